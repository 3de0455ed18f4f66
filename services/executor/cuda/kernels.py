"""Which modules and entry points a model needs, with the types of their arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from shared.cuda_compile import Module
from shared.cuda_layout import Family
from shared.gpt_config import GPTConfig
from shared.layout import round_up

Entry = tuple[str, str, str]  # name, entry point, types of the arguments: P pointer, i int, f float

SOURCES = Path(__file__).parent / "kernels"
PRODUCT_TILES = (2, 4, 8)  # of 8 rows, that product_rows comes in
EXACT = (Family.MXFP4, Family.INT8)  # families whose codes are multiplied as they are
ONE_TYPES = "PPPPPPPPPiiiiiiiiif"
ONE_WARPS, ONE_DEPTH = 8, 3  # of a block of product_one.cu: warps, groups of tiles in a warp's ring
EPILOGUES = ("store", "residual", "gelu", "swiglu")
FEW_TYPES = "PPPPPPPPPPiiiiiiiiif"
ROWS_TYPES = "PPPPPPPPPiiiiiiiii"
TILED_TYPES = "PPPPPPPPPiiiiiii"


def modules_of(config: GPTConfig, families: Iterable[Family]) -> dict[Module, Sequence[Entry]]:
    """Everything that a model of this config runs, its weights in these families."""
    head = (("HEAD_SIZE", config.head_size), ("HEAD_SIZE_PADDED", round_up(config.head_size, 32)))
    attention = [("attention_1", "attention_1", "PPPPPPPPPiiiiii")]
    if dict(head)["HEAD_SIZE_PADDED"] <= 64:
        attention.append(("attention_2", "attention_2", "PPPPPPPPPiiiiii"))
    modules: dict[Module, Sequence[Entry]] = {
        Module("norm"): [("rms_norm", "rms_norm", "PPPiif"), ("layer_norm", "layer_norm", "PPPPiif")],
        Module("rows"): [("add", "add", "PPi"), ("gather", "gather", "PPPi")],
        Module("rope", head): [("rotation", "rotation", "PPPf"), ("store_kv", "store_kv", "PPPPPPiiif")],
        Module("attention", head): attention,
        Module("attention_decode", head): [("attention_decode", "attention_decode", "PPPPPPPPPPPiiiiiif")],
    }
    if config.num_experts:
        modules[Module("route")] = [
            ("router", "router", "PPPPiii"),
            ("choose_experts", "choose_experts", "PPPiii"),
            ("sort_pairs", "sort_pairs", "PPPPiiiii"),
            ("route", "route", "PPPPPPiiiii"),
            ("normed_route", "normed_route", "PPPPPPPPPPPPiiiiiif"),
            ("combine", "combine", "PPPPii"),
        ]
    for family in sorted(set(families)):
        modules |= product_modules(family)
    return modules


def product_modules(family: Family) -> dict[Module, Sequence[Entry]]:
    """The products of one family, and its embedding; names end in the family's."""
    constants, suffix = (("FAMILY", int(family)),), family.name
    modules: dict[Module, Sequence[Entry]] = {
        Module("product", constants): [(f"product_{suffix}", "product", FEW_TYPES)],
        Module("product_rows", constants): [
            (f"product_rows_{tiles}_{suffix}", f"product_rows_{tiles}", ROWS_TYPES) for tiles in PRODUCT_TILES
        ],
        Module("product_tiled", constants): [(f"product_tiled_{suffix}", "product_tiled", TILED_TYPES)],
        Module("embed", constants): [(f"embed_{suffix}", "embed", "PPPPPii")],
    }
    if family in EXACT:
        entries = ["product_summed", *(f"product_one_{epilogue}" for epilogue in EPILOGUES)]
        module = Module("product_one", (*constants, ("WARPS", ONE_WARPS), ("DEPTH", ONE_DEPTH)))
        modules[module] = [(f"{entry}_{suffix}", entry, ONE_TYPES) for entry in entries]
    return modules
