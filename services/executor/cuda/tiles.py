"""How products on Hopper are cut into tiles and shares, so that a GPU's multiprocessors are all busy."""

from __future__ import annotations

from services.executor.cuda.kernels import SPLITS, WGMMA_ROWS, strip_tile_bytes, wgmma_strips
from shared.cuda_layout import Family

TILE_ROWS = tuple(range(32, WGMMA_ROWS + 1, 32))  # of x, that a tile of product_wgmma.cu can have
STRIP_GROUP = 8  # warps that multiply; each takes one or two strips
ROUND_BYTES = 40.0  # that the second cache gives a multiprocessor in a cycle
OVERHEAD = 450.0, 130.0  # cycles of a stage beside its products, and of each strip; they overlap little
START = 4096.0  # cycles of a tile beside its columns: until the first comes, and for its sums to be stored


def choose_tile(
    num_rows: int,
    num_strips: int,
    column_tiles: int,
    family: Family,
    num_multiprocessors: int,
) -> tuple[int, int]:
    """The strips of a warp and the rows of a tile that product_wgmma.cu is reckoned to take the least time with."""
    tile_bytes = strip_tile_bytes(family)

    def cycles(choice: tuple[int, int]) -> float:
        strips, rows = choice
        num_tiles = -(-num_strips // (STRIP_GROUP * strips)) * -(-num_rows // rows)
        rounds = -(-num_tiles // num_multiprocessors)
        # A tensor core multiplies 16 outputs, 64 columns and 32 rows in 16 cycles; there are four.
        multiply = strips * STRIP_GROUP * rows / 2
        fetch = (rows * 128 + strips * STRIP_GROUP * tile_bytes) / ROUND_BYTES
        return rounds * (column_tiles * max(multiply + OVERHEAD[0] + OVERHEAD[1] * strips, fetch) + START)

    choices = ((strips, rows) for strips in wgmma_strips(family) for rows in TILE_ROWS if strips * rows <= WGMMA_ROWS)
    return min(choices, key=cycles)


def choose_split(num_strips: int, column_tiles: int, num_multiprocessors: int) -> int:
    """The blocks that share a tile of product_split.cu, each with a multiprocessor of its own; 1: nothing is shared."""
    most = min(column_tiles, num_multiprocessors // -(-num_strips // STRIP_GROUP))
    return max((blocks for blocks in SPLITS if blocks <= most), default=1)
