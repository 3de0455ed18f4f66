"""`mxgpt top`: the services as they run, live."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import ssl
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live

from mxgpt.cli.failures import OK, UNAVAILABLE
from mxgpt.cli.terminal import has_colours, is_terminal, printable
from mxgpt.serve import MAX_EXECUTORS, METRICS_PORT
from mxgpt.top.history import History
from mxgpt.top.view import render

_NUM_DEFAULT_PORTS = 2 + MAX_EXECUTORS  # tried without addresses: those that `mxgpt serve` may have
_PATH = click.Path(path_type=Path, dir_okay=False)


@click.command(
    epilog="""\b
Examples:
  mxgpt top                                       # what `mxgpt serve` runs on this machine
  mxgpt top gpu1:9460 gpu1:9461 gpu1:9462
  mxgpt top --once > now.txt

\b
Addresses are those that services were given with --metrics. Latencies and outcomes are those of the last
30 refreshes. KV blocks: full bars are used, hatched ones kept for the prefix cache, dotted ones free; one bar for
each group of layers. q or Ctrl-C ends it.
"""
)
@click.argument("addresses", nargs=-1, metavar="[HOST:PORT]...")
@click.option("--interval", type=click.FloatRange(0.1, 60), default=1.0, show_default=True, help="Seconds.")
@click.option("--once", is_flag=True, help="Print the view once, without a terminal's tricks.")
@click.option("--tls-root", type=_PATH, help="PEM authority of the services' certificates; plain text without.")
@click.option("--tls-certificate", type=_PATH, help="PEM certificate to show them.")
@click.option("--tls-key", type=_PATH, help="PEM key of that certificate.")
@click.pass_context
def top(
    context: click.Context,
    /,
    addresses: tuple[str, ...],
    interval: float,
    once: bool,
    tls_root: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
) -> None:
    """Watch services live: streams, rates, time to the first token, KV blocks, the queue, memory."""
    defaults = [f"127.0.0.1:{METRICS_PORT + number}" for number in range(_NUM_DEFAULT_PORTS)]
    history = History(addresses or defaults, _tls(tls_root, tls_certificate, tls_key))
    with contextlib.closing(history):
        history.update()
        if not any(each.service for each in history.watched):
            _say_nobody(history)
            context.exit(UNAVAILABLE)
        if not addresses:
            history.forget_absent()
        if once or not is_terminal(sys.stdout):
            _print_once(history, interval)
        else:
            _watch(history, interval)
    context.exit(OK)


def _say_nobody(history: History) -> None:
    first = history.watched[0]
    others = f" (nor the other {len(history.watched) - 1} addresses)" if len(history.watched) > 1 else ""
    why = printable(f"no service's metrics on {first.address}: {first.error}{others}")
    print(f"mxgpt: {why}. Start `mxgpt serve`, or give addresses.", file=sys.stderr)


def _print_once(history: History, interval: float) -> None:
    """The view after one interval: rates need two looks."""
    time.sleep(interval)
    history.update()
    console = Console(no_color=not has_colours(sys.stdout), highlight=False)
    console.print(render(history, console.width, console.height))


def _watch(history: History, interval: float) -> None:
    """Redraw until q, Ctrl-C, SIGTERM or the end of the terminal."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(no_color=not has_colours(sys.stdout), highlight=False)
    live = Live(console=console, screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), _keys() as pressed, live:
        while True:
            due = time.monotonic() + interval
            history.update()
            live.update(render(history, console.width, console.height), refresh=True)
            if pressed(max(0.0, due - time.monotonic())) in ("q", "Q", ""):
                return


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str | None]]:
    """Reads keys as they are pressed, without a return; the terminal is as before afterwards."""
    if not sys.stdin.isatty():
        yield time.sleep
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield _key
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _key(seconds: float) -> str | None:
    """The key pressed within so many seconds; None if there was none, "" at the end of input."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return os.read(sys.stdin.fileno(), 1).decode(errors="replace") if ready else None


def _tls(root: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """What HTTPS needs; None for plain text.

    Raises:
        click.UsageError: for a certificate without an authority or a key.
    """
    if (certificate is None) != (key is None) or (root is None and certificate is not None):
        raise click.UsageError("--tls-certificate goes with --tls-key and --tls-root")
    if root is None:
        return None
    context = ssl.create_default_context(cafile=root)
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context
