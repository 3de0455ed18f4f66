"""Pieces of a model's files, in order, read and hashed by several threads ahead of whoever takes them.

Each piece is `PIECE_BYTES` long (the last of a file is shorter) and begins at a multiple of it, so that its SHA-256 is
one of those that the model's digest is made of. A thread that has a free buffer takes the next piece; so the piece
that is waited for is always being read, whatever the others do.
"""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Event, Lock
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from shared.digest import PIECE_BYTES, StoppedError
from shared.gguf import GGUFFile, open_unchanged, read_at


@dataclass(frozen=True)
class Piece:
    """Bytes of a file."""

    file_index: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class ReadPiece:
    """A piece in a buffer, which `PieceReader.release` takes back."""

    piece: Piece
    buffer: NDArray[np.uint8]  # (PIECE_BYTES,), the first `num_bytes` of it
    sha256: bytes


def pieces_of(file: GGUFFile) -> Sequence[Piece]:
    """All pieces of a model's files, in order."""
    return [
        Piece(index, offset, min(PIECE_BYTES, size - offset))
        for index, size in enumerate(file.file_sizes)
        for offset in range(0, size, PIECE_BYTES)
    ]


class PieceReader:
    """Reads all pieces of a model's files; a context manager, which ends its threads.

    Args:
        buffers: each (PIECE_BYTES,); at least one for each thread and some for whoever takes pieces.
        stop: set to give up.
    """

    def __init__(self, file: GGUFFile, buffers: Sequence[NDArray[np.uint8]], num_threads: int, stop: Event) -> None:
        self._file = file
        self._pieces = pieces_of(file)
        self._stop = stop
        self._futures: list[Future[ReadPiece]] = [Future() for _ in self._pieces]
        self._free: queue.SimpleQueue[NDArray[np.uint8] | None] = queue.SimpleQueue()
        self._next = iter(range(len(self._pieces)))
        self._lock = Lock()
        self._files = ExitStack()
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, "read")
        for buffer in buffers:
            self._free.put(buffer)

    def __enter__(self) -> PieceReader:
        """
        Raises:
            ServiceError: MODEL_CHANGED if a file is not the one that was parsed.
        """
        indices = range(len(self._file.paths))
        self._descriptors = [self._files.enter_context(open_unchanged(self._file, index)) for index in indices]
        for _ in range(self._num_threads):
            self._pool.submit(self._read_all)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stop.set()
        for _ in range(self._num_threads):
            self._free.put(None)
        self._pool.shutdown(wait=True)
        self._files.close()

    def __iter__(self) -> Iterator[Future[ReadPiece]]:
        """Of each piece in order a future, which has the piece or raises what went wrong with it."""
        return iter(self._futures)

    def release(self, buffer: NDArray[np.uint8]) -> None:
        """Nobody needs what is in a buffer any more."""
        self._free.put(buffer)

    def _read_all(self) -> None:
        while True:
            buffer = self._free.get()
            with self._lock:
                index = next(self._next, None)
            if buffer is None or index is None:
                return
            try:
                self._futures[index].set_result(self._read(self._pieces[index], buffer))
            except BaseException as error:
                self._futures[index].set_exception(error)
                return

    def _read(self, piece: Piece, buffer: NDArray[np.uint8]) -> ReadPiece:
        if self._stop.is_set():
            raise StoppedError
        descriptor = self._descriptors[piece.file_index]
        target = buffer.data[: piece.num_bytes]
        read_at(self._file, piece.file_index, descriptor, target, piece.offset)
        return ReadPiece(piece, buffer, hashlib.sha256(target).digest())
