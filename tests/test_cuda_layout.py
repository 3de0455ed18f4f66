"""The planes of layout cuda.v1, decoded again without a GPU, are the file's weights bit for bit."""

from dataclasses import replace

import numpy as np
import pytest

from shared.cuda_layout import FAMILIES, TILES, Family, family_of, fill, is_tiled, plan
from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf, read_tensor
from shared.gpt_config import GPTConfig
from shared.layout import plane_array
from shared.quants import dequantize
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS, WIDE_GPT2, WIDE_GPT_OSS, random_tensor, write_model

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@pytest.mark.parametrize("type", list(GGMLType), ids=lambda type: type.name)
@pytest.mark.parametrize("config", [WIDE_GPT_OSS, WIDE_GPT2], ids=["gpt-oss", "gpt2"])
def test_every_type_comes_back(tmp_path, config, type):
    check_model(tmp_path, config, lambda name: type if is_tiled(name) else GGMLType.F32)


@pytest.mark.parametrize("config", [TINY_GPT_OSS, TINY_GPT2], ids=["gpt-oss", "gpt2"])
@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.F16, GGMLType.BF16], ids=lambda type: type.name)
def test_odd_sizes(tmp_path, config, type):
    check_model(tmp_path, config, lambda name: type if is_tiled(name) else GGMLType.F32)


def test_rows_of_whole_blocks_but_not_of_whole_tiles(tmp_path):
    config = replace(TINY_GPT_OSS, num_layers=1, hidden_size=96, ffn_size=160)
    check_model(tmp_path, config, lambda name: GGMLType.MXFP4 if "exps.weight" in name else GGMLType.F16)


def test_gate_and_up_of_different_families_lie_as_float32(tmp_path):
    types = {"ffn_gate_exps.weight": GGMLType.MXFP4, "ffn_up_exps.weight": GGMLType.Q8_0}
    config = replace(WIDE_GPT_OSS, num_layers=1)
    tensors = check_model(tmp_path, config, lambda name: types.get(name.split(".", 2)[-1], GGMLType.F32))
    assert family_of(tensors["blk.0.ffn_gate_exps.weight"]) == Family.F32


def test_planes_never_overlap(tmp_path):
    """Every byte belongs to one tensor at most: each is filled with its own mark and keeps it."""
    file = read_gguf(write_model(tmp_path / "model.gguf", WIDE_GPT_OSS, lambda name: GGMLType.F16))
    planned = plan(file, WIDE_GPT_OSS)
    owners = [np.zeros(size, np.uint16) for size in planned.allocation_sizes]
    marks = {}
    for mark, tensor in enumerate(planned.tensors.values(), start=1):
        for index, plane in enumerate(tensor.planes):
            item = np.dtype(plane.dtype).itemsize
            shape, strides = (*plane.shape, item), tuple(2 * stride for stride in (*plane.strides, 1))
            view = np.ndarray(shape, np.uint16, owners[plane.allocation], 2 * plane.offset, strides)
            assert not view.any()
            view[...] = mark
            marks[tensor.name, index] = view
    assert len(marks) > 40


def test_a_weight_past_the_range_of_half_is_refused(tmp_path):
    random = np.random.default_rng(0)
    values = {name: random_tensor(random, name, shape) for name, shape in TINY_GPT2.expected_tensors().items()}
    values["blk.1.ffn_up.weight"][3, 5] = 70000.0
    file = read_gguf(write_model(tmp_path / "model.gguf", TINY_GPT2, values=values))
    planned = plan(file, TINY_GPT2)
    with pytest.raises(ServiceError, match=r"blk.1.ffn_up.weight.*70000") as caught:
        fill(planned, file, 1, memoryview(bytearray(planned.allocation_sizes[1])))
    assert caught.value.reason == Reason.MODEL_INVALID


def check_model(tmp_path, config, type_of):
    file = read_gguf(write_model(tmp_path / "model.gguf", config, type_of))
    GPTConfig.from_gguf(file).check_tensors(file)
    planned = plan(file, config)
    buffers = [memoryview(bytearray(size)) for size in planned.allocation_sizes]
    for index, buffer in enumerate(buffers):
        fill(planned, file, index, buffer)
    for name, info in file.tensors.items():
        expected = dequantize(read_tensor(file, info).reshape(-1, info.row_bytes), info.type).reshape(info.shape)
        found = decode(planned.tensors[name], buffers)
        assert np.array_equal(found.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)), name
    return planned.tensors


def decode(tensor, buffers):
    """The tensor's values, read as the kernels read them."""
    arrays = [plane_array(plane, buffers[plane.allocation]) for plane in tensor.planes]
    if tensor.planes[0].role == "values":
        return arrays[0]
    family = family_of(tensor)
    if len(tensor.shape) == 2:
        arrays = [array[None] for array in arrays]
    matrices = [decode_matrix(tensor, family, [array[index] for array in arrays]) for index in range(len(arrays[0]))]
    return np.stack(matrices) if len(tensor.shape) == 3 else matrices[0]


def decode_matrix(tensor, family, arrays):
    parts = {}
    for (role, _, axes), array in zip(TILES[family], arrays, strict=True):
        letters = ["s", "k", *axes]
        if family == Family.MXFP4 and role == "quants":
            letters.append("v")
        order = [letter for letter in "sugkbhtqv" if letter in letters]
        values = untwiddle(array) if "v" in letters and array.ndim < len(letters) else array
        parts[role] = values.transpose([letters.index(letter) for letter in order])
    codes = parts["quants"]
    codes = codes.reshape(codes.shape[0], *codes.shape[1:5], -1)  # s, u, g, k, b, 32
    if family in (Family.F32, Family.F16):
        values = codes.astype(np.float32)
    elif family == Family.BF16:
        values = (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif family == Family.MXFP4:
        values = E2M1[codes] * np.ldexp(np.float32(1), parts["scales"].astype(int) - 127)[..., None]
    elif family == Family.AFFINE16:
        groups = (codes.astype(np.float32) - 128).reshape(*codes.shape[:-1], 2, 16)
        values = (groups * parts["scales"][..., None]).reshape(codes.shape)
    else:
        values = (codes.astype(np.float32) - 128) * parts["scales"].astype(np.float32)[..., None]
        if family == Family.AFFINE32:
            values += parts["minima"][..., None]
    rows = values.shape[0] * values.shape[1] * values.shape[2]
    return np.ascontiguousarray(values.reshape(rows, -1)[: tensor.shape[-2], : tensor.shape[-1]], np.float32)


def untwiddle(words):
    """What decode() in weights.cuh does, for each half of each pair: the three bits and the sign, as a code."""
    codes = np.empty((*words.shape, 8), np.uint8)
    shifted = [(words, words), (words << 3, words << 3), (words << 6, words << 1), (words << 9, words << 2)]
    for pair, (magnitudes, signs) in enumerate(shifted):
        for upper in range(2):
            magnitude = (magnitudes >> np.uint32(9 + 16 * upper)) & np.uint32(7)
            sign = (signs >> np.uint32(15 + 16 * upper)) & np.uint32(1)
            codes[..., 2 * pair + upper] = magnitude | sign << np.uint32(3)
    return codes


def test_every_type_has_a_family():
    assert set(FAMILIES) == set(GGMLType)
