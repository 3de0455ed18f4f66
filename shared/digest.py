"""A model's identity: SHA-256 over the SHA-256s of its files' 16 KiB pieces, which many threads can compute.

The pieces are so small that a GPU has a thread for each (services/loader/cuda/kernels/sha256.cu): sixteen cores hash
10 GB/s, a fifth of what they read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from threading import Event

from shared.errors import Reason, ServiceError
from shared.gguf import GGUFFile, check_unchanged

PIECE_BYTES = 16 << 10
READ_BYTES = 4 << 20  # read at once, a whole number of pieces


class StoppedError(Exception):
    """Nobody waits for the load any more."""


class FileHashes:
    """The hashes of a model's files, computed by threads of its own from now on; close it, or use it as a context.

    Args:
        file: the files, as they were when parsed.
        pins: the plain SHA-256 expected of each file, in order; empty to expect nothing.
        stop: set to give up.
    """

    def __init__(self, file: GGUFFile, pins: Sequence[str], num_threads: int, stop: Event) -> None:
        assert len(pins) in (0, len(file.paths))
        self._file = file
        self._pool = ThreadPoolExecutor(num_threads, "hash")
        # A pin is one hash over a whole file, sequential by nature, so it starts first.
        self._pins = [
            self._pool.submit(check_pin, path, pin, stop) for path, pin in zip(file.paths, pins, strict=False)
        ]
        self._pieces = [
            self._pool.submit(_hash_range, path, offset, min(READ_BYTES, size - offset), stop)
            for path, size in zip(file.paths, file.file_sizes, strict=True)
            for offset in range(0, size, READ_BYTES)
        ]

    def __enter__(self) -> FileHashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def result(self) -> str:
        """The digest, once all is hashed and the files are still those that were parsed.

        Raises:
            ServiceError: MODEL_CHANGED if a file has changed or misses its pin.
            StoppedError: if the stop was set.
        """
        for pin in self._pins:
            pin.result()
        digest = digest_of_pieces(piece.result() for piece in self._pieces)
        check_unchanged(self._file)
        return digest


def digest_of(file: GGUFFile, pins: Sequence[str], num_threads: int, stop: Event) -> str:
    """The digest of a model's files, read for nothing else; arguments and errors as `FileHashes`."""
    with FileHashes(file, pins, num_threads, stop) as hashes:
        return hashes.result()


def digest_of_pieces(hashes: Iterable[bytes | memoryview]) -> str:
    """The digest of files of whose pieces these are the SHA-256s, in order, any number of them in one."""
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def hash_pieces(data: memoryview) -> bytes:
    """The SHA-256s of the pieces of bytes that begin at a piece's beginning."""
    starts = range(0, data.nbytes, PIECE_BYTES)
    return b"".join(hashlib.sha256(data[start : start + PIECE_BYTES]).digest() for start in starts)


def check_pin(path: Path, pin: str, stop: Event) -> None:
    """Read a file, and refuse it unless it has this plain SHA-256.

    Raises:
        ServiceError: MODEL_CHANGED.
        StoppedError: if the stop was set.
    """
    sha256 = plain_sha256(path, stop)
    if sha256 != pin:
        raise _changed(path, f"has SHA-256 {sha256}, not {pin} as pinned")


def plain_sha256(path: Path, stop: Event) -> str:
    """A file's SHA-256 as sha256sum prints it: sequential, some 2 GB a second.

    Raises:
        ServiceError: MODEL_CHANGED if it can't be opened.
        StoppedError: if the stop was set.
    """
    hasher = hashlib.sha256()
    with _open(path) as file:
        while data := file.read(READ_BYTES):
            if stop.is_set():
                raise StoppedError
            hasher.update(data)
    return hasher.hexdigest()


def _hash_range(path: Path, offset: int, num_bytes: int, stop: Event) -> bytes:
    if stop.is_set():
        raise StoppedError
    data = memoryview(bytearray(num_bytes))
    with _open(path) as file:
        num_read = 0
        while num_read < num_bytes:
            count = os.preadv(file.fileno(), [data[num_read:]], offset + num_read)
            if not count:
                raise _changed(path, "has shrunk while it was read")
            num_read += count
    return hash_pieces(data)


def _open(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise _changed(path, f"can't be opened any more: {error.strerror}") from None


def _changed(path: Path, why: str) -> ServiceError:
    return ServiceError(Reason.MODEL_CHANGED, f"{path}: the file {why}.", metadata={"file": str(path)})
