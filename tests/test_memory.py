"""What a model takes: weights and KV to the byte of what is allocated, activations close above the measured peak."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from services.executor.runner import NumpyRunner
from services.executor.step import SequenceSlice, StepBatch
from services.executor.weights import Weights
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf
from shared.gpt_config import GPTConfig, is_matrix
from shared.layout import plan
from shared.memory import estimate_memory, kv_groups, num_kv_blocks
from tests.marks import needs_invariant_blas
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS, WIDE_GPT2, WIDE_GPT_OSS, write_model

BLOCK_SIZE = 32
GPT2 = replace(WIDE_GPT2, vocab_size=1024, ffn_size=1024, context_length=1024)
GPT_OSS = replace(WIDE_GPT_OSS, vocab_size=1000, num_heads=8, num_experts=8, context_length=1024, sliding_window=64)


@pytest.fixture(scope="module", params=[GPT2, GPT_OSS], ids=["gpt2", "gpt-oss"])
def file(request, tmp_path_factory):
    return read_gguf(write_model(tmp_path_factory.mktemp("models") / "model.gguf", request.param))


@pytest.mark.parametrize("config", [TINY_GPT2, TINY_GPT_OSS])
@pytest.mark.parametrize(("context", "num_sequences", "chunk"), [(0, 1, 256), (100, 3, 16), (33, 2, 1)])
def test_weights_and_kv_to_the_byte(tmp_path, config, context, num_sequences, chunk):
    file = read_gguf(write_model(tmp_path / "model.gguf", config))
    weights = Weights.from_gguf(file, config)
    num_blocks = num_kv_blocks(config, context or config.context_length, num_sequences, BLOCK_SIZE, chunk)
    runner = NumpyRunner(config, weights, BLOCK_SIZE, num_blocks)
    estimate = estimate_memory(config, plan(file, config), context, num_sequences, BLOCK_SIZE, chunk)
    assert estimate.weight_bytes == weights.num_bytes
    assert estimate.kv_bytes == runner.kv_bytes
    assert [group.name for group in kv_groups(config, BLOCK_SIZE)] == [group.name for group in runner.kv_groups]


def test_kv_of_a_token():
    """gpt-oss-20b: 12 full layers, 8 heads of 64 keys and 64 values, in float32."""
    config = replace(
        TINY_GPT_OSS, num_layers=24, num_heads=64, num_kv_heads=8, head_size=64, hidden_size=2880, sliding_window=128
    )
    full, window = kv_groups(config, BLOCK_SIZE)
    assert (full.name, full.num_layers, full.window) == ("full", 12, 0)
    assert (window.name, window.num_layers, window.window) == ("window", 12, 128)
    assert full.block_bytes == window.block_bytes == 49152 * BLOCK_SIZE
    blocks = num_kv_blocks(config, 4096, 2, BLOCK_SIZE, 256)
    # 127 positions before a step of 256, which may begin on the last position of a block: 12 + 1 blocks.
    assert blocks == {"full": 256, "window": 26}
    assert num_kv_blocks(TINY_GPT2, 160, 1, BLOCK_SIZE, 256) == {"full": 5}


@needs_invariant_blas
@pytest.mark.parametrize(
    ("num_tokens", "context", "num_sequences"),
    [(512, 600, 1), (256, 1024, 1), (256, 256, 1), (64, 1000, 1), (16, 1024, 1), (16, 1024, 16), (64, 700, 64)],
)
def test_activations(file, num_tokens, context, num_sequences):
    check_activations(file, num_tokens, context, num_sequences, 4 << 30)


@needs_invariant_blas
@pytest.mark.parametrize("type_", [GGMLType.MXFP4, GGMLType.Q8_0])
@pytest.mark.parametrize("config", [GPT2, GPT_OSS])
def test_activations_of_blocks(tmp_path, config, type_):
    path = write_model(tmp_path / "model.gguf", config, lambda name: type_ if is_matrix(name) else GGMLType.F32)
    check_activations(read_gguf(path), 64, 256, 1, 0)


def check_activations(file, num_tokens, context, num_sequences, budget):
    """A step of as many tokens of every sequence, the last ones of full contexts."""
    config = GPTConfig.from_gguf(file)
    num_blocks = num_kv_blocks(config, context, num_sequences, BLOCK_SIZE, context)
    runner = NumpyRunner(config, Weights.from_gguf(file, config, budget), BLOCK_SIZE, num_blocks)
    share, blocks = num_tokens // num_sequences, -(-context // BLOCK_SIZE)
    tables = np.random.default_rng(0).permutation(num_sequences * blocks).astype(np.int32).reshape(-1, blocks)
    slices = [
        SequenceSlice(index * share, share, context, dict.fromkeys(num_blocks, table))
        for index, table in enumerate(tables)
    ]
    positions = np.tile(np.arange(context - share, context, dtype=np.int32), num_sequences)
    last_rows = np.arange(share - 1, num_tokens, share, dtype=np.int32)
    batch = StepBatch(np.zeros(num_tokens, np.int32), positions, slices, last_rows)
    runner.forward(batch)
    tracemalloc.start()
    runner.forward(batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    planned = plan(file, config, budget)
    estimate = estimate_memory(config, planned, context, num_sequences, BLOCK_SIZE, num_tokens)
    assert peak <= estimate.activation_bytes <= 1.25 * peak
