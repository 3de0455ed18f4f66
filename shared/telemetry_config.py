"""What a service is told about its metrics, traces and logs; `shared.telemetry` does it.

It imports little: a command knows its options before it waits for gRPC.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from shared.config import ServerConfig, is_local
from shared.logs import FORMATS, LEVELS, set_up_logs

F = TypeVar("F", bound=Callable[..., Any])


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


def _require_traces(target: str) -> None:
    try:
        from shared.otel import check_target
    except ImportError as error:
        raise ValueError(f"--traces needs OpenTelemetry: pip install '.[otel]' in mxgpt's clone ({error})") from error
    check_target(target)
