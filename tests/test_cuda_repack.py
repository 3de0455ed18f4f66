"""The loader's kernels, compiled for the host, give the planes that the layout's own `fill` gives, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.loader.cuda.filling import NOTHING_FOUND, refusal_of
from services.loader.cuda.kernels import ENTRIES, SOURCES
from services.loader.cuda.repack import Window, repackings, window_bytes
from shared.cuda_layout import fill, is_tiled, plan
from shared.digest import READ_BYTES
from shared.errors import ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import GGUFFile, read_gguf
from shared.gpt_config import GPTConfig
from shared.layout import Plan
from shared.quants import CODECS
from tests import host_cuda
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS, WIDE_GPT2, WIDE_GPT_OSS, write_model
from tests.weights import random_blocks

pytestmark = host_cuda.needs_compiler

WINDOW_BYTES = 1 << 17


@pytest.mark.parametrize("type", list(GGMLType), ids=lambda type: type.name)
@pytest.mark.parametrize("config", [WIDE_GPT_OSS, WIDE_GPT2], ids=["gpt-oss", "gpt2"])
def test_every_type_is_repacked(tmp_path: Path, config: GPTConfig, type: GGMLType) -> None:
    check(tmp_path, config, lambda name: type if is_tiled(name) else GGMLType.F32)


@pytest.mark.parametrize("config", [TINY_GPT_OSS, TINY_GPT2], ids=["gpt-oss", "gpt2"])
@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.F16, GGMLType.BF16], ids=lambda type: type.name)
def test_odd_sizes(tmp_path: Path, config: GPTConfig, type: GGMLType) -> None:
    check(tmp_path, config, lambda name: type if is_tiled(name) else GGMLType.F32)


def test_rows_of_whole_blocks_but_not_of_whole_tiles(tmp_path: Path) -> None:
    config = replace(TINY_GPT_OSS, num_layers=1, hidden_size=96, ffn_size=160)
    check(tmp_path, config, lambda name: GGMLType.MXFP4 if "exps.weight" in name else GGMLType.F16)


@pytest.mark.parametrize("type", [type for type in GGMLType if type != GGMLType.MXFP4], ids=lambda type: type.name)
def test_gate_and_up_of_different_families_lie_as_float32(tmp_path: Path, type: GGMLType) -> None:
    types = {"ffn_gate_exps.weight": GGMLType.MXFP4, "ffn_up_exps.weight": type}
    config = replace(WIDE_GPT_OSS, num_layers=1)
    check(tmp_path, config, lambda name: types.get(name.split(".", 2)[-1], GGMLType.F32))


@pytest.mark.parametrize("type", list(GGMLType), ids=lambda type: type.name)
def test_vectors_of_any_type(tmp_path: Path, type: GGMLType) -> None:
    """The router's matrix is one of them."""
    config = replace(WIDE_GPT_OSS, num_layers=1)
    check(tmp_path, config, lambda name: type if name.endswith("ffn_gate_inp.weight") else GGMLType.F32)


def test_one_byte_at_a_time_is_enough(tmp_path: Path) -> None:
    config = replace(TINY_GPT_OSS, num_layers=1, vocab_size=20, num_experts=4)
    check(tmp_path, config, lambda name: GGMLType.F16, step=1)


@pytest.mark.parametrize("type", list(GGMLType), ids=lambda type: type.name)
def test_weights_that_are_not_finite_are_found(tmp_path: Path, type: GGMLType) -> None:
    """The same block as the host finds, in every place where a type can hold such a value."""
    config = replace(WIDE_GPT_OSS, num_layers=1, num_experts=4)
    name = "blk.0.ffn_up_exps.weight"
    path = write_model(tmp_path / "model.gguf", config, lambda other: type if is_tiled(other) else GGMLType.F32)
    info = read_gguf(path).tensors[name]
    content = path.read_bytes()
    refusals = []
    for field, (dtype, start) in CODECS[type].layout.fields.items():
        bad = bytearray(content)
        for block in (7, 3):
            end = info.offset + block * type.type_size + start + dtype.itemsize
            bad[end - min(2, dtype.itemsize) : end] = b"\xff" * min(2, dtype.itemsize)
        path.write_bytes(bad)
        refusals.append((field, assert_same_refusal(path, config)))
    assert f"byte {info.offset + 3 * type.type_size}:" in dict(refusals)["scale" if type.block_size > 1 else "value"]


@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.BF16, GGMLType.MXFP4], ids=lambda type: type.name)
def test_weights_past_the_range_of_half_are_found(tmp_path: Path, type: GGMLType) -> None:
    """MXFP4 only where it lies as float32."""
    config = replace(WIDE_GPT_OSS, num_layers=1)
    types = {"blk.0.ffn_gate_exps.weight": type, "blk.0.ffn_up_exps.weight": GGMLType.BF16}
    path = write_model(tmp_path / "model.gguf", config, lambda other: types.get(other, GGMLType.F32))
    info = read_gguf(path).tensors["blk.0.ffn_gate_exps.weight"]
    content = bytearray(path.read_bytes())
    large = {
        GGMLType.F32: np.float32(-65505).tobytes(),
        GGMLType.BF16: b"\x80\x47",
        GGMLType.MXFP4: bytes([127 + 15, 0x07]),
    }[type]
    start = info.offset + 5 * type.type_size
    content[start : start + len(large)] = large
    path.write_bytes(content)
    assert "products on the GPU" in assert_same_refusal(path, config)


def test_a_strip_fits_the_window(tmp_path: Path) -> None:
    """Also where rows are as long as a model's dimensions may be."""
    file = read_gguf(write_model(tmp_path / "model.gguf", TINY_GPT2))
    assert window_bytes(plan(file, TINY_GPT2), file) == 128 << 20
    wide = replace(TINY_GPT2, num_layers=1, ffn_size=1 << 20, hidden_size=5, num_heads=5, num_kv_heads=5, head_size=1)
    file = read_gguf(write_model(tmp_path / "wide.gguf", wide))
    strip_bytes = 16 * file.tensors["blk.0.ffn_down.weight"].row_bytes
    assert strip_bytes == 64 << 20
    assert window_bytes(plan(file, wide), file) >= strip_bytes + 2 * READ_BYTES


@pytest.mark.parametrize("num_bytes", [64, 1 << 14, (1 << 14) + 256, 5 * (1 << 14) + 16320])
def test_pieces_are_hashed(num_bytes: int) -> None:
    content = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)
    pieces = [content.tobytes()[start : start + (1 << 14)] for start in range(0, num_bytes, 1 << 14)]
    digests = np.zeros((len(pieces) + 1, 32), np.uint8)
    host_cuda.run("sha256", "sha256", len(pieces), (content.ctypes.data, digests.ctypes.data, num_bytes, 1 << 14))
    assert [digest.tobytes() for digest in digests] == [*(hashlib.sha256(p).digest() for p in pieces), bytes(32)]


def test_entry_points_take_the_arguments_that_are_declared() -> None:
    sources = {kernel: "sha256" if kernel == "sha256" else "repack" for kernel in ENTRIES}
    for kernel, types in ENTRIES.items():
        assert host_cuda.parameter_types((SOURCES / f"{sources[kernel]}.cu").read_text(), kernel) == types


def check(tmp_path: Path, config: GPTConfig, type_of: Callable[[str], GGMLType], step: int = 10_007) -> None:
    """Random blocks, any bits that are finite, `step` bytes at a time through a window that the file does not fit."""
    path = write_model(tmp_path / "model.gguf", config, type_of)
    random_blocks(path)
    file = read_gguf(path)
    planned = plan(file, config)
    expected = [bytearray(size) for size in planned.allocation_sizes]
    for index, buffer in enumerate(expected):
        fill(planned, file, index, memoryview(buffer))
    found, flags = repack(file, planned, step)
    assert (flags == NOTHING_FOUND).all()
    for index, buffer in enumerate(expected):
        assert found[index].tobytes() == bytes(buffer), f"allocation {index}"


def repack(file: GGUFFile, planned: Plan, step: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The allocations, and what was found wrong of each tensor."""
    allocations = [np.zeros(size, np.uint8) for size in planned.allocation_sizes]
    memory = np.zeros(WINDOW_BYTES, np.uint8)
    flags = np.tile(np.array(NOTHING_FOUND, np.uint64), (len(planned.tensors), 1))
    window = Window(memory.ctypes.data, memory.nbytes)
    addresses = {index: array.ctypes.data for index, array in enumerate(allocations)}
    todo = repackings(planned, file, addresses, window, flags.ctypes.data)
    content = np.frombuffer(file.paths[0].read_bytes(), np.uint8)
    for start in range(0, len(content), step):
        piece = content[start : start + step]
        memory[(start + np.arange(len(piece))) % len(memory)] = piece
        for each in todo:
            launch = each.advance(start + len(piece))
            if launch is not None:
                host_cuda.run("repack", launch.kernel, launch.num_threads, launch.arguments, TYPE=int(launch.type))
    assert all(each.is_done and each.bytes_done == file.tensors[each.tensor.name].num_bytes for each in todo)
    return allocations, flags


def assert_same_refusal(path: Path, config: GPTConfig) -> str:
    """The kernels find what the host's own reading refuses, or both nothing; what the host says."""
    file = read_gguf(path)
    planned = plan(file, config)
    _, flags = repack(file, planned, 1 << 16)
    error = refusal_of(file, list(planned.tensors), flags)
    if error is None:
        fill(planned, file, 0, memoryview(bytearray(planned.allocation_sizes[0])))
        return ""
    with pytest.raises(ServiceError) as caught:
        fill(planned, file, 0, memoryview(bytearray(planned.allocation_sizes[0])))
    assert (caught.value.message, caught.value.reason) == (error.message, error.reason)
    assert caught.value.metadata == error.metadata
    return error.message
