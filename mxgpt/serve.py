"""All three services on this machine, as child processes under one supervisor.

Only executors are there for others, and get the certificates. Loader and tokenizer listen on loopback. The keys given
open all three, each as far as its role goes; the loader, given none, still opens to nobody but this process and the
services that it starts, so that who may only generate can't have models loaded or unloaded.

A child that ends after everything was ready is reported and started again: the services are made to find each other
again, and weights in memory outlive their loader. One that ends before, or too often, ends the whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mxgpt.child import Child
from mxgpt.ports import Port, why_taken
from mxgpt.v1 import loader_pb2, loader_pb2_grpc
from shared.certificates import check_files
from shared.channel import Channel, open_channel
from shared.config import ClientConfig, ServerConfig
from shared.cuda_memory import require_gpu
from shared.devices import device_index
from shared.errors import Reason
from shared.gguf import read_gguf
from shared.gpt_config import GPTConfig
from shared.rpc_errors import from_rpc_error
from shared.telemetry_config import TelemetryConfig

T = TypeVar("T")

EXECUTOR_PORT, TOKENIZER_PORT, LOADER_PORT = 50051, 50052, 50053
METRICS_PORT = 9460  # of the loader; tokenizer and executors have the next ones
LOOPBACK = "127.0.0.1"
MAX_EXECUTORS = 64

NO_DOOR: dict[str, Any] = {"token": None, "tls_root": None}  # for a client: neither MXGPT_TOKEN nor MXGPT_CA

MAX_RESTARTS = 5  # of one child within RESTART_WINDOW seconds
RESTART_WINDOW = 60.0
RESTART_DELAY = 0.5  # seconds, times the number of restarts within the window
STOP_MARGIN = 5.0  # seconds beyond the drain before a child is killed


@dataclass(frozen=True)
class ServeConfig:
    """What to serve and where; port 0 picks a free one.

    Raises:
        ValueError: for no executor at all, a device that is none, or what `ServerConfig` and `TelemetryConfig` refuse.
    """

    model: Path
    device: str = "cpu"
    host: str = "127.0.0.1"  # of the executors; the others are for this machine alone
    port: int = 0  # of the first executor; further ones pick theirs
    tokenizer_port: int = 0
    loader_port: int = 0
    num_executors: int = 1
    drain_seconds: float = 30.0
    metrics_port: int | None = None  # of the loader; tokenizer and executors have the next ones, all on loopback
    traces: str | None = None  # see shared.telemetry_config.TelemetryConfig
    log_level: str = "INFO"
    log_format: str = "text"
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_files: tuple[Path, ...] = ()
    allow_insecure: bool = False
    log_content: bool = False
    executor_options: tuple[str, ...] = ()  # further options of `mxgpt executor`
    loader_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_executors < 1:
            raise ValueError("at least one executor is needed")
        device_index(self.device)
        TelemetryConfig(traces=self.traces)
        ServerConfig(
            listen=f"{self.host}:{self.port}",
            tls_certificate=self.tls_certificate,
            tls_key=self.tls_key,
            tls_client_ca=self.tls_client_ca,
            token_files=self.token_files,
            allow_insecure=self.allow_insecure,
        )
        try:
            check_files(self.tls_certificate, self.tls_key, self.tls_client_ca)
        except OSError as error:
            raise ValueError(str(error)) from error


class ServeError(Exception):
    """The services could not start or stay up; the message says which and why."""


class Supervisor:
    """The services from start to stop.

        async with Supervisor(ServeConfig(model), print_line) as server:
            client = AsyncClient(**server.connection)

    Args:
        on_line: called with a label and a line, for each line of a child and each report of the supervisor.
        on_progress: called with the bytes loaded so far and in all.
    """

    def __init__(
        self,
        config: ServeConfig,
        on_line: Callable[[str, str], None] = lambda _label, _line: None,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        self.config = config
        self._on_line = on_line
        self._on_progress = on_progress
        self._directory = tempfile.TemporaryDirectory(prefix="mxgpt-")  # for this user alone
        self._token = secrets.token_hex(32)
        self._own_keys = _make_keys(Path(self._directory.name), self._token)
        self._children: list[Child] = []  # in the order in which they are stopped
        self._watches: list[asyncio.Task[None]] = []
        self._ready = False
        self._addresses: list[str] = []
        self.tokenizer_address = ""
        self._loader_address = ""

    @property
    def metrics_addresses(self) -> list[str]:
        """Where metrics are served: the loader's, the tokenizer's, then each executor's; empty where they are off."""
        return [child.metrics for child in reversed(self._children) if child.metrics]

    def process_id(self, name: str) -> int:
        """Of the first service of this name: "loader", "tokenizer" or "executor"."""
        (child, *_) = (child for child in reversed(self._children) if child.name == name)
        return child.process_id

    @property
    def address(self) -> str:
        """Where Generate is served: every executor, with commas between."""
        return ",".join(self._addresses)

    @property
    def connection(self) -> dict[str, Any]:
        """Arguments of a client, for services that were given neither keys nor certificates."""
        return {"target": self.address, **NO_DOOR}

    async def start(self) -> None:
        """Start everything; returns when requests can be served.

        Raises:
            ServiceError: for a model that can't be loaded, or a GPU that can't be used.
            ServeError: for a port that is taken, or a service that ended instead.
        """
        _require_free(_ports(self.config))
        require_gpu(self.config.device)
        await asyncio.to_thread(_check_model, self.config.model)
        loader = await self._start_loader()
        loading = asyncio.create_task(self._watch_load(await self._or_end(loader.address())))
        try:
            self._loader_address = await loader.address()
            await self._start_others(self._loader_address)
            await self._or_end(loading)
        finally:
            loading.cancel()
        for number in range(self.config.num_executors):
            await self._or_end(self._until_healthy(self._executor_socket(number)))
        self._ready = True

    async def ended(self) -> None:
        """Wait until a child has ended that is not started again.

        Raises:
            ServeError: saying which, and how.
        """
        done, _ = await asyncio.wait(self._watches, return_when=asyncio.FIRST_COMPLETED)
        for watch in done:
            watch.result()

    async def stop(self) -> None:
        """Drain and stop: the executors first, then what they lean on."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        executors = [child for child in self._children if child.name == "executor"]
        await asyncio.gather(*(self._stop(child) for child in executors))
        for child in self._children:
            await self._stop(child)
        self._directory.cleanup()

    async def loader_status(self) -> loader_pb2.GetStatusResponse:
        """What the loader holds, and how many leases on it are held."""
        async with self._own_channel(self._loader_address) as channel:
            stub: Any = loader_pb2_grpc.LoaderServiceStub(channel)
            response: loader_pb2.GetStatusResponse = await stub.GetStatus(loader_pb2.GetStatusRequest())
            return response

    def kill(self) -> None:
        """End everything at once, for those who can't wait."""
        for child in self._children:
            child.kill()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _start_loader(self) -> Child:
        config = self.config
        socket = Path(self._directory.name) / "loader.sock"
        options = ["--socket", str(socket), "--model", os.path.abspath(config.model), "--device", config.device]
        options += [*_token_options(self._own_keys, *config.token_files), *config.loader_options]
        return await self._start_child("loader", "loader", f"{LOOPBACK}:{config.loader_port}", options)

    async def _start_others(self, loader_address: str) -> None:
        config = self.config
        keys = _token_options(self._own_keys, *config.token_files) if config.token_files else []
        common = ["--loader", loader_address, "--peer-token-file", str(self._own_keys), *keys]
        tokenizer = await self._start_child("tokenizer", "tokenizer", f"{LOOPBACK}:{config.tokenizer_port}", common)
        self.tokenizer_address = await self._or_end(tokenizer.address())
        options = [*common, "--tokenizer", self.tokenizer_address, "--device", config.device]
        options += ["--drain-seconds", str(config.drain_seconds), *_tls_options(config), *config.executor_options]
        executors = [
            await self._start_child(
                "executor",
                "executor" if config.num_executors == 1 else f"executor {number}",
                f"{config.host}:{config.port if number == 0 else 0}",
                [*options, "--local-socket", str(self._executor_socket(number))],
            )
            for number in range(config.num_executors)
        ]
        self._addresses = [await self._or_end(executor.address()) for executor in executors]

    def _executor_socket(self, number: int) -> Path:
        """Where this process asks an executor for its health: it has no certificate to show elsewhere."""
        return Path(self._directory.name) / f"executor-{number}.sock"

    def _own_channel(self, address: str) -> Channel:
        return open_channel(address, ClientConfig(token=self._token))

    async def _start_child(self, name: str, label: str, listen: str, options: list[str]) -> Child:
        every_option = [*options, *self._telemetry_options()]
        child = Child(name, label, listen, every_option, self._on_line)
        await child.start()
        self._children.insert(0, child)
        self._watches.append(asyncio.create_task(self._watch(child)))
        return child

    def _telemetry_options(self) -> list[str]:
        """Options of the next child; its metrics have the port after the last one's."""
        config = self.config
        options = ["--log-level", config.log_level, "--log-format", config.log_format]
        options += ["--log-content"] if config.log_content else []
        if config.traces is not None:
            options += ["--traces", config.traces]
        if config.metrics_port is not None:
            options += ["--metrics", f"{LOOPBACK}:{config.metrics_port and config.metrics_port + len(self._children)}"]
        return options

    async def _watch(self, child: Child) -> None:
        """Keep a child running; raises when that is hopeless."""
        restarts: deque[float] = deque()
        while True:
            how = await child.wait()
            if not self._ready:
                raise ServeError(f"the {child.label} {how} before it could serve; its log says why")
            restarts.append(time.monotonic())
            while restarts[0] < time.monotonic() - RESTART_WINDOW:
                restarts.popleft()
            if len(restarts) > MAX_RESTARTS:
                raise ServeError(f"the {child.label} {how}, for the {len(restarts)}th time in {RESTART_WINDOW:.0f} s")
            self._on_line("serve", f"the {child.label} {how}; starting it again")
            await asyncio.sleep(RESTART_DELAY * len(restarts))
            await child.start()

    async def _or_end(self, work: Awaitable[T]) -> T:
        """The result of `work`, unless a child ends for good before it comes."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait([task, *self._watches], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await self.ended()
            return task.result()
        finally:
            task.cancel()

    async def _watch_load(self, loader_address: str) -> None:
        """Join the load that the loader began, for its progress and its errors."""
        request = loader_pb2.LoadModelRequest(path=os.path.abspath(self.config.model))
        async with self._own_channel(loader_address) as channel:
            stub: Any = loader_pb2_grpc.LoaderServiceStub(channel)
            while True:
                try:
                    async for response in stub.LoadModel(request, wait_for_ready=True):
                        self._on_progress(response.bytes_done, response.bytes_total)
                    return
                except grpc.RpcError as error:
                    failure = from_rpc_error(error, Reason.LOADER_UNAVAILABLE)
                    if failure.reason is not Reason.LOADER_UNAVAILABLE:
                        raise failure from None
                await asyncio.sleep(0.05)

    async def _until_healthy(self, path: Path) -> None:
        async with self._own_channel(f"unix:{path}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            while True:
                with contextlib.suppress(grpc.RpcError):
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                await asyncio.sleep(0.02)

    async def _stop(self, child: Child) -> None:
        if not await child.stop(self.config.drain_seconds + STOP_MARGIN):
            self._on_line("serve", f"the {child.label} did not end in time and was killed")


@contextlib.asynccontextmanager
async def serving(model: Path, on_progress: Callable[[int, int], None] | None = None) -> AsyncIterator[Supervisor]:
    """The services over a model on free ports, quietly, for a command that needs them for a while.

    What the children wrote is told in the error, should they fail to start.
    """
    lines: deque[str] = deque(maxlen=20)
    supervisor = Supervisor(
        ServeConfig(model, drain_seconds=1.0),
        lambda label, line: lines.append(f"{label}: {line}"),
        on_progress or (lambda _done, _total: None),
    )
    try:
        await supervisor.start()
    except ServeError as error:
        await supervisor.stop()
        raise ServeError("\n".join([str(error), *lines])) from error
    except BaseException:
        await supervisor.stop()
        raise
    try:
        yield supervisor
    finally:
        await supervisor.stop()


def _check_model(path: Path) -> None:
    """Refuse early, and clearly, a file that no loader would load.

    Raises:
        ServiceError: MODEL_NOT_FOUND, MODEL_INVALID, ARCHITECTURE_UNSUPPORTED and their like.
    """
    gguf = read_gguf(path)
    GPTConfig.from_gguf(gguf).check_tensors(gguf)


def _require_free(ports: Iterable[Port]) -> None:
    for port in ports:
        why = why_taken(port) if port.number else None
        if why is not None:
            raise ServeError(why)


def _ports(config: ServeConfig) -> Iterator[Port]:
    """Every port that is asked for by its number."""
    yield Port(config.host, config.port, "--port")
    yield Port(LOOPBACK, config.tokenizer_port, "--tokenizer-port")
    yield Port(LOOPBACK, config.loader_port, "--loader-port")
    if config.metrics_port:
        for number in range(2 + config.num_executors):
            yield Port(LOOPBACK, config.metrics_port + number, "--metrics-port")


def _make_keys(directory: Path, token: str) -> Path:
    """A key file for one run: a key that the services show one another, and the hash of this process's own `token`."""
    path = directory / "keys"
    path.touch(mode=0o600)
    digest = hashlib.sha256(token.encode()).hexdigest()
    path.write_text(f"services: {secrets.token_hex(32)} role=service\nserve: sha256:{digest} role=admin\n")
    return path


def _token_options(*paths: Path) -> list[str]:
    return [text for path in paths for text in ("--token-file", os.path.abspath(path))]


def _tls_options(config: ServeConfig) -> list[str]:
    """What executors get of the certificates and of the flag to do without."""
    files = {
        "--tls-certificate": config.tls_certificate,
        "--tls-key": config.tls_key,
        "--tls-client-ca": config.tls_client_ca,
    }
    options = [text for name, path in files.items() if path is not None for text in (name, os.path.abspath(path))]
    return [*options, "--allow-insecure"] if config.allow_insecure else options
