"""Memory that has a file descriptor, and the passing of descriptors over a Unix socket.

Two halves that know nothing of each other. The first makes, seals, checks and maps memfds, the CPU's kind of shared
memory. The second passes descriptors of any kind (memfds, CUDA's exported allocations) with their sizes; to it
they are opaque. Blocking calls, bounded in number and time: run them in a thread, not on an event loop.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import mmap
import os
import socket
import struct
import time
from collections.abc import Iterable, Sequence

ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
MAX_DESCRIPTORS_PER_MESSAGE = 64  # Linux takes at most 253
MAX_DESCRIPTORS = 4096

# A connection to the loader's socket starts with a ticket, which is answered with one byte.
TICKET_BYTES = 32
ACCEPTED = b"\x01"
REFUSED = b"\x00"


def create_memory(name: str, num_bytes: int) -> int:
    """A new memfd of `num_bytes` zeros, all of them backed by memory from now on; the caller closes it.

    Pages are claimed here, so that a host without memory says so by OSError (ENOMEM, ENOSPC) and not by killing
    whoever writes first.
    """
    assert num_bytes > 0
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def map_writable(descriptor: int, num_bytes: int) -> mmap.mmap:
    """A shared, writable mapping; close it (and every view of it) before `seal`."""
    return mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def seal(descriptor: int) -> None:
    """Make a memfd's contents and size final, for everyone and for good.

    Raises:
        OSError: EBUSY while a writable mapping exists.
    """
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, ALL_SEALS)


def check_sealed(descriptor: int, num_bytes: int) -> None:
    """Refuse what is not a sealed memfd of `num_bytes`: mapping it could show changing bytes, or end in SIGBUS.

    Raises:
        ValueError: saying what it is instead.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ValueError(f"descriptor is no memfd: {error.strerror}") from None
    if seals & ALL_SEALS != ALL_SEALS:
        raise ValueError(f"memory is not sealed: its seals are {seals:#x}, not {ALL_SEALS:#x}")
    size = os.fstat(descriptor).st_size
    if size != num_bytes:
        raise ValueError(f"memory has {size} bytes, not {num_bytes}")


def map_readonly(descriptor: int, num_bytes: int) -> memoryview:
    """A read-only mapping of sealed memory, (num_bytes,) uint8; unmapped with the last view of it.

    The mapping is private: kernels before 6.7 refuse a shared one on memory that is sealed against writing. As
    nobody can write, the pages are the same ones in every process all the same.
    """
    return memoryview(mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))


def copy_all(descriptors: Iterable[int]) -> tuple[int, ...]:
    """Copies of descriptors, which the caller closes.

    Raises:
        OSError: if this process may open no more; none stays open then.
    """
    copies: list[int] = []
    try:
        copies.extend(os.dup(descriptor) for descriptor in descriptors)
    except OSError:
        close_all(copies)
        raise
    return tuple(copies)


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors, each of them whatever happens with the others."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def send_descriptors(
    connection: socket.socket, descriptors: Sequence[int], sizes: Sequence[int], timeout: float
) -> None:
    """Send descriptors with the sizes of what they stand for; they stay open here too.

    A message carries at most 64 of them; its bytes are their sizes as little-endian 64-bit integers.

    Raises:
        OSError: when the connection breaks, or `timeout` seconds pass (TimeoutError).
    """
    assert len(descriptors) == len(sizes) <= MAX_DESCRIPTORS
    deadline = time.monotonic() + timeout
    for start in range(0, len(sizes), MAX_DESCRIPTORS_PER_MESSAGE):
        batch = slice(start, start + MAX_DESCRIPTORS_PER_MESSAGE)
        payload = struct.pack(f"<{len(sizes[batch])}Q", *sizes[batch])
        _limit_time(connection, deadline)
        num_sent = socket.send_fds(connection, [payload], list(descriptors[batch]))
        if num_sent < len(payload):  # else the receiver may be content, and gone
            _limit_time(connection, deadline)
            connection.sendall(payload[num_sent:])


def receive_descriptors(connection: socket.socket, sizes: Sequence[int], timeout: float) -> tuple[int, ...]:
    """Receive one descriptor for each of the sizes that are expected; the caller closes them.

    Raises:
        OSError: when the connection breaks or sends something else, or `timeout` seconds pass (TimeoutError).
            Descriptors that had come are closed.
    """
    assert len(sizes) <= MAX_DESCRIPTORS
    deadline = time.monotonic() + timeout
    received: list[int] = []
    try:
        for start in range(0, len(sizes), MAX_DESCRIPTORS_PER_MESSAGE):
            expected = tuple(sizes[start : start + MAX_DESCRIPTORS_PER_MESSAGE])
            payload = _receive_message(connection, len(expected), received, deadline)
            if len(received) != start + len(expected):
                raise ConnectionError(f"{len(received)} descriptors came, not {start + len(expected)}")
            if struct.unpack(f"<{len(expected)}Q", payload) != expected:
                raise ConnectionError("the descriptors stand for other sizes than expected")
    except BaseException:
        close_all(received)
        raise
    return tuple(received)


def _receive_message(connection: socket.socket, count: int, received: list[int], deadline: float) -> bytes:
    """The 8 * count bytes of a message; descriptors that come with them are appended to `received` at once."""
    payload = b""
    room = array.array("i", [0] * count).itemsize * count
    while len(payload) < 8 * count:
        _limit_time(connection, deadline)
        data, ancillary, flags, _ = connection.recvmsg(
            8 * count - len(payload), socket.CMSG_SPACE(room), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(content) - len(content) % array.array("i").itemsize
                received.extend(array.array("i", content[:whole]))
        if flags & socket.MSG_CTRUNC:
            raise ConnectionError("more descriptors came than expected, or more than this process may open")
        if not data:
            raise ConnectionError(f"the other side closed after {len(received)} descriptors")
        payload += data
    return payload


def _limit_time(connection: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("passing descriptors took too long")
    connection.settimeout(left)
