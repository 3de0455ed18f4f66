"""Weights in a GPU's memory: allocations with descriptors, filled from the files by the GPU itself.

Threads read pieces of the files into page-locked buffers and hash them for the digest. One thread copies each piece to
a window on the GPU and starts the kernels that check and repack what has become whole (`repack`), and, once an
allocation is filled, those that hash it; all in the order of one stream. The host holds the buffers and nothing else
of the weights, whatever the model (docs/decisions/022-loading-into-vram.md).
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event as Flag

import numpy as np
from numpy.typing import NDArray

from services.loader.cuda.kernels import HASH, Kernels, repack_module
from services.loader.cuda.reading import PieceReader, ReadPiece
from services.loader.cuda.repack import Repacking, Window, file_starts, repackings, window_bytes
from services.loader.cuda.stream import Event, Stream
from services.loader.memory import Filled
from shared import cuda_layout
from shared.cuda_memory import CudaDevice, create_shared, granularity, import_readonly, is_device_memory
from shared.descriptors import close_all
from shared.digest import PIECE_BYTES, StoppedError, check_pin, digest_of_pieces
from shared.errors import Reason, ServiceError
from shared.gguf import GGUFFile, check_unchanged
from shared.gpt_config import GPTConfig
from shared.layout import Plan, not_finite, round_up
from shared.manifest import Allocation

CHECKSUM_PIECE_BYTES = 16 << 10  # an allocation's pieces are hashed side by side, each by one thread of the GPU
SHA256_BYTES = 32
HASH_THREADS = 128
SPARE_BUFFERS = 8  # page-locked, of PIECE_BYTES, beside one for each thread that reads
NOTHING_FOUND = (2**64 - 1, 0)  # no block that is not finite, no value too large


class CudaMemory:
    """Memory of one GPU; implements `services.loader.memory.Memory`.

    Args:
        index: of the GPU.
        num_threads: that read and hash.
        cache: folder of compiled kernels; None is the user's own.

    Raises:
        ServiceError: FIELD_INVALID if the GPU can't be used.
    """

    def __init__(self, index: int, num_threads: int = 4, cache: Path | None = None) -> None:
        self._device = CudaDevice(index)
        self._kernels = Kernels(self._device, cache)
        self._num_threads = num_threads
        self.device = self._device.name
        self.driver_version = self._device.driver_version
        self.compute_capability = "{}.{}".format(*self._device.capability)

    def free_bytes(self) -> int:
        return self._device.free_bytes()

    def used_bytes(self) -> int:
        return self._device.used_bytes()

    def plan(self, file: GGUFFile, config: GPTConfig) -> Plan:
        return cuda_layout.plan(file, config)

    def require_free(self, planned: Plan, file: GGUFFile, what: str) -> None:
        self._device.use()
        step = granularity(self._device)
        weights = sum(round_up(size, step) for size in planned.allocation_sizes)
        needed = weights + round_up(window_bytes(planned, file), step) + round_up(_num_digest_bytes(planned), step)
        free = self.free_bytes()
        if needed > free:
            raise ServiceError(
                Reason.VRAM_EXHAUSTED,
                f"{what} needs {needed} bytes of {self.device}'s memory ({needed / 2**30:.2f} GiB) while it is loaded; "
                f"{free} ({free / 2**30:.2f} GiB) are free.",
                metadata={"needed_bytes": str(needed), "free_bytes": str(free)},
            )

    def fill(
        self, planned: Plan, file: GGUFFile, pins: Sequence[str], count: Callable[[int], None], stop: Flag
    ) -> Filled:
        self._device.use()
        descriptors: list[int] = []
        seconds = _Seconds()
        try:
            with ExitStack() as stack:
                pool = stack.enter_context(ThreadPoolExecutor(max(1, len(pins)), "pin"))
                stack.push(lambda kind, *_: stop.set() if kind else None)  # before the pool is waited for
                checks = [pool.submit(check_pin, *each, stop) for each in zip(file.paths, pins, strict=False)]
                addresses = self._allocate(planned, descriptors, stack)
                stream = stack.enter_context(Stream(self._device))
                filling = _Filling(self._kernels, stream, planned, file, addresses)
                buffers = [stream.pin(PIECE_BYTES) for _ in range(self._num_threads + SPARE_BUFFERS)]
                seconds.lap("allocate")
                with PieceReader(file, buffers, self._num_threads, stop) as reader:
                    hashes = filling.run(reader, [stream.event() for _ in buffers], count)
                stream.synchronize()
                seconds.lap("read, copy and repack")
                filling.refuse_found()
                checksums = filling.checksums()
                digest = digest_of_pieces(hashes)
                for check in checks:
                    check.result()
                check_unchanged(file)
                seconds.lap("check")
        except BaseException:
            close_all(descriptors)
            raise
        return Filled(tuple(descriptors), checksums, CHECKSUM_PIECE_BYTES, digest, seconds.laps)

    def verify(self, descriptor: int, allocation: Allocation, stop: Flag) -> None:
        if allocation.sha256_piece_bytes != CHECKSUM_PIECE_BYTES:
            raise ValueError(f"its SHA-256 is not of pieces of {CHECKSUM_PIECE_BYTES} bytes")
        if stop.is_set():
            raise StoppedError
        with self._imported(descriptor, allocation.num_bytes) as address, Stream(self._device) as stream:
            num_digest_bytes = _digest_bytes(allocation.num_bytes)
            digests = stream.allocate(num_digest_bytes)
            hash_on_gpu(self._kernels, stream, address, allocation.num_bytes, digests)
            out = np.empty(num_digest_bytes, np.uint8)
            stream.download(digests, out)
        if hashlib.sha256(out.data).hexdigest() != allocation.sha256:
            raise ValueError("the memory does not have the SHA-256 that was said")

    def is_resident(self, descriptor: int, allocation: Allocation) -> bool:
        try:
            with self._imported(descriptor, allocation.num_bytes) as address:
                return is_device_memory(self._device, address, allocation.num_bytes)
        except ValueError:
            return False

    @contextmanager
    def _imported(self, descriptor: int, num_bytes: int) -> Iterator[int]:
        """The address at which a descriptor's memory can be read."""
        self._device.use()
        try:
            mapping = import_readonly(self._device, descriptor, num_bytes)
        except ServiceError as error:
            raise ValueError(f"the descriptor is no memory of {self.device}: {error.message}") from None
        try:
            yield mapping.address
        finally:
            mapping.unmap()

    def _allocate(self, planned: Plan, descriptors: list[int], stack: ExitStack) -> dict[int, int]:
        """The addresses of new allocations, writable until the stack is closed; their descriptors go to the list."""
        addresses = {}
        for index, size in enumerate(planned.allocation_sizes):
            descriptor, mapping = create_shared(self._device, size)
            descriptors.append(descriptor)
            stack.callback(mapping.unmap)
            addresses[index] = mapping.address
        return addresses


class _Filling:
    """One model's way into its allocations."""

    def __init__(
        self, kernels: Kernels, stream: Stream, planned: Plan, file: GGUFFile, addresses: Mapping[int, int]
    ) -> None:
        self._kernels, self._stream = kernels, stream
        self._plan, self._file, self._addresses = planned, file, addresses
        num_bytes = window_bytes(planned, file)
        self._window = Window(stream.allocate(num_bytes), num_bytes)
        self._digests = stream.allocate(_num_digest_bytes(planned))
        self._found = stream.allocate(16 * len(planned.tensors))
        stream.upload(self._found, np.tile(np.array(NOTHING_FOUND, np.uint64), len(planned.tensors)).view(np.uint8))
        for index, size in enumerate(planned.allocation_sizes):
            stream.clear(addresses[index], size)
        self._starts = file_starts(file)
        self._todo = deque(repackings(planned, file, addresses, self._window, self._found))
        self._active: list[Repacking] = []
        self._num_left = Counter(tensor.planes[0].allocation for tensor in planned.tensors.values())

    def run(self, reader: PieceReader, events: Sequence[Event], count: Callable[[int], None]) -> list[bytes]:
        """Put everything on the stream, as fast as it is read and buffers become free; the pieces' SHA-256s."""
        hashes = []
        free, copied = list(events), deque[tuple[Event, NDArray[np.uint8]]]()
        for future in reader:
            while copied and (not future.done() or copied[0][0].is_done):
                event, buffer = copied.popleft()
                event.wait()
                reader.release(buffer)
                free.append(event)
            read = future.result()
            hashes.append(read.sha256)
            if self._take(read, count):
                event = free.pop()
                event.record()
                copied.append((event, read.buffer))
            else:
                reader.release(read.buffer)
        return hashes

    def checksums(self) -> list[str]:
        """Of each allocation the SHA-256 over the SHA-256s of its pieces."""
        out = np.empty(_num_digest_bytes(self._plan), np.uint8)
        self._stream.download(self._digests, out)
        checksums, start = [], 0
        for size in self._plan.allocation_sizes:
            checksums.append(hashlib.sha256(out.data[start : start + _digest_bytes(size)]).hexdigest())
            start += _digest_bytes(size)
        return checksums

    def refuse_found(self) -> None:
        """Raise MODEL_INVALID, as `cuda_layout.fill` does, if the kernels came upon a weight that can't be served."""
        found = np.empty((len(self._plan.tensors), 2), np.uint64)
        self._stream.download(self._found, found)
        error = refusal(self._file, list(self._plan.tensors), found)
        if error is not None:
            raise error

    def _take(self, read: ReadPiece, count: Callable[[int], None]) -> bool:
        """Copy a piece and use what it completes; False if no tensor has bytes of it."""
        piece = read.piece
        start = self._starts[piece.file_index] + piece.offset
        end = start + piece.num_bytes
        while self._todo and self._todo[0].start < end:
            self._active.append(self._todo.popleft())
        if not self._active:
            return False
        self._stream.upload(self._window.place(start), read.buffer[: piece.num_bytes])
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
        return True

    def _finish(self, repacking: Repacking) -> None:
        """A tensor is placed; if its allocation is filled, hash it."""
        index = repacking.tensor.planes[0].allocation
        self._num_left[index] -= 1
        if self._num_left[index] == 0:
            sizes = self._plan.allocation_sizes
            digests = self._digests + sum(_digest_bytes(size) for size in sizes[:index])
            hash_on_gpu(self._kernels, self._stream, self._addresses[index], sizes[index], digests)


class _Seconds:
    """How long the phases of a load take."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def refusal(
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


def hash_on_gpu(kernels: Kernels, stream: Stream, address: int, num_bytes: int, digests: int) -> None:
    """Put on a stream: the SHA-256 of every piece of memory, to (pieces, 32) bytes at `digests`."""
    num_pieces = _digest_bytes(num_bytes) // SHA256_BYTES
    arguments = (address, digests, num_bytes, CHECKSUM_PIECE_BYTES)
    kernels.launch(stream, HASH, "sha256", num_pieces, arguments, HASH_THREADS)


def _digest_bytes(num_bytes: int) -> int:
    """Of the SHA-256s of an allocation's pieces."""
    return SHA256_BYTES * -(-num_bytes // CHECKSUM_PIECE_BYTES)


def _num_digest_bytes(planned: Plan) -> int:
    return sum(_digest_bytes(size) for size in planned.allocation_sizes)
