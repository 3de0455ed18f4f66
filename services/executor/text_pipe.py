"""Token ids to text for every running output, over one stream to a tokenizer, through tokenizer failures.

One message goes out for each engine step, for all outputs together. The pipe keeps what a tokenizer would need
to start over (prompt, ids so far, how many were released), so a broken stream is opened on another replica
and replayed; nobody downstream notices more than the pause.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from mxgpt.v1 import tokenizer_pb2
from shared.errors import Reason, ServiceError
from shared.rpc_errors import from_peer_error
from shared.server import internal_error

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 10.0  # how long outputs wait for a tokenizer to come back, or to say anything
MESSAGE_BYTES = 256 << 10  # of a message that opens many sequences, about: some tenths of a second of a tokenizer


@dataclass(frozen=True)
class TextOptions:
    """How one output's ids become text."""

    prompt_token_ids: tuple[int, ...]  # those at its end that matter
    stop_strings: tuple[str, ...]
    min_tokens: int
    harmony: bool
    special_tokens: bool


@dataclass
class _Sequence:
    options: TextOptions
    on_text: Callable[[Any], None]  # called with each SequenceText
    on_failure: Callable[[ServiceError], None]
    token_ids: list[int]  # all so far, resumed ones included
    num_released: int
    finished: bool = False


@dataclass
class _Outbox:
    """What has gathered since the last message."""

    opens: list[int] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    closed: list[int] = field(default_factory=list)
    probes: list[int] = field(default_factory=list)  # sequences of no ids


class TextPipe:
    """The stream to the tokenizer. `run` must be running as a task; the other methods never wait."""

    def __init__(self, stub: Any, model: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._stub = stub
        self._model = model
        self._patience_seconds = patience_seconds
        self._sequences: dict[int, _Sequence] = {}
        self._ids = itertools.count(1)
        self._outbox = _Outbox()
        self._wake = asyncio.Event()
        self._num_answers = 0  # on the stream that is open
        self.num_breaks = 0

    def open(
        self,
        options: TextOptions,
        resumed_token_ids: Sequence[int],
        on_text: Callable[[Any], None],
        on_failure: Callable[[ServiceError], None],
    ) -> int:
        """Start a sequence; `resumed_token_ids` were released before. Returns its id on this pipe."""
        sequence_id = next(self._ids)
        token_ids = list(resumed_token_ids)
        self._sequences[sequence_id] = _Sequence(options, on_text, on_failure, token_ids, len(token_ids))
        self._outbox.opens.append(sequence_id)
        return sequence_id

    def feed(self, sequence_id: int, token_id: int) -> None:
        """One more id of a sequence; goes out with the next `flush`."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            sequence.token_ids.append(token_id)
            self._outbox.tokens.setdefault(sequence_id, []).append(token_id)

    def finish(self, sequence_id: int) -> None:
        """No more ids will come; whatever waits is released."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            sequence.finished = True
            self._outbox.finished.add(sequence_id)

    def close(self, sequence_id: int) -> None:
        """Forget a sequence; nothing more is called for it."""
        if self._sequences.pop(sequence_id, None) is not None:
            self._outbox.closed.append(sequence_id)
            self.flush()

    def flush(self) -> None:
        """Send what has gathered."""
        self._wake.set()

    async def run(self) -> None:
        """Keep a stream open while there are sequences; never returns."""
        delay = 0.05
        down_since: float | None = None
        loop = asyncio.get_running_loop()
        while True:
            await self._something_to_do()
            failure = await self._exchange()
            if self._num_answers > 0:
                down_since, delay = None, 0.05
            down_since = down_since or loop.time()
            self.num_breaks += 1
            log.warning("the tokenizer's stream broke: %s", failure.message)
            if loop.time() - down_since > self._patience_seconds:
                self._fail_all(failure)
                down_since = None
            await asyncio.sleep(delay * random.uniform(0.5, 1.5))
            delay = min(2 * delay, 1.0)

    async def _something_to_do(self) -> None:
        while not self._sequences:
            self._outbox = _Outbox()
            self._wake.clear()
            await self._wake.wait()

    async def _exchange(self) -> ServiceError:
        """Open a stream and talk over it until it breaks; returns why it did."""
        self._num_answers = 0
        call = self._stub.DetokenizeStream()
        sender, watch = asyncio.create_task(self._send(call)), asyncio.create_task(self._watch(call))
        try:
            async for response in call:
                self._num_answers += 1
                for text in response.texts:
                    self._deliver(text)
            return ServiceError(Reason.TOKENIZER_UNAVAILABLE, "the tokenizer ended the stream")
        except grpc.aio.AioRpcError as error:
            return from_peer_error(error, Reason.TOKENIZER_UNAVAILABLE)
        except asyncio.CancelledError:
            if not watch.done():
                raise
            return ServiceError(Reason.TOKENIZER_UNAVAILABLE, "the tokenizer has stopped answering")
        finally:
            sender.cancel()
            watch.cancel()
            call.cancel()

    async def _watch(self, call: Any) -> None:
        """Return, with the call cancelled, when nothing comes although an answer is due.

        A tokenizer may have nothing to say for long, while it waits for the rest of a stop string. So it is asked for
        the text of a sequence that has none, which it can answer when it has done what came before.
        """
        while True:
            heard = self._num_answers
            await asyncio.sleep(self._patience_seconds / 2)
            if heard != self._num_answers or not self._sequences:
                continue
            self._outbox.probes.append(next(self._ids))
            self.flush()
            await asyncio.sleep(self._patience_seconds / 2)
            if heard == self._num_answers:
                call.cancel()
                return

    async def _send(self, call: Any) -> None:
        try:
            self._outbox = _Outbox(opens=list(self._sequences), finished=self._finished())
            while True:
                outbox, self._outbox = self._outbox, _Outbox()
                for message in list(self._messages(outbox)):  # at once: more may come while one is written
                    await call.write(message)
                await self._wake.wait()
                self._wake.clear()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reader of the same call sees the error and deals with it

    def _finished(self) -> set[int]:
        return {sequence_id for sequence_id, sequence in self._sequences.items() if sequence.finished}

    def _messages(self, outbox: _Outbox) -> Iterator[Any]:
        """What has gathered, in one message but for many sequences that open with long prompts."""
        message = tokenizer_pb2.DetokenizeStreamRequest(model=self._model)
        num_bytes = 0
        for sequence_id in outbox.opens:
            sequence = self._sequences.get(sequence_id)
            if sequence is None:
                continue
            message.opens.append(_open(sequence_id, sequence))
            outbox.tokens.pop(sequence_id, None)  # the ids fed since are part of what it opens with
            num_bytes += message.opens[-1].ByteSize()
            if num_bytes > MESSAGE_BYTES:
                _probe(message, next(self._ids))  # so that a long replay is not silent
                yield message
                message = tokenizer_pb2.DetokenizeStreamRequest(model=self._model)
                num_bytes = 0
        for sequence_id in outbox.tokens.keys() | outbox.finished:
            if sequence_id in self._sequences:
                message.tokens.add(
                    sequence_id=sequence_id,
                    token_ids=outbox.tokens.get(sequence_id, ()),
                    finished=sequence_id in outbox.finished,
                )
        for sequence_id in outbox.probes:
            _probe(message, sequence_id)
        message.closed_ids.extend(outbox.closed)
        if message.opens or message.tokens or message.closed_ids:
            yield message

    def _deliver(self, text: Any) -> None:
        sequence = self._sequences.get(text.sequence_id)
        if sequence is None:
            return
        sequence.num_released += sum(segment.num_token_ids for segment in text.segments)
        if text.error_reason:
            del self._sequences[text.sequence_id]
            reason = Reason.__members__.get(text.error_reason, Reason.INTERNAL)
            sequence.on_failure(ServiceError(reason, text.error_message))
            return
        if text.stopped or text.finished:
            del self._sequences[text.sequence_id]
        try:
            sequence.on_text(text)
        except Exception:  # as after an answer that makes no sense: the other sequences go on
            self.close(text.sequence_id)
            sequence.on_failure(internal_error("the text of a stream"))

    def _fail_all(self, error: ServiceError) -> None:
        sequences, self._sequences = self._sequences, {}
        for sequence in sequences.values():
            sequence.on_failure(error)


def _probe(message: Any, sequence_id: int) -> None:
    """Ask for the text of no ids, which is answered when all before it is done."""
    message.opens.add(sequence_id=sequence_id)
    message.tokens.add(sequence_id=sequence_id, finished=True)


def _open(sequence_id: int, sequence: _Sequence) -> Any:
    options = sequence.options
    return tokenizer_pb2.SequenceOpen(
        sequence_id=sequence_id,
        prompt_token_ids=options.prompt_token_ids,
        stop_strings=options.stop_strings,
        min_tokens=options.min_tokens,
        harmony=options.harmony,
        special_tokens=options.special_tokens,
        replayed_token_ids=sequence.token_ids,
        num_released=sequence.num_released,
    )
