"""On the CPU a sequence's logits do not depend, in any bit, on how it is cut into steps or on what else runs."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from services.executor.blas import blas_environment
from services.executor.ops import numpy_ops
from services.executor.ops.numpy_ops import is_row_invariant, multiply
from services.executor.weights import DecodedMatrix
from tests.marks import needs_invariant_blas
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS, SteppedSequence, load_runner, write_model

NUM_TOKENS = 150  # past the window, past YaRN's original context, several blocks
CONFIGS = {
    "gpt2": TINY_GPT2,
    "gpt-oss": TINY_GPT_OSS,
    # Products summed in pieces: more inputs than a piece has, and that not by a whole number of pieces.
    "deep gpt-oss": replace(TINY_GPT_OSS, num_layers=2, hidden_size=290, ffn_size=520, head_size=44, sliding_window=50),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def runner(request, tmp_path_factory):
    config = CONFIGS[request.param]
    return load_runner(write_model(tmp_path_factory.mktemp("models") / "model.gguf", config), num_sequences=17)


@pytest.fixture(scope="module")
def alone(runner):
    """The logits of one sequence run at once, alone: (NUM_TOKENS, vocab_size)."""
    return runner.run(random_tokens(runner, 0), NUM_TOKENS)


@pytest.mark.parametrize("chunk", [1, 2, 7, 31, 33, 64, 149])
def test_chunks_of_any_size(runner, alone, chunk):
    assert_same_bits(runner.run(random_tokens(runner, 0), chunk), alone)


def test_among_fifteen_others(runner, alone):
    """Every sequence takes steps of its own random sizes; all start and end at different times."""
    random = np.random.default_rng(5)
    sequences = [SteppedSequence(random_tokens(runner, index)[: 150 - index]) for index in range(16)]
    while sequences[0].num_computed < NUM_TOKENS:
        work = []
        for sequence in sequences:
            left = len(sequence.token_ids) - sequence.num_computed
            count = int(min(left, random.choice([0, 1, 1, 1, 2, 9, 40])))
            if count:
                work.append((sequence, count))
        if work:
            random.shuffle(work)
            runner.step(work)
    assert_same_bits(np.stack(sequences[0].logits), alone)
    for sequence in sequences:
        runner.release(sequence)


def test_batched_decode(runner, alone):
    """Sixteen streams, a token each a step, with contexts from one block to five."""
    place = 5
    sequences = [SteppedSequence(random_tokens(runner, index)) for index in range(1, 17)]
    sequences[place] = SteppedSequence(random_tokens(runner, 0))
    for index, sequence in enumerate(sequences):
        runner.step([(sequence, 10 + 8 * index)])
    while sequences[place].num_computed < NUM_TOKENS:
        runner.step([(sequence, 1) for sequence in sequences if sequence.num_computed < NUM_TOKENS])
    assert_same_bits(np.stack(sequences[place].logits), alone)
    for sequence in sequences:
        runner.release(sequence)


def test_one_row_at_a_time_when_the_probe_fails(tmp_path, monkeypatch, caplog):
    """Where BLAS fails the probe the promise holds all the same, and the log says why it is slow."""
    monkeypatch.setattr(numpy_ops, "is_row_invariant", lambda shapes: False)
    runner = load_runner(write_model(tmp_path / "model.gguf", TINY_GPT_OSS))
    assert "rows are computed one at a time" in caplog.text
    tokens = random_tokens(runner, 0)[:60]
    assert_same_bits(runner.run(tokens, 1), runner.run(tokens, 60))


@needs_invariant_blas
def test_the_probe_sees_a_blas_that_is_not(monkeypatch):
    """A product whose rows depend on their number is found out."""

    def careless(x, matrix, out):
        multiply(x, matrix, out)
        out += np.float32(1e-6) * len(x)

    assert is_row_invariant({(72, 48), (256, 1024)})
    monkeypatch.setattr(numpy_ops, "multiply", careless)
    assert not is_row_invariant({(72, 48)})


@needs_invariant_blas
def test_two_threads_of_blas():
    code = "from services.executor.ops.numpy_ops import *; print(is_row_invariant({(72, 48), (256, 1024), (64, 32)}))"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "True\n"


@pytest.mark.parametrize("function", [np.exp, np.tanh, np.cos, np.sin, np.sqrt])
def test_elementwise_functions(function):
    """A value's result does not depend on where in an array it stands, nor on the array's length or strides."""
    values = np.abs(np.random.default_rng(1).standard_normal(4096, np.float32)) * 20
    whole = function(values)
    for start, stop in [(0, 1), (1, 2), (3, 10), (5, 22), (7, 40), (100, 177), (1000, 3001)]:
        np.testing.assert_array_equal(function(values[start:stop]), whole[start:stop])
    np.testing.assert_array_equal(function(values.reshape(64, 64)[:, 3:40]), whole.reshape(64, 64)[:, 3:40])
    np.testing.assert_array_equal(function(values[::3].copy()), whole[::3])


@pytest.mark.parametrize("num_columns", [5, 72, 90, 256, 2880])
def test_sums_along_rows(num_columns):
    x = np.random.default_rng(1).standard_normal((70, num_columns), np.float32)
    sums, squares = np.add.reduce(x, axis=-1, keepdims=True), np.vecdot(x, x)
    for start, stop in [(0, 1), (1, 3), (5, 12), (30, 70)]:
        np.testing.assert_array_equal(np.add.reduce(x[start:stop], axis=-1, keepdims=True), sums[start:stop])
        np.testing.assert_array_equal(np.vecdot(x[start:stop], x[start:stop]), squares[start:stop])


@pytest.mark.parametrize("one_row_at_a_time", [pytest.param(False, marks=needs_invariant_blas), True])
@pytest.mark.parametrize("inputs", [20, 256, 300, 777])
@pytest.mark.parametrize("outputs", [16, 144, 1040, 2064])
def test_products(inputs, outputs, one_row_at_a_time):
    """Every number of rows from 2 to 70, against all 200 at once."""
    random = np.random.default_rng(inputs * outputs)
    x = random.standard_normal((200, inputs), np.float32)
    matrix = DecodedMatrix(random.standard_normal((inputs, outputs), np.float32), outputs)
    whole = np.empty((200, outputs), np.float32)
    multiply(x, matrix, whole, one_row_at_a_time)
    np.testing.assert_allclose(whole, x.astype(np.float64) @ matrix.array.astype(np.float64), atol=1e-3)
    for num_rows in (*range(1 if one_row_at_a_time else 2, 34), 63, 64, 65, 66, 128, 129):
        start = int(random.integers(0, 200 - num_rows))
        part = np.empty((num_rows, outputs), np.float32)
        multiply(x[start : start + num_rows], matrix, part, one_row_at_a_time)
        assert_same_bits(part, whole[start : start + num_rows])


def random_tokens(runner, seed):
    return np.random.default_rng(seed).integers(0, runner.config.vocab_size, NUM_TOKENS).tolist()


def assert_same_bits(found, expected):
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    different = np.flatnonzero((found.view(np.int32) != expected.view(np.int32)).any(axis=-1))
    assert different.size == 0, f"rows {different} differ"


def test_kernels_are_chosen_by_what_the_processor_can(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags : fpu avx2 avx512f avx512cd avx512bw avx512dq avx512vl\n")
    assert blas_environment(2, {}, cpuinfo)["OPENBLAS_CORETYPE"] == "SkylakeX"
    assert blas_environment(2, {}, cpuinfo)["OPENBLAS_NUM_THREADS"] == "2"
    assert "OPENBLAS_CORETYPE" not in blas_environment(2, {"OPENBLAS_CORETYPE": "Haswell"}, cpuinfo)
    cpuinfo.write_text("processor : 0\nflags : fpu avx2\n")
    assert "OPENBLAS_CORETYPE" not in blas_environment(2, {}, cpuinfo)
    assert "OPENBLAS_CORETYPE" not in blas_environment(2, {}, tmp_path / "none")
