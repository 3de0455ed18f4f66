"""What a service tells of itself to whoever watches it: metrics for Prometheus, traces, logs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import click
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.calls import Calls
from shared.config import ServerConfig, is_local
from shared.logs import FORMATS, LEVELS, set_up_logs
from shared.tracing import NoTracing, Tracing

F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger(__name__)

SCRAPE_SECONDS = 5.0  # what a scrape may take; Prometheus gives up after 10


@dataclass(frozen=True)
class TelemetryConfig:
    """Where metrics are served and traces go, and how logs look.

    Raises:
        ValueError: for an address without a port, and for traces that can't be had.
    """

    metrics: str | None = None  # host:port; port 0 picks a free one; None: not served
    traces: str | None = None  # "http://host:port" of an OTLP gRPC receiver, or "file:/path"; None: off
    log_level: str = "INFO"
    log_format: str = "text"
    log_content: bool = False  # prompts and answers in logs, too

    def __post_init__(self) -> None:
        if self.metrics is not None and not self.metrics.rpartition(":")[2].isdecimal():
            raise ValueError(f"--metrics: {self.metrics!r} is no HOST:PORT")
        if self.traces is not None:
            _require_traces(self.traces)

    def require_allowed(self, server: ServerConfig) -> None:
        """Refuse to tell strangers in plain text what even the service itself would not.

        Raises:
            ValueError: for a metrics address beyond loopback, without TLS and without leave.
        """
        if self.metrics is None or server.tls_certificate is not None or server.allow_insecure:
            return
        if not is_local(self.metrics):
            raise ValueError(f"refusing to serve metrics on {self.metrics} without TLS or --allow-insecure")


traces_option = click.option(
    "--traces",
    metavar="URL",
    envvar="MXGPT_TRACES",
    show_envvar=True,
    help="OTLP receiver for traces, as http://localhost:4317, or file:/PATH.",
)


def telemetry_options(command: F) -> F:
    """The click options of `TelemetryConfig`, taken out of the arguments again by `telemetry_config`."""
    for option in (
        click.option("--log-content", is_flag=True, help="Prompts and answers in logs, too."),
        click.option("--log-format", type=click.Choice(FORMATS), default="text", show_default=True),
        click.option("--log-level", type=click.Choice(LEVELS, case_sensitive=False), default="INFO", show_default=True),
        traces_option,
        click.option("--metrics", metavar="HOST:PORT", help="Serve metrics for Prometheus there. Default: nowhere."),
    ):
        command = option(command)
    return command


def telemetry_config(options: dict[str, Any], server: ServerConfig, service: str) -> TelemetryConfig:
    """Take `telemetry_options` out of a command's arguments, and set up this process's logs by them.

    Raises:
        click.UsageError: when they don't fit together.
    """
    given = {name: options.pop(name) for name in ("metrics", "traces", "log_level", "log_format", "log_content")}
    try:
        config = TelemetryConfig(**given)
        config.require_allowed(server)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    set_up_logs(service, config.log_level, config.log_format, with_content=config.log_content)
    return config


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


def _require_traces(target: str) -> None:
    try:
        from shared.otel import check_target
    except ImportError as error:
        raise ValueError(f"--traces needs OpenTelemetry: pip install '.[otel]' in mxgpt's clone ({error})") from error
    check_target(target)


def _open_tracing(target: str | None, service: str, instance: str) -> Tracing:
    if target is None:
        return NoTracing()
    from shared.otel import OTelTracing, open_exporter

    return OTelTracing(service, instance, open_exporter(target))


def _text(path: object) -> str | None:
    return None if path is None else str(path)
