"""Sealed memory and the passing of descriptors: what a receiver may rely on, and what it refuses."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from shared import descriptors
from shared.descriptors import (
    ALL_SEALS,
    check_sealed,
    close_all,
    create_memory,
    map_readonly,
    map_writable,
    receive_descriptors,
    seal,
    send_descriptors,
)

SIZE = 3 * 4096 + 17


def sealed_memory(content: bytes = b"\x05" * SIZE) -> int:
    descriptor = create_memory("test", len(content))
    mapping = map_writable(descriptor, len(content))
    mapping[:] = content
    mapping.close()
    seal(descriptor)
    return descriptor


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = sealed_memory()
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        yield left, right


def num_open() -> int:
    """Descriptors of these tests' memories; what else this process has open comes and goes by itself."""
    num_found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            num_found += "/memfd:test" in os.readlink(f"/proc/self/fd/{name}")
    return num_found


def test_new_memory_is_zero_and_not_inherited() -> None:
    descriptor = create_memory("test", SIZE)
    try:
        assert os.pread(descriptor, SIZE, 0) == bytes(SIZE)
        assert not os.get_inheritable(descriptor)
        assert os.fstat(descriptor).st_blocks * 512 >= SIZE
    finally:
        os.close(descriptor)


def test_sealing_waits_for_writable_mappings() -> None:
    descriptor = create_memory("test", SIZE)
    mapping = map_writable(descriptor, SIZE)
    with pytest.raises(OSError, match="busy") as caught:
        seal(descriptor)
    assert caught.value.errno == errno.EBUSY
    mapping.close()
    seal(descriptor)
    os.close(descriptor)


def test_sealed_memory_is_final(memory: int) -> None:
    assert fcntl.fcntl(memory, fcntl.F_GET_SEALS) == ALL_SEALS
    check_sealed(memory, SIZE)
    for change in (
        lambda: os.pwrite(memory, b"x", 0),
        lambda: os.ftruncate(memory, SIZE - 1),
        lambda: os.ftruncate(memory, SIZE + 1),
        lambda: map_writable(memory, SIZE),
        lambda: fcntl.fcntl(memory, fcntl.F_ADD_SEALS, 0),
    ):
        with pytest.raises(PermissionError):
            change()
    view = map_readonly(memory, SIZE)
    assert view.readonly
    assert view == b"\x05" * SIZE
    with pytest.raises(TypeError):
        view[0] = 1


def test_writing_through_the_pages_kills_the_writer_and_nobody_else(memory: int) -> None:
    code = f"""
import ctypes, os
import numpy as np
from shared.descriptors import map_readonly
view = map_readonly({memory}, {SIZE})
address = np.frombuffer(view, np.uint8).ctypes.data
ctypes.memset(address, 9, 1)
"""
    done = subprocess.run([sys.executable, "-c", code], pass_fds=[memory], check=False)
    assert done.returncode == -signal.SIGSEGV
    assert map_readonly(memory, SIZE) == b"\x05" * SIZE


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_SEAL, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE])
def test_memory_without_every_seal_is_refused(missing: int) -> None:
    descriptor = create_memory("test", SIZE)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, ALL_SEALS & ~missing)
    with pytest.raises(ValueError, match="not sealed"):
        check_sealed(descriptor, SIZE)
    os.close(descriptor)


def test_other_descriptors_and_other_sizes_are_refused(memory: int) -> None:
    with pytest.raises(ValueError, match=f"{SIZE} bytes, not {SIZE + 1}"):
        check_sealed(memory, SIZE + 1)
    reading, writing = os.pipe()
    with pytest.raises(ValueError, match="no memfd"):
        check_sealed(reading, SIZE)
    close_all([reading, writing])


@pytest.mark.parametrize("count", [0, 1, 64, 65, 200])
def test_descriptors_pass_in_order(pair: tuple[socket.socket, socket.socket], memory: int, count: int) -> None:
    """They stand for the same files on both sides, pipes among them: the transport asks nothing of their kind."""
    ends = list(os.pipe())
    sent = [(memory, ends[0], ends[1])[i % 3] for i in range(count)]
    sizes = [2**40 + i for i in range(count)]
    sender = threading.Thread(target=send_descriptors, args=(pair[0], sent, sizes, 60.0))
    sender.start()
    received = receive_descriptors(pair[1], sizes, 60.0)
    sender.join()
    assert [os.fstat(fd).st_ino for fd in received] == [os.fstat(fd).st_ino for fd in sent]
    assert not any(os.get_inheritable(fd) for fd in received)
    close_all([*received, *ends])


def test_a_message_cut_into_bytes_is_put_together(pair: tuple[socket.socket, socket.socket], memory: int) -> None:
    payload = struct.pack("<2Q", 11, 22)

    def send() -> None:
        socket.send_fds(pair[0], [payload[:1]], [memory, memory])
        for byte in payload[1:]:
            pair[0].sendall(bytes([byte]))

    sender = threading.Thread(target=send)
    sender.start()
    received = receive_descriptors(pair[1], [11, 22], 60.0)
    sender.join()
    assert len(received) == 2
    close_all(received)


def refused(pair: tuple[socket.socket, socket.socket], sizes: list[int], why: str, seconds: float = 60.0) -> None:
    before = num_open()
    with pytest.raises(OSError, match=why):
        receive_descriptors(pair[1], sizes, seconds)
    assert num_open() == before, "descriptors that had come must be closed"


def test_what_a_receiver_refuses_leaves_nothing_open(pair: tuple[socket.socket, socket.socket], memory: int) -> None:
    socket.send_fds(pair[0], [struct.pack("<Q", 5)], [memory])
    refused(pair, [6], "other sizes")
    socket.send_fds(pair[0], [struct.pack("<Q", 5)], [memory] * 40)
    refused(pair, [5], "more descriptors")
    socket.send_fds(pair[0], [struct.pack("<2Q", 5, 5)], [memory])
    refused(pair, [5, 5], "1 descriptors came, not 2")
    refused(pair, [5], "timed out|too long", 0.2)
    socket.send_fds(pair[0], [struct.pack("<Q", 5)[:3]], [memory])
    refused(pair, [5], "timed out|too long", 0.2)
    socket.send_fds(pair[0], [struct.pack("<Q", 5)[:3]], [memory])
    pair[0].close()
    refused(pair, [5], "closed")


def test_a_receiver_that_does_not_read_ends_the_sending(
    pair: tuple[socket.socket, socket.socket], memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "MAX_DESCRIPTORS_PER_MESSAGE", 1)
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with pytest.raises(OSError, match=r"timed out|too long|Too many references"):
        send_descriptors(pair[0], [memory] * 4000, [SIZE] * 4000, 0.2)


def test_closing_goes_on_after_a_bad_descriptor(memory: int) -> None:
    copies = [fcntl.fcntl(memory, fcntl.F_DUPFD_CLOEXEC, 500) for _ in range(2)]  # numbers that no other thread gets
    close_all([copies[0], copies[0], copies[1]])
    for copy in copies:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(copy)


def test_no_memory_is_an_error_and_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    before = num_open()
    with contextlib.suppress(OSError):
        create_memory("test", SIZE)
        pytest.fail("memory that was refused was handed out")
    assert num_open() == before
