"""A model in memory: its manifest and the descriptors of its allocations."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock

from services.loader.memory import Memory
from shared.descriptors import close_all, copy_all
from shared.gguf import GGUFFile
from shared.manifest import Manifest


@dataclass(eq=False)
class LoadedModel:
    """A model whose memory is sealed; it can be attached until `free`.

    `file` is what was parsed of its files; None for a model that was adopted, until its files have been found to
    be the ones it came from.
    """

    manifest: Manifest
    descriptors: tuple[int, ...]  # of the allocations, in order
    file: GGUFFile | None
    file_sha256: tuple[str, ...] = ()  # plain SHA-256 of each file; empty until they are known
    is_file_changed: bool = False  # a file is no longer what it was when it was loaded
    _descriptors_lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, then its aliases."""
        return (self.manifest.model, *self.manifest.aliases)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each allocation."""
        return tuple(allocation.num_bytes for allocation in self.manifest.allocations)

    @property
    def generations(self) -> tuple[int, ...]:
        """What tells its memory from every other, whatever that holds."""
        return tuple(allocation.generation for allocation in self.manifest.allocations)

    @property
    def resident_bytes(self) -> int:
        return sum(self.sizes)

    @property
    def tensor_types(self) -> Mapping[str, int]:
        """Number of tensors by type."""
        return Counter(tensor.type for tensor in self.manifest.tensors.values())

    def copy_descriptors(self) -> tuple[int, ...]:
        """Copies of its descriptors, which the caller closes; none once it is free. For any thread.

        Raises:
            OSError: if this process may open no more.
        """
        with self._descriptors_lock:  # a number that is closed may be another file's the next moment
            return copy_all(self.descriptors)

    def free(self) -> None:
        """Give the memory back, once nobody else maps it."""
        with self._descriptors_lock:
            close_all(self.descriptors)
            self.descriptors = ()


async def is_resident(model: LoadedModel, memory: Memory) -> bool:
    """Whether all of a model's memory is where it was put."""
    allocations = model.manifest.allocations

    def look() -> bool:
        # Copied here, not by the caller: a call that is given up while all threads are taken leaves nothing open.
        copies = model.copy_descriptors()
        try:
            return len(copies) == len(allocations) and all(map(memory.is_resident, copies, allocations))
        finally:
            close_all(copies)

    return await asyncio.to_thread(look)
