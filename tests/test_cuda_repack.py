"""The loader's kernels, compiled for the host, give the planes that the layout's own `fill` gives, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.loader.cuda.repack import Window, file_starts, repackings
from shared.cuda_layout import fill, is_tiled, plan
from shared.digest import PIECE_BYTES
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf
from shared.gpt_config import GPTConfig
from tests import host_cuda
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS, WIDE_GPT2, WIDE_GPT_OSS, write_model

pytestmark = host_cuda.needs_compiler


@pytest.mark.parametrize("type", list(GGMLType), ids=lambda type: type.name)
@pytest.mark.parametrize("config", [WIDE_GPT_OSS, WIDE_GPT2], ids=["gpt-oss", "gpt2"])
def test_every_type_is_repacked(tmp_path: Path, config: GPTConfig, type: GGMLType) -> None:
    check(tmp_path, config, lambda name: type if is_tiled(name) else GGMLType.F32)


def check(tmp_path: Path, config: GPTConfig, type_of: Callable[[str], GGMLType], step: int = 10_007) -> None:
    """Bytes arrive `step` at a time through a window that the file does not fit."""
    file = read_gguf(write_model(tmp_path / "model.gguf", config, type_of))
    planned = plan(file, config)
    expected = [bytearray(size) for size in planned.allocation_sizes]
    for index, buffer in enumerate(expected):
        fill(planned, file, index, memoryview(buffer))
    found = [np.zeros(size, np.uint8) for size in planned.allocation_sizes]
    bytes_ = np.zeros(1 << 17, np.uint8)
    flags = np.tile(np.array([2**64 - 1, 0], np.uint64), (len(planned.tensors), 1))
    window = Window(bytes_.ctypes.data, bytes_.nbytes)
    addresses = {index: array.ctypes.data for index, array in enumerate(found)}
    todo = repackings(planned, file, addresses, window, flags.ctypes.data)
    content = file.paths[0].read_bytes()
    for start in range(0, len(content), step):
        piece = np.frombuffer(content[start : start + step], np.uint8)
        bytes_[(start + np.arange(len(piece))) % len(bytes_)] = piece
        for each in todo:
            launch = each.advance(start + len(piece))
            if launch is not None:
                host_cuda.run("repack", launch.kernel, launch.num_threads, launch.arguments, TYPE=int(launch.type))
    assert all(each.is_done and each.bytes_done == file.tensors[each.tensor.name].num_bytes for each in todo)
    assert (flags == [2**64 - 1, 0]).all()
    for index, buffer in enumerate(expected):
        assert found[index].tobytes() == bytes(buffer), f"allocation {index}"
