"""What a service tells of itself to whoever watches it: metrics for Prometheus, traces, logs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.calls import Calls
from shared.config import ServerConfig, is_local
from shared.telemetry_config import TelemetryConfig
from shared.tracing import NoTracing, Tracing

log = logging.getLogger(__name__)

SCRAPE_SECONDS = 5.0  # what a scrape may take; Prometheus gives up after 10


class Telemetry:
    """The metrics and traces of one service.

    Args:
        service: "loader", "tokenizer" or "executor".
        full_name: of the service in the contract.
        instance: which one of several it is.

    Raises:
        OSError: when the file for traces can't be written.
    """

    def __init__(self, config: TelemetryConfig, service: str, full_name: str, instance: str) -> None:
        self.config = config
        self.registry = CollectorRegistry()
        self.tracing = _open_tracing(config.traces, service, instance)
        self.calls = Calls(service, full_name, self.registry, self.tracing)
        self._service = service
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(_Info({"service": service, "instance": instance}))

    @contextlib.contextmanager
    def serving(self, server: ServerConfig, collect: Callable[[], Awaitable[Iterable[Metric]]]) -> Iterator[None]:
        """Serve metrics, those of `collect` (asked for on this event loop) among them, and send traces, for a while.

        Raises:
            OSError: when the address can't be had.
        """
        self.registry.register(_Collector(asyncio.get_running_loop(), collect))
        stop = self._serve_metrics(server)
        try:
            yield
        finally:
            stop()
            self.tracing.close()

    def _serve_metrics(self, server: ServerConfig) -> Callable[[], None]:
        if self.config.metrics is None:
            return lambda: None
        host, _, port = self.config.metrics.rpartition(":")
        has_tls = server.tls_certificate is not None and not is_local(self.config.metrics)
        try:
            httpd, thread = start_http_server(
                int(port),
                host.strip("[]"),
                self.registry,
                certfile=_text(server.tls_certificate) if has_tls else None,
                keyfile=_text(server.tls_key) if has_tls else None,
                client_cafile=_text(server.tls_client_ca) if has_tls else None,
                client_auth_required=has_tls and server.tls_client_ca is not None,
            )
        except OSError as error:
            raise OSError(f"metrics can't be served on {self.config.metrics}: {error}") from error
        address = f"{host}:{httpd.server_port}"
        log.info("metrics on %s", address)
        print(f"{self._service} metrics on {address}", flush=True)

        def stop() -> None:
            httpd.shutdown()
            httpd.server_close()
            thread.join()

        return stop


class _Collector(Collector):
    """Asks the event loop, from the thread of a scrape, for what only the event loop knows."""

    def __init__(self, loop: asyncio.AbstractEventLoop, collect: Callable[[], Awaitable[Iterable[Metric]]]) -> None:
        self._loop = loop
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return asyncio.run_coroutine_threadsafe(self._gather(), self._loop).result(SCRAPE_SECONDS)

    async def _gather(self) -> list[Metric]:
        return list(await self._collect())


class _Info(Collector):
    """mxgpt_info: what this process is."""

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        yield InfoMetricFamily("mxgpt", "What this process is.", self._labels)


def _open_tracing(target: str | None, service: str, instance: str) -> Tracing:
    if target is None:
        return NoTracing()
    from shared.otel import OTelTracing, open_exporter

    return OTelTracing(service, instance, open_exporter(target))


def _text(path: object) -> str | None:
    return None if path is None else str(path)
