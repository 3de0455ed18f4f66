"""Paged keys and values in numpy, and attention over them.

A row's result must not depend, in any bit, on what else is in the step. So a row only ever meets keys in whole
blocks; the products with a block are of a shape that does not change but in its number of rows, which BLAS is
checked not to care about (`numpy_ops.NumpyOps`); and sums over blocks run in order, where blocks that a row
does not see add exact zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.executor.step import SequenceSlice, StepBatch
from shared.layout import COLUMN_MULTIPLE, round_up
from shared.memory import TILE_SCORES, TILE_TOKENS

Floats = NDArray[np.float32]

MAX_RUNS_PER_TILE = 3


@dataclass(frozen=True)
class KVLayer:
    """The keys and values of one layer. A block starts out all zero: what is not written yet adds nothing."""

    group: str
    keys: Floats  # (num_blocks, K, D, block_size)
    values: Floats  # (num_blocks, K, block_size, D rounded up to 16)


@dataclass(frozen=True, slots=True)
class Write:
    """Consecutive rows of one sequence that go into one block."""

    rows: slice  # of the batch
    block: int
    offsets: slice  # in the block
    is_fresh: bool  # the block is written from its start: cleared first


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Blocks that follow one another in memory, upwards or downwards, so that one view spans them."""

    tile: int  # whose blocks they are; without a meaning where the group has an order of its own
    start: int  # of the tile's blocks, or of the group's order
    stop: int
    blocks: slice  # physical


@dataclass(frozen=True)
class TileGroup:
    """S tiles of t tokens each, attended to together over B logical blocks.

    A tile is some consecutive rows of one sequence; tiles with fewer blocks leave the last ones unseen.
    """

    rows: NDArray[np.intp] | slice  # the S t rows of the batch
    num_tiles: int
    num_tokens: int
    num_blocks: int
    is_even: bool  # every tile has num_blocks blocks
    runs: Sequence[BlockRun]
    # Tile and block of each product, by where the blocks lie; None where tiles come one after another.
    order: tuple[NDArray[np.intp], NDArray[np.intp]] | None
    first_masked: int  # the blocks before it are seen by every row
    mask: Floats  # (S, B - first_masked, 1, t, 1, block_size): 0 where a row sees the position, else -inf


def allocate_kv(num_blocks: int, num_kv_heads: int, head_size: int, block_size: int, group: str) -> KVLayer:
    """One layer's empty blocks."""
    value_width = round_up(head_size, COLUMN_MULTIPLE)
    return KVLayer(
        group,
        np.zeros((num_blocks, num_kv_heads, head_size, block_size), np.float32),
        np.zeros((num_blocks, num_kv_heads, block_size, value_width), np.float32),
    )


def plan_writes(batch: StepBatch, group: str, block_size: int) -> list[Write]:
    """Where the rows of a batch are written."""
    writes = []
    for sequence in batch.sequences:
        table = sequence.block_tables[group]
        position = sequence.context_length - sequence.num_tokens
        row = sequence.start
        while position < sequence.context_length:
            block, offset = divmod(position, block_size)
            count = min(block_size - offset, sequence.context_length - position)
            physical = int(table[block])
            assert physical >= 0, "a row has no block to write to"
            writes.append(Write(slice(row, row + count), physical, slice(offset, offset + count), offset == 0))
            position += count
            row += count
    return writes


def plan_tiles(
    batch: StepBatch,
    group: str,
    window: int,  # 0: all positions
    block_size: int,
    num_heads: int,
    tile_tokens: int = TILE_TOKENS,
) -> list[TileGroup]:
    """The work list of attention in the layers of one group."""
    max_blocks = max(1, TILE_SCORES // (num_heads * block_size))  # in a group, times tokens in a tile
    tiles = [
        tile
        for sequence in batch.sequences
        for tile in _cut(sequence, group, window, block_size, tile_tokens, max_blocks)
    ]
    groups = [[tile] for tile in tiles if tile.num_tokens > 1]
    single = [tile for tile in tiles if tile.num_tokens == 1]
    most = max((len(tile.blocks) for tile in single), default=0)
    if any(2 * len(tile.blocks) < most for tile in single) or most * len(single) > max_blocks:
        groups += _alike(single, max_blocks)
    elif single:
        groups.append(single)
    return [_group(members, window, block_size) for members in groups]


def store_kv(
    kv: KVLayer,
    writes: Sequence[Write],
    keys: Floats,  # (T, K, D)
    values: Floats,  # (T, K, D)
) -> None:
    """Write the rows' keys and values into their blocks."""
    keys = keys.transpose(1, 2, 0)  # (K, D, T)
    values = values.transpose(1, 0, 2)  # (K, T, D)
    head_size = values.shape[-1]
    for write in writes:
        if write.is_fresh:
            kv.keys[write.block] = 0.0
            kv.values[write.block] = 0.0
        kv.keys[write.block, :, :, write.offsets] = keys[:, :, write.rows]
        kv.values[write.block, :, write.offsets, :head_size] = values[:, write.rows]


def attend(
    group: TileGroup,
    queries: Floats,  # (T, H, D), scaled
    kv: KVLayer,
    sinks: Floats | None,  # (H,)
    out: Floats,  # (T, H, D), of which the group's rows are written
) -> None:
    """softmax(q k) v of the group's rows. G below is H / K, the query heads that share a key head."""
    num_kv_heads, head_size, block_size = kv.keys.shape[1:]
    num_tiles, num_tokens, num_blocks = group.num_tiles, group.num_tokens, group.num_blocks
    shared = queries.shape[1] // num_kv_heads
    q = queries[group.rows].reshape(num_tiles, num_tokens, num_kv_heads, shared, head_size)
    q = q.transpose(0, 2, 1, 3, 4).reshape(num_tiles, num_kv_heads, num_tokens * shared, head_size)
    if num_tokens * shared == 1:
        q = np.repeat(q, 2, axis=2)  # one row alone would be another kernel's work
    num_rows = q.shape[2]  # t G, or 2

    scores = np.empty((num_tiles, num_blocks, num_kv_heads, num_rows, block_size), np.float32)
    if not group.is_even:
        scores.fill(-np.inf)
    _multiply_blocks(group, np.broadcast_to(q[:, None], (*scores.shape[:-1], head_size)), kv.keys, scores)
    last = scores[:, group.first_masked :].reshape(
        num_tiles, -1, num_kv_heads, num_tokens, q.shape[2] // num_tokens, block_size
    )
    last += group.mask
    total = _exponentials(scores, sinks, num_tokens)  # (S, K, rows, 1)

    partial = np.empty((num_tiles, num_blocks, num_kv_heads, num_rows, kv.values.shape[-1]), np.float32)
    if not group.is_even:
        partial.fill(0.0)
    _multiply_blocks(group, scores, kv.values, partial)
    heads = np.add.reduce(partial, axis=1)  # (S, K, t G, D rounded up)
    heads /= total
    heads = heads[:, :, : num_tokens * shared, :head_size]
    heads = heads.reshape(num_tiles, num_kv_heads, num_tokens, shared, head_size).transpose(0, 2, 1, 3, 4)
    out[group.rows] = heads.reshape(num_tiles * num_tokens, -1, head_size)


def _multiply_blocks(
    group: TileGroup,
    left: Floats,  # (S, B, K, rows, n)
    blocks: Floats,  # (num_blocks, K, n, m), by physical block
    out: Floats,  # (S, B, K, rows, m)
) -> None:
    """out = left @ the block of each tile and logical block."""
    if group.order is None:
        for run in group.runs:
            part = slice(run.start, run.stop)
            np.matmul(left[run.tile, part], blocks[run.blocks], out=out[run.tile, part])
        return
    ordered = left[group.order]  # (products, K, rows, n)
    product = np.empty((len(ordered), *out.shape[2:]), np.float32)
    for run in group.runs:
        np.matmul(ordered[run.start : run.stop], blocks[run.blocks], out=product[run.start : run.stop])
    out[group.order] = product


def _exponentials(
    scores: Floats,  # (S, B, K, rows, block_size), overwritten by exp(scores - their maximum)
    sinks: Floats | None,  # (H,)
    num_tokens: int,
) -> Floats:
    """The sum of the exponentials and that of the sink, (S, K, rows, 1)."""
    maximum = np.maximum.reduce(np.maximum.reduce(scores, axis=1), axis=-1, keepdims=True)  # (S, K, rows, 1)
    num_tiles, num_kv_heads = maximum.shape[:2]
    if sinks is not None:
        sinks = sinks.reshape(num_kv_heads, 1, -1, 1)
        by_token = maximum.reshape(num_tiles, num_kv_heads, num_tokens, -1, 1)
        np.maximum(by_token, sinks, out=by_token)
    scores -= maximum[:, None]
    np.exp(scores, out=scores)
    # Over blocks in order, then over the positions of a block: the same additions whatever blocks are unseen.
    total: Floats = np.add.reduce(np.add.reduce(scores, axis=1), axis=-1, keepdims=True)
    if sinks is not None:
        np.subtract(sinks, by_token, out=by_token)
        np.exp(maximum, out=maximum)
        total += maximum
    return total


@dataclass(frozen=True, slots=True)
class _Tile:
    """Consecutive rows of one sequence and the blocks that they see."""

    row: int  # first, of the batch
    num_tokens: int
    position: int  # of the first row
    first_block: int  # logical
    blocks: Sequence[int]  # physical


def _cut(
    sequence: SequenceSlice, group: str, window: int, block_size: int, tile_tokens: int, max_blocks: int
) -> Iterator[_Tile]:
    table = sequence.block_tables[group]
    begin = sequence.context_length - sequence.num_tokens
    num_context_blocks = -(-sequence.context_length // block_size)
    size = max(1, min(tile_tokens, max_blocks // num_context_blocks))
    for position in range(begin, sequence.context_length, size):
        num_tokens = min(size, sequence.context_length - position)
        first = max(0, position - window + 1) // block_size if window else 0
        last = (position + num_tokens - 1) // block_size
        blocks = table[first : last + 1].tolist()
        assert min(blocks) >= 0, "a row sees a block that is gone"
        yield _Tile(sequence.start + position - begin, num_tokens, position, first, blocks)


def _alike(tiles: Sequence[_Tile], max_blocks: int) -> list[list[_Tile]]:
    """Tiles of one token in groups of alike lengths: the longest of a group sets the size of its scores."""
    groups: list[list[_Tile]] = []
    for tile in sorted(tiles, key=lambda tile: -len(tile.blocks)):
        longest = len(groups[-1][0].blocks) if groups else 0
        if 2 * len(tile.blocks) >= longest > 0 and (len(groups[-1]) + 1) * longest <= max_blocks:
            groups[-1].append(tile)
        else:
            groups.append([tile])
    return groups


def _group(tiles: Sequence[_Tile], window: int, block_size: int) -> TileGroup:
    num_tiles, num_tokens = len(tiles), tiles[0].num_tokens
    counts = [len(tile.blocks) for tile in tiles]
    num_blocks = max(counts)
    first_rows = [tile.row for tile in tiles]
    rows: NDArray[np.intp] | slice = slice(first_rows[0], first_rows[0] + num_tiles * num_tokens)
    if first_rows != list(range(first_rows[0], first_rows[0] + num_tiles * num_tokens, num_tokens)):
        rows = (np.array(first_rows)[:, None] + np.arange(num_tokens)).reshape(-1)
    # How far a position lies behind a row: below zero it is yet to come, from `window` on it has passed.
    distances = [tile.position - tile.first_block * block_size for tile in tiles]
    first_masked = 0 if window else min(distances) // block_size
    tokens = np.arange(num_tokens).reshape(-1, 1, 1)
    keys = np.arange(first_masked * block_size, num_blocks * block_size).reshape(-1, 1, 1, 1, block_size)
    distance = np.array(distances).reshape(-1, 1, 1, 1, 1, 1) + (tokens - keys)  # the mask's shape
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    mask = np.zeros(hidden.shape, np.float32)
    np.copyto(mask, -np.inf, where=hidden)
    is_even = min(counts) == num_blocks
    runs, order = _plan_products(tiles)
    return TileGroup(rows, num_tiles, num_tokens, num_blocks, is_even, runs, order, first_masked, mask)


def _plan_products(
    tiles: Sequence[_Tile],
) -> tuple[list[BlockRun], tuple[NDArray[np.intp], NDArray[np.intp]] | None]:
    """The runs of blocks that are multiplied at once: each tile's own, or those of all tiles by where they lie.

    Streams that grow together take blocks in turns, and then a tile's own lie scattered: a product for each costs
    more than bringing the rows into the blocks' order and back.
    """
    runs = [run for index, tile in enumerate(tiles) for run in _runs(index, tile.blocks)]
    if len(tiles) == 1 or len(runs) <= MAX_RUNS_PER_TILE * len(tiles):
        return runs, None
    products = sorted(
        (physical, index, block) for index, tile in enumerate(tiles) for block, physical in enumerate(tile.blocks)
    )
    physical, tile_ids, block_ids = (list(column) for column in zip(*products, strict=True))
    return list(_runs(0, physical)), (np.array(tile_ids, np.intp), np.array(block_ids, np.intp))


def _runs(tile: int, blocks: Sequence[int]) -> Iterator[BlockRun]:
    """Cut a block table where the blocks stop following one another, upwards or downwards."""
    start = 0
    while start < len(blocks):
        stop = start + 1
        step = blocks[stop] - blocks[start] if stop < len(blocks) else 1
        if abs(step) == 1:
            while stop < len(blocks) and blocks[stop] - blocks[stop - 1] == step:
                stop += 1
        else:
            step = 1
        end = blocks[start] + step * (stop - start)
        yield BlockRun(tile, start, stop, slice(blocks[start], end if end >= 0 else None, step))
        start = stop
