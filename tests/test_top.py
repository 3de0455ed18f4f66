"""`mxgpt top`: renders a live stack, fits 80 columns and 24 lines, and leaves the terminal as it was."""

from __future__ import annotations

import fcntl
import math
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from mxgpt import Client
from mxgpt.cli.main import run
from mxgpt.top.history import History
from mxgpt.top.scrape import quantile
from mxgpt.top.view import render
from tests.stack import ROOT, Stack, running

ALTERNATE_SCREEN = ("\x1b[?1049h", "\x1b[?1049l")  # entered, left


@pytest.fixture(scope="module")
def watched(demo_gpt_oss: Path) -> Iterator[Stack]:
    with running(demo_gpt_oss, options=["--metrics", "127.0.0.1:0"]) as stack:
        yield stack


def addresses(stack: Stack) -> list[str]:
    return [service.metrics for service in (*stack.executors, stack.tokenizer, stack.loader)]


def drawn(history: History, width: int = 80, height: int = 24) -> list[str]:
    console = Console(width=width, height=height, record=True, file=open(os.devnull, "w"), color_system="truecolor")  # noqa: SIM115
    console.print(render(history, width, height, clock=0.0))
    return console.export_text().splitlines()


def test_a_live_stack_is_drawn_with_its_own_figures(watched: Stack) -> None:
    history = History([*addresses(watched), "127.0.0.1:1"])
    history.update()
    with Client(watched.address) as client:
        for _ in range(3):
            client.complete("one two", max_tokens=30, ignore_eos=True)
        for _ in range(20):  # a stream may be over before a busy machine has asked the executor
            with closing(client.generate("three four", ignore_eos=True)) as generation:
                next(generation)
                history.update()
            if history.running[-1]:
                break
    lines = drawn(history)
    text = "\n".join(lines)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "demo-gpt-oss" in lines[0]
    assert "1 executor, 1 tokenizer, 1 loader" in lines[0]
    assert re.search(r"\b1 sequences run", text)
    assert re.search(r"requests ended lately: \d+ OK", text)
    assert float(re.search(r"([\d,]+) tokens/s written", text)[1].replace(",", "")) > 0  # type: ignore[index]
    assert re.search(r"first token p50 [\d.]+ m?s  p99 [\d.]+ m?s", text)
    assert re.search(r"demo-gpt-oss +1 +31 MiB +– +[\d.]+ GiB +cpu", text)
    assert "no metrics from 127.0.0.1:1: " in text
    assert "█" in text


def test_a_service_that_goes_is_shown_as_gone(demo_gpt2: Path) -> None:
    with running(demo_gpt2, options=["--metrics", "127.0.0.1:0"]) as stack:
        history = History(addresses(stack))
        history.update()
        stack.tokenizer.kill()
        history.update()
        text = "\n".join(drawn(history))
        assert "gone" in text
        assert "0 tokenizers" in text


def test_wide_and_tall_terminals_are_filled(watched: Stack) -> None:
    history = History(addresses(watched))
    history.update()
    assert {len(line) for line in drawn(history, 140, 50) if line.startswith("╭")} == {140}
    assert len(drawn(history, 80, 12)) <= 14  # nothing is cut off; the terminal does that


class Terminal:
    """`mxgpt top` in a terminal of 80 x 24."""

    def __init__(self, *options: str) -> None:
        self.text = ""
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(self._ours)
        command = [sys.executable, "-m", "mxgpt", "top", "--interval", "0.2", *options]
        environment = {**os.environ, "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)

    def read_until(self, wanted: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while wanted not in self.text:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {wanted!r} in {self.text[-2000:]!r}"
            try:
                self.text += os.read(self._ours, 65536).decode(errors="replace")
            except OSError:  # nobody holds the other end any more
                raise AssertionError(f"ended without {wanted!r}: {self.text[-2000:]!r}") from None

    def press(self, key: bytes) -> None:
        os.write(self._ours, key)


@pytest.mark.parametrize("how", ["q", "interrupt", "terminate"])
def test_it_ends_cleanly(watched: Stack, how: str) -> None:
    terminal = Terminal(*addresses(watched))
    terminal.read_until("EXECUTOR")
    if how == "q":
        terminal.press(b"q")
    else:
        terminal.process.send_signal(signal.SIGINT if how == "interrupt" else signal.SIGTERM)
    terminal.read_until(ALTERNATE_SCREEN[1])
    assert terminal.process.wait(30) == 0
    assert "Traceback" not in terminal.text
    assert termios.tcgetattr(terminal._ours)[:4] == terminal.before[:4]


def test_in_a_pipe_it_is_printed_once(watched: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", *addresses(watched), "--interval", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "EXECUTOR" in out
    assert "\x1b" not in out


def test_characters_that_the_encoding_lacks_are_replaced(watched: Stack) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "mxgpt", "top", "--once", "--interval", "0.1", *addresses(watched)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"tokens/s" in done.stdout


def test_nobody_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "127.0.0.1:1"]) == 3
    assert "mxgpt serve" in capsys.readouterr().err


def test_quantiles_are_those_of_the_growth() -> None:
    before = {0.1: 5.0, 1.0: 5.0, math.inf: 5.0}
    assert quantile(before, before, 0.5) is None
    after = {0.1: 5.0, 1.0: 15.0, math.inf: 15.0}
    assert quantile(before, after, 0.5) == pytest.approx(0.55)
    assert quantile({}, {0.1: 4.0, 1.0: 4.0, math.inf: 8.0}, 0.99) == 1.0  # past every bound: the last one
    assert quantile({}, {0.1: 4.0, math.inf: 4.0}, 0.5) == pytest.approx(0.05)
