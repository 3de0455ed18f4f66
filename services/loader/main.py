"""Starts a loader: serve the contract and the descriptors' socket, take memory back, load what was asked for."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from prometheus_client.core import Metric

from mxgpt.v1 import loader_pb2, loader_pb2_grpc
from services.loader.config import LoaderConfig, default_socket
from services.loader.cpu_memory import CpuMemory
from services.loader.handover import Handover
from services.loader.leases import Leases
from services.loader.loading import LoadOptions, Source, default_name
from services.loader.loads import Loads
from services.loader.memory import Memory
from services.loader.metrics import LoadMetrics, loader_metrics
from services.loader.provenance import Provenance
from services.loader.servicer import LoaderServicer, loader_id
from services.loader.store import ModelStore
from services.loader.tokenizer_check import TokenizerChecks
from shared.config import server_config, server_options
from shared.devices import device_index
from shared.errors import ServiceError
from shared.pins import Pins
from shared.server import OVERALL, Server
from shared.telemetry import Telemetry
from shared.telemetry_config import telemetry_config, telemetry_options

log = logging.getLogger(__name__)

DEFAULT_PORT = 50053


class Loader:
    """One loader and everything that it owns, from start to stop."""

    def __init__(self, config: LoaderConfig) -> None:
        self.store = ModelStore()
        self.leases = Leases()
        self._config = config
        name = loader_pb2.DESCRIPTOR.services_by_name["LoaderService"].full_name
        self._telemetry = Telemetry(config.telemetry, "loader", name, loader_id())
        self._server = Server(config.server, [name], self._telemetry.calls.denied)
        # On the CPU weights take longer than any check.
        self._tokenizer_checks = TokenizerChecks(keeps_ready=device_index(config.device) is not None)
        self._tokenizer_checks.make_ready()  # beside the GPU's context
        options = LoadOptions(
            config.model_root, config.num_threads, _memory(config), config.pins, self._tokenizer_checks
        )
        self._loads = Loads(self.store, options)
        self._provenance = Provenance(self.store)
        self._handover = Handover(config.socket, config.allowed_uids)
        self._loads.on_ended = LoadMetrics(self._telemetry.registry).on_ended
        paths = [Path(os.path.abspath(path)) for path in config.models]
        self._sources = [Source(path, default_name(path)) for path in paths]
        self._servicer = LoaderServicer(
            self._server, self._telemetry.calls, self.store, self._loads, self.leases, self._handover, self._sources
        )
        loader_pb2_grpc.add_LoaderServiceServicer_to_server(self._servicer, self._server.grpc)
        self._found_stale = False

    async def run(self) -> int:
        """Serve until a signal; returns the exit code, 1 if a model that was asked for at start can't be had."""
        with self._telemetry.serving(self._config.server, self._collect):
            return await self._run()

    async def _run(self) -> int:
        address = await self.start()
        loading = asyncio.create_task(self.load_at_start())
        serving = asyncio.create_task(self._server.serve(self._loads.close))
        await asyncio.sleep(0)  # signals are handled from here on
        print(f"loader listening on {address}", flush=True)
        await asyncio.wait([loading, serving], return_when=asyncio.FIRST_COMPLETED)
        failed = loading.done() and not loading.result() and not self._server.draining.is_set()
        if not failed:
            await serving
        loading.cancel()
        serving.cancel()
        await self.stop()
        return 1 if failed else 0

    async def start(self) -> str:
        """Listen, not yet healthy; returns the address with the port in use.

        Raises:
            OSError: when the socket's path can't be had.
            RuntimeError: when the address can't be bound.
        """
        _make_directory(self._config.socket.parent)
        self._found_stale = await self._handover.start()
        try:
            address = await self._server.start()
        except BaseException:
            await self._handover.stop()
            raise
        self._provenance.start()
        log.info("listening on %s, handing out descriptors on %s", address, self._config.socket)
        return address

    async def load_at_start(self) -> bool:
        """Load the models of the configuration, or see them adopted, then be healthy; False if one can't be had."""
        if self._found_stale and self._sources:
            await self._wait_for_adoption()
        for source in self._sources:
            if not self._is_there(source) and not await self._load(source):
                return False
            self._servicer.adoption.awaited.pop(source.name, None)
        await self._server.set_health(OVERALL, True)
        return True

    async def stop(self) -> None:
        """End every call and give all memory back; executors keep what they map."""
        await self._server.stop(self._loads.close)
        await self._provenance.stop()
        self._tokenizer_checks.close()
        # A socket that stays tells the next loader that executors may bring memory.
        await self._handover.stop(keep_path=self._servicer.has_ended_leases)
        for model in self.store.models:
            self.store.remove(model)
            model.free()

    async def _collect(self) -> Iterable[Metric]:
        """The metrics that are read when a scrape comes."""
        return loader_metrics(self.store, self._loads, self.leases)

    async def _wait_for_adoption(self) -> None:
        """Until everything is there; else as long as configured, and while what has come is being checked."""
        seconds = self._config.adoption_seconds
        log.info(
            "a loader before this one may have ended under leases: executors have %.0f s to bring its memory", seconds
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline or self._servicer.adoption.is_busy:
            if all(self._is_there(source) for source in self._sources):
                return
            await asyncio.sleep(0.02)

    def _is_there(self, source: Source) -> bool:
        """Whether a source's name stands for its model, loaded or adopted: another's name is a failure, not a find."""
        model = self.store.get(source.name)
        return model is not None and model.manifest.files[0][0] == str(source.path)

    async def _load(self, source: Source) -> bool:
        try:
            async with self._loads.join(source) as load:
                await load.ended
        except ServiceError as error:
            log.error("can't load %s: %s (%s)", source.path, error.message, error.reason.name)
            return False
        return True


def _memory(config: LoaderConfig) -> Memory:
    """The memory of the configured device; what a GPU needs is imported only where one is asked for.

    Raises:
        ServiceError: FIELD_INVALID if the GPU can't be used, saying what to install.
    """
    index = device_index(config.device)
    if index is None:
        return CpuMemory(config.num_threads, config.float32_budget)
    from services.loader.cuda.memory import CudaMemory

    return CudaMemory(index, config.num_threads)


def _make_directory(path: Path) -> None:
    """The socket's directory, which nobody else may own: who does could put another socket in its place."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = path.stat().st_uid
    if owner not in (0, os.getuid()):
        raise PermissionError(f"{path} belongs to user {owner}; give another --socket")


@click.command()
@server_options(DEFAULT_PORT)
@click.option("--socket", type=click.Path(path_type=Path), default=default_socket, help="Unix socket for descriptors.")
@click.option("--model", "models", type=click.Path(path_type=Path), multiple=True, help="GGUF file to load at start.")
@click.option("--model-root", type=click.Path(path_type=Path), help="Load models from below this directory only.")
@click.option("--pins", type=click.Path(path_type=Path), help="Load only files of this list, as sha256sum writes it.")
@click.option("--device", default="cpu", show_default=True, help="Where weights live: cpu, or cuda:N.")
@click.option("--float32-budget-mib", type=int, default=4096, show_default=True, help="Larger models stay quantised.")
@click.option("--allow-uid", "allowed_uids", type=int, multiple=True, help="User whose executors may map weights too.")
@click.option("--adoption-seconds", type=float, default=5.0, show_default=True, help="Wait for a dead loader's memory.")
@click.option("--threads", "num_threads", type=int, default=lambda: min(16, os.cpu_count() or 1), help="To load with.")
@telemetry_options
def main(**options: Any) -> None:
    """Load GGUF models into memory once, and lease them to executors read-only."""
    server = server_config(options)
    telemetry = telemetry_config(options, server, "loader")
    options["float32_budget"] = options.pop("float32_budget_mib") * 2**20
    pins = options.pop("pins")
    try:
        config = LoaderConfig(server=server, telemetry=telemetry, pins=Pins.read(pins) if pins else None, **options)
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error
    try:
        code = asyncio.run(_serve(config))
    except (OSError, RuntimeError) as error:
        log.error("can't serve: %s", error)
        code = 1
    except ServiceError as error:
        log.error("can't serve: %s", error.message)
        code = 1
    raise SystemExit(code)


async def _serve(config: LoaderConfig) -> int:
    return await Loader(config).run()
