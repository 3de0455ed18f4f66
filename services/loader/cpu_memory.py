"""Weights in the host's memory: memfds, filled one tensor at a time by each thread, then sealed."""

from __future__ import annotations

import errno
import hashlib
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

from services.loader import host_memory
from services.loader.host_memory import memory_exhausted
from services.loader.memory import Filled
from shared.descriptors import check_sealed, close_all, create_memory, map_readonly, map_writable, seal
from shared.digest import FileHashes, StoppedError
from shared.gguf import GGUFFile
from shared.gpt_config import GPTConfig
from shared.layout import FLOAT32_BUDGET, Plan, fill, plan
from shared.manifest import WHOLE, Allocation
from shared.memory import MemoryEstimate, estimate_memory
from shared.phases import Phases

WORKING_BYTES = 64 << 20  # of each thread beside the tensor that it reads: decoded rows, checks


@dataclass(frozen=True)
class CpuMemory:
    """Sealed memfds; implements `services.loader.memory.Memory`."""

    num_threads: int = 4
    float32_budget: int = FLOAT32_BUDGET
    device: str = "cpu"
    driver_version: str = ""
    compute_capability: str = ""

    def free_bytes(self) -> int:
        return host_memory.free_bytes()

    def used_bytes(self) -> int:
        return 0

    def plan(self, file: GGUFFile, config: GPTConfig) -> Plan:
        return plan(file, config, self.float32_budget)

    def estimate(self, config: GPTConfig, planned: Plan, context_length: int, num_sequences: int) -> MemoryEstimate:
        return estimate_memory(config, planned, context_length, num_sequences)

    def require_free(self, planned: Plan, file: GGUFFile, what: str) -> None:
        host_memory.require_free(planned.num_bytes + _working_bytes(planned, file, self.num_threads), what)

    def fill(
        self,
        planned: Plan,
        file: GGUFFile,
        pins: Sequence[str],
        count: Callable[[int], None],
        stop: Event,
        phases: Phases,
    ) -> Filled:
        filling = _Filling(planned, file, count, stop)
        with FileHashes(file, pins, self.num_threads, stop) as hashes:
            checksums = filling.run(self.num_threads)
            phases.lap("fill")
            try:
                digest = hashes.result()
            except BaseException:
                close_all(filling.descriptors)
                raise
            phases.lap("hash")
        return Filled(filling.descriptors, checksums, WHOLE, digest)

    def verify(self, descriptor: int, allocation: Allocation, stop: Event) -> None:
        check_sealed(descriptor, allocation.num_bytes)
        if allocation.sha256_piece_bytes != WHOLE:
            raise ValueError(f"its SHA-256 is of pieces of {allocation.sha256_piece_bytes} bytes, not of the whole")
        if _hash_allocation(descriptor, allocation.num_bytes, stop) != allocation.sha256:
            raise ValueError("the memory does not have the SHA-256 that was said")

    def is_resident(self, descriptor: int, allocation: Allocation) -> bool:
        try:
            check_sealed(descriptor, allocation.num_bytes)
        except ValueError:
            return False
        return True


class _Filling:
    """The allocations of one model, from zeros to sealed weights; its methods run in several threads."""

    def __init__(self, planned: Plan, file: GGUFFile, count: Callable[[int], None], stop: Event) -> None:
        self._plan = planned
        self._file = file
        self._count = count
        self._stop = stop
        self._descriptors: dict[int, int] = {}

    @property
    def descriptors(self) -> tuple[int, ...]:
        return tuple(self._descriptors[index] for index in sorted(self._descriptors))

    def run(self, num_threads: int) -> list[str]:
        """Make every allocation final; returns the SHA-256 of the contents of each. If one fails, all are freed."""
        with ThreadPoolExecutor(num_threads, "fill") as pool:
            try:
                return list(pool.map(self._fill_and_seal, range(len(self._plan.allocation_sizes))))
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                close_all(self._descriptors.values())
                self._descriptors.clear()
                raise

    def _fill_and_seal(self, index: int) -> str:
        size = self._plan.allocation_sizes[index]
        descriptor = self._descriptors[index] = self._create(index, size)
        mapping = map_writable(descriptor, size)
        buffer = memoryview(mapping)
        try:
            fill(self._plan, self._file, index, buffer, self._count)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold arrays over the buffer
            raise
        finally:
            buffer.release()
            mapping.close()
        seal(descriptor)
        return _hash_allocation(descriptor, size, self._stop)

    def _create(self, index: int, size: int) -> int:
        if self._stop.is_set():
            raise StoppedError
        try:
            return create_memory(f"mxgpt-weights-{index}", size)
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.ENOSPC):
                raise
            raise memory_exhausted(size, host_memory.free_bytes(), f"allocation {index}") from None


def _hash_allocation(descriptor: int, num_bytes: int, stop: Event) -> str:
    hasher = hashlib.sha256()
    with map_readonly(descriptor, num_bytes) as memory:
        for start in range(0, num_bytes, 64 << 20):
            if stop.is_set():
                raise StoppedError
            with memory[start : start + (64 << 20)] as piece:
                hasher.update(piece)
    return hasher.hexdigest()


def _working_bytes(planned: Plan, file: GGUFFile, num_threads: int) -> int:
    """Bound of what the threads hold at once beside the planes: the file's bytes of a tensor each, and its rows."""
    largest: dict[int, int] = {}
    for name, tensor in planned.tensors.items():
        allocation = tensor.planes[0].allocation
        largest[allocation] = max(largest.get(allocation, 0), file.tensors[name].num_bytes)
    at_once = sorted(largest.values(), reverse=True)[:num_threads]
    return sum(at_once) + len(at_once) * WORKING_BYTES
