"""A few long-lived template workers, killed and replaced when a template breaks its limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import Reason, ServiceError

log = logging.getLogger(__name__)

START_SECONDS = 30.0  # for a worker to be ready; 0.2 s on an idle machine

_WORKER = Path(__file__).with_name("template_worker.py")


@dataclass(frozen=True)
class TemplateLimits:
    """What rendering one conversation may take."""

    wall_seconds: float = 5.0
    cpu_seconds: int = 3
    memory_bytes: int = 512 << 20  # address space of the worker, of which Python takes about 40 MiB
    max_chars: int = 2 << 20  # of the text rendered


class TemplatePool:
    """Renders templates in `num_workers` processes, started as they are needed."""

    def __init__(self, num_workers: int = 2, limits: TemplateLimits | None = None) -> None:
        self.limits = limits or TemplateLimits()
        self._slots = asyncio.Semaphore(num_workers)
        self._idle: list[asyncio.subprocess.Process] = []
        self._is_closed = False
        self._has_warned = False

    async def render(self, template: str, variables: Mapping[str, Any], today: str) -> str:
        """The text that a template makes of its variables (JSON values); `today` is YYYY-MM-DD.

        Raises:
            ServiceError: CHAT_TEMPLATE_FAILED when the template refuses, fails, or breaks its limits.
        """
        request = {"template": template, "variables": variables, "today": today, "max_chars": self.limits.max_chars}
        data = await asyncio.to_thread(_request_bytes, request)
        async with self._worker() as worker:
            try:
                answer = await asyncio.wait_for(self._exchange(worker, data), self.limits.wall_seconds)
            except TimeoutError:
                why = f"it took longer than {self.limits.wall_seconds:g} s"
                raise _failure(why) from None
            except (asyncio.IncompleteReadError, ConnectionError):
                why = f"it broke the limit of {self.limits.cpu_seconds} s of CPU time or killed its process otherwise"
                raise _failure(why) from None
            if answer.get("is_exhausted"):
                raise _failure(str(answer["error"]))
        if "error" in answer:
            raise _failure(str(answer["error"]))
        return str(answer["text"])

    async def start(self) -> None:
        """Start one worker ahead of the first request."""
        async with self._worker():
            pass

    async def close(self) -> None:
        """Kill the workers that are idle, and those in use when they are done."""
        self._is_closed = True
        while self._idle:
            await _kill(self._idle.pop())

    @contextlib.asynccontextmanager
    async def _worker(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """A worker for one request; one that was left in the middle of it, for whatever reason, is killed."""
        async with self._slots:
            worker = self._take_idle() or await self._new_worker()
            try:
                yield worker
            except BaseException:
                await _kill(worker)
                raise
            if self._is_closed or worker.returncode is not None:
                await _kill(worker)
            else:
                self._idle.append(worker)

    def _take_idle(self) -> asyncio.subprocess.Process | None:
        while self._idle:
            worker = self._idle.pop()
            if worker.returncode is None:
                return worker
        return None

    async def _new_worker(self) -> asyncio.subprocess.Process:
        worker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            str(_WORKER),
            str(self.limits.memory_bytes),
            str(self.limits.cpu_seconds),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={},
            cwd="/",
        )
        try:
            ready = await asyncio.wait_for(self._read(worker), START_SECONDS)
        except BaseException:
            await _kill(worker)
            raise
        if ready["unfiltered"] and not self._has_warned:
            self._has_warned = True
            log.warning("templates run without a filter of system calls: %s", ready["unfiltered"])
        return worker

    async def _exchange(self, worker: asyncio.subprocess.Process, data: bytes) -> dict[str, Any]:
        assert worker.stdin is not None
        worker.stdin.write(len(data).to_bytes(4, "big") + data)
        await worker.stdin.drain()
        return await self._read(worker)

    async def _read(self, worker: asyncio.subprocess.Process) -> dict[str, Any]:
        assert worker.stdout is not None
        num_bytes = int.from_bytes(await worker.stdout.readexactly(4), "big")
        if num_bytes > 12 * self.limits.max_chars + 4096:  # a character outside the BMP is 12 bytes of JSON
            raise _failure("its process broke the protocol")
        answer: dict[str, Any] = json.loads(await worker.stdout.readexactly(num_bytes))
        return answer


def _request_bytes(request: Mapping[str, Any]) -> bytes:
    """JSON, made piece by piece: all at once, 300,000 messages would hold the interpreter lock for 0.3 s."""
    return "".join(json.JSONEncoder().iterencode(request)).encode()


async def _kill(worker: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.kill()
    await worker.wait()


def _failure(why: str) -> ServiceError:
    return ServiceError(Reason.CHAT_TEMPLATE_FAILED, f"The model's chat template failed: {why}.")
