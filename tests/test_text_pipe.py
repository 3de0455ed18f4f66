"""The executor's stream to a tokenizer that breaks, hangs, errs, or is given more than a message may hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from mxgpt.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from services.executor.text_pipe import TextOptions, TextPipe
from services.executor.tokenizer_client import MAX_BEGUN_IDS, Vocabulary
from shared.config import MAX_MESSAGE_BYTES
from shared.errors import Reason, ServiceError
from tests.loader_harness import until

PLAIN = TextOptions((1,), (), 0, harmony=False, special_tokens=False)


class Tokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """A piece of text for each id and an end for each sequence that ends, but for what a subclass does."""

    def __init__(self) -> None:
        self.num_streams = 0
        self.messages: list[Any] = []

    async def DetokenizeStream(self, requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        self.num_streams += 1
        async for request in requests:
            self.messages.append(request)
            texts = [self.text_of(each) for each in (*request.tokens, *request.opens)]
            yield tokenizer_pb2.DetokenizeStreamResponse(texts=texts)

    def text_of(self, part: Any) -> Any:
        is_open = isinstance(part, tokenizer_pb2.SequenceOpen)
        num_ids = len(part.replayed_token_ids) - part.num_released if is_open else len(part.token_ids)
        segments = [tokenizer_pb2.TextSegment(num_token_ids=num_ids, text="x" * num_ids)] if num_ids else []
        finished = not is_open and part.finished
        return tokenizer_pb2.SequenceText(sequence_id=part.sequence_id, segments=segments, finished=finished)


class Hanging(Tokenizer):
    """Takes a stream and says nothing."""

    async def DetokenizeStream(self, requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        self.num_streams += 1
        await asyncio.sleep(1000)
        yield


class Ending(Tokenizer):
    """Ends every stream at once, with OK."""

    async def DetokenizeStream(self, requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        self.num_streams += 1
        return
        yield


class Holding(Tokenizer):
    """Releases nothing before a sequence ends, as in the middle of a stop string."""

    def text_of(self, part: Any) -> Any:
        if isinstance(part, tokenizer_pb2.SequenceTokens) and part.finished:
            return super().text_of(part)
        return tokenizer_pb2.SequenceText(sequence_id=1 << 40)

    async def DetokenizeStream(self, requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async for response in super().DetokenizeStream(requests, context):
            if any(text.finished for text in response.texts):
                yield response


class Slow(Tokenizer):
    """Takes its time with every message."""

    async def DetokenizeStream(self, requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async for response in super().DetokenizeStream(requests, context):
            await asyncio.sleep(0.1)
            if any(text.segments or text.finished for text in response.texts):
                yield response


class Sequence:
    """One sequence on a pipe, and what came of it."""

    def __init__(self, pipe: TextPipe, options: TextOptions = PLAIN) -> None:
        self.text = ""
        self.finished = False
        self.failures: list[ServiceError] = []
        self.id = pipe.open(options, (), self.take, self.failures.append)

    def take(self, answer: Any) -> None:
        self.text += "".join(segment.text for segment in answer.segments)
        self.finished |= answer.finished


def with_pipe(tokenizer: Tokenizer, test: Callable[[TextPipe], Awaitable[None]], patience_seconds: float = 1.0) -> None:
    async def main() -> None:
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(tokenizer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        options = [("grpc.max_send_message_length", MAX_MESSAGE_BYTES)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            pipe = TextPipe(tokenizer_pb2_grpc.TokenizerServiceStub(channel), "", patience_seconds)
            running = asyncio.create_task(pipe.run())
            try:
                await test(pipe)
                assert not running.done()
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
        await server.stop(0)

    asyncio.run(main())


def test_a_tokenizer_that_stops_answering_is_given_up() -> None:
    async def test(pipe: TextPipe) -> None:
        sequence = Sequence(pipe)
        pipe.flush()
        await until(lambda: bool(sequence.failures))
        assert sequence.failures[0].reason is Reason.TOKENIZER_UNAVAILABLE
        assert "stopped answering" in sequence.failures[0].message
        assert tokenizer.num_streams > 1, "another replica might have answered"

    tokenizer = Hanging()
    with_pipe(tokenizer, test)


def test_a_tokenizer_that_ends_every_stream_is_asked_ever_more_seldom_and_given_up() -> None:
    async def test(pipe: TextPipe) -> None:
        sequence = Sequence(pipe)
        pipe.flush()
        await until(lambda: bool(sequence.failures))
        assert sequence.failures[0].reason is Reason.TOKENIZER_UNAVAILABLE
        assert 2 < tokenizer.num_streams < 20

    tokenizer = Ending()
    with_pipe(tokenizer, test, patience_seconds=3.0)


def test_a_tokenizer_that_holds_text_back_is_not_taken_for_dead() -> None:
    async def test(pipe: TextPipe) -> None:
        sequence = Sequence(pipe)
        for token_id in range(10):
            pipe.feed(sequence.id, token_id)
            pipe.flush()
            await asyncio.sleep(0.5)
        assert (tokenizer.num_streams, pipe.num_breaks) == (1, 0)
        pipe.finish(sequence.id)
        pipe.flush()
        await until(lambda: sequence.finished)
        assert not sequence.failures

    tokenizer = Holding()
    with_pipe(tokenizer, test, patience_seconds=2.0)


def test_an_answer_that_makes_no_sense_ends_its_own_sequence_alone() -> None:
    async def test(pipe: TextPipe) -> None:
        def refuse(answer: Any) -> None:
            raise IndexError("pop from an empty deque")

        failures: list[ServiceError] = []
        odd = pipe.open(PLAIN, (), refuse, failures.append)
        sound = Sequence(pipe)
        for token_id in range(5):
            pipe.feed(odd, token_id)
            pipe.feed(sound.id, token_id)
            pipe.flush()
            await asyncio.sleep(0.05)
        await until(lambda: sound.text == "xxxxx")
        (failure,) = failures
        assert failure.reason is Reason.INTERNAL
        assert "reference" in failure.metadata

    with_pipe(Tokenizer(), test)


def test_more_than_a_message_holds_goes_out_in_several() -> None:
    """Prompts that a message can't hold together, opened in one step and replayed after a break; every id once."""
    options = TextOptions(tuple(range(100_000, 230_000)), (), 0, harmony=True, special_tokens=False)

    async def test(pipe: TextPipe) -> None:
        sequences = [Sequence(pipe, options) for _ in range(64)]
        pipe.flush()
        for token_id in range(20):
            for sequence in sequences:
                pipe.feed(sequence.id, token_id)
            pipe.flush()
            await asyncio.sleep(0)
        await until(lambda: all(sequence.text == 20 * "x" for sequence in sequences))
        for sequence in sequences:
            pipe.finish(sequence.id)
        pipe.flush()
        await until(lambda: all(sequence.finished for sequence in sequences))
        assert not any(sequence.failures for sequence in sequences)
        assert pipe.num_breaks == 0
        assert sum(bool(message.opens) for message in tokenizer.messages) > 2

    tokenizer = Tokenizer()
    with_pipe(tokenizer, test, patience_seconds=30.0)


def test_a_long_replay_is_not_taken_for_silence() -> None:
    """Sixty-four sequences whose ids were all released before: nothing is due for them, and it takes seconds."""

    async def test(pipe: TextPipe) -> None:
        failures: list[ServiceError] = []
        token_ids = range(100_000, 190_000)
        ids = [pipe.open(PLAIN, token_ids, lambda _: None, failures.append) for _ in range(64)]
        pipe.flush()
        await until(lambda: {each for message in tokenizer.messages for each in opened(message)} >= set(ids))
        assert not failures
        assert (tokenizer.num_streams, pipe.num_breaks) == (1, 0)

    def opened(message: Any) -> list[int]:
        return [each.sequence_id for each in message.opens]

    tokenizer = Slow()
    with_pipe(tokenizer, test, patience_seconds=3.0)


def test_of_a_prompt_goes_what_is_unfinished() -> None:
    vocabulary = Vocabulary({7: "<|start|>", 8: "<|message|>"}, harmony=True)
    prompt = (7, 1, 8, *range(100, 200), 7, 3)
    assert vocabulary.unfinished(prompt, harmony=True) == (7, 3)
    assert vocabulary.unfinished(prompt, harmony=False) == prompt[-MAX_BEGUN_IDS:]
    assert vocabulary.unfinished((1, 2), harmony=True) == (1, 2)
