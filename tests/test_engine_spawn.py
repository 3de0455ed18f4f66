"""The engine's process runs before its server has imported anything large, and never outlives it."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from services.executor import engine_spawn
from services.executor.engine_client import EngineClient
from services.executor.engine_config import EngineConfig
from services.executor.engine_spawn import EngineProcess, start_engine
from services.executor.messages import EngineSocket, Prepared
from shared.errors import Reason, ServiceError
from shared.manifest import Allocation, Manifest
from tests.stack import ROOT, free_ports
from tests.tiny_models import TINY_GPT2

MANIFEST = Manifest("m", (), "0" * 64, "cpu.f32.v1", TINY_GPT2, (Allocation(4096, "0" * 64, 1),), {}, (), ())
CONFIG = EngineConfig(max_context=32, num_blocks={"full": 1}, max_batch_tokens=64)


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


def test_a_process_that_is_still_importing_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_spawn, "END_SECONDS", 60.0)  # a busy machine takes its time
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


def test_an_interrupt_is_the_servers_to_hear_even_while_the_process_is_starting() -> None:
    with start_engine("cpu", 1, "INFO", "text") as engine:
        for _ in range(5):
            engine.process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        assert isinstance(EngineSocket(engine.messages).receive(), Prepared)
    assert engine.process.returncode == 0


def talk(work: Callable[[EngineClient, EngineProcess], Awaitable[None]]) -> None:
    """Run `work` with a process that is prepared."""

    async def run(engine: EngineProcess) -> None:
        client = EngineClient(engine, lambda events: None)
        async with asyncio.timeout(60):
            await client.prepared()
            await work(client, engine)
            await client.stop()

    with start_engine("cpu", 1, "INFO", "text") as engine:
        asyncio.run(run(engine))


def test_descriptors_that_do_not_come_are_named() -> None:
    async def work(client: EngineClient, engine: EngineProcess) -> None:
        engine.descriptors.shutdown(socket.SHUT_WR)
        with pytest.raises(ServiceError, match=r"the weights' descriptors did not come: .* after 0") as caught:
            await client.start(MANIFEST, [0], CONFIG)
        assert caught.value.reason is Reason.INTERNAL

    talk(work)


def test_a_process_that_ends_while_it_waits_is_seen_at_once() -> None:
    async def work(client: EngineClient, engine: EngineProcess) -> None:
        engine.process.kill()
        await client.gone.wait()

    talk(work)


def test_a_process_that_ends_when_it_is_told_what_to_run_is_an_error() -> None:
    async def work(client: EngineClient, engine: EngineProcess) -> None:
        engine.process.send_signal(signal.SIGSTOP)
        starting = asyncio.create_task(client.start(MANIFEST, [0], CONFIG))
        await asyncio.sleep(0.1)
        engine.process.kill()
        with pytest.raises(ServiceError, match="ended while it was starting"):
            await starting

    talk(work)


def test_an_executor_ends_with_its_engine_though_there_is_no_loader() -> None:
    command = [sys.executable, "-m", "services.executor", "--listen", "127.0.0.1:0"]
    command += ["--loader", f"127.0.0.1:{free_ports(1)[0]}"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as executor:
        assert executor.stderr is not None
        try:
            lines = iter(executor.stderr.readline, "")
            assert any("waiting for the loader" in line for line in lines)
            (child,) = Path(f"/proc/{executor.pid}/task/{executor.pid}/children").read_text().split()
            subprocess.run(["kill", "-9", child], check=True)
            (error,) = [line for line in lines if "ERROR" in line]
            assert error.rstrip().endswith("the engine process has ended")
            assert executor.wait(20) == 1
        finally:
            executor.kill()
