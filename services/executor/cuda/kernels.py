"""Which modules and entry points a model needs, with the types of their arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shared.cuda_compile import Module
from shared.cuda_layout import TILES, Family
from shared.gpt_config import GPTConfig
from shared.layout import round_up

Entry = tuple[str, str, str]  # name, entry point, types of the arguments: P pointer, i int, f float, T tensor map

SOURCES = Path(__file__).parent / "kernels"
PRODUCT_TILES = (2, 4, 8)  # of 8 rows, that product_rows comes in
EXACT = (Family.MXFP4, Family.INT8)  # families whose codes are multiplied as they are
ONE_TYPES = "PPPPPPPPPiiiiiiiiif"
ONE_WARPS, ONE_DEPTH = 8, 3  # of a block of product_one.cu: warps, groups of tiles in a warp's ring
EPILOGUES = ("store", "residual", "gelu", "swiglu")
FEW_TYPES = "PPPPPPPPPPiiiiiiiiif"
ROWS_TYPES = "PPPPPPPPPiiiiiiiii"
TILED_TYPES = "PPPPPPPPPiiiiiii"
WGMMA_TYPES = "PPPPiiiiTTTTiiiiiii"
SPLIT_TYPES = "PPPiiiiiiTTTT"
SPLITS = (2, 4, 8)  # blocks of a cluster of product_split.cu
SPLIT_STAGES = 8  # most of them, past which nothing is gained
BOX_ROWS = 32  # of x, that wgmma_tiles.cuh copies at once
WGMMA_SHARED = 232_448  # bytes of shared memory that a block has on Hopper
MAX_GROUP = 16  # query heads of a key head in attention_decode.cu
ATTENTION_WGMMA_HEAD = 64  # values of a head, padded, that attention_wgmma.cu takes
ATTENTION_WGMMA_GROUPS = 2  # of four warps that multiply, each 64 rows of queries
ATTENTION_WGMMA_STAGES = 3  # of 128 positions' keys and values, and eight dimensions of ones
ATTENTION_WGMMA_BYTES = ATTENTION_WGMMA_STAGES * (128 * 64 * 2 + 128 * 72 * 2 + 16) + 1024


class WgmmaTile(NamedTuple):
    """A size of tile that product_wgmma.cu comes in."""

    strips: int  # of a warp
    groups: int  # of four warps that multiply
    rows: int  # of x, at most
    stage_tiles: int  # of 64 columns, that a stage has

    @property
    def num_strips(self) -> int:
        """Of 16 outputs, that a tile has."""
        return 4 * self.groups * self.strips

    @property
    def threads(self) -> int:
        """Of a block: those that multiply, and 128 that copy."""
        return 128 + 128 * self.groups


# High tiles decode a weight for the most rows, low ones have the most warps that decode.
WGMMA_TILES = {"high": WgmmaTile(1, 2, 256, 1), "wide": WgmmaTile(2, 2, 128, 1), "low": WgmmaTile(1, 4, 64, 2)}

ROWS = Module("rows")
ROWS_ENTRIES = [(name, name, types) for name, types in (("add", "PPi"), ("gather", "PPPi"), ("gather_halves", "PPPi"))]


def modules_of(config: GPTConfig, families: Iterable[Family]) -> dict[Module, Sequence[Entry]]:
    """Everything that a model of this config runs, its weights in these families."""
    head = (("HEAD_SIZE", config.head_size), ("HEAD_SIZE_PADDED", round_up(config.head_size, 32)))
    attention = [("attention_1", "attention_1", "PPPPPPPPPiiiiiii")]
    if dict(head)["HEAD_SIZE_PADDED"] <= 64:
        attention.append(("attention_2", "attention_2", "PPPPPPPPPiiiiiii"))
    modules: dict[Module, Sequence[Entry]] = {
        Module("norm"): [("rms_norm", "rms_norm", "PPPiif"), ("layer_norm", "layer_norm", "PPPPiif")],
        Module("norm_many"): [("rms_norm_many", "rms_norm_many", "PPPiifi")],
        ROWS: ROWS_ENTRIES,
        Module("rope", head): [("rotation", "rotation", "PPPf"), ("store_kv", "store_kv", "PPPPPPiiif")],
        Module("store_kv_many", head): [("store_kv_many", "store_kv_many", "PPPPPPiiifi")],
        Module("attention", head): attention,
        Module("attention_prefill", head): [("attention_prefill", "attention_prefill", "PPPPPPPiiiiiii")],
        Module("sample"): [
            ("resolve_tokens", "resolve_tokens", "PPi"),
            ("take_best", "take_best", "PPPPPPi"),
            ("set_counts", "set_counts", "PPPi"),
            ("adjust_rows", "adjust_rows", "PPPPPPPPii"),
            ("weigh_rows", "weigh_rows", "PPPPPPPii"),
            ("draw_rows", "draw_rows", "PPPPPPPPPPPii"),
        ],
        Module("nucleus"): [
            ("sum_buckets", "sum_buckets", "PPPPii"),
            ("list_border", "list_border", "PPPPPPi"),
            ("find_cut", "find_cut", "PPPPPPPii"),
            ("sum_kept", "sum_kept", "PPPPPi"),
        ],
    }
    group = config.num_heads // config.num_kv_heads
    if group <= MAX_GROUP:
        entry = ("attention_decode", "attention_decode", "PPPPPPPPPPPiiiiiiif")
        modules[Module("attention_decode", (*head, ("GROUP", group)))] = [entry]
    if dict(head)["HEAD_SIZE_PADDED"] == ATTENTION_WGMMA_HEAD:
        constants = (*head, ("NUM_GROUPS", ATTENTION_WGMMA_GROUPS), ("NUM_STAGES", ATTENTION_WGMMA_STAGES))
        modules[Module("attention_wgmma", constants)] = [("attention_wgmma", "attention_wgmma", "PPPPPPPiiiiii")]
    if config.num_experts:
        modules[Module("route")] = [
            ("router", "router", "PPPPiiii"),
            ("choose_experts", "choose_experts", "PPPiii"),
            ("route", "route", "PPPPPPiiiii"),
            ("normed_route", "normed_route", "PPPPPPPPPPPPiiiiiiif"),
            ("combine", "combine", "PPPPii"),
        ]
        modules[Module("combine_many")] = [("combine_many", "combine_many", "PPPPii")]
        modules[Module("router_many")] = [("router_many", "router_many", "PPPPiiiii")]
        modules[Module("sort")] = [("sort_pairs", "sort_pairs", "PPPPiiiii")]
    for family in sorted(set(families)):
        modules |= product_modules(family)
    return modules


@functools.cache
def wgmma_tiles(family: Family) -> Mapping[str, WgmmaTile]:
    """The tiles of product_wgmma.cu, by name; of two strips of wide weights to a warp registers hold only one."""
    return {name: tile for name, tile in WGMMA_TILES.items() if family <= Family.INT8 or tile.strips == 1}


def tile_bytes(family: Family) -> list[int]:
    """Of 16 outputs by 64 inputs in each plane of this family."""
    return [np.dtype(dtype).itemsize * math.prod(axes.values()) for _, dtype, axes in TILES[family]]


def _largest_bytes(family: Family) -> int:
    """Of a strip, in a stage: the largest exponents of MXFP4's rows."""
    return 16 if family == Family.MXFP4 else 0


@functools.cache
def wgmma_stages(family: Family, tile: WgmmaTile) -> tuple[int, int]:
    """How many stages of product_wgmma.cu shared memory holds, and their bytes with their barriers, to be aligned."""
    stage = tile.stage_tiles * (tile.rows * 64 * 2 + tile.num_strips * sum(tile_bytes(family)))
    stage += tile.num_strips * _largest_bytes(family) + 16
    num_stages = (WGMMA_SHARED - 1024) // stage
    return num_stages, num_stages * stage + 1024


def split_stages(family: Family) -> tuple[int, int]:
    """The same of product_split.cu, with the sums that a cluster's blocks exchange."""
    stage = 64 * 64 * 2 + 8 * (sum(tile_bytes(family)) + _largest_bytes(family)) + 16
    sums = 64 * 128 * 4
    num_stages = min(SPLIT_STAGES, (WGMMA_SHARED - 1024 - sums) // stage)
    return num_stages, num_stages * stage + sums + 1024


def product_modules(family: Family) -> dict[Module, Sequence[Entry]]:
    """The products of one family, and its embedding; names end in the family's."""
    constants, suffix = (("FAMILY", int(family)),), family.name
    modules: dict[Module, Sequence[Entry]] = {
        Module("product", constants): [(f"product_{suffix}", "product", FEW_TYPES)],
        Module("product_rows", constants): [
            (f"product_rows_{tiles}_{suffix}", f"product_rows_{tiles}", ROWS_TYPES) for tiles in PRODUCT_TILES
        ],
        Module("product_tiled", constants): [(f"product_tiled_{suffix}", "product_tiled", TILED_TYPES)],
        Module("product_split", (*constants, ("NUM_STAGES", split_stages(family)[0]))): [
            (f"product_split_{blocks}_{suffix}", f"product_split_{blocks}", SPLIT_TYPES) for blocks in SPLITS
        ],
        Module("embed", constants): [(f"embed_{suffix}", "embed", "PPPPPii")],
    }
    for name, tile in wgmma_tiles(family).items():
        names = ("WARP_STRIPS", "NUM_GROUPS", "TILE_ROWS", "STAGE_TILES", "NUM_STAGES")
        sizes = tuple(zip(names, (*tile, wgmma_stages(family, tile)[0]), strict=True))
        module = Module("product_wgmma", (*constants, *sizes))
        modules[module] = [(f"product_wgmma_{name}_{suffix}", "product_wgmma", WGMMA_TYPES)]
    if family == Family.MXFP4:
        modules[Module("largest")] = [("largest", "largest", "PPii")]
    if family in EXACT:
        entries = ["product_summed", *(f"product_one_{epilogue}" for epilogue in EPILOGUES)]
        module = Module("product_one", (*constants, ("WARPS", ONE_WARPS), ("DEPTH", ONE_DEPTH)))
        modules[module] = [(f"{entry}_{suffix}", entry, ONE_TYPES) for entry in entries]
    return modules
