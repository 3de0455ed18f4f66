"""Stopping and starting: a drain as it was promised, restarts under load, services in any order."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mxgpt import Client
from mxgpt.results import Result
from mxgpt.v1 import executor_pb2_grpc
from shared.errors import Reason, Status
from tests.calls import chat, collect, error_of, greedy
from tests.stack import Service, Stack, free_ports, running

PROMPT = "Write a haiku about the sea."
LONG = {"max_tokens": 1200, "ignore_eos": True}  # several seconds of tokens
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health_of(channel: grpc.Channel, name: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=name)
    status: int = health_pb2_grpc.HealthStub(channel).Check(request, timeout=20).status
    return status


def test_a_drain_from_its_signal_to_the_end_of_its_grace(demo_gpt_oss: Path) -> None:
    """Unhealthy at once, nothing new is taken, short streams finish, and the rest ends with DRAINING."""
    grace = 6.0
    options = ["--drain-seconds", str(grace)]
    with running(demo_gpt_oss, executor_options=options) as stack, grpc.insecure_channel(stack.address) as channel:
        stub = executor_pb2_grpc.ExecutorServiceStub(channel)
        endless = chat(PROMPT, sampling=greedy(), stopping={"ignore_eos": True})
        calls = [stub.Generate(endless) for _ in range(12)]  # many times the grace, on any machine
        short = stub.Generate(chat(PROMPT, sampling=greedy(), stopping={"max_tokens": 60, "ignore_eos": True}))
        firsts = [next(iter(call)) for call in (*calls, short)]
        signalled = time.monotonic()
        stack.executor.process.terminate()
        while health_of(channel) != NOT_SERVING:
            assert time.monotonic() - signalled < grace, "health must turn at once"
        assert error_of(stub.Generate(chat("hello"), timeout=grace)).reason is Reason.DRAINING
        assert len(collect([firsts[-1], *short]).token_ids()) == 60
        for call in calls:
            error = error_of(call)
            assert (error.reason, error.status) == (Reason.DRAINING, Status.UNAVAILABLE)
        assert grace <= time.monotonic() - signalled < grace + 20
        assert stack.executor.process.wait(30) == 0


def test_streams_that_outlast_the_grace_go_on_elsewhere(demo_gpt_oss: Path) -> None:
    options = ["--drain-seconds", "0.3"]
    with running(demo_gpt_oss, 2, options) as stack, Client(stack.address) as client:
        quiet = client.complete(PROMPT, temperature=1.0, seed=3, **LONG)
        generation = client.generate(PROMPT, temperature=1.0, seed=3, **LONG)
        next(generation)
        (stopped,) = [e for e in stack.executors if generation.result.executor_id.endswith(f"-{e.process.pid}")]
        stopped.process.terminate()
        for _ in generation:
            pass
        assert generation.result.num_resumes == 1
        assert outcome(generation.result) == outcome(quiet)
        assert stopped.process.wait(30) == 0


@pytest.mark.timeout(180)
def test_a_rolling_restart_of_two_executors_under_load_loses_no_stream(demo_gpt_oss: Path) -> None:
    """Streams of eight clients, some longer than the grace, while each executor is stopped and started, twice."""
    num_clients, kinds = 8, [20, 80, 900]
    with running(demo_gpt_oss, 2, ["--drain-seconds", "0.5"]) as stack, Client(stack.address) as client:

        def complete(number: int) -> Result:
            num_tokens = kinds[number % len(kinds)]
            return client.complete(PROMPT, temperature=1.0, seed=number % 6, max_tokens=num_tokens, ignore_eos=True)

        quiet = [outcome(complete(number)) for number in range(6)]
        results: list[tuple[int, Result]] = []
        errors: list[Exception] = []
        over = threading.Event()
        numbers = itertools.count()

        def keep_asking() -> None:
            while not over.is_set():
                number = next(numbers)
                try:
                    results.append((number, complete(number)))
                except Exception as error:
                    errors.append(error)

        clients = [threading.Thread(target=keep_asking) for _ in range(num_clients)]
        for each in clients:
            each.start()
        for index in (0, 1, 0, 1):
            assert restart(stack, index) == 0
        over.set()
        for each in clients:
            each.join()
    assert errors == []
    assert all(outcome(result) == quiet[number % 6] for number, result in results)
    num_resumed = sum(result.num_resumes > 0 for _, result in results)
    print(f"\n{len(results)} streams, {num_resumed} of them resumed, over 4 restarts")
    assert num_resumed > 0
    assert len({result.executor_id for _, result in results}) > 2, "the new executors serve too"


@pytest.mark.parametrize("order", list(itertools.permutations(["loader", "tokenizer", "executor"])), ids="-".join)
def test_services_may_start_in_any_order(demo_gpt_oss: Path, tmp_path: Path, order: tuple[str, ...]) -> None:
    """Each is up and answers STARTING or the like, and all are healthy once the others are there."""
    ports = dict(zip(order, free_ports(3), strict=True))
    options = {
        "loader": ["--socket", str(tmp_path / "loader.sock"), "--model", str(demo_gpt_oss)],
        "tokenizer": ["--loader", f"127.0.0.1:{ports['loader']}"],
        "executor": ["--loader", f"127.0.0.1:{ports['loader']}", "--tokenizer", f"127.0.0.1:{ports['tokenizer']}"],
    }
    with started() as services:
        for name in order:
            services.append(Service(name, *options[name], "--listen", f"127.0.0.1:{ports[name]}"))
            assert services[-1].address, "it listens, whoever else is there"
        for service in services:
            service.wait_healthy()
        with Client(f"127.0.0.1:{ports['executor']}") as client:
            assert client.chat([{"role": "user", "content": "What is 12 + 30?"}], temperature=0).content == "42"


def outcome(result: Result) -> list[Any]:
    return [(output.token_ids, output.text, output.finish_reason) for output in result.outputs]


def restart(stack: Stack, index: int) -> int:
    """Stop an executor with SIGTERM and start another in its place; returns the exit code of the one stopped."""
    stopped = stack.executors[index]
    code = stopped.stop()
    stack.executors[index] = stack.start_executor("--listen", stopped.address)
    stack.executors[index].wait_healthy()
    return code


@contextmanager
def started() -> Iterator[list[Service]]:
    """Services that are stopped at the end, the last one first."""
    services: list[Service] = []
    try:
        yield services
    finally:
        for service in reversed(services):
            service.stop()
