"""Weights that no quantiser would write, but that a file may hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.cuda_layout import MAX_HALF
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf
from shared.quants import CODECS


def random_blocks(path: Path, seed: int = 0) -> None:
    """Overwrite every tensor of a file with random bits, as far as they are finite and, as values, in half's range."""
    random = np.random.default_rng(seed)
    file = read_gguf(path)
    with path.open("r+b") as out:
        for info in file.tensors.values():
            out.seek(info.offset)
            out.write(blocks_of(random, info.type, info.num_bytes // info.type.type_size).tobytes())


def blocks_of(random: np.random.Generator, type: GGMLType, count: int) -> NDArray[np.void]:
    """Random blocks, (count,) of the type's layout."""
    codec = CODECS[type]
    blocks = random.integers(0, 256, count * type.type_size, np.uint8).view(codec.layout)
    if type == GGMLType.F32:
        blocks["value"] = random.uniform(-MAX_HALF, MAX_HALF, count)
    elif type == GGMLType.BF16:
        blocks["value"] &= np.uint16(0xBFFF)  # below 2
    elif type == GGMLType.MXFP4:
        blocks["scale"] %= np.uint8(130)  # values below 2^5
    for name in codec.scales:
        bits = blocks[name].view(np.uint16)
        blocks[name] = (bits & np.uint16(0xBFFF)).view(np.float16)  # below 2: neither infinite nor NaN
    return blocks
