"""Faults inside real engine processes: each is an answer to the requests that it meets, and not the end of others."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mxgpt import Client
from mxgpt.v1 import executor_pb2, executor_pb2_grpc
from shared.errors import Reason, Status
from tests.calls import chat, collect, error_of, greedy
from tests.stack import engine_of, running, until

PROMPT = "Write a haiku about the sea."
POISON = 901  # an id that no other prompt here holds, and that greedy decoding does not draw after them
LONG_PROMPT = list(range(100, 300))


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes engines that start from now on faulty; see tests/faults/sitecustomize.py."""

    def plant(fault: str) -> None:
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "faults"))
        monkeypatch.setenv("MXGPT_FAULT", fault)
        monkeypatch.setenv("MXGPT_FAULT_ID", str(POISON))

    return plant


def prompt_of(*token_ids: int, **options: Any) -> Any:
    return executor_pb2.GenerateRequest(token_ids=executor_pb2.TokenIds(ids=token_ids), sampling=greedy(), **options)


def is_serving(channel: grpc.Channel) -> bool:
    status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status
    return bool(status == health_pb2.HealthCheckResponse.SERVING)


def status_of(stub: Any) -> Any:
    return stub.GetStatus(executor_pb2.ExecutorServiceGetStatusRequest(), timeout=10)


def all_blocks_are_free(stub: Any) -> bool:
    return all(group.num_free == group.num_blocks for group in status_of(stub).blocks)


def test_a_step_that_raises_is_an_internal_error_with_a_reference_to_the_log(demo_gpt_oss: Path, plant: Any) -> None:
    plant("raise")
    with running(demo_gpt_oss) as stack, grpc.insecure_channel(stack.address) as channel:
        stub = executor_pb2_grpc.ExecutorServiceStub(channel)
        before = collect(stub.Generate(chat(PROMPT, sampling=greedy()), timeout=60))
        beside = stub.Generate(chat(PROMPT, sampling=greedy(), stopping={"ignore_eos": True}), timeout=60)
        next(iter(beside))
        error = error_of(stub.Generate(prompt_of(1, 2, POISON), timeout=60))
        assert (error.reason, error.status) == (Reason.INTERNAL, Status.INTERNAL)
        reference = error.metadata["reference"]
        assert reference in error.message
        assert error_of(beside).metadata["reference"] == reference, "it was in the same step"
        after = collect(stub.Generate(chat(PROMPT, sampling=greedy()), timeout=60))
        assert after.token_ids() == before.token_ids()
        assert is_serving(channel)
        assert all_blocks_are_free(stub)
        until(lambda: reference in stack.executor.text and "RuntimeError" in stack.executor.text)
        assert "Traceback" in stack.executor.text
        assert "planted" not in error.message, "what went wrong inside is for the log alone"


def test_memory_that_runs_out_in_a_step_ends_the_request_that_wanted_it(demo_gpt_oss: Path, plant: Any) -> None:
    plant("memory")
    with running(demo_gpt_oss) as stack, grpc.insecure_channel(stack.address) as channel:
        stub = executor_pb2_grpc.ExecutorServiceStub(channel)
        request = chat(PROMPT, sampling=greedy(), stopping={"max_tokens": 400, "ignore_eos": True})
        quiet = collect(stub.Generate(request, timeout=60))
        beside = stub.Generate(request, timeout=60)
        first = next(iter(beside))
        error = error_of(stub.Generate(prompt_of(*LONG_PROMPT), timeout=60))
        assert (error.reason, error.status) == (Reason.KV_EXHAUSTED, Status.RESOURCE_EXHAUSTED)
        until(lambda: error.metadata["reference"] in stack.executor.text)
        rest = collect([first, *beside])
        assert rest.token_ids() == quiet.token_ids()
        assert rest.text() == quiet.text()
        assert all_blocks_are_free(stub)


def test_an_engine_that_is_broken_for_good_ends_its_executor_with_a_failure(demo_gpt_oss: Path, plant: Any) -> None:
    with running(demo_gpt_oss) as stack:
        plant("break")
        broken = stack.start_executor()
        stack.executors.append(broken)
        broken.wait_healthy()
        with Client(stack.address) as client, grpc.insecure_channel(broken.address) as channel:
            quiet = client.complete(PROMPT, max_tokens=600, ignore_eos=True, temperature=0)
            health = Watch(channel)
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            error = error_of(stub.Generate(prompt_of(1, 2, POISON), timeout=60))
            assert (error.reason, error.status) == (Reason.INTERNAL, Status.INTERNAL)
            assert broken.process.wait(60) == 1, "its supervisor must see a failure"
            assert health.statuses() == [True, False], "health says so before the end"
            broken.joined()
            assert "giving up" in broken.text
            assert client.complete(PROMPT, max_tokens=600, ignore_eos=True, temperature=0).text == quiet.text


def test_an_engine_that_hangs_ends_its_executor_with_a_failure_and_its_streams_go_on(demo_gpt_oss: Path) -> None:
    with (
        running(demo_gpt_oss, 2, executor_options=["--step-seconds", "8"]) as stack,
        Client(stack.address) as client,
    ):
        quiet = client.complete(PROMPT, temperature=0.0, max_tokens=1500, ignore_eos=True)
        generation = client.generate(PROMPT, temperature=0.0, max_tokens=1500, ignore_eos=True)
        next(generation)
        (hung,) = [e for e in stack.executors if generation.result.executor_id.endswith(f"-{e.process.pid}")]
        os.kill(engine_of(hung), signal.SIGSTOP)
        for _ in generation:
            pass
        assert generation.result.num_resumes == 1
        assert generation.result.outputs[0].token_ids == quiet.outputs[0].token_ids
        assert hung.process.wait(60) == 1
        hung.joined()
        assert "has not ended its step for 8 s" in hung.text


def test_blocks_that_run_out_and_prompts_that_never_fit_harm_nobody_else(demo_gpt_oss: Path) -> None:
    """Eight streams want three times the blocks that there are, and take turns; a prompt beyond all is refused."""
    options = ["--kv-memory-mib", "3"]
    with running(demo_gpt_oss, executor_options=options) as stack, grpc.insecure_channel(stack.address) as channel:
        stub = executor_pb2_grpc.ExecutorServiceStub(channel)
        context_length = status_of(stub).model.context_length
        assert context_length == 768
        requests = [
            prompt_of(100 + number, 7, 8, stopping={"max_tokens": 300, "ignore_eos": True}) for number in range(8)
        ]
        alone = [collect(stub.Generate(request, timeout=60)) for request in requests]
        calls = [stub.Generate(request, timeout=60) for request in requests]
        firsts = [next(iter(call)) for call in calls[:2]]
        error = error_of(stub.Generate(prompt_of(*[9] * context_length), timeout=60))
        assert (error.reason, error.status) == (Reason.CONTEXT_LENGTH_EXCEEDED, Status.INVALID_ARGUMENT)
        together = [collect([*firsts[number : number + 1], *call]) for number, call in enumerate(calls)]
        assert [each.token_ids() for each in together] == [each.token_ids() for each in alone]
        assert [each.text() for each in together] == [each.text() for each in alone]
        assert status_of(stub).num_preemptions > 0
        assert all_blocks_are_free(stub)


class Watch:
    """What Health.Watch tells of an executor, from now to its end."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        self._first = next(self._call)

    def statuses(self) -> list[bool]:
        """Whether it was serving, each time that it said something, until the connection's end."""
        statuses = [self._first]
        with pytest.raises(grpc.RpcError):
            statuses.extend(self._call)
        return [each.status == health_pb2.HealthCheckResponse.SERVING for each in statuses]
