"""The server process's view of the engine process: submit, cancel, and a callback for every step's events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from services.executor.engine_config import EngineConfig
from services.executor.engine_spawn import DESCRIPTOR_SECONDS, EngineProcess
from services.executor.engine_status import EngineStatus
from services.executor.messages import (
    AskStatus,
    Broken,
    Cancel,
    Command,
    Events,
    Prepared,
    Ready,
    Setup,
    StatusAnswer,
    Submit,
    pack,
    read_answer,
)
from services.executor.request import Event, Request
from shared.descriptors import send_descriptors
from shared.errors import Reason, ServiceError
from shared.manifest import Manifest

log = logging.getLogger(__name__)

STATUS_SECONDS = 1.0  # what a scrape of metrics waits for the step that runs


def engine_gone() -> ServiceError:
    """What becomes of requests whose engine process has ended: another executor can go on with them."""
    return ServiceError(Reason.EXECUTOR_UNAVAILABLE, "the executor's engine process has ended")


def _ended_early() -> ServiceError:
    return ServiceError(Reason.INTERNAL, "the engine process ended while it was starting")


class EngineClient:
    """Talks with the engine process; one task reads its answers in order.

    `on_events` is called once for each step, on the event loop; `gone` is set when the process has ended, once it was
    prepared.
    """

    def __init__(self, process: EngineProcess, on_events: Callable[[Sequence[Event]], None]) -> None:
        self.gone = asyncio.Event()
        self._on_events = on_events
        self._process = process
        self._started: asyncio.Future[Ready | Broken | None] | None = None  # None in it: the process has ended
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._status_waiters: list[asyncio.Future[EngineStatus]] = []
        self._last_status: EngineStatus | None = None  # None before it has started

    @property
    def process_id(self) -> int:
        """Of the engine's process."""
        return self._process.process.pid

    async def prepared(self) -> None:
        """Wait until the process has imported what it needs and has its device.

        Raises:
            ServiceError: when it can't use the device, with what it said.
        """
        reader, self._writer = await asyncio.open_connection(sock=self._process.messages)
        try:
            answer = await read_answer(reader)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise _ended_early() from error
        if isinstance(answer, Broken):
            raise answer.error
        assert isinstance(answer, Prepared)
        self._started = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read(reader, self._started))

    async def start(self, manifest: Manifest, descriptors: Sequence[int], engine: EngineConfig) -> None:
        """Have the prepared process map a model, and wait until it runs.

        Args:
            descriptors: one of each allocation; they stay the caller's.

        Raises:
            ServiceError: when the engine can't start, with what it said.
        """
        assert self._started is not None
        sizes = [allocation.num_bytes for allocation in manifest.allocations]
        self._send(Setup(manifest, engine))
        with self._process.descriptors as connection, contextlib.suppress(OSError):  # the process tells what it lacks
            await asyncio.to_thread(send_descriptors, connection, descriptors, sizes, DESCRIPTOR_SECONDS)
        answer = await self._started
        if answer is None:
            raise _ended_early()
        if isinstance(answer, Broken):
            raise answer.error
        self._last_status = answer.status

    def submit(self, request: Request) -> None:
        """Hand a request to the engine; whatever comes of it comes as events."""
        self._send(Submit(request))

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one output of it; no events follow for it but those already under way."""
        self._send(Cancel(request_id, index))

    async def status(self) -> EngineStatus:
        """The engine's status after the step that runs now.

        Raises:
            ServiceError: when the process has ended.
        """
        waiter: asyncio.Future[EngineStatus] = asyncio.get_running_loop().create_future()
        self._status_waiters.append(waiter)
        self._send(AskStatus())
        return await waiter

    async def last_status(self) -> EngineStatus | None:
        """The engine's status or, where the step that runs takes long, the last known one; None before it starts."""
        if self._last_status is not None and not self.gone.is_set():
            with contextlib.suppress(TimeoutError, ServiceError):
                async with asyncio.timeout(STATUS_SECONDS):
                    self._last_status = await self.status()
        return self._last_status

    async def stop(self) -> None:
        """End the process."""
        if self._writer is not None:
            self._writer.transport.abort()
        await asyncio.to_thread(self._process.end)
        if self._reading is not None:
            await self._reading

    def _send(self, command: Command) -> None:
        if self._writer is None or self.gone.is_set():
            raise engine_gone()
        self._writer.write(pack(command))

    async def _read(self, reader: asyncio.StreamReader, started: asyncio.Future[Ready | Broken | None]) -> None:
        try:
            while True:
                answer = await read_answer(reader)
                if isinstance(answer, Events):
                    self._on_events(answer.events)
                elif isinstance(answer, Ready | Broken):
                    started.set_result(answer)
                elif isinstance(answer, StatusAnswer):
                    waiter = self._status_waiters.pop(0)
                    if not waiter.done():  # its caller may have gone
                        waiter.set_result(answer.status)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.gone.set()
            if not started.done():
                started.set_result(None)
            for waiter in self._status_waiters:
                if not waiter.done():
                    waiter.set_exception(engine_gone())
