"""The runner: what it offers to the engine, what it refuses, and that sequences can't touch one another."""

import numpy as np
import pytest

from services.executor.runner import NumpyRunner
from services.executor.step import KVGroup, Runner, SequenceSlice, StepBatch
from services.executor.weights import Weights
from shared.errors import Reason, ServiceError
from shared.gguf import read_gguf
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS, SteppedSequence, load_runner, write_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "model.gguf", TINY_GPT_OSS)


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 257, 100).tolist()


def test_what_the_engine_sees(path, tmp_path):
    runner: Runner = load_runner(path).runner
    assert list(runner.kv_groups) == [KVGroup("full", 1, 0), KVGroup("window", 2, 40)]
    assert runner.vocab_size == 257
    gpt2: Runner = load_runner(write_model(tmp_path / "gpt2.gguf", TINY_GPT2)).runner
    assert list(gpt2.kv_groups) == [KVGroup("full", 2, 0)]


@pytest.mark.parametrize("block_size", [0, -16, 8, 24])
def test_block_size(path, block_size):
    weights = Weights.from_gguf(read_gguf(path), TINY_GPT_OSS)
    with pytest.raises(ServiceError, match="block_size: a multiple of 16 on the CPU, got") as caught:
        NumpyRunner(TINY_GPT_OSS, weights, block_size, {"full": 4, "window": 4})
    assert caught.value.reason == Reason.FIELD_INVALID


@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_logits_hardly_depend_on_the_block_size(path, tokens, block_size):
    expected = load_runner(path).run(tokens, 100)
    found = load_runner(path, block_size=block_size).run(tokens, 33)
    assert np.abs(found - expected).max() <= 1e-5 * (expected.max() - expected.min())


def test_logits_of_some_rows(path, tokens):
    """Rows are chosen by index; none wanted, none given, yet the keys and values are written."""
    stepped = load_runner(path)
    expected = stepped.run(tokens, 100)
    tables = {name: np.arange(4, dtype=np.int32) for name in ("full", "window")}
    ids = np.array(tokens, np.int32)
    first = StepBatch(ids[:90], np.arange(90, dtype=np.int32), [SequenceSlice(0, 90, 90, tables)], ids[:0])
    assert stepped.runner.forward(first).shape == (0, 257)
    rows = np.array([2, 9], np.int32)
    positions = np.arange(90, 100, dtype=np.int32)
    rest = StepBatch(ids[90:], positions, [SequenceSlice(0, 10, 100, tables)], rows)
    np.testing.assert_array_equal(stepped.runner.forward(rest), expected[[92, 99]])


def test_shared_blocks(path, tokens):
    """Two sequences read one prefix from the same blocks and go on in their own, side by side."""
    stepped = load_runner(path, num_sequences=2)
    one = SteppedSequence(tokens[:64])
    stepped.step([(one, 64)])
    other = SteppedSequence(tokens[:64], 64, {name: list(table) for name, table in one.tables.items()})
    one.token_ids += [5] * 10
    other.token_ids += [9] * 10
    stepped.step([(one, 4), (other, 6)])
    stepped.step([(one, 6), (other, 4)])
    for sequence in (one, other):
        expected = load_runner(path).run(sequence.token_ids, 74)
        np.testing.assert_array_equal(np.stack(sequence.logits)[-10:], expected[-10:])


def test_a_sequence_leaves_nothing_behind(path, tokens):
    """Blocks that held infinities serve the next sequence as if they were new."""
    stepped = load_runner(path)
    expected = stepped.run(tokens, 100)
    for layer in stepped.runner._kv_layers:
        layer.keys[:] = np.nan
        layer.values[:] = np.inf
    np.testing.assert_array_equal(stepped.run(tokens, 9), expected)


def test_no_warnings(path, tokens):
    """A gate far below zero overflows an exponential on its way to zero."""
    stepped = load_runner(path)
    biases = stepped.runner._model.layers[0].gate_up[1]
    biases[0, 0] = -1e4
    assert np.isfinite(stepped.run(tokens, 100)).all()
