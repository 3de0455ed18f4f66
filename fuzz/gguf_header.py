"""Target: a GGUF file's bytes, from the magic number to the last tensor and on to the model's dimensions.

A file is refused by a `ServiceError` that names it, or all that it claims holds: every value decodes, every tensor
lies inside the file, and dimensions, tokenizer and the plan of its weights come out or are refused in turn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np

from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import GGUFFile, StringArray, read_gguf, read_tensor
from shared.gpt_config import GPTConfig
from shared.layout import plan
from shared.quants import find_invalid
from shared.tokenizer_data import tokenizer_data_from_gguf
from tests.gguf_files import gguf_bytes
from tests.hostile_files import hostile_files, narrow_arrays
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS, model_metadata

MAX_BYTES = 8192  # of an input: small, so that mutations meet what matters
MAX_SECONDS = 2.0  # of the processor; instrumented code is a few times slower

REFUSALS = frozenset(
    (
        Reason.MODEL_INVALID,
        Reason.FILE_VERSION_UNSUPPORTED,
        Reason.TENSOR_TYPE_UNSUPPORTED,
        Reason.ARCHITECTURE_UNSUPPORTED,
    )
)


def seeds() -> Iterator[bytes]:
    """Whole models of both architectures, one tensor of each type, and the hostile files."""
    sizes = {"vocab_size": 4, "num_layers": 1, "hidden_size": 32, "ffn_size": 32}
    gpt2 = replace(TINY_GPT2, **sizes, context_length=4, num_heads=2, num_kv_heads=2, head_size=16)
    gpt_oss = replace(
        TINY_GPT_OSS, **sizes, num_heads=2, num_kv_heads=1, head_size=8, num_experts=2, num_experts_used=1
    )
    tokenizer = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<|end|>"],
        "tokenizer.ggml.token_type": np.array([1, 1, 1, 3], np.int32),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.chat_template": "{{ messages }}",
    }
    for config, type_ in ((gpt2, GGMLType.F16), (gpt_oss, GGMLType.MXFP4)):
        metadata = {"general.architecture": config.architecture} | model_metadata(config) | tokenizer
        tensors = {
            name: (np.zeros(shape, np.float32), type_ if name.endswith("_exps.weight") else GGMLType.BF16)
            for name, shape in config.expected_tensors().items()
        }
        yield gguf_bytes(metadata, tensors)
    for type_ in GGMLType:
        yield gguf_bytes({"key": [1, 2]}, {"t": (np.zeros((2, 256), np.float32), type_)}, alignment=64)
    yield narrow_arrays()
    for file in hostile_files():
        yield file.data[:MAX_BYTES]


def examine(data: bytes) -> str:
    """Read `data` as a file: "served", or the reason of its refusal.

    Raises:
        AssertionError: for a claim that was believed and does not hold, a refusal without its place, or time lost.
    """
    path = f"/proc/self/fd/{_memory_file()}"
    os.ftruncate(_memory_file(), len(data))
    os.pwrite(_memory_file(), data, 0)
    start = time.process_time()
    refusal = None
    try:
        _use(read_gguf(path), len(data))
    except ServiceError as error:
        refusal = error
    assert time.process_time() - start < MAX_SECONDS
    if refusal is None:
        return "served"
    assert refusal.reason in REFUSALS, refusal
    assert refusal.message.startswith(path), refusal
    assert len(refusal.message) < 2000, refusal
    return refusal.reason.name


@cache
def _memory_file() -> int:
    return os.memfd_create("fuzzed.gguf")


def _use(file: GGUFFile, size: int) -> None:
    for value in file.metadata.values():
        if isinstance(value, StringArray):
            assert sum(len(text) for text in value) <= size
        repr(value)
    end = 0
    for info in file.tensors.values():
        data = read_tensor(file, info)
        assert data.nbytes == info.num_bytes == info.type.row_bytes(info.num_elements)
        assert max(end, file.data_starts[0]) <= info.offset
        end = info.offset + info.num_bytes
        assert end <= size
        find_invalid(data, info.type)
    config = GPTConfig.from_gguf(file)
    config.check_tensors(file)
    planned = plan(file, config)
    assert planned.num_bytes < 1000 * size  # float32 planes, padded to whole vectors and lines
    tokenizer_data_from_gguf(file, model="fuzzed", digest="")
