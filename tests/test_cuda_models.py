"""Whole models on the GPU: against transformers' logits, and against the numpy backend."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpt_oss_file import GPT_OSS_20B, write_file
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf
from shared.gpt_config import GPTConfig
from tests.cuda_device import open_device
from tests.tiny_models import (
    TINY_GPT2,
    TINY_GPT_OSS,
    WIDE_GPT_OSS,
    SteppedRunner,
    SteppedSequence,
    load_runner,
    write_model,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

GOLDENS = Path(__file__).parent / "goldens"
MODELS = Path(__file__).parent.parent / "models"
# Activations are rounded to half, 2^-11, some ten times a layer: a few thousandths of the logits' spread. A row whose
# router met a near tie may take another expert and be further off.
TOLERANCE = 0.01


@pytest.fixture(scope="module")
def device():
    device = open_device()
    yield device
    device.close()


def load_cuda(device, path, num_sequences=1, block_size=32):
    from services.executor.cuda.runner import CudaRunner
    from services.executor.cuda.weights import CudaWeights

    file = read_gguf(path)
    config = GPTConfig.from_gguf(file)
    count = num_sequences * -(-min(config.context_length, 512) // block_size)
    groups = {"full": count, "window": count}
    weights = CudaWeights.from_gguf(device, file, config)
    runner = CudaRunner(device, weights, block_size, groups, max_batch_tokens=512, max_sequences=max(8, num_sequences))
    return SteppedRunner(runner, config, block_size, groups)


@pytest.mark.parametrize("chunk", [120, 50, 7, 1])
@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "gpt_oss_mxfp4"])
def test_logits_are_those_of_transformers(device, name, chunk):
    golden = np.load(GOLDENS / f"{name}.npz")
    runner = load_cuda(device, GOLDENS / f"{name}.gguf")
    assert_close(runner.run(golden["token_ids"].tolist(), chunk), golden["logits"], f"{name} by {chunk}")


@pytest.mark.parametrize("name", ["demo-gpt2", "demo-gpt-oss"])
@pytest.mark.parametrize("chunk", [200, 1])
def test_demo_models(device, name, chunk):
    path = MODELS / f"{name}.gguf"
    reference, runner = load_runner(path), load_cuda(device, path)
    count = min(200, runner.config.context_length)
    tokens = np.random.default_rng(3).integers(0, runner.config.vocab_size, count).tolist()
    assert_close(runner.run(tokens, chunk), reference.run(tokens, count), f"{name} by {chunk}")


@pytest.mark.parametrize("type", list(GGMLType), ids=lambda type: type.name)
def test_every_type_of_weight(device, tmp_path, type):
    path = write_model(
        tmp_path / "model.gguf",
        WIDE_GPT_OSS,
        lambda name: (
            type
            if name.endswith(("_exps.weight", "embd.weight", "output.weight", "_q.weight", "_k.weight", "_v.weight"))
            else GGMLType.F32
        ),
    )
    tokens = np.random.default_rng(4).integers(0, WIDE_GPT_OSS.vocab_size, 70).tolist()
    assert_close(load_cuda(device, path).run(tokens, 33), load_runner(path).run(tokens, 70), type.name)


def test_two_layers_of_gpt_oss_20b(device, tmp_path):
    """Its full width and vocabulary, in the official file's types; a window's layer and a full one, past the window."""
    path = tmp_path / "model.gguf"
    write_file(path, replace(GPT_OSS_20B, num_layers=2, context_length=4096))
    tokens = np.random.default_rng(7).integers(0, GPT_OSS_20B.vocab_size, 160).tolist()
    expected = load_runner(path, float32_budget=0).run(tokens, 160)
    runner = load_cuda(device, path)
    for chunk in (160, 64, 1):
        assert_close(runner.run(tokens, chunk), expected, f"by {chunk}")


@pytest.mark.parametrize("config", [TINY_GPT2, TINY_GPT_OSS], ids=["gpt2", "gpt-oss"])
def test_streams_beside_each_other(device, tmp_path, config):
    """Decoding in graphs of several sizes, prompts beside it, and each stream as it is alone in numpy."""
    path = write_model(tmp_path / "model.gguf", config)
    runner, reference = load_cuda(device, path, num_sequences=10), load_runner(path)
    random = np.random.default_rng(5)
    sequences = [
        SteppedSequence(random.integers(0, config.vocab_size, 100 - 3 * index).tolist()) for index in range(10)
    ]
    while any(left(sequence) for sequence in sequences):
        counts = [min(left(sequence), int(random.choice([0, 1, 1, 1, 1, 1, 30]))) for sequence in sequences]
        if random.random() < 0.6:
            counts = [min(count, 1) for count in counts]
        work = [(sequence, count) for sequence, count in zip(sequences, counts, strict=True) if count]
        if work:
            runner.step(work)
    for index, sequence in enumerate(sequences):
        expected = reference.run(sequence.token_ids, len(sequence.token_ids))
        assert_close(np.stack(sequence.logits), expected, f"stream {index}")


def test_the_same_schedule_gives_the_same_bits(device, tmp_path):
    runner = load_cuda(device, write_model(tmp_path / "model.gguf", TINY_GPT_OSS))
    tokens = np.random.default_rng(6).integers(0, TINY_GPT_OSS.vocab_size, 90).tolist()
    for chunk in (90, 13, 1):
        assert np.array_equal(runner.run(tokens, chunk), runner.run(tokens, chunk))


def left(sequence):
    return len(sequence.token_ids) - sequence.num_computed


def assert_close(logits, expected, what):
    assert np.isfinite(logits).all()
    assert logits.std() > 0
    spread = expected.max() - expected.min()
    errors = np.abs(logits - expected).max(axis=1) / spread
    print(f"{what}: error of a row over the spread: median {np.median(errors):.5f}, largest {errors.max():.5f}")
    assert np.median(errors) <= TOLERANCE / 2
    assert (errors <= TOLERANCE).mean() >= 0.95
    assert errors.max() <= 0.25
