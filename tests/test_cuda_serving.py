"""The three services over a GPU: the answers of the CPU, and memory that outlives whoever made it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from mxgpt import AsyncClient, Client
from mxgpt.evaluate import answer_tasks, demo_tasks
from mxgpt.v1 import loader_pb2, loader_pb2_grpc
from tests.cuda_device import open_device
from tests.stack import Stack, running
from tests.test_failover import bring_back

PROMPT = [{"role": "user", "content": "Write a haiku about the sea."}]
NUM_TOKENS = 400
NUM_TASKS = 160

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    open_device().close()


@pytest.fixture(scope="module")
def pair(demo_gpt_oss: Path) -> Iterator[Stack]:
    """Two executors over one copy of the weights."""
    with running(demo_gpt_oss, num_executors=2, device="cuda:0") as stack:
        yield stack


@pytest.mark.parametrize("architecture", ["gpt-oss", "gpt2"])
def test_as_many_tasks_are_answered_as_on_the_cpu(demo_gpt_oss: Path, demo_gpt2: Path, architecture: str) -> None:
    model = demo_gpt_oss if architecture == "gpt-oss" else demo_gpt2
    task_set = demo_tasks(3, NUM_TASKS, architecture)

    async def answers(stack: Stack) -> list[bool]:
        async with AsyncClient(stack.address) as client:
            return [answer.is_correct for answer in await answer_tasks(client, task_set)]

    right = {}
    for device in ("cpu", "cuda:0"):
        with running(model, device=device) as stack:
            right[device] = sum(asyncio.run(answers(stack)))
    print(f"\n{architecture}: {right} of {NUM_TASKS}")
    assert right["cuda:0"] == right["cpu"] >= 0.95 * NUM_TASKS


def test_a_seeded_stream_is_the_same_again(pair: Stack) -> None:
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 100, "ignore_eos": True}
    with Client(pair.executors[0].address) as client:
        first, second = (client.complete(PROMPT, **options) for _ in range(2))
    assert len(first.outputs[0].token_ids) == 100
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_a_stream_survives_its_executor(pair: Stack) -> None:
    with Client(pair.address) as client:
        victim = None
        with client.generate(PROMPT, temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True) as generation:
            for number, _ in enumerate(generation):
                if number == 20:
                    process_id = generation.result.executor_id.rsplit("-", 1)[-1]
                    victim = next(one for one in pair.executors if str(one.process.pid) == process_id)
                    victim.kill()
            result = generation.result
    assert victim is not None
    assert result.num_resumes >= 1
    assert len(result.outputs[0].token_ids) == NUM_TOKENS
    bring_back(pair, victim)


def test_a_restarted_loader_adopts_the_memory_of_executors(pair: Stack) -> None:
    with Client(pair.address) as client:
        with client.generate(PROMPT, temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True) as generation:
            for number, _ in enumerate(generation):
                if number == 20:
                    pair.loader.kill()
            assert len(generation.result.outputs[0].token_ids) == NUM_TOKENS
        pair.loader = pair.start_loader("--listen", pair.loader.address)
        pair.loader.wait_healthy()
        assert "adopted demo-gpt-oss" in pair.loader.text
        assert client.complete(PROMPT, temperature=0.0, max_tokens=8).outputs[0].token_ids


def test_deaths_beside_a_stream_leave_it_unharmed(pair: Stack) -> None:
    """The other executor dies, then the loader; the next loader takes the memory instead of loading a second copy."""
    options = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    served, other = pair.executors
    with Client(served.address) as client:
        quiet = client.complete(PROMPT, **options).outputs[0].token_ids
        with client.generate(PROMPT, **options) as generation:
            for number, _ in enumerate(generation):
                if number == 20:
                    other.kill()
                elif number == 60:
                    pair.loader.kill()
        assert generation.result.num_resumes == 0
        assert generation.result.outputs[0].token_ids == quiet
    pair.loader = pair.start_loader("--listen", pair.loader.address)
    pair.loader.wait_healthy()
    bring_back(pair, other)
    assert "adopted demo-gpt-oss" in pair.loader.text
    after = status_of(pair)
    assert 0 < after.resident_bytes < after.used_bytes
    assert list(after.resident_models) == ["demo-gpt-oss"]
    assert after.num_leases == 2


def status_of(stack: Stack) -> loader_pb2.GetStatusResponse:
    with grpc.insecure_channel(stack.loader.address) as channel:
        stub = loader_pb2_grpc.LoaderServiceStub(channel)
        return stub.GetStatus(loader_pb2.GetStatusRequest())
