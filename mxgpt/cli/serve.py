"""`mxgpt serve`: everything on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import click
from rich.progress import Progress, TaskID

from mxgpt.bundled import find_model
from mxgpt.cli.failures import FAILED, OK, CommandError
from mxgpt.cli.terminal import dim, progress
from mxgpt.serve import (
    EXECUTOR_PORT,
    LOADER_PORT,
    MAX_EXECUTORS,
    METRICS_PORT,
    TOKENIZER_PORT,
    ServeConfig,
    ServeError,
    Supervisor,
)
from shared.logs import FORMATS, LEVELS, json_line
from shared.telemetry_config import traces_option

_PORT = click.IntRange(0, 65535)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(
    epilog="""\b
Examples:
  mxgpt serve                                          # the bundled demo model
  mxgpt serve --model gpt-oss-20b-mxfp4.gguf
  mxgpt serve --port 0                                 # any free port; the address is printed
  mxgpt serve --executors 2                            # two executors over one copy of the weights
  mxgpt serve --host 0.0.0.0 --tls-certificate server.pem --tls-key server.key --token-file keys

\b
Logs go to stderr, each line marked with its service; stdout has one line, once requests can be served.
Ctrl-C or SIGTERM lets running requests finish (--drain-seconds) and stops everything; a second Ctrl-C does not wait.
A service that dies is reported and started again, up to five times a minute; one that can't start ends the command.
Loader and tokenizer listen on ports 50053 and 50052, or on any free ones if --port is not its default. Metrics are
served on loopback: the loader's on --metrics-port, the tokenizer's and executors' on the next ones. The default is
9460, where `mxgpt top` looks, or none at all if --port is not its default.
Certificates are for executors (docs/security.md); loader and tokenizer stay on loopback, the loader behind a key.
"""
)
@click.option("--model", type=click.Path(path_type=Path), help="GGUF file, or the first of its shards. Default: demo.")
@click.option("--pins", type=_FILE, help="Load only files of this list, as sha256sum writes it.")
@click.option("--device", default="cpu", show_default=True, help='"cpu", or a GPU as "cuda" or "cuda:1".')
@click.option("--host", default="127.0.0.1", show_default=True, help="Interface that executors listen on.")
@click.option("--port", type=_PORT, default=EXECUTOR_PORT, show_default=True, help="0 picks a free one.")
@click.option("--tokenizer-port", type=_PORT, help="On loopback; see below.")
@click.option("--loader-port", type=_PORT, help="On loopback; see below.")
@click.option("--executors", "num_executors", type=click.IntRange(1, MAX_EXECUTORS), default=1, show_default=True)
@click.option("--tls-certificate", type=_FILE, help="PEM chain to serve TLS with.")
@click.option("--tls-key", type=_FILE, help="PEM key of the certificate.")
@click.option("--tls-client-ca", type=_FILE, help="PEM authority; clients show a certificate that it signed.")
@click.option("--token-file", "token_files", type=_FILE, multiple=True, help="Keys to accept, one a line. Repeatable.")
@click.option("--allow-insecure", is_flag=True, help="Listen beyond loopback without TLS.")
@click.option("--threads", type=click.IntRange(1), help="Threads of each executor. Default: half the cores.")
@click.option("--max-context", type=click.IntRange(1), help="Tokens of prompt and output. Default: the model's own.")
@click.option("--kv-memory-mib", type=click.IntRange(1), help="Memory for KV blocks of each executor.")
@click.option("--float32-budget-mib", type=click.IntRange(0), help="Larger models stay quantised on the CPU.")
@click.option("--drain-seconds", type=float, default=30.0, show_default=True, help="What running requests get.")
@click.option("--metrics-port", type=_PORT, help="On loopback; see below. 0 picks free ones.")
@traces_option
@click.option("--log-level", type=click.Choice(LEVELS, case_sensitive=False), default="INFO", show_default=True)
@click.option("--log-format", type=click.Choice(FORMATS), default="text", show_default=True)
@click.option("--log-content", is_flag=True, help="Prompts and answers, too.")
@click.pass_context
def serve(
    context: click.Context,
    /,
    model: Path | None,
    pins: Path | None,
    threads: int | None,
    max_context: int | None,
    kv_memory_mib: int | None,
    float32_budget_mib: int | None,
    metrics_port: int | None,
    loader_port: int | None,
    tokenizer_port: int | None,
    **options: object,
) -> None:
    """Load a model and serve it: loader, tokenizer and executor, as processes of their own."""
    is_default = options["port"] == EXECUTOR_PORT
    of_executors = {"--threads": threads, "--max-context": max_context, "--kv-memory-mib": kv_memory_mib}
    try:
        config = ServeConfig(
            model=model or find_model(),
            executor_options=_given(of_executors),
            metrics_port=METRICS_PORT if metrics_port is None and is_default else metrics_port,
            loader_port=(LOADER_PORT if is_default else 0) if loader_port is None else loader_port,
            tokenizer_port=(TOKENIZER_PORT if is_default else 0) if tokenizer_port is None else tokenizer_port,
            loader_options=_given({"--float32-budget-mib": float32_budget_mib, "--pins": pins and pins.absolute()}),
            **options,  # type: ignore[arg-type]  # click's options have the names and types of the fields
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        code = asyncio.run(_serve(config))
    except ServeError as error:
        raise CommandError(str(error)) from error
    context.exit(code)


def _given(options: Mapping[str, int | Path | None]) -> tuple[str, ...]:
    """Command line options that have a value."""
    return tuple(text for name, value in options.items() if value is not None for text in (name, str(value)))


async def _serve(config: ServeConfig) -> int:
    with progress() as bar:
        task = bar.add_task(f"loading {config.model.name}", total=None)
        print_line = _print_json if config.log_format == "json" else _print_line
        supervisor = Supervisor(config, print_line, lambda done, total: _advance(bar, task, done, total))
        stopping = _stop_on_signals(supervisor, print_line)
        running = asyncio.create_task(_run(supervisor, bar))
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait([running, stopped], return_when=asyncio.FIRST_COMPLETED)
        try:
            if not stopping.is_set():
                running.result()
                return FAILED
            return OK
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await supervisor.stop()
            stopped.cancel()


async def _run(supervisor: Supervisor, bar: Progress) -> None:
    await supervisor.start()
    bar.stop()
    config = supervisor.config
    print(f"mxgpt serves {config.model.name} on {supervisor.address}", flush=True)
    await supervisor.ended()


def _stop_on_signals(supervisor: Supervisor, print_line: Callable[[str, str], None]) -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets; the second one kills."""
    stopping = asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            supervisor.kill()
            return
        print_line("serve", "stopping; running requests may finish")
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    return stopping


def _advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total or None)


def _print_json(label: str, line: str) -> None:
    """A service's line names the service already; whatever else it writes, and what we report, becomes such a line."""
    is_record = label != "serve" and line.startswith("{")
    _say(line if is_record else json_line(label, "INFO", "mxgpt.serve", line))


def _print_line(label: str, line: str) -> None:
    _say(f"{dim(f'{label:<10}|', sys.stderr)} {line}")


def _say(line: str) -> None:
    """A line to stderr; that nobody reads it any more keeps nothing from being served, or from being stopped."""
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)
