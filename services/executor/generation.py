"""One Generate call between the engine's events and its responses: ids wait for their text here.

Data flow: engine event -> `on_event` -> text pipe (or straight through, where no text is wanted) ->
`_release` -> pending responses -> `responses()`. All of it runs on the event loop of the server process.
Whatever gathers while the client is slow to read, or before the stream's next message is due, goes out in one Delta
an output, and a client that lags too far behind is given up: what is pending is bounded by `MAX_UNREAD`.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from mxgpt.v1 import executor_pb2
from services.executor.outbox import Outbox
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
        cancel: tells the engine that an output, by index, is over, or with None the whole request.
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
        cancel: Callable[[int | None], None],
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
        self._cancel = cancel
        self._on_finished = on_finished
        self._arrival = time.monotonic()
        self._queue_seconds = 0.0
        self._num_cached_tokens = 0
        self._outbox = Outbox(delta_interval)
        self._error: ServiceError | None = None
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
            await self._outbox.wait()
            while self._outbox:
                if not self._started:
                    self._started = True
                    yield self._started_response()
                yield self._outbox.take()
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
        """End the stream with an error, after what is pending; the engine need not wait until that is read."""
        if self._error is None:
            self._error = error
            self._cancel(None)
            self._outbox.wake()

    def nothing_to_run(self) -> bool:
        """Every output had finished before; the stream is a Started alone."""
        if self._outputs:
            return False
        self._outbox.wake()
        return True

    def close(self) -> None:
        """Let go of the text pipe, and of all that was not read."""
        for output in self._outputs.values():
            if output.sequence_id is not None:
                self._pipe.close(output.sequence_id)
        self._outbox.clear()
        self._error = None  # its traceback leads back here: the collector would find the circle only much later

    def _open_texts(self) -> None:
        assert self._vocabulary is not None
        options = TextOptions(
            prompt_token_ids=self._vocabulary.unfinished(self.request.prompt_token_ids, self._form.harmony),
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
            self._outbox.put(executor_pb2.GenerateResponse(prompt_logprobs=message), sum(map(_num_entries, piece)))
        self._outbox.wake()
        self._require_reader()

    def _on_text(self, output: _Output, text: Any) -> None:
        if self._error is not None:
            return
        for segment in text.segments:
            self._release(output, segment.num_token_ids, segment.text, segment.channel, segment.recipient)
        if text.stopped:
            output.waiting.clear()
            if output.engine_finish is None:
                self._cancel(output.index)
            self._finish(output, matched_stop=text.matched_stop)
        elif text.finished:
            assert not output.waiting, "the tokenizer finished a sequence and kept ids back"
            self._finish(output, matched_stop=None)

    def _release(self, output: _Output, num_token_ids: int, text: str, channel: str, recipient: str) -> None:
        released = [output.waiting.popleft() for _ in range(num_token_ids)]
        output.num_released += num_token_ids
        if released:
            output.last_token_id = released[-1][0]
        pending = self._outbox.delta(output.index, channel, recipient)
        delta = pending.response.delta
        if self._form.text:
            delta.text += text
        if self._form.token_ids:
            delta.token_ids.extend(token_id for token_id, _ in released)
        delta.logprobs.extend(_logprobs_proto(logprobs) for _, logprobs in released if logprobs is not None)
        self._outbox.grow(pending, sum(_num_entries(logprobs) for _, logprobs in released))
        self._require_reader()

    def _require_reader(self) -> None:
        """End the stream of a client that lags too far behind."""
        if self._outbox.num_unread > MAX_UNREAD:
            self.fail(ServiceError(Reason.CLIENT_STALLED, f"the client lags {MAX_UNREAD} ids and logprobs behind"))

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
        self._outbox.put(executor_pb2.GenerateResponse(finished=finished))
        self._outbox.wake()

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


def _num_entries(logprobs: Logprobs | None) -> int:
    """Ids and log-probabilities of one token in a message."""
    return 1 if logprobs is None else 2 + len(logprobs.top)


def _logprobs_proto(logprobs: Logprobs) -> Any:
    return executor_pb2.TokenLogprobs(
        token=executor_pb2.TokenLogprob(token_id=logprobs.token_id, logprob=logprobs.logprob),
        top=[executor_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top],
    )
