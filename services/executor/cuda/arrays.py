"""What the ops hand to one another on a GPU: addresses with their shapes, and work that waits for what will take it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from services.executor.cuda.weights import ExpertMatrices, Matrix, Vector
from shared.cuda_layout import TILE_COLUMNS
from shared.layout import round_up


class Epilogue(enum.IntEnum):
    """What a product does with its sums; the numbers are those of epilogue.cuh."""

    STORE = 0
    RESIDUAL = 1
    GELU = 2
    SWIGLU = 3


@dataclass(frozen=True)
class Floats:
    """float32, (num_rows, width)."""

    address: int
    num_rows: int
    width: int


@dataclass(frozen=True)
class Halves:
    """What a product reads: half, (num_rows, width), its rows `pitch` apart, what pads them zero."""

    address: int
    num_rows: int
    width: int
    is_spread: bool = False  # columns in the order that wgmma_tiles.cuh reads (spread.cuh)

    @property
    def pitch(self) -> int:
        return round_up(self.width, TILE_COLUMNS)


@dataclass(frozen=True)
class Normed:
    """RMSNorm of rows, not run yet: what reads few of them does it, what reads many says how they are to lie."""

    x: Floats
    weight: Vector

    @property
    def num_rows(self) -> int:
        return self.x.num_rows

    @property
    def width(self) -> int:
        return self.x.width


@dataclass(frozen=True)
class Unplaced:
    """Queries, keys and values of rows that attention turns and places itself: those of a decoding step."""

    rotate: bool


@dataclass(frozen=True)
class Product:
    """x @ matrix + bias, not run yet."""

    x: Halves | Normed
    matrix: Matrix | Vector  # a Vector: the router's, (outputs, inputs) in float32
    bias: Vector | None


@dataclass(frozen=True)
class Routing:
    """The experts of each row, and pairs of rows and experts in their order, in the workspace."""

    x: Halves  # what was routed
    num_used: int
    num_pairs: int
    group_rows: int  # most rows of a group
    max_groups: int
    is_sorted: bool = True  # else there are logits, of one row


@dataclass(frozen=True)
class ExpertSum:
    """The weighted sum of one row's experts, not run yet."""

    hidden: Halves  # a row for each expert
    down: ExpertMatrices
    bias: Vector


@dataclass(frozen=True)
class ExpertOutputs:
    """The experts' outputs, (num_pairs, hidden) float32, not summed up yet."""

    address: int
    num_rows: int
    width: int
