"""What one engine step hands to a model runner: a ragged batch of tokens over block tables.

Ownership: the scheduler builds a `StepBatch` and never touches it again; a runner reads it, writes KV into the
blocks that the tables name, and returns logits. Blocks are numbered per group; a group is a set of layers
that share a table ("full": every position stays; "window": only the last `sliding_window` positions stay).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FULL = "full"
WINDOW = "window"


@dataclass(frozen=True)
class SequenceSlice:
    """One sequence's share of a step.

    Query rows `start : start + num_tokens` of the batch are its positions
    `context_length - num_tokens : context_length`.
    """

    start: int
    num_tokens: int
    context_length: int  # positions known after this step, its own tokens included
    # Group -> physical block of each logical block (position // block_size); -1 where the window has passed.
    block_tables: Mapping[str, NDArray[np.int32]]  # each (num_logical_blocks,)


@dataclass(frozen=True)
class StepBatch:
    """The tokens of one step, sequence after sequence."""

    token_ids: NDArray[np.int32]  # (num_tokens,)
    positions: NDArray[np.int32]  # (num_tokens,)
    sequences: Sequence[SequenceSlice]
    logits_rows: NDArray[np.int32]  # (num_logits,) rows of the batch whose logits are wanted, ascending


@dataclass(frozen=True)
class KVGroup:
    """A group of layers that share block tables, as the runner wants it from the block manager."""

    name: str  # FULL or WINDOW
    num_layers: int
    window: int  # positions a query sees, itself included; 0: all


class Runner(Protocol):
    """Runs a model over KV blocks that it owns."""

    @property
    def kv_groups(self) -> Sequence[KVGroup]: ...

    @property
    def vocab_size(self) -> int: ...

    def forward(self, batch: StepBatch) -> NDArray[np.float32]:
        """Write the KV of every row, return logits (num_logits, vocab_size)."""
        ...
