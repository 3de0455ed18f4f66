"""What one engine step hands to a model runner: a ragged batch of tokens over block tables, and what to draw.

Ownership: the scheduler builds a `StepBatch` and its `Draws` and leaves them alone until the step is launched; a runner
reads them in `launch`, writes KV into the blocks that the tables name, draws, and gives a `StepResult`. Blocks are
numbered per group; a group is a set of layers that share a table ("full": every position stays; "window": only the
last `sliding_window` positions stay).

Steps run in the order in which they are launched, each on what the ones before it wrote. So a block may be given to
another sequence while a step that reads it is still running: whoever writes it runs later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from services.executor.sampling import OutputSampler

GPU_DEPTH = 2  # steps that a GPU's runner holds: one runs, the next waits behind it
FULL = "full"
WINDOW = "window"


class SequenceSlice(NamedTuple):
    """One sequence's share of a step.

    Query rows `start : start + num_tokens` of the batch are its positions
    `context_length - num_tokens : context_length`.
    """

    start: int
    num_tokens: int
    context_length: int  # positions known after this step, its own tokens included
    # Group -> physical block of each logical block (position // block_size); -1 where the window has passed, and past
    # the context. They change once the step has been launched.
    block_tables: Mapping[str, NDArray[np.int32]]  # each (at least the context's logical blocks,)


@dataclass(frozen=True)
class StepBatch:
    """The tokens of one step, sequence after sequence.

    A token id of -1 - seat stands for the token that was last drawn in that seat, which the host need not know yet.
    """

    token_ids: NDArray[np.int32]  # (num_tokens,)
    positions: NDArray[np.int32]  # (num_tokens,)
    sequences: Sequence[SequenceSlice]
    logits_rows: NDArray[np.int32]  # (num_logits,) rows of the batch whose logits are wanted, ascending


@dataclass(frozen=True)
class Draws:
    """What a step draws, in the order of the batch, and which of its logits are wanted on the host.

    Each sequence of the running batch has a seat, where a runner keeps what it needs to go on drawing for it. What
    a sampler remembers may lag behind a draw by the tokens of the steps that still run; a draw that starts its
    seat has a sampler that remembers all.
    """

    rows: NDArray[np.int32]  # (num_draws,) rows of logits to draw from, ascending
    samplers: Sequence[OutputSampler]  # num_draws
    seats: NDArray[np.int32]  # (num_draws,)
    token_indices: NDArray[np.int32]  # (num_draws,) of the token within its output
    starts: Sequence[int]  # those of the draws that are the first since their sequences took their seats
    wanted: NDArray[np.int32]  # (num_wanted,) rows of logits that the host reads, ascending


@dataclass(frozen=True)
class StepResult:
    """What a step gave."""

    token_ids: Sequence[int | None]  # one a draw; None where the model's logits are not finite enough to draw from
    logits: NDArray[np.float32]  # (num_wanted, vocab_size)


@dataclass(frozen=True)
class KVGroup:
    """A group of layers that share block tables, as the runner wants it from the block manager."""

    name: str  # FULL or WINDOW
    num_layers: int
    window: int  # positions a query sees, itself included; 0: all


class DeviceLostError(Exception):
    """The device runs nothing any more: the engine's process ends, and its requests go on elsewhere."""


class Runner(Protocol):
    """Runs a model over KV blocks that it owns."""

    @property
    def kv_groups(self) -> Sequence[KVGroup]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def depth(self) -> int:
        """Most steps that are launched and not collected."""
        ...

    def launch(self, batch: StepBatch, draws: Draws) -> None:
        """Start a step: write the KV of every row, then draw. The batch has at least one row.

        Raises:
            DeviceLostError: as `collect`. Whatever else is raised concerns this step alone.
        """
        ...

    def collect(self) -> StepResult:
        """What the oldest step that was launched gave, waiting for it; it counts as collected if it failed."""
        ...
