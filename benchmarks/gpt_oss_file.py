"""A file of gpt-oss-20b's full size in the official file's types, 98 Q8_0, 72 MXFP4, 289 F32, with random weights."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from shared.cuda_layout import is_tiled
from shared.ggml_type import GGMLType
from shared.gguf import TensorInfo, read_gguf
from shared.gpt_config import GPTConfig
from shared.quants import CODECS

TEMPLATE_BYTES = 64 << 20  # of random blocks of each type, which are written again and again, each time from elsewhere
PIECE_BYTES = 16 << 20
NUM_WRITERS = 8


def write_file(path: Path, config: GPTConfig) -> int:
    """Write the file; returns its size in bytes."""
    _write_header(path, config)
    tensors = read_gguf_header(path, config)
    random = np.random.default_rng(0)
    templates = {type: _template(random, type) for type in sorted({info.type for info in tensors})}

    def write(info: TensorInfo, start: int, shift: int) -> None:
        size = info.type.type_size
        count = min(PIECE_BYTES // size * size, info.num_bytes - start)
        template = templates[info.type]
        first = shift * size % (len(template) - PIECE_BYTES) // size * size
        with path.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), template[first : first + count].data, info.offset + start)

    shifts = itertools.count(1, 7919)
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        for info in tensors:
            step = PIECE_BYTES // info.type.type_size * info.type.type_size
            for start in range(0, info.num_bytes, step):
                pool.submit(write, info, start, next(shifts))
    return path.stat().st_size


def read_gguf_header(path: Path, config: GPTConfig) -> list[TensorInfo]:
    """The tensors of a file that has room for them."""
    tensors = read_gguf(path).tensors
    assert tensors.keys() == config.expected_tensors().keys()
    return list(tensors.values())


def type_of(name: str) -> GGMLType:
    """A tensor's type in the official file."""
    if name.endswith("_exps.weight"):
        return GGMLType.MXFP4
    return GGMLType.Q8_0 if is_tiled(name) else GGMLType.F32


def vocabulary(num_tokens: int) -> tuple[list[str], list[str]]:
    """Tokens of a byte-level BPE, and merges, about as many as the real one has: two for each longer token."""
    alphabet = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 256 + 68))]
    pairs = [left + right for left in alphabet for right in alphabet]
    merges = [" ".join(pair) for pair in pairs]
    tokens = [*alphabet, *pairs]
    for left, middle, right in itertools.islice(itertools.product(alphabet, repeat=3), num_tokens - len(tokens)):
        tokens.append(left + middle + right)
        merges += [f"{left + middle} {right}", f"{left} {middle + right}"]
    return tokens, merges


def _write_header(path: Path, config: GPTConfig) -> None:
    from tests.tiny_models import add_value, model_metadata

    writer = gguf.GGUFWriter(path, config.architecture)
    tokens, merges = vocabulary(config.vocab_size)
    values: dict[str, Any] = {
        **model_metadata(config),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.eos_token_id": config.vocab_size - 1,
        "tokenizer.ggml.merges": merges,
        "tokenizer.chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    }
    for key, value in values.items():
        add_value(writer, key, value)
    for name, shape in config.expected_tensors().items():
        type = type_of(name)
        num_bytes = int(np.prod(shape[:-1])) * type.row_bytes(shape[-1])
        # Shapes of quantised tensors are given in bytes.
        stored = (*shape[:-1], type.row_bytes(shape[-1])) if type != GGMLType.F32 else shape
        dtype = np.dtype(np.float32 if type == GGMLType.F32 else np.uint8)
        raw = None if type == GGMLType.F32 else gguf.GGMLQuantizationType(int(type))
        writer.add_tensor_info(name, stored, dtype, num_bytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    # What the last tensor's padding would end at; the header alone is no sound file.
    start = -(-path.stat().st_size // 32) * 32
    sizes = (
        -(-int(np.prod(shape[:-1])) * type_of(name).row_bytes(shape[-1]) // 32) * 32
        for name, shape in config.expected_tensors().items()
    )
    os.truncate(path, start + sum(sizes))


def _template(random: np.random.Generator, type: GGMLType) -> NDArray[np.uint8]:
    """Blocks whose values are about 0.02, as trained weights are."""
    count = TEMPLATE_BYTES // type.type_size
    blocks = np.frombuffer(random.bytes(count * type.type_size), np.uint8).copy().view(CODECS[type].layout)
    if type == GGMLType.MXFP4:
        blocks["scale"] = 119 + blocks["scale"] % 3
    elif type == GGMLType.Q8_0:
        blocks["scale"] = random.uniform(1e-4, 4e-4, count)
    else:
        blocks["value"] = random.uniform(0.5, 1.5, count)
    return blocks.view(np.uint8).reshape(-1)
