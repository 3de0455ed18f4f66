"""Weights in a GPU's memory: allocations with descriptors, filled from the host one layer at a time by each thread.

A layer is read, checked and repacked in a buffer of the host, hashed there, copied, and let go; so at no time does the
host hold more than `HOST_BYTES` of weights, whatever the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np

from shared import cuda_layout
from shared.cuda_memory import CudaDevice, copy_from_device, copy_to_device, create_shared, granularity, import_readonly
from shared.descriptors import close_all
from shared.digest import StoppedError
from shared.errors import Reason, ServiceError
from shared.gguf import GGUFFile
from shared.gpt_config import GPTConfig
from shared.layout import Plan, round_up
from shared.manifest import Allocation

HOST_BYTES = 1 << 30  # of all threads' buffers; one may take three times what it holds while it repacks
REPACKING = 3
PIECE_BYTES = 64 << 20  # read back at once


class CudaMemory:
    """Memory of one GPU; implements `services.loader.memory.Memory`.

    Args:
        index: of the GPU.
        num_threads: that read and repack, where layers are small enough for so many.

    Raises:
        ServiceError: FIELD_INVALID if the GPU can't be used.
    """

    def __init__(self, index: int, num_threads: int = 4) -> None:
        self._device = CudaDevice(index)
        self._num_threads = num_threads
        self.device = self._device.name
        self.driver_version = self._device.driver_version
        self.compute_capability = "{}.{}".format(*self._device.capability)

    def free_bytes(self) -> int:
        return self._device.free_bytes()

    def plan(self, file: GGUFFile, config: GPTConfig) -> Plan:
        return cuda_layout.plan(file, config)

    def require_free(self, planned: Plan, file: GGUFFile, what: str) -> None:
        self._device.use()
        step = granularity(self._device)
        needed, free = sum(round_up(size, step) for size in planned.allocation_sizes), self.free_bytes()
        if needed > free:
            raise ServiceError(
                Reason.VRAM_EXHAUSTED,
                f"{what} needs {needed} bytes of {self.device}'s memory ({needed / 2**30:.2f} GiB); "
                f"{free} ({free / 2**30:.2f} GiB) are free.",
                metadata={"needed_bytes": str(needed), "free_bytes": str(free)},
            )

    def fill(
        self, planned: Plan, file: GGUFFile, count: Callable[[int], None], stop: Event
    ) -> tuple[tuple[int, ...], list[str]]:
        descriptors: dict[int, int] = {}

        def load(index: int) -> str:
            if stop.is_set():
                raise StoppedError
            self._device.use()
            size = planned.allocation_sizes[index]
            descriptors[index], mapping = create_shared(self._device, size)
            try:
                buffer = bytearray(size)
                with memoryview(buffer) as view:
                    cuda_layout.fill(planned, file, index, view, count)
                copy_to_device(self._device, mapping.address, np.frombuffer(buffer, np.uint8))
            finally:
                mapping.unmap()
            return hashlib.sha256(buffer).hexdigest()

        indices = range(len(planned.allocation_sizes))
        at_once = HOST_BYTES // (REPACKING * max(planned.allocation_sizes))
        with ThreadPoolExecutor(max(1, min(self._num_threads, at_once)), "fill") as pool:
            try:
                checksums = list(pool.map(load, indices))
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                close_all(descriptors.values())
                raise
        return tuple(descriptors[index] for index in indices), checksums

    def verify(self, descriptor: int, allocation: Allocation, stop: Event) -> None:
        self._device.use()
        try:
            mapping = import_readonly(self._device, descriptor, allocation.num_bytes)
        except ServiceError as error:
            raise ValueError(f"the descriptor is no memory of {self.device}: {error.message}") from None
        hasher = hashlib.sha256()
        piece = np.empty(min(PIECE_BYTES, allocation.num_bytes), np.uint8)
        try:
            for start in range(0, allocation.num_bytes, PIECE_BYTES):
                if stop.is_set():
                    raise StoppedError
                part = piece[: min(PIECE_BYTES, allocation.num_bytes - start)]
                copy_from_device(self._device, mapping.address + start, part)
                hasher.update(part.data)
        finally:
            mapping.unmap()
        if hasher.hexdigest() != allocation.sha256:
            raise ValueError("the memory does not have the SHA-256 that was said")
