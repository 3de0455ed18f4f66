"""The engine's process runs before its server has imported anything large, and never outlives it."""

import signal
import subprocess
import sys
import time

import pytest

from services.executor import engine_spawn
from services.executor.engine_spawn import start_engine
from services.executor.messages import EngineSocket, Prepared
from tests.stack import ROOT


def test_the_command_waits_for_nothing_large_before_it_starts_the_process() -> None:
    code = (
        "import sys, services.executor.main\n"
        "print([name for name in ('grpc', 'numpy', 'google', 'prometheus_client', 'gguf') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert said == "[]\n"


def test_a_process_that_was_told_nothing_ends_by_itself() -> None:
    with start_engine("cpu", 1, "INFO", "text") as engine:
        assert isinstance(EngineSocket(engine.messages).receive(), Prepared)
    assert engine.process.returncode == 0


def test_a_process_that_is_still_importing_ends_by_itself() -> None:
    with start_engine("cpu", 1, "INFO", "text") as engine:
        assert engine.process.poll() is None
    assert engine.process.returncode == 0


def test_a_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_spawn, "END_SECONDS", 0.2)
    with start_engine("cpu", 1, "INFO", "text") as engine:
        engine.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
    assert engine.process.returncode == -signal.SIGKILL
    assert time.monotonic() - start >= 0.2
