"""Which modules and entry points a model needs, with the types of their arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.executor.cuda.compile import Module
from shared.cuda_layout import Family
from shared.gpt_config import GPTConfig
from shared.layout import round_up

Entry = tuple[str, str, str]  # name, entry point, types of the arguments: P pointer, i int, f float

PRODUCT_TILES = (1, 2, 4, 8)  # of 8 rows
PRODUCT_TYPES = "PPPPPPPPPiiiiii"


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
    if config.num_experts:
        modules[Module("route")] = [
            ("router", "router", "PPPPiii"),
            ("choose_experts", "choose_experts", "PPPiii"),
            ("sort_pairs", "sort_pairs", "PPPPiiiii"),
            ("route", "route", "PPPPPPiiiii"),
            ("combine", "combine", "PPPPii"),
        ]
    for family in sorted(set(families)):
        modules |= product_modules(family)
    return modules


def product_modules(family: Family) -> dict[Module, Sequence[Entry]]:
    """The products of one family, and its embedding; names end in the family's."""
    constants, suffix = (("FAMILY", int(family)),), family.name
    return {
        Module("product", constants): [
            (f"product_{tiles}_{suffix}", f"product_{tiles}", PRODUCT_TYPES) for tiles in PRODUCT_TILES
        ],
        Module("product_tiled", constants): [(f"product_tiled_{suffix}", "product_tiled", PRODUCT_TYPES + "i")],
        Module("embed", constants): [(f"embed_{suffix}", "embed", "PPPPPii")],
    }
