"""Weights in a GPU's memory: allocations with descriptors, filled from the files by the GPU itself.

Threads read the files into page-locked buffers. One thread copies what they read to a window on the GPU and starts the
kernels that hash it for the files' digest, check and repack what has become whole (`repack`), and, once an allocation
is filled, hash that (`filling`); all in the order of one stream. The host holds the buffers and nothing else of the
weights, whatever the model (docs/decisions/022-loading-into-vram.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event

import numpy as np

from services.loader.cuda.filling import Filling, scratch_bytes
from services.loader.cuda.hashing import hash_on_gpu, num_digest_bytes
from services.loader.cuda.kernels import Kernels
from services.loader.cuda.reading import SpanReader
from services.loader.cuda.stream import Stream, pin
from services.loader.memory import Filled
from shared import cuda_layout
from shared.cuda_estimate import estimate_serving
from shared.cuda_memory import CudaDevice, create_shared, granularity, import_readonly, is_device_memory
from shared.descriptors import close_all
from shared.digest import PIECE_BYTES, READ_BYTES, StoppedError, check_pin
from shared.errors import Reason, ServiceError
from shared.gguf import GGUFFile, check_unchanged
from shared.gpt_config import GPTConfig
from shared.layout import Plan, round_up
from shared.manifest import Allocation
from shared.memory import MemoryEstimate
from shared.phases import Phases

SPARE_BUFFERS = 8  # page-locked, of READ_BYTES, beside one for each thread that reads


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
        # Once, as it takes longer than to read what they hold; models are loaded one after another.
        pinned = pin(self._device, (num_threads + SPARE_BUFFERS) * READ_BYTES)
        self._buffers = np.split(pinned, num_threads + SPARE_BUFFERS)
        self.device = self._device.name
        self.driver_version = self._device.driver_version
        self.compute_capability = "{}.{}".format(*self._device.capability)

    def free_bytes(self) -> int:
        return self._device.free_bytes()

    def used_bytes(self) -> int:
        return self._device.used_bytes()

    def plan(self, file: GGUFFile, config: GPTConfig) -> Plan:
        return cuda_layout.plan(file, config)

    def estimate(self, config: GPTConfig, planned: Plan, context_length: int, num_sequences: int) -> MemoryEstimate:
        return estimate_serving(config, planned, context_length, num_sequences)

    def require_free(self, planned: Plan, file: GGUFFile, what: str) -> None:
        self._device.use()
        step = granularity(self._device)
        weights = sum(round_up(size, step) for size in planned.allocation_sizes)
        needed = weights + round_up(scratch_bytes(planned, file), step)
        free = self.free_bytes()
        if needed > free:
            raise ServiceError(
                Reason.VRAM_EXHAUSTED,
                f"{what} needs {needed} bytes of {self.device}'s memory ({needed / 2**30:.2f} GiB) while it is loaded; "
                f"{free} ({free / 2**30:.2f} GiB) are free.",
                metadata={"needed_bytes": str(needed), "free_bytes": str(free)},
            )

    def fill(
        self,
        planned: Plan,
        file: GGUFFile,
        pins: Sequence[str],
        count: Callable[[int], None],
        stop: Event,
        phases: Phases,
    ) -> Filled:
        self._device.use()
        descriptors: list[int] = []
        try:
            with ExitStack() as stack:
                pool = stack.enter_context(ThreadPoolExecutor(max(1, len(pins)), "pin"))
                stack.push(lambda kind, *_: stop.set() if kind else None)  # before the pool is waited for
                checks = [pool.submit(check_pin, *each, stop) for each in zip(file.paths, pins, strict=False)]
                addresses = self._allocate(planned, descriptors, stack)
                stream = stack.enter_context(Stream(self._device))
                filling = Filling(self._kernels, stream, planned, file, addresses)
                phases.lap("allocate")
                with SpanReader(file, self._buffers, self._num_threads, stop) as reader:
                    filling.run(reader, [stream.event() for _ in self._buffers], count)
                phases.lap("read, copy, repack and hash")
                refusal = filling.refusal()
                if refusal is not None:
                    raise refusal
                checksums, digest = filling.hashes()
                for check in checks:
                    check.result()
                check_unchanged(file)
                phases.lap("check")
        except BaseException:
            close_all(descriptors)
            raise
        return Filled(tuple(descriptors), checksums, PIECE_BYTES, digest)

    def verify(self, descriptor: int, allocation: Allocation, stop: Event) -> None:
        if allocation.sha256_piece_bytes != PIECE_BYTES:
            raise ValueError(f"its SHA-256 is not of pieces of {PIECE_BYTES} bytes")
        if stop.is_set():
            raise StoppedError
        with self._imported(descriptor, allocation.num_bytes) as address, Stream(self._device) as stream:
            hashes = np.empty(num_digest_bytes(allocation.num_bytes), np.uint8)
            digests = stream.allocate(hashes.nbytes)
            hash_on_gpu(self._kernels, stream, address, allocation.num_bytes, digests)
            stream.download(digests, hashes)
        if hashlib.sha256(hashes.data).hexdigest() != allocation.sha256:
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
