"""A stream survives its executor: kill -9 in mid-stream, and the client's text and ids are those of a quiet run."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from mxgpt import AsyncClient, Client
from mxgpt.results import FinishReason, Piece, Result
from mxgpt.v1 import executor_pb2_grpc, loader_pb2, loader_pb2_grpc
from shared.errors import Reason, ServiceError, Status
from tests.calls import chat, error_of
from tests.stack import Service, Stack, engine_of, running, until

PROMPT = [{"role": "user", "content": "Write a haiku about the sea."}]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 300, "ignore_eos": True, "logprobs": 0}
SEEDED: dict[str, Any] = {
    "temperature": 1.3,
    "seed": 7,
    "n": 2,
    "max_tokens": 200,
    "ignore_eos": True,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.2,
    "repetition_penalty": 1.1,
    "stop_strings": ["\n\n\n\n"],
    "logprobs": 2,
}
OPTIONS = [GREEDY, SEEDED]


@dataclass
class Watched:
    """One stream as its reader saw it; what is to happen in its middle happens once, between two pieces.

    How many tokens a piece has is up to how fast it is read, so that it is tokens that are counted.
    """

    after: int = 0  # tokens
    happens: Callable[[str], None] = lambda _executor_id: None
    num_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)  # of its pieces

    def saw(self, piece: Piece, generation: Any) -> None:
        self.arrivals.append(time.monotonic())
        was_before = self.num_tokens <= self.after
        self.num_tokens += len(piece.token_ids)
        if was_before and self.num_tokens > self.after:
            self.happens(generation.result.executor_id)

    @property
    def longest_pause(self) -> float:
        """The longest time between two pieces, in seconds."""
        return max(later - earlier for earlier, later in itertools.pairwise(self.arrivals))


Stream = Callable[[dict[str, Any], Watched], Result]


@contextlib.contextmanager
def blocking_client(address: str) -> Iterator[Stream]:
    """Streams of one `Client`."""
    with Client(address) as client:

        def stream(options: dict[str, Any], watched: Watched) -> Result:
            with client.generate(PROMPT, **options) as generation:
                for piece in generation:
                    watched.saw(piece, generation)
                return generation.result

        yield stream


@contextlib.contextmanager
def async_client(address: str) -> Iterator[Stream]:
    """Streams of one `AsyncClient`, one after the other."""

    async def make() -> AsyncClient:
        return AsyncClient(address)

    with asyncio.Runner() as runner:
        client = runner.run(make())

        async def read(options: dict[str, Any], watched: Watched) -> Result:
            async with client.generate(PROMPT, **options) as generation:
                async for piece in generation:
                    watched.saw(piece, generation)
                return generation.result

        yield lambda options, watched: runner.run(read(options, watched))
        runner.run(client.close())


def outcome(result: Result) -> list[Any]:
    """What must not differ: everything that came, output by output, logprobs included."""
    return [(output.token_ids, output.text, output.finish_reason, output.logprobs) for output in result.outputs]


def stopped_by_a_string(stream: Stream) -> dict[str, Any]:
    """Options under which an output ends in a stop string, in its second half."""
    options = {**SEEDED, "n": 1, "seed": 11}
    output = stream(options, Watched()).outputs[0]
    before = ""
    for channel, pieces in itertools.groupby(output.pieces, lambda piece: piece.channel):
        text = "".join(piece.text for piece in pieces)
        stop = text[:6]
        if channel == "final" and 2 * len(before) > len(output.text) and len(stop) == 6 and stop not in before:
            return {**options, "stop_strings": ["never there", stop]}
        before += text
    raise AssertionError(f"nothing to stop at: {output.text!r}")


def server_of(stack: Stack, executor_id: str) -> Service:
    """The executor of an id."""
    (executor,) = [each for each in stack.executors if executor_id.endswith(f"-{each.process.pid}")]
    return executor


def bring_back(stack: Stack, victim: Service) -> None:
    index = stack.executors.index(victim)
    stack.executors[index] = stack.start_executor("--listen", victim.address)
    stack.executors[index].wait_healthy()


@pytest.mark.parametrize("client", [blocking_client, async_client])
@pytest.mark.parametrize("num_kills", [pytest.param(4), pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_kill_the_executor_of_a_stream(demo_gpt_oss: Path, num_kills: int, client: Any) -> None:
    """After some of a stream's tokens, as many as are drawn for each; whoever reads it sees a pause."""
    chance = random.Random(num_kills)
    pauses = []
    with running(demo_gpt_oss, num_executors=2) as stack, client(stack.address) as stream:
        all_options = [*OPTIONS, stopped_by_a_string(stream)]
        quiet, num_tokens = [], []
        for options in all_options:
            watched = Watched()
            quiet.append(outcome(stream(options, watched)))
            num_tokens.append(watched.num_tokens)
        assert quiet[-1][0][2] is FinishReason.STOP_STRING
        for number in itertools.count():
            kind = number % len(all_options)
            victims: list[Service] = []

            def kill(executor_id: str, victims: list[Service] = victims) -> None:
                victims.append(server_of(stack, executor_id))
                victims[0].kill()

            # What comes after the last third may have come already, though nobody has read it.
            watched = Watched(chance.randrange(2 * num_tokens[kind] // 3), kill)
            result = stream(all_options[kind], watched)
            assert outcome(result) == quiet[kind]
            if result.num_resumes:
                pauses.append(watched.longest_pause)
            bring_back(stack, victims[0])
            if len(pauses) == num_kills:
                break
            assert number < 3 * num_kills, "most kills must fall into a stream"
    worst = [f"{pause:.2f}" for pause in sorted(pauses)[-3:]]
    print(f"\n{num_kills} streams went on, {number + 1 - num_kills} kills fell beside one; ", end="")
    print(f"pauses: median {statistics.median(pauses):.2f} s, longest {', '.join(worst)} s")


def test_two_executors_map_one_copy_of_the_weights(demo_gpt_oss: Path) -> None:
    with running(demo_gpt_oss, num_executors=2) as stack:
        engines = [engine_of(executor) for executor in stack.executors]
        inodes = [_sealed_inodes(engine) for engine in engines]
        assert inodes[0] == inodes[1] == _sealed_inodes(stack.loader.process.pid)
        assert len(inodes[0]) > 0


def test_an_engine_that_dies_takes_its_executor_with_it_and_no_stream(demo_gpt_oss: Path) -> None:
    with running(demo_gpt_oss, num_executors=2) as stack, Client(stack.address) as client:
        quiet = outcome(client.complete(PROMPT, **OPTIONS[0]))
        with client.generate(PROMPT, **OPTIONS[0]) as generation:
            victims: list[Service] = []

            def kill(executor_id: str) -> None:
                victims.append(server_of(stack, executor_id))
                os.kill(engine_of(victims[0]), signal.SIGKILL)

            watched = Watched(30, kill)
            for piece in generation:
                watched.saw(piece, generation)
            assert outcome(generation.result) == quiet
        (victim,) = victims
        assert victim.process.wait(60) != 0, "its supervisor must see a failure"


def test_a_tokenizer_that_dies_takes_no_stream(demo_gpt_oss: Path) -> None:
    """The stream goes on over the other replica, on the same executor; each of the two dies once."""
    with running(demo_gpt_oss) as stack:
        second = Service("tokenizer", "--loader", stack.loader.address)
        both = [stack.tokenizer, second]
        executor = stack.start_executor("--tokenizer", f"{stack.tokenizer.address},{second.address}")
        try:
            executor.wait_healthy()
            with Client(executor.address) as client:
                quiet = [outcome(client.complete(PROMPT, **options)) for options in OPTIONS]
                for number, options in enumerate(OPTIONS):
                    with client.generate(PROMPT, **options) as generation:
                        watched = Watched(20, lambda _, victim=both[number]: victim.kill())
                        for piece in generation:
                            watched.saw(piece, generation)
                        assert outcome(generation.result) == quiet[number]
                        assert generation.result.num_resumes == 0
                    both[number] = Service(
                        "tokenizer", "--loader", stack.loader.address, "--listen", both[number].address
                    )
                    both[number].wait_healthy()
        finally:
            executor.stop()
            for tokenizer in both:
                tokenizer.stop()


@pytest.mark.timeout(180)
def test_a_loader_that_dies_takes_no_stream_and_finds_its_memory_again(demo_gpt_oss: Path) -> None:
    """Without it executors serve, a newcomer and a new model say what they wait for; then it gets its memory back."""
    with running(demo_gpt_oss, num_executors=2) as stack, Client(stack.address) as client:
        quiet = outcome(client.complete(PROMPT, **SEEDED))
        memory = _sealed_inodes(stack.loader.process.pid)
        with client.generate(PROMPT, **SEEDED) as generation:
            watched = Watched(20, lambda _: stack.loader.kill())
            for piece in generation:
                watched.saw(piece, generation)
            assert outcome(generation.result) == quiet
            assert generation.result.num_resumes == 0
        for executor in stack.executors:
            executor.wait_health("mxgpt.loader", serving=False)
            executor.wait_health("", serving=True)

        newcomer = stack.start_executor()
        stack.executors.append(newcomer)
        with grpc.insecure_channel(newcomer.address) as channel:
            until(lambda: _refusal_of(channel).reason is Reason.LOADER_UNAVAILABLE, 60)
            assert _refusal_of(channel).status is Status.UNAVAILABLE
        newcomer.wait_health("mxgpt.loader", serving=False)
        newcomer.wait_health("", serving=False)
        with grpc.insecure_channel(stack.loader.address) as channel:
            load = loader_pb2_grpc.LoaderServiceStub(channel).LoadModel(loader_pb2.LoadModelRequest(path="other.gguf"))
            assert error_of(load, Reason.LOADER_UNAVAILABLE).status is Status.UNAVAILABLE
        assert outcome(client.complete(PROMPT, **SEEDED)) == quiet

        stack.loader = stack.start_loader("--listen", stack.loader.address, "--adoption-seconds", "60")
        for executor in stack.executors:
            executor.wait_health("mxgpt.loader", serving=True)
            executor.wait_health("", serving=True)
            assert _sealed_inodes(engine_of(executor)) == memory
        assert _sealed_inodes(stack.loader.process.pid) == memory, "handed over, not loaded again"
        with grpc.insecure_channel(stack.loader.address) as channel:
            stub = loader_pb2_grpc.LoaderServiceStub(channel)
            until(lambda: stub.GetStatus(loader_pb2.GetStatusRequest(), timeout=30).num_leases == 3)
        with Client(newcomer.address) as other:
            assert outcome(other.complete(PROMPT, **SEEDED)) == quiet


def _refusal_of(channel: grpc.Channel) -> ServiceError:
    return error_of(executor_pb2_grpc.ExecutorServiceStub(channel).Generate(chat("hello"), timeout=30))


def _sealed_inodes(process_id: int) -> set[int]:
    """Inodes of the memfds that a process has mapped or open."""
    inodes = set()
    for descriptor in Path(f"/proc/{process_id}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if "memfd:" in str(descriptor.readlink()):
                inodes.add(descriptor.stat().st_ino)
    return inodes
