"""A model's files in spans, in order, read by several threads ahead of whoever takes them.

Each span is `READ_BYTES` long (the last of a file is shorter) and begins at a multiple of it. A thread that has a free
buffer takes the next span; so the span that is waited for is always being read, whatever the others do.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Event, Lock
from types import TracebackType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from shared.digest import READ_BYTES, StoppedError
from shared.gguf import GGUFFile, open_unchanged, read_at

Buffer: TypeAlias = NDArray[np.uint8]  # (READ_BYTES,)


@dataclass(frozen=True)
class Span:
    """Bytes of a file."""

    file_index: int
    offset: int
    num_bytes: int


def spans_of(file: GGUFFile) -> Sequence[Span]:
    """All spans of a model's files, in order."""
    return [
        Span(index, offset, min(READ_BYTES, size - offset))
        for index, size in enumerate(file.file_sizes)
        for offset in range(0, size, READ_BYTES)
    ]


class SpanReader:
    """Reads all spans of a model's files; a context manager, which ends its threads.

    Args:
        buffers: each (READ_BYTES,); at least one for each thread and some for whoever takes spans.
        stop: set to give up.
    """

    def __init__(self, file: GGUFFile, buffers: Sequence[Buffer], num_threads: int, stop: Event) -> None:
        self._file = file
        self._spans = spans_of(file)
        self._stop = stop
        self._futures: list[Future[Buffer]] = [Future() for _ in self._spans]
        self._free: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        self._next = iter(range(len(self._spans)))
        self._lock = Lock()
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, "read")
        for buffer in buffers:
            self._free.put(buffer)

    def __enter__(self) -> SpanReader:
        """
        Raises:
            ServiceError: MODEL_CHANGED if a file is not the one that was parsed.
        """
        with ExitStack() as files:
            indices = range(len(self._file.paths))
            self._descriptors = [files.enter_context(open_unchanged(self._file, index)) for index in indices]
            self._files = files.pop_all()
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

    def __iter__(self) -> Iterator[tuple[Span, Future[Buffer]]]:
        """Of each span in order a future, which has the buffer that it begins in or raises what went wrong with it."""
        return zip(self._spans, self._futures, strict=True)

    def release(self, buffer: Buffer) -> None:
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
                self._futures[index].set_result(self._read(self._spans[index], buffer))
            except BaseException as error:
                self._futures[index].set_exception(error)
                return

    def _read(self, span: Span, buffer: Buffer) -> Buffer:
        if self._stop.is_set():
            raise StoppedError
        descriptor = self._descriptors[span.file_index]
        read_at(self._file, span.file_index, descriptor, buffer.data[: span.num_bytes], span.offset)
        return buffer
