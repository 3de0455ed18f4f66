"""The descriptors' socket: tickets, strangers, stale sockets, and connections that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.loader import handover as handover_module
from services.loader.handover import Handover
from shared.descriptors import (
    ACCEPTED,
    REFUSED,
    TICKET_BYTES,
    close_all,
    create_memory,
    receive_descriptors,
    send_descriptors,
)
from tests.loader_harness import asynchronous, until

SIZES = [4096, 8192]


class Clock:
    """Seconds that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def started(path: Path, **options: object) -> AsyncIterator[Handover]:
    handover = Handover(path, **options)
    await handover.start()
    try:
        yield handover
    finally:
        await handover.stop()


@pytest.fixture
def memories() -> list[int]:
    descriptors = [create_memory("test", size) for size in SIZES]
    yield descriptors
    close_all(descriptors)


def num_descriptors_of(memories: list[int]) -> int:
    """Descriptors of these memories that this process has open."""
    inodes = {os.fstat(descriptor).st_ino for descriptor in memories}
    num_found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            num_found += os.fstat(int(name)).st_ino in inodes
    return num_found


def present(path: Path, ticket: bytes) -> tuple[socket.socket, bytes]:
    """Connect and show a ticket; the connection and the answer."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(60)
    connection.connect(str(path))
    with contextlib.suppress(BrokenPipeError):  # strangers are refused unheard
        connection.sendall(ticket)
    return connection, connection.recv(1)


def answer_to(path: Path, ticket: bytes) -> bytes:
    connection, answer = present(path, ticket)
    connection.close()
    return answer


def fetch(path: Path, ticket: bytes) -> list[int]:
    """The inodes behind the descriptors that a ticket is good for."""
    connection, answer = present(path, ticket)
    assert answer == ACCEPTED
    with connection:
        received = receive_descriptors(connection, SIZES, 60)
    inodes = [os.fstat(descriptor).st_ino for descriptor in received]
    close_all(received)
    return inodes


@asynchronous
async def test_a_ticket_is_good_once(tmp_path: Path, memories: list[int]) -> None:
    path = tmp_path / "s"
    async with started(path) as handover:
        ticket = handover.hand_out(memories, SIZES)
        assert len(ticket) == TICKET_BYTES
        inodes = await asyncio.to_thread(fetch, path, ticket)
        assert inodes == [os.fstat(descriptor).st_ino for descriptor in memories]
        assert await asyncio.to_thread(answer_to, path, ticket) == REFUSED


@asynchronous
async def test_tickets_that_are_unknown_withdrawn_or_late_are_refused(tmp_path: Path, memories: list[int]) -> None:
    path, clock = tmp_path / "s", Clock()
    async with started(path, clock=clock) as handover:
        assert await asyncio.to_thread(answer_to, path, bytes(TICKET_BYTES)) == REFUSED
        withdrawn = handover.hand_out(memories, SIZES)
        handover.withdraw(withdrawn)
        assert await asyncio.to_thread(answer_to, path, withdrawn) == REFUSED
        late, in_time = handover.hand_out(memories, SIZES), handover.hand_out(memories, SIZES)
        clock.now += 29
        await asyncio.to_thread(fetch, path, in_time)
        clock.now += 2
        assert await asyncio.to_thread(answer_to, path, late) == REFUSED


@asynchronous
async def test_only_allowed_users_get_anything(
    tmp_path: Path, memories: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = os.getuid()
    async with started(tmp_path / "a") as handover:
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
        monkeypatch.setattr(handover, "_allowed_uids", frozenset({mine + 1}))
        ticket = handover.hand_out(memories, SIZES)
        assert await asyncio.to_thread(answer_to, tmp_path / "a", ticket) == REFUSED
        monkeypatch.setattr(handover, "_allowed_uids", frozenset({mine}))
        await asyncio.to_thread(fetch, tmp_path / "a", ticket)  # a stranger does not use it up
    async with started(tmp_path / "b", allowed_uids=(mine + 1,)):
        assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o666


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user takes root")
@asynchronous
async def test_a_process_of_another_user_is_a_stranger(tmp_path: Path, memories: list[int]) -> None:
    code = """
import os, socket, sys
os.setuid(12345)
connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
connection.connect(sys.argv[1])
try:
    connection.sendall(bytes.fromhex(sys.argv[2]))
except BrokenPipeError:
    pass  # refused unheard
print(connection.recv(1))
"""
    path = Path("/tmp") / f"mxgpt-test-{os.getpid()}.sock"  # other users can't enter a test's own directory
    async with started(path) as handover:
        path.chmod(0o666)
        ticket = handover.hand_out(memories, SIZES)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, str(path), ticket.hex(), stdout=subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert output.decode().strip() == repr(REFUSED)


@asynchronous
async def test_memory_comes_back(tmp_path: Path, memories: list[int]) -> None:
    path = tmp_path / "s"

    def bring(ticket: bytes, sizes: list[int]) -> None:
        connection, answer = present(path, ticket)
        assert answer == ACCEPTED
        with connection, contextlib.suppress(OSError):
            send_descriptors(connection, memories, sizes, 60)

    async with started(path) as handover:
        ticket, arrival = handover.take_back(SIZES)
        await asyncio.to_thread(bring, ticket, SIZES)
        received = await arrival
        assert [os.fstat(fd).st_ino for fd in received] == [os.fstat(fd).st_ino for fd in memories]
        close_all(received)
        ticket, arrival = handover.take_back(SIZES)
        await asyncio.to_thread(bring, ticket, [1, 2])
        with pytest.raises(OSError, match="other sizes"):
            await arrival
        ticket, arrival = handover.take_back(SIZES)
        handover.withdraw(ticket)
        assert arrival.cancelled()
        assert await asyncio.to_thread(answer_to, path, ticket) == REFUSED


@asynchronous
async def test_memory_that_nobody_waits_for_any_more_is_closed(tmp_path: Path, memories: list[int]) -> None:
    path = tmp_path / "s"
    async with started(path) as handover:
        ticket, arrival = handover.take_back(SIZES)
        connection, answer = await asyncio.to_thread(present, path, ticket)
        assert answer == ACCEPTED
        arrival.cancel()
        await asyncio.to_thread(send_descriptors, connection, memories, SIZES, 60)
        await until(lambda: not handover._serving)
        assert num_descriptors_of(memories) == len(memories), "those that it was sent are closed"
        connection.close()


@asynchronous
async def test_connections_that_say_nothing_or_leave_do_no_harm(
    tmp_path: Path, memories: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover_module, "GREETING_SECONDS", 1.0)
    path = tmp_path / "s"
    async with started(path) as handover:
        silent = []
        for _ in range(2 * handover_module.MAX_CONNECTIONS):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.connect(str(path))
            silent.append(connection)
        hurried = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(OSError):
            hurried.settimeout(60)
            await asyncio.to_thread(hurried.connect, str(path))
            hurried.sendall(b"short")
        hurried.close()
        ticket = handover.hand_out(memories, SIZES)
        assert await asyncio.to_thread(fetch, path, ticket)
        for connection in silent:
            connection.close()
        await until(lambda: not handover._serving)


@asynchronous
async def test_stopping_ends_transfers_under_way(tmp_path: Path, memories: list[int]) -> None:
    path = tmp_path / "s"
    async with started(path) as handover:
        ticket, arrival = handover.take_back(SIZES)
        connection, answer = await asyncio.to_thread(present, path, ticket)
        assert answer == ACCEPTED
        await asyncio.wait_for(handover.stop(), handover_module.TICKET_SECONDS - 5)  # in which it would end by itself
        with pytest.raises(OSError, match="closed"):
            await arrival
        connection.close()
        assert not path.exists()


@asynchronous
async def test_a_dead_loaders_socket_makes_way_and_a_living_ones_does_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(path))
    dead.close()
    first = Handover(path)
    assert await first.start() is True
    with pytest.raises(FileExistsError, match="another loader"):
        await Handover(path).start()
    await first.stop(keep_path=True)
    second = Handover(path)
    assert await second.start() is True
    await second.stop()
    third = Handover(path)
    assert await third.start() is False
    await third.stop()
    path.write_text("not a socket")
    with pytest.raises(FileExistsError, match="no socket"):
        await Handover(path).start()
    assert path.read_text() == "not a socket"
