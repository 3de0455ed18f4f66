"""GPTConfig: what it reads from a file, and every check that stands between a file and the models."""

import dataclasses
import math
import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest

from mxgpt.v1 import loader_pb2
from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf
from shared.gpt_config import GPTConfig, RopeConfig, is_matrix
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS, add_value, model_metadata, write_model

ONE_LAYER = replace(TINY_GPT_OSS, num_layers=1)


@pytest.mark.parametrize("config", [TINY_GPT2, TINY_GPT_OSS, replace(TINY_GPT2, tied_head=False)])
def test_reads_what_was_written(tmp_path, config):
    file = read_gguf(write_model(tmp_path / "model.gguf", config))
    found = GPTConfig.from_gguf(file)
    found.check_tensors(file)
    assert_same(found, config)


def test_fields_are_those_of_the_contract():
    for ours, message in ((GPTConfig, loader_pb2.ModelConfig), (RopeConfig, loader_pb2.RopeConfig)):
        names = [field.name for field in dataclasses.fields(ours)]
        assert names == [field.name for field in message.DESCRIPTOR.fields]


def test_gpt_oss_20b(tmp_path):
    """The official file's own keys, head size and attention factor."""
    keys = model_metadata(TINY_GPT_OSS) | {
        "gpt-oss.context_length": 131072,
        "gpt-oss.block_count": 24,
        "gpt-oss.embedding_length": 2880,
        "gpt-oss.feed_forward_length": 2880,
        "gpt-oss.expert_feed_forward_length": 2880,
        "gpt-oss.attention.head_count": 64,
        "gpt-oss.attention.head_count_kv": 8,
        "gpt-oss.attention.key_length": 64,
        "gpt-oss.attention.value_length": 64,
        "gpt-oss.attention.sliding_window": 128,
        "gpt-oss.expert_count": 32,
        "gpt-oss.rope.scaling.original_context_length": 4096,
    }
    config = GPTConfig.from_gguf(header_only(tmp_path, "gpt-oss", keys))
    assert (config.query_size, config.kv_size, config.num_windowed_layers) == (4096, 512, 12)
    assert [config.is_windowed(layer) for layer in range(3)] == [True, False, True]
    assert config.rope is not None
    assert config.rope.attention_factor == pytest.approx(1.3465736, abs=1e-6)
    assert (config.rope.beta_fast, config.rope.beta_slow, config.rope.extrapolation_factor) == (32.0, 1.0, 1.0)
    assert len(config.expected_tensors()) == 459


def test_yarn_keys(tmp_path):
    keys = model_metadata(TINY_GPT_OSS) | {
        "gpt-oss.rope.scaling.yarn_beta_fast": 16.0,
        "gpt-oss.rope.scaling.yarn_beta_slow": 2.0,
        "gpt-oss.rope.scaling.yarn_ext_factor": 0.5,
        "gpt-oss.rope.scaling.yarn_attn_factor": 2.0,
        "gpt-oss.rope.scaling.yarn_log_multiplier": 0.5,
    }
    rope = GPTConfig.from_gguf(header_only(tmp_path, "gpt-oss", keys)).rope
    assert rope is not None
    assert (rope.beta_fast, rope.beta_slow, rope.extrapolation_factor) == (16.0, 2.0, 0.5)
    log_factor = 0.1 * math.log(32)
    assert rope.attention_factor == pytest.approx(2 * (log_factor + 1) / (0.5 * log_factor + 1))


def test_defaults(tmp_path):
    keys = model_metadata(TINY_GPT_OSS)
    for key in ("attention.head_count_kv", "attention.key_length", "attention.value_length"):
        del keys[f"gpt-oss.{key}"]
    del keys["gpt-oss.expert_feed_forward_length"]
    keys["gpt-oss.rope.scaling.type"] = "none"
    config = GPTConfig.from_gguf(header_only(tmp_path, "gpt-oss", keys))
    assert (config.num_kv_heads, config.head_size, config.ffn_size) == (6, 12, 88)
    assert config.rope == RopeConfig(150000.0, 1.0, 4096, 32.0, 1.0, 1.0, 1.0)


REFUSED_KEYS = [
    ("gpt2", "context_length", None, "context_length is missing"),
    ("gpt2", "context_length", 0, "context_length is 0"),
    ("gpt2", "context_length", 1 << 28, "context_length is 268435456"),
    ("gpt2", "context_length", "160", "is STRING"),
    ("gpt2", "embedding_length", None, "embedding_length is missing"),
    ("gpt2", "embedding_length", 5 << 20, "hidden_size is 5242880"),
    ("gpt2", "attention.head_count", 7, "does not divide 90"),
    ("gpt2", "attention.head_count", 0, "head_count is 0"),
    ("gpt2", "attention.head_count", [5, 5], "is ARRAY"),
    ("gpt2", "attention.head_count_kv", 1, "gpt2 wants 5 equal heads"),
    ("gpt2", "block_count", 0, "block_count is 0"),
    ("gpt2", "block_count", 513, "more than the 512"),
    ("gpt2", "attention.layer_norm_epsilon", math.nan, "is nan"),
    ("gpt2", "attention.layer_norm_epsilon", -1e-5, "norm_epsilon is -"),
    ("gpt2", "attention.layer_norm_epsilon", 1, "is UINT32"),
    ("gpt-oss", "attention.head_count_kv", 4, "num_kv_heads 4 does not divide num_heads 6"),
    ("gpt-oss", "attention.key_length", 19, "differs from the head size 19"),
    ("gpt-oss", "attention.value_length", 24, "differs from the head size 20"),
    ("gpt-oss", "rope.dimension_count", 10, "differs from the head size 20"),
    ("gpt-oss", "attention.sliding_window", None, "sliding_window is missing"),
    ("gpt-oss", "attention.sliding_window", 0, "sliding_window is 0"),
    ("gpt-oss", "expert_count", None, "expert_count is missing"),
    ("gpt-oss", "expert_count", 100000, "expert_count is 100000"),
    ("gpt-oss", "expert_used_count", 9, "num_experts_used is 9"),
    ("gpt-oss", "rope.freq_base", None, "freq_base is missing"),
    ("gpt-oss", "rope.freq_base", math.inf, "is inf"),
    ("gpt-oss", "rope.freq_base", -1.0, "rope.theta is -1.0"),
    ("gpt-oss", "rope.scaling.type", "linear", "'yarn' and 'none' are served"),
    ("gpt-oss", "rope.scaling.factor", 0.0, "scaling.factor is 0.0"),
    ("gpt-oss", "rope.scaling.factor", None, "scaling.factor is missing"),
    ("gpt-oss", "rope.scaling.original_context_length", 0, "original_context_length is 0"),
    ("gpt-oss", "rope.scaling.yarn_beta_slow", 64.0, "rope.beta_fast is 32"),
    ("gpt-oss", "rope.scaling.yarn_ext_factor", 2.0, "rope.extrapolation_factor is 2.0"),
    ("gpt-oss", "rope.scaling.yarn_attn_factor", 0.0, "rope.attention_factor is 0.0"),
    ("gpt-oss", "rope.scaling.yarn_log_multiplier", -1e9, "rope.attention_factor is "),
]


@pytest.mark.parametrize(("architecture", "key", "value", "message"), REFUSED_KEYS)
def test_refused_metadata(tmp_path, architecture, key, value, message):
    keys = model_metadata(TINY_GPT2 if architecture == "gpt2" else TINY_GPT_OSS)
    keys.pop(f"{architecture}.{key}", None)
    if value is not None:
        keys[f"{architecture}.{key}"] = value
    with pytest.raises(ServiceError) as caught:
        GPTConfig.from_gguf(header_only(tmp_path, architecture, keys))
    assert caught.value.reason == Reason.MODEL_INVALID
    assert message in caught.value.message
    assert str(tmp_path / "header.gguf") in caught.value.message


def test_unknown_architecture(tmp_path):
    with pytest.raises(ServiceError, match="'llama' is not served; gpt2 and gpt-oss are") as caught:
        GPTConfig.from_gguf(header_only(tmp_path, "llama", {}))
    assert caught.value.reason == Reason.ARCHITECTURE_UNSUPPORTED
    with pytest.raises(ServiceError) as caught:
        replace(TINY_GPT2, architecture="llama")
    assert caught.value.reason == Reason.ARCHITECTURE_UNSUPPORTED


def test_vocabulary_of_another_length(tmp_path):
    file = header_only(tmp_path, "gpt2", model_metadata(TINY_GPT2) | {"tokenizer.ggml.tokens": ["a", "b"]})
    with pytest.raises(ServiceError, match="has 2 tokens, but the embedding has 3 rows"):
        GPTConfig.from_gguf(file)


def test_no_embedding(tmp_path):
    file = header_only(tmp_path, "gpt2", model_metadata(TINY_GPT2), tensor="other.weight")
    with pytest.raises(ServiceError, match=r"tensor 'token_embd\.weight' is missing"):
        GPTConfig.from_gguf(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope": TINY_GPT_OSS.rope},
        {"sliding_window": 4},
        {"num_experts": 2, "num_experts_used": 1},
        {"head_size": 20},
        {"vocab_size": 0},
        {"num_kv_heads": 0},
        {"norm_epsilon": math.nan},
    ],
)
def test_gpt2_validates_itself(changes):
    with pytest.raises(ServiceError) as caught:
        replace(TINY_GPT2, **changes)
    assert caught.value.reason == Reason.MODEL_INVALID


@pytest.mark.parametrize(
    "changes",
    [
        {"rope": None},
        {"sliding_window": 0},
        {"num_experts": 0},
        {"num_experts_used": 0},
        {"head_size": 21},
        {"tied_head": True},
        {"num_layers": 513},
    ],
)
def test_gpt_oss_validates_itself(changes):
    with pytest.raises(ServiceError) as caught:
        replace(TINY_GPT_OSS, **changes)
    assert caught.value.reason == Reason.MODEL_INVALID


@pytest.mark.parametrize("name", sorted(ONE_LAYER.expected_tensors()))
def test_every_tensor_is_required(tmp_path, name):
    check_with(tmp_path, drop=name, message=f"tensor {name!r} is missing")


@pytest.mark.parametrize("name", ["blk.0.attn_k.weight", "blk.0.ffn_down_exps.bias", "output_norm.weight"])
def test_misshapen_tensor(tmp_path, name):
    shape = TINY_GPT_OSS.expected_tensors()[name]
    wrong = (*shape[:-1], shape[-1] + 1)
    check_with(tmp_path, add={name: np.ones(wrong, np.float32)}, message=f"tensor {name!r} has shape")


def test_unknown_tensor(tmp_path):
    extra = {"blk.0.attn_q.scale": np.ones(1, np.float32)}
    check_with(tmp_path, add=extra, message="tensor 'blk.0.attn_q.scale' is not known in architecture gpt-oss")


def test_quantised_vector(tmp_path):
    config = replace(TINY_GPT2, hidden_size=96, num_heads=4, num_kv_heads=4, head_size=24)
    for type_ in (GGMLType.F16, GGMLType.BF16):
        file = read_gguf(write_model(tmp_path / f"{type_.name}.gguf", config, lambda name, type_=type_: type_))
        GPTConfig.from_gguf(file).check_tensors(file)
    types = {"blk.0.attn_norm.weight": GGMLType.Q8_0}
    path = write_model(tmp_path / "vector.gguf", config, lambda name: types.get(name, GGMLType.F32))
    with pytest.raises(ServiceError, match=r"'blk\.0\.attn_norm\.weight' is a vector of type Q8_0"):
        config.check_tensors(read_gguf(path))


def test_which_tensors_are_matrices():
    matrices = {name for name in TINY_GPT_OSS.expected_tensors() if is_matrix(name)}
    layer = {name.removeprefix("blk.0.") for name in matrices if name.startswith("blk.0.")}
    assert layer == {
        f"{part}.weight"
        for part in (
            *("attn_q", "attn_k", "attn_v", "attn_output"),
            *("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
        )
    }
    assert {name for name in matrices if not name.startswith("blk.")} == {"token_embd.weight", "output.weight"}


def check_with(tmp_path, message, drop=None, add=None):
    """Write a gpt-oss of one layer with a tensor dropped or put in its place; expect the refusal."""
    path = tmp_path / "tensors.gguf"
    writer = gguf.GGUFWriter(path, "gpt-oss")
    for key, value in model_metadata(ONE_LAYER).items():
        add_value(writer, key, value)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in ONE_LAYER.expected_tensors().items()}
    tensors |= add or {}
    tensors.pop(drop, None)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    finish(writer)
    file = read_gguf(path)
    with pytest.raises(ServiceError) as caught:
        GPTConfig.from_gguf(file).check_tensors(file)
    assert caught.value.reason == Reason.MODEL_INVALID
    assert message in caught.value.message
    assert str(path) in caught.value.message


def header_only(tmp_path, architecture, keys, tensor="token_embd.weight"):
    """A file with these keys and one tensor of three rows."""
    path = tmp_path / "header.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add_value(writer, key, value)
    writer.add_tensor(tensor, np.ones((3, 4), np.float32))
    if tensor == "token_embd.weight" and architecture == "gpt-oss":
        writer.add_tensor("output.weight", np.ones((3, 4), np.float32))
    finish(writer)
    return read_gguf(path)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same(found, config):
    """Equal, but for what 32-bit floats in the file round."""
    for field in dataclasses.fields(config):
        ours, theirs = getattr(found, field.name), getattr(config, field.name)
        if isinstance(theirs, RopeConfig):
            assert_same(ours, theirs)
        elif isinstance(theirs, float):
            assert ours == pytest.approx(theirs, rel=1e-6)
            assert field.name == "attention_factor" or struct.pack("f", ours) == struct.pack("f", theirs)
        else:
            assert ours == theirs
