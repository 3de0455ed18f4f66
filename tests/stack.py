"""The three services as real processes on free ports, for end-to-end tests."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).parents[1]
START_SECONDS = 60.0
PORTS = range(10_000, 32_000)  # below those that the kernel hands out: nobody gets one of them by chance


class Service:
    """One service as a child process; its output is kept for failure reports.

    By default it listens on a port that it finds free when it is started again.
    """

    def __init__(self, name: str, *options: str) -> None:
        self.name = name
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"services.{name}", "--listen", f"127.0.0.1:{free_ports(1)[0]}", *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._address: str | None = None
        self._metrics: str | None = None
        self._listening = threading.Event()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    @property
    def address(self) -> str:
        assert self._listening.wait(START_SECONDS), f"{self.name} did not start:\n{self.text}"
        assert self._address is not None, f"{self.name} ended:\n{self.text}"
        return self._address

    @property
    def metrics(self) -> str:
        """Where metrics are served; told before the address is."""
        assert self.address
        assert self._metrics is not None, f"{self.name} serves no metrics:\n{self.text}"
        return self._metrics

    @property
    def text(self) -> str:
        return "".join(self.log)

    def wait_healthy(self) -> None:
        self.wait_health("", serving=True)

    def wait_health(self, name: str, serving: bool) -> None:
        """Wait until the service says of `name`, empty for itself as a whole, that it is serving, or is not."""
        wanted = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        deadline = time.monotonic() + START_SECONDS
        with grpc.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < deadline:
                with contextlib.suppress(grpc.RpcError):
                    if stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status == wanted:
                        return
                assert self.process.poll() is None, f"{self.name} ended:\n{self.text}"
                time.sleep(0.02)
        raise AssertionError(f"{self.name} does not say {wanted} of {name!r} after {START_SECONDS} s:\n{self.text}")

    def joined(self) -> None:
        """Wait until all that a process wrote before it ended is in `text`."""
        self._reading.join(30)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line)
            if line.startswith(f"{self.name} metrics on "):
                self._metrics = line.split()[-1]
            if self._address is None and line.startswith(f"{self.name} listening on "):
                self._address = line.split()[-1]
                self._listening.set()
        self._listening.set()


class Stack:
    """One loader, one tokenizer and one or more executors over one model."""

    def __init__(
        self,
        model: Path,
        num_executors: int = 1,
        executor_options: Sequence[str] = (),
        device: str = "cpu",
        options: Sequence[str] = (),  # of every service
    ) -> None:
        self.options = options
        self.directory = tempfile.TemporaryDirectory()
        self.socket = str(Path(self.directory.name) / "loader.sock")
        self.model = model
        self.device = device
        self.executor_options = ["--device", device, *executor_options]
        self.loader = self.start_loader()
        self.tokenizer = Service("tokenizer", "--loader", self.loader.address, *options)
        self.executors = [self.start_executor() for _ in range(num_executors)]
        for service in (self.loader, *self.executors):
            service.wait_healthy()

    def start_loader(self, *options: str) -> Service:
        options = ("--socket", self.socket, "--model", str(self.model), "--device", self.device, *options)
        return Service("loader", *options, *self.options)

    def start_executor(self, *options: str) -> Service:
        return Service(
            "executor",
            *("--loader", self.loader.address, "--tokenizer", self.tokenizer.address),
            *self.executor_options,
            *self.options,
            *options,
        )

    @property
    def executor(self) -> Service:
        return self.executors[0]

    @property
    def address(self) -> str:
        """Where Generate is served: every executor, with commas between."""
        return ",".join(executor.address for executor in self.executors)

    def stop(self) -> None:
        for service in (*self.executors, self.tokenizer, self.loader):
            service.stop()
        self.directory.cleanup()


@contextlib.contextmanager
def running(
    model: Path,
    num_executors: int = 1,
    executor_options: Sequence[str] = (),
    device: str = "cpu",
    options: Sequence[str] = (),
) -> Iterator[Stack]:
    """A stack that is stopped at the end, whatever happens."""
    stack = Stack(model, num_executors, executor_options, device, options)
    try:
        yield stack
    finally:
        stack.stop()


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for a condition to come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def engine_of(executor: Service) -> int:
    """Process id of an executor's engine: its only child."""
    pid = executor.process.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    ports: set[int] = set()
    while len(ports) < count:
        port = PORTS[secrets.randbelow(len(PORTS))]
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.add(port)
    return list(ports)


def num_descriptors(process_id: int) -> int:
    """Open descriptors of a process."""
    return len(os.listdir(f"/proc/{process_id}/fd"))
