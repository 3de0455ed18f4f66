"""Starts a tokenizer: serve, and keep the loader in view."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from prometheus_client.core import Metric

from mxgpt.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from services.tokenizer.config import TokenizerConfig
from services.tokenizer.metrics import TokenizerMetrics, store_metrics
from services.tokenizer.servicer import TokenizerServicer
from services.tokenizer.store import FileStore, LoaderStore, TokenizerStore
from services.tokenizer.template_pool import TemplatePool
from shared.channel import open_channel
from shared.config import client_config, client_options, server_config, server_options
from shared.errors import ServiceError
from shared.pins import Pins
from shared.server import OVERALL, Server
from shared.telemetry import Telemetry
from shared.telemetry_config import telemetry_config, telemetry_options

log = logging.getLogger(__name__)

DEFAULT_PORT = 50052
LOADER_HEALTH = "mxgpt.loader"  # health name of the loader as this tokenizer sees it
WATCH_SECONDS = 1.0  # how soon a model loaded, or loaded anew under its name, is noticed


class TokenizerServer:
    """One tokenizer and everything that it owns, from start to stop."""

    def __init__(self, config: TokenizerConfig) -> None:
        self._config = config
        name = tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"].full_name
        self._templates = TemplatePool(config.num_template_workers, config.template_limits)
        instance = f"{socket.gethostname()}-{os.getpid()}"
        self._telemetry = Telemetry(config.telemetry, "tokenizer", name, instance)
        self._server = Server(config.server, [name], self._telemetry.calls.denied)
        self._metrics = TokenizerMetrics(self._telemetry.registry)
        self._store: TokenizerStore | None = None

    async def run(self) -> None:
        """Serve until a signal.

        Raises:
            ServiceError: when the model's file can't be served.
            RuntimeError: when the address can't be bound; OSError when that of metrics can't.
        """
        with self._telemetry.serving(self._config.server, self._collect):
            await self._run()

    async def _run(self) -> None:
        try:
            if self._config.model is not None:
                await self._serve_file(self._config.model)
            else:
                await self._serve_loader()
        finally:
            await self._templates.close()

    async def _serve_file(self, model: Path) -> None:
        store = await asyncio.to_thread(FileStore.read, model, self._config.tokenizer_json, self._config.pins)
        await self._start(store)
        await self._server.set_health(OVERALL, True)
        await self._server.serve()

    async def _serve_loader(self) -> None:
        async with open_channel(self._config.loader, self._config.peers) as channel:
            store = LoaderStore(channel, self._telemetry.calls)
            await self._start(store)
            watch = asyncio.create_task(self._watch(store))
            await self._server.serve()
            watch.cancel()

    async def _start(self, store: TokenizerStore) -> None:
        self._store = store
        servicer = TokenizerServicer(store, self._templates, self._telemetry.calls, self._metrics)
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(servicer, self._server.grpc)
        address = await self._server.start()
        log.info("listening on %s", address)
        print(f"tokenizer listening on {address}", flush=True)
        await self._templates.start()

    async def _collect(self) -> Iterable[Metric]:
        """The metrics that are read when a scrape comes."""
        return store_metrics(self._store.tokenizers) if self._store is not None else ()

    async def _watch(self, store: LoaderStore) -> None:
        """Follow the loader's models, and become healthy once a tokenizer can be served."""
        last_message = ""
        while True:
            message = ""
            try:
                await store.refresh()
                await store.prefetch()
            except ServiceError as error:
                message = error.message
                if message != last_message:
                    log.warning("%s", message)
            last_message = message
            await self._server.set_health(LOADER_HEALTH, store.is_loader_there)
            await self._server.set_health(OVERALL, store.is_ready)
            await asyncio.sleep(WATCH_SECONDS)


@click.command()
@server_options(DEFAULT_PORT)
@client_options()
@click.option("--loader", default="127.0.0.1:50053", show_default=True, help="Address of the loader.")
@click.option("--model", type=click.Path(path_type=Path), help="GGUF file to take the tokenizer from; no loader then.")
@click.option("--tokenizer-json", type=click.Path(path_type=Path), help="Used instead of the vocabulary in --model.")
@click.option("--pins", type=click.Path(path_type=Path), help="SHA-256 of those files, as sha256sum writes it.")
@telemetry_options
def main(**options: Any) -> None:
    """Turn text and conversations into token ids, and token ids back into text."""
    server = server_config(options)
    telemetry = telemetry_config(options, server, "tokenizer")
    peers = client_config(options)
    pins = options.pop("pins")
    try:
        files = Pins.read(pins) if pins else None
        config = TokenizerConfig(server=server, peers=peers, telemetry=telemetry, pins=files, **options)
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error
    try:
        asyncio.run(_serve(config))
    except (OSError, RuntimeError, ServiceError) as error:
        log.error("can't serve: %s", error)
        raise SystemExit(1) from error


async def _serve(config: TokenizerConfig) -> None:
    await TokenizerServer(config).run()
