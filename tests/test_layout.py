"""How weights lie in memory: sizes to the byte, alignment, neighbours, both layouts, and weights that are refused."""

from dataclasses import replace

import numpy as np
import pytest

from services.executor.weights import Weights
from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf, read_tensor
from shared.gpt_config import GPTConfig, is_matrix
from shared.layout import BLOCKS_LAYOUT, FLOAT32_LAYOUT, fill, plan, plane_array
from shared.quants import dequantize
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS, WIDE_GPT2, WIDE_GPT_OSS, load_runner, write_model

CONFIGS = {"gpt2": TINY_GPT2, "gpt2 with a head": replace(TINY_GPT2, tied_head=False), "gpt-oss": TINY_GPT_OSS}
MIXED = {"attn_q": GGMLType.F16, "attn_k": GGMLType.BF16, "ffn_down_exps": GGMLType.F16, "norm": GGMLType.BF16}


@pytest.fixture(params=list(CONFIGS))
def file(request, tmp_path):
    return read_gguf(write_model(tmp_path / "model.gguf", CONFIGS[request.param], mixed_type))


@pytest.mark.parametrize("budget", [0, 4 << 30])
def test_every_value_is_where_the_plan_says(file, budget):
    config = GPTConfig.from_gguf(file)
    planned, buffers = load(file, config, budget)
    assert set(planned.tensors) == set(file.tensors)
    assert planned.layout == (FLOAT32_LAYOUT if budget else BLOCKS_LAYOUT)
    for name, tensor in planned.tensors.items():
        info = file.tensors[name]
        data = read_tensor(file, info).reshape(*info.shape[:-1], -1)
        (plane,) = tensor.planes
        array = plane_array(plane, buffers[plane.allocation])
        if plane.role == "blocks":
            assert not budget
            assert is_matrix(name)
            np.testing.assert_array_equal(array, data)
        else:
            values = dequantize(data, info.type)
            expected = np.swapaxes(values, -1, -2) if plane.role == "transposed" else values
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("budget", [0, 4 << 30])
def test_planes_fill_their_allocations(file, budget):
    """One allocation a layer and one for the rest; arrays start at 64 bytes, do not overlap, and nothing is wasted."""
    config = GPTConfig.from_gguf(file)
    planned = plan(file, config, budget)
    assert len(planned.allocation_sizes) == config.num_layers + 1
    assert planned.num_bytes == sum(planned.allocation_sizes)
    used = [np.zeros(size, np.uint8) for size in planned.allocation_sizes]
    for name, tensor in planned.tensors.items():
        plane = tensor.planes[0]
        layer = int(name.split(".")[1]) if name.startswith("blk.") else config.num_layers
        assert plane.allocation == layer
        item = np.ndarray(
            (*plane.shape, np.dtype(plane.dtype).itemsize),
            np.uint8,
            used[plane.allocation],
            plane.offset,
            (*plane.strides, 1),
        )
        assert not item.any(), f"{name} overlaps"
        item += 1
        if plane.role == "transposed":
            assert plane.strides[-2] % 64 == 0
        if not any(part in name for part in ("attn_k.", "attn_v.", "ffn_up_exps.")):
            assert plane.offset % 64 == 0
    for size, bytes_used in zip(planned.allocation_sizes, used, strict=True):
        assert size % 64 == 0
        assert bytes_used.sum() > 0.5 * size


def test_blocks_are_kept_only_past_the_budget(file):
    config = GPTConfig.from_gguf(file)
    size = plan(file, config).num_bytes
    assert plan(file, config, size).layout == FLOAT32_LAYOUT
    kept = plan(file, config, size - 1)
    assert kept.layout == BLOCKS_LAYOUT
    assert kept.num_bytes < size


def test_report_counts_the_files_bytes(file):
    config = GPTConfig.from_gguf(file)
    planned = plan(file, config)
    reported = []
    for index, size in enumerate(planned.allocation_sizes):
        fill(planned, file, index, memoryview(bytearray(size)), reported.append)
    assert sum(reported) == sum(info.num_bytes for info in file.tensors.values())
    assert len(reported) == len(file.tensors)


def test_large_matrices_are_filled_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("shared.layout.DECODE_VALUES", 500)
    test_every_value_is_where_the_plan_says(
        read_gguf(write_model(tmp_path / "model.gguf", TINY_GPT_OSS, mixed_type)), 4 << 30
    )


@pytest.mark.parametrize("budget", [0, 4 << 30])
@pytest.mark.parametrize(
    ("name", "type_", "byte"),
    [
        ("blk.0.ffn_down_exps.weight", GGMLType.MXFP4, 17 * 1000),
        ("output.weight", GGMLType.Q8_0, 34 * 500),
        ("blk.1.attn_norm.weight", GGMLType.F32, 4 * 7),
    ],
)
def test_a_weight_that_is_not_finite(tmp_path, name, type_, byte, budget):
    """The refusal names file, byte and tensor."""
    path = write_model(tmp_path / "model.gguf", WIDE_GPT_OSS, lambda tensor: type_ if tensor == name else GGMLType.F32)
    offset = read_gguf(path).tensors[name].offset + byte
    bad = {GGMLType.MXFP4: b"\xff", GGMLType.Q8_0: b"\x00\x7c", GGMLType.F32: b"\x00\x00\xc0\x7f"}[type_]
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(bad)
    file = read_gguf(path)
    with pytest.raises(ServiceError) as caught:
        load(file, GPTConfig.from_gguf(file), budget)
    assert caught.value.reason == Reason.MODEL_INVALID
    assert f"{path}: byte {offset}: tensor {name!r} ({type_.name})" in caught.value.message
    assert caught.value.metadata["offset"] == str(offset)


@pytest.mark.parametrize("config", [WIDE_GPT2, WIDE_GPT_OSS])
@pytest.mark.parametrize("type_", list(GGMLType))
def test_every_type_everywhere(tmp_path, config, type_):
    """Each matrix of a model in one type: both layouts give the bits of the same values in a float32 file."""
    path = write_model(tmp_path / "quantised.gguf", config, lambda name: type_ if is_matrix(name) else GGMLType.F32)
    file = read_gguf(path)
    assert {info.type for name, info in file.tensors.items() if is_matrix(name)} == {type_}
    decoded = {
        name: dequantize(read_tensor(file, info).reshape(*info.shape[:-1], -1), info.type)
        for name, info in file.tensors.items()
    }
    plain = write_model(tmp_path / "plain.gguf", config, values=decoded)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, 45).tolist()
    expected = load_runner(plain).run(tokens, 45)
    assert np.isfinite(expected).all()
    assert expected.std() > 0.1
    for budget in (4 << 30, 0):
        found = load_runner(path, float32_budget=budget).run(tokens, 40)
        np.testing.assert_array_equal(found, expected)


def test_weights_are_views(tmp_path):
    """What is multiplied with one input is one array, read-only where its memory is."""
    file = read_gguf(write_model(tmp_path / "model.gguf", TINY_GPT_OSS))
    config = GPTConfig.from_gguf(file)
    planned, buffers = load(file, config, 4 << 30)
    weights = Weights.from_gguf(file, config)
    sealed = replace_buffers(weights, [buffer.toreadonly() for buffer in buffers])
    fused = sealed.matrix(*[f"blk.0.attn_{part}.weight" for part in "qkv"])
    assert (fused.num_inputs, fused.num_outputs, fused.width) == (72, 200, 208)
    array = fused.columns(0, 208)
    assert not array.flags.writeable
    assert not array[:, 200:].any()
    address = array.__array_interface__["data"][0]
    start = np.frombuffer(buffers[0], np.uint8).__array_interface__["data"][0]
    assert address - start == planned.tensors["blk.0.attn_q.weight"].planes[0].offset
    assert sealed.vector("blk.0.attn_q.bias", "blk.0.attn_k.bias", "blk.0.attn_v.bias").shape == (200,)
    assert sealed.vector("blk.0.ffn_gate_exps.bias", "blk.0.ffn_up_exps.bias").shape == (8, 176)
    experts = sealed.expert_matrices("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight")
    assert [matrix.columns(0, 176).shape for matrix in experts] == [(72, 176)] * 8


def replace_buffers(weights, buffers):
    weights._buffers = buffers
    return weights


def mixed_type(name):
    return next((type_ for part, type_ in MIXED.items() if part in name), GGMLType.F32)


def load(file, config, budget):
    """The plan and the filled memory of every allocation."""
    config.check_tensors(file)
    planned = plan(file, config, budget)
    buffers = [memoryview(bytearray(size)) for size in planned.allocation_sizes]
    for index, buffer in enumerate(buffers):
        fill(planned, file, index, buffer)
    return planned, buffers
