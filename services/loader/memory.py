"""The seam between loading and the kinds of memory that weights can lie in: the host's, or a GPU's."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from typing import Protocol

from shared.gguf import GGUFFile
from shared.gpt_config import GPTConfig
from shared.layout import Plan
from shared.manifest import Allocation


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

    def plan(self, file: GGUFFile, config: GPTConfig) -> Plan:
        """Where the weights of a checked file will lie."""

    def require_free(self, planned: Plan, file: GGUFFile, what: str) -> None:
        """Refuse what does not fit, before anything is allocated.

        Raises:
            ServiceError: MEMORY_EXHAUSTED or VRAM_EXHAUSTED, with the bytes needed and the bytes free.
        """

    def fill(
        self, planned: Plan, file: GGUFFile, count: Callable[[int], None], stop: Event
    ) -> tuple[tuple[int, ...], list[str]]:
        """Allocate, fill and make final: the descriptors, which the caller closes, and the checksum of each.

        Args:
            count: called from several threads with the number of file bytes that are placed; may raise StoppedError.
            stop: set by another thread to give up; set here when one of several threads fails.

        Raises:
            ServiceError: for weights that can't be served, or memory that is not there; all is freed then.
            StoppedError: if the stop was set; likewise.
        """

    def verify(self, descriptor: int, allocation: Allocation, stop: Event) -> None:
        """Refuse memory that is not what an allocation says.

        Raises:
            ValueError: saying what is wrong with it.
            StoppedError: if the stop was set.
        """
