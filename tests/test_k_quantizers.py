"""The quantisers of the K types: near the least error there is, and no worse than ggml's own."""

import gguf.quants
import numpy as np
import pytest

from shared.ggml_type import GGMLType
from shared.quantizers import quantize
from shared.quants import dequantize

K_TYPES = [GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K]
every_type = pytest.mark.parametrize("type_", K_TYPES, ids=lambda type_: type_.name)
SHAPE = (64, 1024)
DISTRIBUTIONS = {
    "normal": lambda random: random.normal(size=SHAPE),
    "uniform": lambda random: random.uniform(-1, 1, SHAPE),
    "laplace": lambda random: random.laplace(size=SHAPE),
    "student": lambda random: random.standard_t(3, SHAPE),
    "positive": lambda random: random.uniform(1, 2, SHAPE),
    "sparse": lambda random: random.normal(size=SHAPE) * (random.random(SHAPE) < 0.05),
    "rows of all sizes": lambda random: random.normal(size=SHAPE) * np.logspace(-4, 4, SHAPE[0])[:, None],
}


def values_of(name):
    return DISTRIBUTIONS[name](np.random.default_rng(11)).astype(np.float32)


def error(blocks, type_, values):
    """Of each row: root mean square error over that of its values."""
    difference = (dequantize(blocks, type_).astype(np.float64) - values) ** 2
    return np.sqrt(difference.mean(axis=1) / (values.astype(np.float64) ** 2).mean(axis=1))


@every_type
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_gguf_py_reads_the_same_values(type_, name):
    blocks = quantize(values_of(name), type_)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(type_))
    assert np.array_equal(dequantize(blocks, type_).view(np.uint32), theirs.view(np.uint32))


@every_type
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_llama_cpp_reads_the_same_values_and_quantises_no_better(type_, name):
    peer = pytest.importorskip("tests.ggml_peer")
    values = values_of(name)
    ours, theirs = quantize(values, type_), peer.ggml_quantize(values, type_)
    assert np.array_equal(peer.ggml_dequantize(ours, type_), dequantize(ours, type_))
    assert np.median(error(ours, type_, values) / error(theirs, type_, values)) < 1.02


@every_type
def test_searching_is_better_than_the_extremes_alone(type_):
    """What a scale from a group's extremes gives on normal values; the search must stay clearly below."""
    extremes = {GGMLType.Q4_K: 0.0783, GGMLType.Q5_K: 0.0381, GGMLType.Q6_K: 0.0188}
    assert error(quantize(values_of("normal"), type_), type_, values_of("normal")).mean() < 0.95 * extremes[type_]


@every_type
def test_what_it_can_hold_comes_back(type_):
    """A block of values that some scale and minimum hold exactly, all codes at work in every group."""
    if type_ is GGMLType.Q6_K:  # groups of 16, whose values are multiples of a scale: the extreme one is -32
        values = np.arange(256) % 16 * 2.0 - 16
    else:
        values = np.arange(256) % (16 if type_ is GGMLType.Q4_K else 32) * 0.5 - 2
    values = values.astype(np.float32)[None]
    assert np.abs(dequantize(quantize(values, type_), type_) - values).max() < 0.005


@every_type
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e-9])
def test_values_too_small_for_its_scales_become_zero_or_small(type_, size):
    values = np.random.default_rng(2).uniform(-size, size, (4, 256)).astype(np.float32)
    assert np.abs(dequantize(quantize(values, type_), type_)).max() <= 2.0**-12
