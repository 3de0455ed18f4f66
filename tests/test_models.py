"""Both models against Hugging Face transformers: logits of small random files (tests/make_goldens.py)."""

from pathlib import Path

import numpy as np
import pytest

from services.executor.ops.numpy_ops import rope_frequencies
from shared.gguf import read_gguf
from shared.gpt_config import GPTConfig, RopeConfig
from tests.tiny_models import load_runner

GOLDENS = Path(__file__).parent / "goldens"
NAMES = ["gpt2", "gpt_oss", "gpt_oss_mxfp4"]


@pytest.mark.parametrize("chunk", [120, 50, 7, 1])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, chunk):
    golden = np.load(GOLDENS / f"{name}.npz")
    runner = load_runner(GOLDENS / f"{name}.gguf", block_size=16)
    logits = runner.run(golden["token_ids"].tolist(), chunk)
    assert_close(logits, golden["logits"])


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_same_from_blocks(name):
    golden = np.load(GOLDENS / f"{name}.npz")
    runner = load_runner(GOLDENS / f"{name}.gguf", float32_budget=0)
    assert_close(runner.run(golden["token_ids"].tolist(), 64), golden["logits"])


@pytest.mark.parametrize("name", NAMES)
def test_goldens_leave_nothing_out(name):
    """A golden proves what it exercises: every tensor random, the window and the original context left behind."""
    file = read_gguf(GOLDENS / f"{name}.gguf")
    config = GPTConfig.from_gguf(file)
    config.check_tensors(file)
    num_tokens = len(np.load(GOLDENS / f"{name}.npz")["token_ids"])
    assert config.hidden_size & (config.hidden_size - 1) != 0
    if config.rope is not None:
        assert config.num_heads > config.num_kv_heads > 1
        assert config.head_size != config.hidden_size // config.num_heads
        assert num_tokens > 2 * config.sliding_window
        assert num_tokens > 2 * config.rope.original_context_length
        assert 1 < config.num_experts_used < config.num_experts


def test_yarn_keeps_the_ends_of_its_ramp_unrounded():
    """gpt-oss-20b's own numbers: the ramp runs from dimension 8.0928 to 17.3980 (llama.cpp: from 8 to 18)."""
    rope = RopeConfig(150000.0, 32.0, 4096, 32.0, 1.0, 1.0, 1.0)
    plain = 150000.0 ** -(np.arange(0, 64, 2) / 64)
    kept = (rope_frequencies(rope, 64) / plain - 1 / 32) / (1 - 1 / 32)
    expected = 1 - np.clip((np.arange(32) - 8.0928) / (17.3980 - 8.0928), 0, 1)
    np.testing.assert_allclose(kept, expected, atol=2e-5)


def test_yarn_keys_are_honoured():
    plain = 150000.0 ** -(np.arange(0, 64, 2) / 64)
    divided = RopeConfig(150000.0, 32.0, 4096, 32.0, 1.0, 1.0, extrapolation_factor=0.0)
    np.testing.assert_allclose(rope_frequencies(divided, 64), plain / 32, rtol=1e-6)
    none = RopeConfig(150000.0, 1.0, 4096, 32.0, 1.0, 1.0, 1.0)
    np.testing.assert_allclose(rope_frequencies(none, 64), plain, rtol=1e-6)
    steep = RopeConfig(150000.0, 32.0, 4096, 1.0, 1.0, 1.0, 1.0)
    kept = np.isclose(rope_frequencies(steep, 64), plain, rtol=1e-6)
    assert kept[:18].all()
    assert not kept[18:].any()


def assert_close(logits, expected):
    assert np.isfinite(logits).all()
    spread = expected.max() - expected.min()
    assert np.abs(logits - expected).max() <= 1e-4 * spread
