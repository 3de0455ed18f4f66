"""Which type each tensor of a file gets: one type for all matrices, or a mixture that has a name.

Vectors, the router and GPT-2's positions are never quantised: they are few, and errors in them weigh most.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import gguf

from shared.ggml_type import GGMLType
from shared.gguf import GGUFFile
from shared.gpt_config import GPTConfig, is_matrix

# A type whose blocks do not fill a row gives way to a smaller block of about its precision, as in llama.cpp.
FALLBACKS = {GGMLType.Q4_K: GGMLType.Q5_0, GGMLType.Q5_K: GGMLType.Q5_1, GGMLType.Q6_K: GGMLType.Q8_0}
LAST_FALLBACK = GGMLType.F16


@dataclass(frozen=True)
class Recipe:
    """A name for `general.file_type`, and the type that a matrix of this name gets."""

    file_type: gguf.LlamaFileType
    matrix_type: Callable[[str, GPTConfig], GGMLType]


def tensor_types(recipe: Recipe, file: GGUFFile, config: GPTConfig) -> Mapping[str, GGMLType]:
    """The type of every tensor of a file under a recipe, in the file's order."""
    types = {}
    for name, info in file.tensors.items():
        if _is_quantised(name):
            types[name] = _fitting(recipe.matrix_type(name, config), info.shape[-1])
        else:
            types[name] = GGMLType.F32 if recipe.file_type == gguf.LlamaFileType.ALL_F32 else info.type
    return types


def _is_quantised(name: str) -> bool:
    return is_matrix(name) and not name.startswith("position_embd.") and ".ffn_gate_inp." not in name


def _fitting(type_: GGMLType, num_columns: int) -> GGMLType:
    """The type, or the one to fall back to for rows that its blocks do not fill."""
    while num_columns % type_.block_size:
        type_ = FALLBACKS.get(type_, LAST_FALLBACK)
    return type_


def _all(type_: GGMLType) -> Callable[[str, GPTConfig], GGMLType]:
    return lambda _name, _config: type_


def _q4_k_m(name: str, config: GPTConfig) -> GGMLType:
    """llama.cpp's "medium" mixture: more bits for the head, and for values and down projections in half the layers."""
    layer = re.match(r"blk\.(\d+)\.(.+)\.weight$", name)
    if layer is None:
        is_head = name == "output.weight" or config.tied_head
        return GGMLType.Q6_K if is_head else GGMLType.Q4_K
    part = layer[2]
    if config.num_experts == 8 and part in ("attn_k", "attn_v"):
        return GGMLType.Q8_0  # small beside the experts
    if config.num_experts == 8 and part == "attn_output":
        return GGMLType.Q5_K
    if part == "attn_qkv":
        return GGMLType.Q5_K
    if part in ("attn_v", "ffn_down", "ffn_down_exps") and _wants_more_bits(int(layer[1]), config.num_layers):
        return GGMLType.Q6_K
    return GGMLType.Q4_K


def _wants_more_bits(layer: int, num_layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _mxfp4_moe(name: str, config: GPTConfig) -> GGMLType:
    """As gpt-oss is published: experts in MXFP4, other matrices in Q8_0."""
    return GGMLType.MXFP4 if "_exps." in name else GGMLType.Q8_0


RECIPES: Mapping[str, Recipe] = {
    "F32": Recipe(gguf.LlamaFileType.ALL_F32, _all(GGMLType.F32)),
    "F16": Recipe(gguf.LlamaFileType.MOSTLY_F16, _all(GGMLType.F16)),
    "BF16": Recipe(gguf.LlamaFileType.MOSTLY_BF16, _all(GGMLType.BF16)),
    "Q8_0": Recipe(gguf.LlamaFileType.MOSTLY_Q8_0, _all(GGMLType.Q8_0)),
    "Q6_K": Recipe(gguf.LlamaFileType.MOSTLY_Q6_K, _all(GGMLType.Q6_K)),
    "Q5_0": Recipe(gguf.LlamaFileType.MOSTLY_Q5_0, _all(GGMLType.Q5_0)),
    "Q5_1": Recipe(gguf.LlamaFileType.MOSTLY_Q5_1, _all(GGMLType.Q5_1)),
    "Q5_K": Recipe(gguf.LlamaFileType.MOSTLY_Q5_K_S, _all(GGMLType.Q5_K)),
    "Q4_K_M": Recipe(gguf.LlamaFileType.MOSTLY_Q4_K_M, _q4_k_m),
    "Q4_K": Recipe(gguf.LlamaFileType.MOSTLY_Q4_K_S, _all(GGMLType.Q4_K)),
    "Q4_0": Recipe(gguf.LlamaFileType.MOSTLY_Q4_0, _all(GGMLType.Q4_0)),
    "Q4_1": Recipe(gguf.LlamaFileType.MOSTLY_Q4_1, _all(GGMLType.Q4_1)),
    "IQ4_NL": Recipe(gguf.LlamaFileType.MOSTLY_IQ4_NL, _all(GGMLType.IQ4_NL)),
    "MXFP4_MOE": Recipe(gguf.LlamaFileType.MOSTLY_MXFP4_MOE, _mxfp4_moe),
    "MXFP4": Recipe(gguf.LlamaFileType.MOSTLY_MXFP4_MOE, _all(GGMLType.MXFP4)),
}
