"""The Unix socket over which descriptors pass, to executors and, when memory is adopted, from them.

A connection sends a 32-byte ticket, which `Attach` handed out, and gets one byte: ACCEPTED or REFUSED. After ACCEPTED
descriptors follow as in `shared.descriptors`, in the direction that the ticket was made for. A ticket works once, for
30 seconds, for processes of the allowed users; who holds none learns nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import stat
import struct
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.descriptors import (
    ACCEPTED,
    REFUSED,
    TICKET_BYTES,
    close_all,
    copy_all,
    receive_descriptors,
    send_descriptors,
)

log = logging.getLogger(__name__)

TICKET_SECONDS = 30.0
GREETING_SECONDS = 5.0  # in which a connection shows its ticket
MAX_CONNECTIONS = 16  # at once; others wait

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@dataclass(frozen=True)
class Handout:
    """Descriptors that a ticket's bearer gets."""

    descriptors: tuple[int, ...]
    sizes: tuple[int, ...]
    expires: float


@dataclass(frozen=True)
class Return:
    """Descriptors that a ticket's bearer brings, as the future's result."""

    arrival: asyncio.Future[tuple[int, ...]]
    sizes: tuple[int, ...]
    expires: float


class Handover:
    """Serves the socket on the running event loop; transfers run in threads.

    Args:
        path: of the socket; made anew, with mode 0600 where only this user is allowed, else 0666.
        allowed_uids: users whose processes may connect, as this loader's kernel namespace numbers them.
        clock: seconds, monotonic.
    """

    def __init__(
        self, path: Path, allowed_uids: Collection[int] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path = path
        self._allowed_uids = frozenset(allowed_uids) | {os.getuid()}
        self._clock = clock
        self._tickets: dict[bytes, Handout | Return] = {}
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._serving: dict[asyncio.Task[None], socket.socket] = {}

    async def start(self) -> bool:
        """Listen; True if a socket lay there that nobody served: a loader before this one ended under leases.

        Raises:
            OSError: when the path is taken (by another loader, or by something that is no socket) or can't be made.
        """
        found_stale = _remove_stale(self.path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._listener.bind(str(self.path))
            self.path.chmod(0o600 if self._allowed_uids == {os.getuid()} else 0o666)
            self._listener.listen(MAX_CONNECTIONS)
        except OSError:
            self._listener.close()
            raise
        self._accepting = asyncio.create_task(self._accept(self._listener))
        return found_stale

    async def stop(self, *, keep_path: bool = False) -> None:
        """Close everything; `keep_path` leaves the socket's file for the next loader to find."""
        if self._listener is None or self._accepting is None:
            return
        self._accepting.cancel()
        for connection in self._serving.values():  # ends its transfer; a thread can't be cancelled
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        await asyncio.gather(self._accepting, *self._serving, return_exceptions=True)
        for ticket in list(self._tickets):
            self.withdraw(ticket)
        self._listener.close()
        if not keep_path:
            self.path.unlink(missing_ok=True)

    def hand_out(self, descriptors: Sequence[int], sizes: Sequence[int]) -> bytes:
        """A ticket for descriptors, which stay the caller's and open until the ticket is withdrawn or used."""
        return self._add(Handout(tuple(descriptors), tuple(sizes), self._clock() + TICKET_SECONDS))

    def take_back(self, sizes: Sequence[int]) -> tuple[bytes, asyncio.Future[tuple[int, ...]]]:
        """A ticket for someone who brings descriptors of these sizes, and their arrival (OSError if it fails)."""
        arrival: asyncio.Future[tuple[int, ...]] = asyncio.get_running_loop().create_future()
        return self._add(Return(arrival, tuple(sizes), self._clock() + TICKET_SECONDS)), arrival

    def withdraw(self, ticket: bytes) -> None:
        """Forget a ticket, used or not; an arrival that nobody brings is cancelled."""
        entry = self._tickets.pop(ticket, None)
        if isinstance(entry, Return):
            entry.arrival.cancel()

    def _add(self, entry: Handout | Return) -> bytes:
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._tickets[ticket] = entry
        return ticket

    async def _accept(self, listener: socket.socket) -> None:
        room = asyncio.Semaphore(MAX_CONNECTIONS)
        loop = asyncio.get_running_loop()
        while True:
            await room.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptors left, say: others may be closed soon
                log.warning("accepting on %s failed: %s", self.path, error)
                room.release()
                await asyncio.sleep(0.1)
                continue
            task = asyncio.create_task(self._serve(connection))
            self._serving[task] = connection
            task.add_done_callback(self._serving.pop)
            task.add_done_callback(lambda _: room.release())

    async def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.setblocking(False)
            try:
                entry = await self._redeem(connection)
                if entry is None:
                    await asyncio.get_running_loop().sock_sendall(connection, REFUSED)
                elif isinstance(entry, Handout):
                    await self._send(connection, entry)
                else:
                    await self._receive(connection, entry)
            except OSError as error:
                log.warning("a transfer of descriptors failed: %s", error)

    async def _redeem(self, connection: socket.socket) -> Handout | Return | None:
        """What the connection's ticket is good for; None for strangers and for tickets that are good for nothing."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(credentials)
        if uid not in self._allowed_uids:
            log.warning("refused a connection of user %d (process %d): --allow-uid would allow it", uid, pid)
            return None
        ticket = b""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(GREETING_SECONDS):
            while len(ticket) < TICKET_BYTES:
                piece = await loop.sock_recv(connection, TICKET_BYTES - len(ticket))
                if not piece:
                    return None
                ticket += piece
        entry = self._tickets.pop(ticket, None)
        if entry is None or entry.expires < self._clock():
            log.warning("refused a ticket that is unknown, used or expired (process %d)", pid)
            return None
        return entry

    async def _send(self, connection: socket.socket, entry: Handout) -> None:
        # Copies, made before this task yields: the model may be freed, and its numbers reused, under the thread.
        copies = copy_all(entry.descriptors)
        try:
            connection.setblocking(True)
            await asyncio.to_thread(_accept_and_send, connection, copies, entry.sizes)
        finally:
            close_all(copies)

    async def _receive(self, connection: socket.socket, entry: Return) -> None:
        connection.setblocking(True)
        try:
            received = await asyncio.to_thread(_accept_and_receive, connection, entry.sizes)
        except OSError as error:
            if not entry.arrival.done():
                entry.arrival.set_exception(error)
            return
        if entry.arrival.done():  # whoever waited has gone
            close_all(received)
        else:
            entry.arrival.set_result(received)


def _accept_and_send(connection: socket.socket, descriptors: Sequence[int], sizes: Sequence[int]) -> None:
    connection.sendall(ACCEPTED)
    send_descriptors(connection, descriptors, sizes, TICKET_SECONDS)


def _accept_and_receive(connection: socket.socket, sizes: Sequence[int]) -> tuple[int, ...]:
    connection.sendall(ACCEPTED)
    return receive_descriptors(connection, sizes, TICKET_SECONDS)


def _remove_stale(path: Path) -> bool:
    """Make way for a new socket; True if one lay there that nobody served."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(kind):
        raise FileExistsError(f"{path} exists and is no socket; give another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return True
    raise FileExistsError(f"another loader serves on {path}; give another --socket")
