"""Which type each tensor gets."""

from dataclasses import replace

import pytest

from mxgpt.recipes import RECIPES, tensor_types
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf
from shared.gpt_config import GPTConfig
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS, WIDE_GPT_OSS, write_model


def types_of(path, recipe):
    file = read_gguf(path)
    return tensor_types(RECIPES[recipe], file, GPTConfig.from_gguf(file))


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_a_matrix_and_the_router_and_positions_stay(recipe, demo_gpt_oss, demo_gpt2):
    for path in (demo_gpt_oss, demo_gpt2):
        file = read_gguf(path)
        kept = [
            name
            for name, info in file.tensors.items()
            if len(info.shape) == 1 or name.endswith(".bias") or "_inp." in name or "position" in name
        ]
        assert len(kept) > 40
        assert all(types_of(path, recipe)[name] is GGMLType.F32 for name in kept)


def test_plain_types_are_of_all_other_matrices(demo_gpt2):
    types = types_of(demo_gpt2, "MXFP4")
    assert [name for name, type_ in types.items() if type_ is GGMLType.MXFP4] == [
        "token_embd.weight",
        *[
            f"blk.{layer}.{part}.weight"
            for layer in range(6)
            for part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        ],
    ]


def test_mxfp4_moe_is_what_the_demo_model_and_the_official_ones_have(demo_gpt_oss):
    assert types_of(demo_gpt_oss, "MXFP4_MOE") == {n: i.type for n, i in read_gguf(demo_gpt_oss).tensors.items()}


def test_q4_k_m_of_gpt2(demo_gpt2):
    """The tied head Q6_K, fused attention Q5_K, and of six down projections the third and the last in Q6_K."""
    types = types_of(demo_gpt2, "Q4_K_M")
    assert types["token_embd.weight"] is GGMLType.Q6_K
    assert {types[f"blk.{layer}.attn_qkv.weight"] for layer in range(6)} == {GGMLType.Q5_K}
    down = [types[f"blk.{layer}.ffn_down.weight"].name for layer in range(6)]
    assert down == ["Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K"]
    assert types["blk.5.attn_output.weight"] is types["blk.5.ffn_up.weight"] is GGMLType.Q4_K


def test_q4_k_m_of_gpt_oss_with_8_experts(demo_gpt_oss):
    types = types_of(demo_gpt_oss, "Q4_K_M")
    assert types["token_embd.weight"] is GGMLType.Q4_K
    assert types["output.weight"] is GGMLType.Q6_K
    layer = {part: types[f"blk.3.{part}.weight"].name for part in ("attn_q", "attn_k", "attn_v", "attn_output")}
    assert layer == {"attn_q": "Q4_K", "attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q5_K"}
    down = [types[f"blk.{layer}.ffn_down_exps.weight"].name for layer in range(4)]
    assert down == ["Q4_K", "Q4_K", "Q6_K", "Q6_K"]


def test_q4_k_m_of_gpt_oss_with_other_numbers_of_experts(tmp_path):
    types = types_of(write_model(tmp_path / "model.gguf", replace(WIDE_GPT_OSS, num_layers=9)), "Q4_K_M")
    values = [types[f"blk.{layer}.attn_v.weight"].name for layer in range(9)]
    assert values == ["Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K", "Q6_K"]
    assert types["blk.4.attn_k.weight"] is types["blk.4.attn_output.weight"] is GGMLType.Q4_K


@pytest.mark.parametrize(
    ("recipe", "of_96", "of_72"),
    [("Q4_K", "Q5_0", "F16"), ("Q5_K", "Q5_1", "F16"), ("Q6_K", "Q8_0", "F16"), ("MXFP4", "MXFP4", "F16")],
)
def test_rows_that_blocks_do_not_fill_fall_back(tmp_path, recipe, of_96, of_72):
    path = write_model(tmp_path / "a.gguf", replace(TINY_GPT_OSS, hidden_size=96))
    assert types_of(path, recipe)["blk.0.attn_q.weight"].name == of_96
    path = write_model(tmp_path / "b.gguf", TINY_GPT_OSS)
    assert types_of(path, recipe)["blk.0.attn_q.weight"].name == of_72
    path = write_model(tmp_path / "c.gguf", TINY_GPT2)  # rows of 90
    assert types_of(path, recipe)["blk.0.ffn_up.weight"] is GGMLType.F16
