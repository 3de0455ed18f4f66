"""The seam between loading and the kinds of memory that weights can lie in: the host's, or a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Protocol

from shared.gguf import GGUFFile
from shared.gpt_config import GPTConfig
from shared.layout import Plan
from shared.manifest import Allocation
from shared.memory import MemoryEstimate
from shared.phases import Phases


@dataclass(frozen=True)
class Filled:
    """A model's allocations, final."""

    descriptors: tuple[int, ...]  # the receiver closes them
    sha256: Sequence[str]  # of each allocation, as `Allocation` defines it
    sha256_piece_bytes: int
    digest: str  # of the files


class Memory(Protocol):
    """Memory with descriptors; its methods block and may be called from any thread."""

    @property
    def device(self) -> str:
        """ "cpu" or "cuda:N"."""

    @property
    def driver_version(self) -> str:
        """Empty on the CPU, as is the next."""

    @property
    def compute_capability(self) -> str: ...

    def free_bytes(self) -> int: ...

    def used_bytes(self) -> int:
        """Of the GPU's, by whomever; 0 on the CPU."""

    def plan(self, file: GGUFFile, config: GPTConfig) -> Plan:
        """Where the weights of a checked file will lie."""

    def estimate(self, config: GPTConfig, planned: Plan, context_length: int, num_sequences: int) -> MemoryEstimate:
        """What serving a model from this memory takes, for sequences of `context_length` tokens (0: the model's)."""

    def require_free(self, planned: Plan, file: GGUFFile, what: str) -> None:
        """Refuse what does not fit, before anything is allocated.

        Raises:
            ServiceError: MEMORY_EXHAUSTED or VRAM_EXHAUSTED, with the bytes needed and the bytes free.
        """

    def fill(
        self,
        planned: Plan,
        file: GGUFFile,
        pins: Sequence[str],
        count: Callable[[int], None],
        stop: Event,
        phases: Phases,
    ) -> Filled:
        """Allocate, fill and make final, and hash the files beside it.

        Args:
            pins: the plain SHA-256 expected of each file, in order; empty to expect nothing.
            count: called with the number of file bytes that are placed, from any thread; may raise StoppedError.
            stop: set by another thread to give up; set here when one of several threads fails.
            phases: of the load, which this adds its own to.

        Raises:
            ServiceError: for weights that can't be served, files that have changed or miss their pins, or memory that
                is not there; all is freed then.
            StoppedError: if the stop was set; likewise.
        """

    def verify(self, descriptor: int, allocation: Allocation, stop: Event) -> None:
        """Refuse memory that is not what an allocation says.

        Raises:
            ValueError: saying what is wrong with it.
            StoppedError: if the stop was set.
        """

    def is_resident(self, descriptor: int, allocation: Allocation) -> bool:
        """Whether a descriptor's memory is there, of this kind and of an allocation's size."""
