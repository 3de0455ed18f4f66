"""One model's way from its files into its allocations on a GPU, on one stream and from one thread."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from services.loader.cuda.hashing import SHA256_BYTES, hash_on_gpu, num_digest_bytes
from services.loader.cuda.kernels import Kernels, repack_module
from services.loader.cuda.reading import Buffer, Span, SpanReader
from services.loader.cuda.repack import Repacking, Window, file_starts, repackings, window_bytes
from services.loader.cuda.stream import Event, Stream
from shared import cuda_layout
from shared.digest import PIECE_BYTES, READ_BYTES, digest_of_pieces, hash_pieces
from shared.errors import ServiceError
from shared.gguf import GGUFFile, open_unchanged, read_at
from shared.layout import Plan, not_finite, round_up

NOTHING_FOUND = (2**64 - 1, 0)  # no block that is not finite, no value too large
HASH_BYTES = 64 << 20  # of the stream, hashed at once: enough threads for every multiprocessor


class Filling:
    """Copies what is read, repacks and checks what becomes whole, hashes it all.

    Args:
        stream: which the memory that this needs beside the allocations is freed with.
        addresses: of each allocation.
    """

    def __init__(
        self, kernels: Kernels, stream: Stream, planned: Plan, file: GGUFFile, addresses: Mapping[int, int]
    ) -> None:
        self._kernels, self._stream = kernels, stream
        self._plan, self._file, self._addresses = planned, file, addresses
        num_bytes = window_bytes(planned, file)
        self._window = Window(stream.allocate(num_bytes), num_bytes)
        self._file_digests = stream.allocate(num_digest_bytes(_stream_bytes(file)))
        self._digests = stream.allocate(sum(map(num_digest_bytes, planned.allocation_sizes)))
        self._found = stream.allocate(16 * len(planned.tensors))
        stream.upload(self._found, np.tile(np.array(NOTHING_FOUND, np.uint64), len(planned.tensors)).view(np.uint8))
        for index, size in enumerate(planned.allocation_sizes):
            stream.clear(addresses[index], size)
        self._starts = file_starts(file)
        self._hashed = 0  # of the stream
        self._todo = deque(repackings(planned, file, addresses, self._window, self._found))
        self._active: list[Repacking] = []
        self._num_left = Counter(tensor.planes[0].allocation for tensor in planned.tensors.values())

    def run(self, reader: SpanReader, events: Sequence[Event], count: Callable[[int], None]) -> None:
        """Put everything on the stream as fast as it is read and buffers become free again; complete when it returns.

        Args:
            events: as many as the reader has buffers.
            count: called with the number of file bytes that are on their way.
        """
        free, copied = list(events), deque[tuple[Event, Buffer]]()
        for span, future in reader:
            while copied and (not future.done() or copied[0][0].is_done):
                event, buffer = copied.popleft()
                event.wait()
                reader.release(buffer)
                free.append(event)
            buffer = future.result()
            end = self._copy(span, buffer)
            event = free.pop()
            event.record()
            copied.append((event, buffer))
            self._hash_stream(end, HASH_BYTES)
            self._repack(end, count)
        self._hash_stream(_stream_bytes(self._file), 1)
        self._stream.synchronize()

    def refusal(self) -> ServiceError | None:
        """What the kernels found wrong with weights."""
        found = np.empty((len(self._plan.tensors), 2), np.uint64)
        self._stream.download(self._found, found)
        return refusal_of(self._file, list(self._plan.tensors), found)

    def hashes(self) -> tuple[list[str], str]:
        """Of each allocation the SHA-256 over the SHA-256s of its pieces; and the files' digest."""
        ends = np.cumsum([num_digest_bytes(size) for size in self._plan.allocation_sizes])
        of_allocations = np.empty(int(ends[-1]), np.uint8)
        of_files = np.empty(num_digest_bytes(_stream_bytes(self._file)), np.uint8)
        self._stream.download(self._digests, of_allocations)
        self._stream.download(self._file_digests, of_files)
        with ThreadPoolExecutor(1, "digest") as pool:
            digest = pool.submit(self._digest, of_files)
            parts = np.split(of_allocations, ends[:-1])
            return [hashlib.sha256(part.data).hexdigest() for part in parts], digest.result()

    def _digest(self, hashes: NDArray[np.uint8]) -> str:
        """The last piece of each file, which may be shorter, is hashed here."""
        parts: list[bytes | memoryview] = []
        for index, (start, size) in enumerate(zip(self._starts, self._file.file_sizes, strict=True)):
            first, num_whole = start // PIECE_BYTES, size // PIECE_BYTES
            parts.append(hashes.data[SHA256_BYTES * first : SHA256_BYTES * (first + num_whole)])
            parts.append(hash_pieces(_read(self._file, index, num_whole * PIECE_BYTES)))
        return digest_of_pieces(parts)

    def _copy(self, span: Span, buffer: Buffer) -> int:
        """Copy a span to its place in the window; where in the stream it ends."""
        start = self._starts[span.file_index] + span.offset
        self._stream.upload(self._window.place(start), buffer[: span.num_bytes])
        return start + span.num_bytes

    def _hash_stream(self, end: int, at_least: int) -> None:
        """Hash what has come of the stream since this was last done, if there is so much of it.

        Parts begin at multiples of HASH_BYTES, of which the window is one, so that none wraps around.
        """
        if end - self._hashed >= at_least:
            num_bytes = min(end - self._hashed, HASH_BYTES)
            digests = self._file_digests + num_digest_bytes(self._hashed)
            hash_on_gpu(self._kernels, self._stream, self._window.place(self._hashed), num_bytes, digests)
            self._hashed += num_bytes

    def _repack(self, end: int, count: Callable[[int], None]) -> None:
        """Repack what has become whole now that the stream has come to `end`."""
        while self._todo and self._todo[0].start < end:
            self._active.append(self._todo.popleft())
        for each in self._active:
            before = each.bytes_done
            launch = each.advance(end)
            if launch is not None:
                module = repack_module(launch.type)
                self._kernels.launch(self._stream, module, launch.kernel, launch.num_threads, launch.arguments)
            count(each.bytes_done - before)
            if each.is_done:
                self._finish(each)
        self._active = [each for each in self._active if not each.is_done]

    def _finish(self, repacking: Repacking) -> None:
        """A tensor is placed; if its allocation is filled, hash that."""
        index = repacking.tensor.planes[0].allocation
        self._num_left[index] -= 1
        if self._num_left[index] == 0:
            sizes = self._plan.allocation_sizes
            digests = self._digests + sum(map(num_digest_bytes, sizes[:index]))
            hash_on_gpu(self._kernels, self._stream, self._addresses[index], sizes[index], digests)


def scratch_bytes(planned: Plan, file: GGUFFile) -> int:
    """Of GPU memory that a filling takes beside the allocations."""
    digests = sum(map(num_digest_bytes, (*planned.allocation_sizes, _stream_bytes(file))))
    return window_bytes(planned, file) + digests + 16 * len(planned.tensors)


def refusal_of(
    file: GGUFFile,
    names: Sequence[str],
    found: NDArray[np.uint64],  # (len(names), 2), as kernels leave it
) -> ServiceError | None:
    """The error (to be raised) for the first tensor with weights that can't be served; None if all can."""
    for name, (block, largest) in zip(names, found.tolist(), strict=True):
        if block != NOTHING_FOUND[0]:
            return not_finite(file, file.tensors[name], block)
        if largest != NOTHING_FOUND[1]:
            return cuda_layout.too_large(name, float(np.uint32(largest).view(np.float32)))
    return None


def _stream_bytes(file: GGUFFile) -> int:
    """Of the whole stream; what lies between the end of a file and the beginning of the next means nothing."""
    return sum(round_up(size, READ_BYTES) for size in file.file_sizes)


def _read(file: GGUFFile, index: int, offset: int) -> memoryview:
    """The bytes of a file from an offset to its end."""
    data = memoryview(bytearray(file.file_sizes[index] - offset))
    with open_unchanged(file, index) as descriptor:
        read_at(file, index, descriptor, data, offset)
    return data
