"""Stopping and starting: a drain as it was promised, restarts under load, services in any order."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator, Sequence
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
    with running(demo_gpt_oss, 2, ["--drain-seconds", "0.5"]) as stack, Client(stack.address) as client:
        load = Load(client, [20, 80, 900])
        with load.asking(8):
            for index in (0, 1, 0, 1):
                assert restart(stack, index) == 0
    load.check()
    assert load.num_resumed > 0
    assert len({result.executor_id for _, result in load.results}) > 2, "the new executors serve too"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whatever_is_stopped_or_killed_and_started_again_loses_no_stream(demo_gpt_oss: Path, tmp_path: Path) -> None:
    """A loader, two tokenizers and two executors, one at a time and at random; it is healthy before the next goes."""
    seed = random.randrange(1 << 32)
    print(f"\nseed {seed}")
    draw = random.Random(seed)
    addresses = [f"127.0.0.1:{port}" for port in free_ports(5)]
    loader, tokenizers, executors = addresses[0], addresses[1:3], addresses[3:]
    grace = ("--drain-seconds", "0.5")
    options: list[tuple[str, ...]] = [
        ("loader", "--socket", str(tmp_path / "loader.sock"), "--model", str(demo_gpt_oss)),
        *[("tokenizer", "--loader", loader, *grace)] * 2,
        *[("executor", "--loader", loader, "--tokenizer", ",".join(tokenizers), "--threads", "1", *grace)] * 2,
    ]

    def start(index: int) -> Service:
        return Service(*options[index], "--listen", addresses[index])

    with started() as services, Client(",".join(executors)) as client:
        services.extend(map(start, range(5)))
        for service in services:
            service.wait_healthy()
        load = Load(client, [20, 80, 400])
        with load.asking(6):
            for _ in range(30):
                index = draw.randrange(5)
                if draw.random() < 0.5:
                    services[index].kill()
                else:
                    assert services[index].stop() == 0
                services[index] = start(index)
                services[index].wait_healthy()
    load.check()
    assert load.num_resumed > 0


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


class Load:
    """Threads that ask for the same few seeded streams again and again, and what they got.

    Args:
        lengths: of the streams, in tokens.
    """

    NUM_SEEDS = 6

    def __init__(self, client: Client, lengths: Sequence[int]) -> None:
        self._client = client
        self._lengths = lengths
        self._quiet = [outcome(self._complete(number)) for number in range(self.NUM_SEEDS)]
        self._over = threading.Event()
        self._numbers = itertools.count()
        self._errors: list[Exception] = []
        self.results: list[tuple[int, Result]] = []

    @property
    def num_resumed(self) -> int:
        return sum(result.num_resumes > 0 for _, result in self.results)

    @contextmanager
    def asking(self, num_clients: int) -> Iterator[None]:
        clients = [threading.Thread(target=self._keep_asking) for _ in range(num_clients)]
        for each in clients:
            each.start()
        try:
            yield
        finally:
            self._over.set()
            for each in clients:
                each.join()

    def check(self) -> None:
        """Each stream has come, and is what it was before anything was stopped."""
        print(f"\n{len(self.results)} streams, {self.num_resumed} of them resumed")
        assert self._errors == []
        assert all(outcome(result) == self._quiet[number % self.NUM_SEEDS] for number, result in self.results)

    def _complete(self, number: int) -> Result:
        options = {"seed": number % self.NUM_SEEDS, "max_tokens": self._lengths[number % len(self._lengths)]}
        return self._client.complete(PROMPT, temperature=1.0, ignore_eos=True, **options)

    def _keep_asking(self) -> None:
        while not self._over.is_set():
            number = next(self._numbers)
            try:
                self.results.append((number, self._complete(number)))
            except Exception as error:
                self._errors.append(error)


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
