"""One Generate call between the engine's events and its responses: ids wait for their text here.

Data flow: engine event -> `on_event` -> text pipe (or straight through, where no text is wanted) ->
`_release` -> pending responses -> `responses()`. All of it runs on the event loop of the server process.
Whatever gathers while the client is slow to read, or before the stream's next message is due, goes out in one Delta
an output, and a client that lags too far behind is given up: what is pending is bounded by `MAX_UNREAD`.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mxgpt.v1 import executor_pb2
from services.executor.request import (
    Event,
    FinishReason,
    Logprobs,
    OutputFinished,
    PromptScored,
    Request,
    RequestFailed,
    RequestStarted,
    TokenDrawn,
)
from services.executor.text_pipe import TextOptions, TextPipe
from services.executor.tokenizer_client import Vocabulary
from shared.errors import Reason, ServiceError

NUM_PROMPT_LOGPROBS_PER_MESSAGE = 512
# Of all streams together: a message costs the server's one core 60 to 80 us, however many tokens it carries.
DELTAS_PER_SECOND = 5000
MAX_UNREAD = 1 << 18  # ids and log-probabilities that wait for a client to read them: some 20 MB, a Delta 4 MB


@dataclass(frozen=True)
class Origin:
    """Who answers; the same in every Started of this executor."""

    executor_id: str
    model: str
    digest: str


@dataclass(frozen=True)
class Form:
    """What the responses carry."""

    text: bool
    token_ids: bool
    stop_strings: tuple[str, ...]
    harmony: bool
    special_tokens: bool

    @property
    def needs_text(self) -> bool:
        """Whether a tokenizer must see the ids."""
        return self.text or bool(self.stop_strings) or self.harmony


@dataclass
class _Pending:
    """A message that waits for the client to read what came before it."""

    response: Any  # GenerateResponse
    num_entries: int = 0  # ids and log-probabilities of a Delta, ids that are not sent included


@dataclass
class _Output:
    index: int
    num_resumed: int
    sequence_id: int | None = None  # on the text pipe
    # Drawn, not yet released: (id, its logprobs).
    waiting: deque[tuple[int, Logprobs | None]] = field(default_factory=deque)
    num_released: int = 0
    last_token_id: int | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    engine_finish: OutputFinished | None = None
    finished: bool = False


class Generation:
    """The state of one Generate call.

    Args:
        request: as the engine gets it; its id is the engine's, unique in this process.
        request_id: the caller's id for it.
        caller: whose call it is; nobody else can cancel or take it over.
        cancel_output: tells the engine that an output, by index, is over.
        on_finished: told each output's Finished, and how many of its tokens were resumed.
        delta_interval: seconds that Deltas of a stream are apart now, at least.
    """

    def __init__(
        self,
        request: Request,
        request_id: str,
        caller: str,
        origin: Origin,
        form: Form,
        vocabulary: Vocabulary | None,
        pipe: TextPipe,
        cancel_output: Callable[[int], None],
        on_finished: Callable[[Any, int], None],
        delta_interval: Callable[[], float],
    ) -> None:
        self.request = request
        self.request_id = request_id
        self.caller = caller
        self._origin = origin
        self._form = form
        self._vocabulary = vocabulary
        self._pipe = pipe
        self._cancel_output = cancel_output
        self._on_finished = on_finished
        self._delta_interval = delta_interval
        self._last_delta_time = 0.0
        self._due: asyncio.TimerHandle | None = None  # of the next Delta, while it gathers
        self._arrival = time.monotonic()
        self._queue_seconds = 0.0
        self._num_cached_tokens = 0
        self._pending: deque[_Pending] = deque()
        self._growing: dict[int, _Pending] = {}  # by output, the Delta that takes what comes next
        self._num_unread = 0  # entries of all that is pending
        self._error: ServiceError | None = None
        self._wake = asyncio.Event()
        self._started = False
        resumed = request.resumed
        self._outputs = {
            index: _Output(index, len(resumed[index].token_ids) if index in resumed else 0)
            for index in range(request.sampling.num_outputs)
            if not (index in resumed and resumed[index].finished)
        }
        if form.needs_text:
            self._open_texts()

    async def responses(self) -> AsyncIterator[Any]:
        """The stream's messages, until every output has finished.

        Raises:
            ServiceError: what ended the request early.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                if not self._started:
                    self._started = True
                    yield self._started_response()
                self._last_delta_time = time.monotonic()
                yield self._next_response()
            if all(output.finished for output in self._outputs.values()):
                if not self._started:
                    yield self._started_response()
                return
            if self._error is not None:
                raise self._error

    def on_event(self, event: Event) -> None:
        """Take one event of the engine; none counts after an error."""
        if self._error is not None:
            return
        if isinstance(event, TokenDrawn):
            self._on_token(event)
        elif isinstance(event, OutputFinished):
            self._on_output_finished(event)
        elif isinstance(event, RequestStarted):
            self._num_cached_tokens = event.num_cached_tokens
            self._queue_seconds = event.queue_seconds
        elif isinstance(event, PromptScored):
            self._on_prompt_scored(event)
        elif isinstance(event, RequestFailed):
            self.fail(event.error)

    def fail(self, error: ServiceError) -> None:
        """End the stream with an error, after what is pending."""
        if self._error is None:
            self._error = error
            self._wake.set()

    def _next_response(self) -> Any:
        """The oldest message that is pending; nothing is added to it any more."""
        pending = self._pending.popleft()
        self._num_unread -= pending.num_entries
        if pending.response.WhichOneof("event") == "delta" and self._growing[pending.response.delta.index] is pending:
            del self._growing[pending.response.delta.index]
        return pending.response

    def nothing_to_run(self) -> bool:
        """Every output had finished before; the stream is a Started alone."""
        if self._outputs:
            return False
        self._wake.set()
        return True

    def close(self) -> None:
        """Let go of the text pipe, and of all that was not read."""
        if self._due is not None:
            self._due.cancel()
        for output in self._outputs.values():
            if output.sequence_id is not None:
                self._pipe.close(output.sequence_id)
        self._pending.clear()
        self._growing.clear()
        self._error = None  # its traceback leads back here: the collector would find the circle only much later

    def _open_texts(self) -> None:
        options = TextOptions(
            prompt_token_ids=self.request.prompt_token_ids,
            stop_strings=self._form.stop_strings,
            min_tokens=self.request.stopping.min_tokens,
            harmony=self._form.harmony,
            special_tokens=self._form.special_tokens,
        )
        for output in self._outputs.values():
            resumed = self.request.resumed.get(output.index)
            output.sequence_id = self._pipe.open(
                options,
                resumed.token_ids if resumed else (),
                on_text=functools.partial(self._on_text, output),
                on_failure=self.fail,
            )

    def _on_token(self, event: TokenDrawn) -> None:
        output = self._outputs[event.index]
        if output.finished:
            return
        now = time.monotonic()
        output.first_token_time = output.first_token_time or now
        output.last_token_time = now
        output.waiting.append((event.token_id, event.logprobs))
        if output.sequence_id is not None:
            self._pipe.feed(output.sequence_id, event.token_id)
        else:
            self._release(output, 1, "", "", "")

    def _on_output_finished(self, event: OutputFinished) -> None:
        output = self._outputs[event.index]
        if output.finished:
            return
        output.engine_finish = event
        if output.sequence_id is not None:
            self._pipe.finish(output.sequence_id)
        else:
            self._finish(output, matched_stop=None)

    def _on_prompt_scored(self, event: PromptScored) -> None:
        for first in range(0, len(event.logprobs), NUM_PROMPT_LOGPROBS_PER_MESSAGE):
            piece = event.logprobs[first : first + NUM_PROMPT_LOGPROBS_PER_MESSAGE]
            message = executor_pb2.PromptLogprobs(start=event.start + first, logprobs=map(_logprobs_proto, piece))
            self._pending.append(_Pending(executor_pb2.GenerateResponse(prompt_logprobs=message)))

    def _on_text(self, output: _Output, text: Any) -> None:
        if self._error is not None:
            return
        for segment in text.segments:
            self._release(output, segment.num_token_ids, segment.text, segment.channel, segment.recipient)
        if text.stopped:
            output.waiting.clear()
            if output.engine_finish is None:
                self._cancel_output(output.index)
            self._finish(output, matched_stop=text.matched_stop)
        elif text.finished:
            assert not output.waiting, "the tokenizer finished a sequence and kept ids back"
            self._finish(output, matched_stop=None)

    def _release(self, output: _Output, num_token_ids: int, text: str, channel: str, recipient: str) -> None:
        released = [output.waiting.popleft() for _ in range(num_token_ids)]
        output.num_released += num_token_ids
        if released:
            output.last_token_id = released[-1][0]
        pending = self._delta_to_extend(output.index, channel, recipient)
        delta = pending.response.delta
        if self._form.text:
            delta.text += text
        if self._form.token_ids:
            delta.token_ids.extend(token_id for token_id, _ in released)
        delta.logprobs.extend(_logprobs_proto(logprobs) for _, logprobs in released if logprobs is not None)
        num_entries = sum(1 if logprobs is None else 2 + len(logprobs.top) for _, logprobs in released)
        pending.num_entries += num_entries
        self._num_unread += num_entries
        if self._num_unread > MAX_UNREAD:
            self._give_up_client()
        self._wake_when_due()

    def _wake_when_due(self) -> None:
        """Let a Delta out: at once, or when the last one is long enough ago."""
        if self._wake.is_set() or self._due is not None:
            return
        wait = self._last_delta_time + self._delta_interval() - time.monotonic()
        if wait <= 0:
            self._wake.set()
        else:
            self._due = asyncio.get_running_loop().call_later(wait, self._let_out)

    def _let_out(self) -> None:
        self._due = None
        self._wake.set()

    def _delta_to_extend(self, index: int, channel: str, recipient: str) -> _Pending:
        pending = self._growing.get(index)
        if pending is not None:
            delta = pending.response.delta
            if (delta.channel, delta.recipient) == (channel, recipient):
                return pending
        delta = executor_pb2.Delta(index=index, channel=channel, recipient=recipient)
        pending = self._growing[index] = _Pending(executor_pb2.GenerateResponse(delta=delta))
        self._pending.append(pending)
        return pending

    def _give_up_client(self) -> None:
        """End the stream of a client that lags too far behind; the engine need not wait until that is told."""
        if self._error is None:
            self.fail(ServiceError(Reason.CLIENT_STALLED, f"the client lags {MAX_UNREAD} ids and logprobs behind"))
            for index in self._outputs:
                self._cancel_output(index)

    def _finish(self, output: _Output, matched_stop: str | None) -> None:
        output.finished = True
        reason, stop = self._finish_reason(output, matched_stop)
        finished = executor_pb2.Finished(
            index=output.index,
            reason=reason,
            matched_stop=stop,
            usage=executor_pb2.Usage(
                num_prompt_tokens=len(self.request.prompt_token_ids),
                num_cached_tokens=self._num_cached_tokens,
                num_output_tokens=output.num_resumed + output.num_released,
            ),
            timings=self._timings(output),
        )
        self._on_finished(finished, output.num_resumed)
        self._pending.append(_Pending(executor_pb2.GenerateResponse(finished=finished)))
        self._wake.set()

    def _finish_reason(self, output: _Output, matched_stop: str | None) -> tuple[executor_pb2.FinishReason, str]:
        if matched_stop is not None:
            return executor_pb2.FINISH_REASON_STOP_STRING, matched_stop
        assert output.engine_finish is not None
        if output.engine_finish.reason is FinishReason.LENGTH:
            return executor_pb2.FINISH_REASON_LENGTH, ""
        matched_id = output.engine_finish.matched_token_id
        assert matched_id is not None
        if self._vocabulary is None:
            return executor_pb2.FINISH_REASON_STOP, ""
        text = self._vocabulary.special_texts.get(matched_id, "")
        if self._form.harmony and self._vocabulary.is_tool_call(matched_id):
            return executor_pb2.FINISH_REASON_TOOL_CALL, text
        return executor_pb2.FINISH_REASON_STOP, text

    def _timings(self, output: _Output) -> Any:
        first, last = output.first_token_time, output.last_token_time
        return executor_pb2.Timings(
            queue_seconds=self._queue_seconds,
            first_token_seconds=first - self._arrival if first is not None else 0.0,
            decode_seconds=last - first if first is not None and last is not None else 0.0,
        )

    def _started_response(self) -> Any:
        started = executor_pb2.Started(
            request_id=self.request_id,
            executor_id=self._origin.executor_id,
            model=self._origin.model,
            digest=self._origin.digest,
            seed=self.request.sampling.seed,
            prompt_token_ids=self.request.prompt_token_ids,
            num_cached_tokens=self._num_cached_tokens,
        )
        return executor_pb2.GenerateResponse(started=started)


class Generations:
    """The running Generate calls, by the engine's id, and by caller and the caller's id."""

    def __init__(self) -> None:
        self._by_engine_id: dict[str, Generation] = {}
        self._by_request_id: dict[tuple[str, str], Generation] = {}

    def __len__(self) -> int:
        return len(self._by_engine_id)

    def delta_interval(self) -> float:
        """Seconds between the Deltas of a stream, so that all together are not more than the server can send."""
        return len(self._by_engine_id) / DELTAS_PER_SECOND

    def add(self, generation: Generation, takes_over: bool) -> None:
        """Register a call. One that resumes takes its request id over from a call of its caller's that has broken.

        Raises:
            ServiceError: REQUEST_ID_IN_USE.
        """
        older = self.find(generation.caller, generation.request_id)
        if older is not None:
            if not takes_over:
                raise ServiceError(
                    Reason.REQUEST_ID_IN_USE, f"request_id: {generation.request_id} is running", field="request_id"
                )
            older.fail(ServiceError(Reason.CANCELLED, "the request was resumed by another call"))
        self._by_request_id[generation.caller, generation.request_id] = generation
        self._by_engine_id[generation.request.request_id] = generation

    def remove(self, generation: Generation) -> None:
        """Forget a call that has ended."""
        self._by_engine_id.pop(generation.request.request_id, None)
        if self.find(generation.caller, generation.request_id) is generation:
            del self._by_request_id[generation.caller, generation.request_id]

    def find(self, caller: str, request_id: str) -> Generation | None:
        """The call that the caller knows as `request_id`."""
        return self._by_request_id.get((caller, request_id))

    def on_events(self, events: Sequence[Event]) -> None:
        """Give each event of a step to its call; events of calls that have ended are dropped."""
        for event in events:
            generation = self._by_engine_id.get(event.request_id)
            if generation is not None:
                generation.on_event(event)

    def fail_all(self, error: ServiceError) -> None:
        """End every call with an error."""
        for generation in list(self._by_engine_id.values()):
            generation.fail(error)


def _logprobs_proto(logprobs: Logprobs) -> Any:
    return executor_pb2.TokenLogprobs(
        token=executor_pb2.TokenLogprob(token_id=logprobs.token_id, logprob=logprobs.logprob),
        top=[executor_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top],
    )
