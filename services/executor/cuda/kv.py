"""Keys and values in blocks on the GPU, and a batch's arrays as kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from services.executor.step import Draws, KVGroup, StepBatch
from shared.gpt_config import GPTConfig
from shared.layout import round_up
from shared.memory import HEAD_MULTIPLE

if TYPE_CHECKING:  # what needs no GPU is timed and tested where there is none
    from services.executor.cuda.device import Device

BLOCK_MULTIPLE = 32  # positions of a chunk of attention


@dataclass(frozen=True)
class KVLayer:
    """One layer's blocks: keys (blocks, K, block_size, D), values (blocks, K, D, block_size), in half, D padded."""

    group: str
    window: int
    keys: int
    values: int
    block_bytes: int  # of keys, and of values


def padded_head_size(config: GPTConfig) -> int:
    return round_up(config.head_size, HEAD_MULTIPLE)


def block_bytes(config: GPTConfig, block_size: int) -> int:
    """Bytes of a block's keys in one layer; its values take as many."""
    return 2 * config.num_kv_heads * block_size * padded_head_size(config)


def allocate_kv(device: Device, config: GPTConfig, group: KVGroup, num_blocks: int, block_size: int) -> KVLayer:
    """One layer's blocks, all zero: what is not written yet adds nothing."""
    size = block_bytes(config, block_size)
    keys, values = (device.allocate(num_blocks * size) for _ in range(2))
    return KVLayer(group.name, group.window, keys, values, size)


@dataclass(frozen=True)
class Shape:
    """What decides where a batch's arrays lie, and which kernels run on them: the key of a graph."""

    num_rows: int
    num_logits: int
    num_sequences: int
    num_items: int  # of attention
    table_width: int  # logical blocks
    tile_rows: int  # rows of queries in an item, 16 or 32
    num_splits: int  # of an item's positions, in layers that see all
    num_wide: int = 0  # items of prompts, the first ones, which attention_prefill.cu takes
    wide_tokens: int = 0  # rows of one of those at most

    @property
    def is_decode(self) -> bool:
        """Whether each row is the one of its sequence."""
        return self.num_rows == self.num_sequences == self.num_items and self.num_wide == 0


@dataclass(frozen=True)
class CudaStep:
    """A batch on the device. Addresses of int32 arrays."""

    shape: Shape
    token_ids: int  # (num_rows,)
    positions: int  # (num_rows,)
    logits_rows: int  # (num_logits,)
    seats: int  # (num_logits,) of the sequence that a row of logits draws for, -1: none
    items: int  # (num_items, 4): first row, rows, position of the first, sequence
    places: dict[str, int]  # by group: (num_rows,) block * block_size + offset
    tables: dict[str, int]  # by group: (num_sequences, table_width)
    num_ints: int  # of all


def lay_out(shape: Shape, groups: Sequence[KVGroup], base: int) -> CudaStep:
    """Where the arrays of a batch of this shape lie from `base` on."""
    offset = 0

    def take(count: int) -> int:
        nonlocal offset
        address = base + 4 * offset
        offset += round_up(count, 4)
        return address

    token_ids, positions = take(shape.num_rows), take(shape.num_rows)
    logits_rows, seats = take(shape.num_logits), take(shape.num_logits)
    items = take(4 * shape.num_items)
    places = {group.name: take(shape.num_rows) for group in groups}
    tables = {group.name: take(shape.num_sequences * shape.table_width) for group in groups}
    return CudaStep(shape, token_ids, positions, logits_rows, seats, items, places, tables, offset)


def max_ints(groups: Sequence[KVGroup], max_rows: int, max_sequences: int, table_width: int) -> int:
    """Values that the arrays of any batch take which stays within these bounds, by `lay_out`."""
    shape = Shape(max_rows, max_rows, max_sequences, max_rows, table_width, 16, 1)
    return lay_out(shape, groups, 0).num_ints


def pack(
    batch: StepBatch,
    step: CudaStep,
    block_size: int,
    item_tokens: int,
    base: int,
    draws: Draws | None = None,
    out: NDArray[np.int32] | None = None,
) -> NDArray[np.int32]:
    """The arrays of a batch as `lay_out` puts them, in `out` if it is given.

    Rows that only fill its shape have no place.
    """
    ints = np.empty(step.num_ints, np.int32) if out is None else out[: step.num_ints]

    def view(address: int, count: int) -> NDArray[np.int32]:
        start = (address - base) // 4
        return ints[start : start + count]

    shape, num_rows, num_sequences = step.shape, len(batch.token_ids), len(batch.sequences)
    _fill(view(step.token_ids, shape.num_rows), batch.token_ids)
    _fill(view(step.positions, shape.num_rows), batch.positions)
    _fill(view(step.logits_rows, shape.num_logits), batch.logits_rows)
    seats = view(step.seats, shape.num_logits)
    seats[:] = -1
    if draws is not None:
        seats[draws.rows] = draws.seats
    _fill(view(step.items, 4 * shape.num_items), make_items(batch, item_tokens, shape.wide_tokens).reshape(-1))
    sequences = np.arange(num_sequences)
    if num_rows > num_sequences:
        sequences = sequences.repeat([sequence.num_tokens for sequence in batch.sequences])
    num_blocks = [-(-sequence.context_length // block_size) for sequence in batch.sequences]
    logical, offsets = np.divmod(batch.positions, block_size)
    for name, address in step.tables.items():
        tables = view(address, shape.num_sequences * shape.table_width).reshape(shape.num_sequences, -1)
        tables[:] = 0
        for row, count, sequence in zip(tables, num_blocks, batch.sequences, strict=False):
            row[:count] = sequence.block_tables[name][:count]
        blocks = tables[sequences, logical]
        assert blocks.min() >= 0, "a row has no block to write to"
        places = view(step.places[name], shape.num_rows)
        places[:num_rows] = blocks * block_size + offsets
        places[num_rows:] = -1
    return ints


def _fill(target: NDArray[np.int32], values: NDArray[np.int32]) -> None:
    """The values, then zeros."""
    target[: len(values)] = values
    target[len(values) :] = 0


def make_items(batch: StepBatch, item_tokens: int, wide_tokens: int = 0) -> NDArray[np.int32]:
    """Rows of one sequence that are attended to together: (items, 4), as `CudaStep.items`.

    Args:
        item_tokens: rows of an item at most.
        wide_tokens: the same for sequences of more rows than `item_tokens`, whose items come first; 0: none are wide.
    """
    if len(batch.token_ids) == len(batch.sequences):
        rows = np.arange(len(batch.sequences), dtype=np.int32)
        return np.stack((rows, np.ones_like(rows), batch.positions, rows), axis=1)
    wide: list[tuple[int, int, int, int]] = []
    items: list[tuple[int, int, int, int]] = []
    for index, sequence in enumerate(batch.sequences):
        position = sequence.context_length - sequence.num_tokens
        is_wide = wide_tokens > 0 and sequence.num_tokens > item_tokens
        tokens = wide_tokens if is_wide else item_tokens
        for first in range(0, sequence.num_tokens, tokens):
            count = min(tokens, sequence.num_tokens - first)
            (wide if is_wide else items).append((sequence.start + first, count, position + first, index))
    return np.array(wide + items, np.int32).reshape(-1, 4)


def count_items(batch: StepBatch, item_tokens: int, wide_tokens: int) -> tuple[int, int]:
    """How many items `make_items` makes, wide ones and others."""
    num_wide = num_items = 0
    for sequence in batch.sequences:
        if sequence.num_tokens > item_tokens:
            num_wide += -(-sequence.num_tokens // wide_tokens)
        else:
            num_items += 1
    return num_wide, num_items
