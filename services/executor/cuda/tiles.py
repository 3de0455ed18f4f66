"""How products on Hopper are cut into tiles and shares, so that a GPU's multiprocessors are all busy."""

from __future__ import annotations

import functools

from services.executor.cuda.kernels import SPLITS, tile_bytes, wgmma_tiles
from shared.cuda_layout import Family

ROW_STEP = 32  # of rows of x, that a tile of product_wgmma.cu can have
STRIP_GROUP = 8  # strips of a tile of product_split.cu
ROUND_BYTES = 40.0  # that the second cache gives a multiprocessor in a cycle
OVERHEAD = 450.0, 130.0  # cycles of a stage beside its products, and of each strip; they overlap little
START = 4096.0  # cycles of a tile beside its columns: until the first comes, and for its sums to be stored


@functools.lru_cache(4096)  # asked for by every product of a step that is no graph
def choose_tile(
    num_rows: int,
    num_strips: int,
    column_tiles: int,
    family: Family,
    num_multiprocessors: int,
) -> tuple[str, int]:
    """The tile and its rows with which product_wgmma.cu is reckoned to take the least time."""
    strip_bytes, tiles = sum(tile_bytes(family)), wgmma_tiles(family)

    def cycles(choice: tuple[str, int]) -> float:
        tile, rows = tiles[choice[0]], choice[1]
        tile_strips = tile.num_strips
        num_tiles = -(-num_strips // tile_strips) * -(-num_rows // rows)
        rounds = -(-num_tiles // num_multiprocessors)
        # A tensor core multiplies 16 outputs, 64 columns and 32 rows in 16 cycles; there are four.
        multiply = tile_strips * rows / 2
        fetch = (rows * 128 + tile_strips * strip_bytes) / ROUND_BYTES
        return rounds * (column_tiles * max(multiply + OVERHEAD[0] + OVERHEAD[1] * tile.strips, fetch) + START)

    names = [name for name in ("high", "wide") if name in tiles]
    return min(((name, rows) for name in names for rows in range(ROW_STEP, tiles[name].rows + 1, ROW_STEP)), key=cycles)


def choose_split(num_strips: int, column_tiles: int, num_multiprocessors: int) -> int:
    """The blocks that share a tile of product_split.cu, each with a multiprocessor of its own; 1: nothing is shared."""
    most = min(column_tiles, num_multiprocessors // -(-num_strips // STRIP_GROUP))
    return max((blocks for blocks in SPLITS if blocks <= most), default=1)
