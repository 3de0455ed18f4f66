"""A stream survives its executor: kill -9 in mid-stream, and the client's text and ids are those of a quiet run."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mxgpt import AsyncClient, Client
from mxgpt.results import Result
from tests.stack import Service, Stack, running

PROMPT = [{"role": "user", "content": "Write a haiku about the sea."}]
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 300, "ignore_eos": True},
    {
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
    },
]


def outcome(result: Result) -> list[Any]:
    """What must not differ: everything that came, output by output, logprobs included."""
    return [(output.token_ids, output.text, output.finish_reason, output.logprobs) for output in result.outputs]


def kill_the_server_of(stack: Stack, executor_id: str) -> Service:
    """Kill the executor that serves a stream; returns it."""
    (victim,) = [executor for executor in stack.executors if executor_id.endswith(f"-{executor.process.pid}")]
    victim.kill()
    return victim


def bring_back(stack: Stack, victim: Service) -> None:
    index = stack.executors.index(victim)
    stack.executors[index] = stack.start_executor("--listen", victim.address)
    stack.executors[index].wait_healthy()


@pytest.mark.parametrize("num_kills", [pytest.param(4), pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_kill_the_executor_of_a_stream(demo_gpt_oss: Path, num_kills: int) -> None:
    chance = random.Random(num_kills)
    pauses = []
    with running(demo_gpt_oss, num_executors=2) as stack, Client(stack.address) as client:
        quiet = [outcome(client.complete(PROMPT, **options)) for options in OPTIONS]
        for number in range(num_kills):
            options = OPTIONS[number % len(OPTIONS)]
            kill_after = chance.randrange(1, 150)
            victim = None
            arrivals = []
            with client.generate(PROMPT, **options) as generation:
                for piece_number, _ in enumerate(generation):
                    arrivals.append(time.monotonic())
                    if piece_number == kill_after:
                        victim = kill_the_server_of(stack, generation.result.executor_id)
                result = generation.result
            assert outcome(result) == quiet[number % len(OPTIONS)]
            if victim is not None:
                assert result.num_resumes >= 1
                pauses.append(max(later - earlier for earlier, later in itertools.pairwise(arrivals)))
                bring_back(stack, victim)
    assert len(pauses) >= num_kills // 2, "most kills must fall into a stream"
    print(f"\n{len(pauses)} streams continued; longest pauses {sorted(pauses)[-3:]} s")


def test_the_async_client_goes_on_too(demo_gpt_oss: Path) -> None:
    async def main(stack: Stack) -> None:
        async with AsyncClient(stack.address) as client:
            quiet = outcome(await client.complete(PROMPT, **OPTIONS[1]))
            async with client.generate(PROMPT, **OPTIONS[1]) as generation:
                pieces = 0
                async for _ in generation:
                    pieces += 1
                    if pieces == 20:
                        kill_the_server_of(stack, generation.result.executor_id)
                assert outcome(generation.result) == quiet
                assert generation.result.num_resumes >= 1

    with running(demo_gpt_oss, num_executors=2) as stack:
        asyncio.run(main(stack))


def test_two_executors_map_one_copy_of_the_weights(demo_gpt_oss: Path) -> None:
    with running(demo_gpt_oss, num_executors=2) as stack:
        engines = [_engine_of(executor) for executor in stack.executors]
        inodes = [_sealed_inodes(engine) for engine in engines]
        assert inodes[0] == inodes[1] == _sealed_inodes(stack.loader.process.pid)
        assert len(inodes[0]) > 0


def test_an_engine_that_dies_takes_its_executor_with_it_and_no_stream(demo_gpt_oss: Path) -> None:
    with running(demo_gpt_oss, num_executors=2) as stack, Client(stack.address) as client:
        quiet = outcome(client.complete(PROMPT, **OPTIONS[0]))
        with client.generate(PROMPT, **OPTIONS[0]) as generation:
            for piece_number, _ in enumerate(generation):
                if piece_number == 30:
                    (victim,) = [
                        executor
                        for executor in stack.executors
                        if generation.result.executor_id.endswith(f"-{executor.process.pid}")
                    ]
                    threading.Thread(target=_kill, args=(_engine_of(victim),)).start()
            assert outcome(generation.result) == quiet
        assert victim.process.wait(10) != 0, "its supervisor must see a failure"


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
                        for piece_number, _ in enumerate(generation):
                            if piece_number == 20:
                                both[number].kill()
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


def _kill(process_id: int) -> None:
    os.kill(process_id, signal.SIGKILL)


def _engine_of(executor: Service) -> int:
    """Process id of an executor's engine: its only child."""
    pid = executor.process.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def _sealed_inodes(process_id: int) -> set[int]:
    """Inodes of the memfds that a process has mapped or open."""
    descriptors = Path(f"/proc/{process_id}/fd")
    return {descriptor.stat().st_ino for descriptor in descriptors.iterdir() if "memfd:" in str(descriptor.readlink())}
