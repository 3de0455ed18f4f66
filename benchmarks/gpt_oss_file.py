"""A file of gpt-oss-20b's full size in the official file's types, 98 Q8_0, 72 MXFP4, 289 F32, with random weights."""

from __future__ import annotations

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from shared.cuda_layout import is_tiled
from shared.ggml_type import GGMLType
from shared.gguf import TensorInfo, read_gguf
from shared.gpt_config import GPTConfig, RopeConfig
from shared.layout import round_up
from shared.quants import CODECS

GPT_OSS_20B = GPTConfig(
    architecture="gpt-oss",
    vocab_size=201088,
    context_length=131072,
    num_layers=24,
    hidden_size=2880,
    num_heads=64,
    num_kv_heads=8,
    head_size=64,
    ffn_size=2880,
    norm_epsilon=1e-5,
    tied_head=False,
    num_experts=32,
    num_experts_used=4,
    sliding_window=128,
    rope=RopeConfig(150000.0, 32.0, 4096, 32.0, 1.0, 0.1 * math.log(32.0) + 1.0, 1.0),
)
TEMPLATE_BYTES = 64 << 20  # of random blocks of each type, which are written again and again, each time from elsewhere
PIECE_BYTES = 16 << 20
NUM_WRITERS = 8
ALIGNMENT = 32  # of tensors in the file


def write_file(path: Path, config: GPTConfig) -> int:
    """Write the file; returns its size in bytes."""
    _write_header(path, config)
    tensors = read_gguf(path).tensors.values()
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
    """Everything but the weights, for which there is room."""
    assert config.rope is not None
    writer = gguf.GGUFWriter(path, config.architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_expert_feed_forward_length(config.ffn_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_used)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope.factor)
    writer.add_rope_scaling_orig_ctx_len(config.rope.original_context_length)
    tokens, merges = vocabulary(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(config.vocab_size - 1)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    num_bytes = 0
    for name, shape in config.expected_tensors().items():
        type = type_of(name)
        size = math.prod(shape[:-1]) * type.row_bytes(shape[-1])
        if type == GGMLType.F32:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
        else:  # whose shapes are given in bytes
            stored = (*shape[:-1], type.row_bytes(shape[-1]))
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, gguf.GGMLQuantizationType(int(type)))
        num_bytes += round_up(size, ALIGNMENT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, round_up(path.stat().st_size, ALIGNMENT) + num_bytes)


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
