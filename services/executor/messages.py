"""What the server process and the engine process say to each other, over one stream socket.

Each message is a pickled value behind its length. Both ends are ours and no one else holds the socket.
"""

from __future__ import annotations

import asyncio
import pickle
import select
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.executor.engine_config import EngineConfig
from services.executor.engine_status import EngineStatus
from services.executor.request import Event, Request
from shared.errors import ServiceError
from shared.manifest import Manifest

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Setup:
    """First message to the engine process: the model to map and how to run it.

    The descriptors of its allocations follow over a socket of their own.
    """

    manifest: Manifest
    engine: EngineConfig


@dataclass(frozen=True)
class Submit:
    """Take a request."""

    request: Request


@dataclass(frozen=True)
class Cancel:
    """Drop a request, or one output of it."""

    request_id: str
    index: int | None = None


@dataclass(frozen=True)
class AskStatus:
    """Answer with the engine's status."""


@dataclass(frozen=True)
class Prepared:
    """First answer: the process has its device and waits for `Setup`."""


@dataclass(frozen=True)
class Ready:
    """The model is mapped and the engine runs."""

    status: EngineStatus


@dataclass(frozen=True)
class Broken:
    """The engine can't start; the process ends."""

    error: ServiceError


@dataclass(frozen=True)
class Events:
    """Everything that one step brought."""

    events: Sequence[Event]


@dataclass(frozen=True)
class StatusAnswer:
    """Answer to AskStatus."""

    status: EngineStatus


Command = Setup | Submit | Cancel | AskStatus
Answer = Prepared | Ready | Broken | Events | StatusAnswer


def pack(message: Command | Answer) -> bytes:
    """A message as it goes over the socket."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """The next answer of the engine process.

    Raises:
        asyncio.IncompleteReadError: when the process is gone.
    """
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    answer: Answer = pickle.loads(await reader.readexactly(length))
    return answer


class EngineSocket:
    """The engine process's end: it blocks when there is nothing to do, and only then."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def send(self, answer: Answer) -> None:
        self._socket.sendall(pack(answer))

    def receive(self) -> Command:
        """The next command, waiting for it.

        Raises:
            EOFError: when the server process is gone.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        command: Command = pickle.loads(self._read(length))
        return command

    def has_command(self) -> bool:
        """Whether `receive` would find a command (or the end) without waiting."""
        return bool(self._poll.poll(0))

    def _read(self, num_bytes: int) -> Any:
        buffer = bytearray(num_bytes)
        view = memoryview(buffer)
        while view:
            received = self._socket.recv_into(view)
            if received == 0:
                raise EOFError("the server process is gone")
            view = view[received:]
        return buffer
