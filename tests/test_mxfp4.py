"""MXFP4 against the OCP Microscaling Formats specification, version 1.0: every code, every scale, and the way back.

The reference here is built from the bits of E2M1 and E8M0 in exact arithmetic, not from a table. docs/mxfp4.md says
which test stands behind which sentence, docs/decisions/004-mxfp4-corner-cases.md why the corner cases are as they are.
"""

import itertools
import re
from fractions import Fraction

import gguf.quants
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mxgpt.inspect_file import inspect_file
from mxgpt.quantize_file import quantize_file
from mxgpt.recipes import RECIPES
from services.executor.weights import Weights
from shared.codecs import MXFP4
from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf, read_tensor
from shared.gpt_config import GPTConfig
from shared.layout import FLOAT32_BUDGET
from shared.quantizers import quantize
from shared.quants import dequantize, find_invalid

LARGEST = 2.0**128  # the first power of two that float32 does not hold


def e2m1(code):
    """Section 5.3.3: sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = Fraction(mantissa, 2) if exponent == 0 else (1 + Fraction(mantissa, 2)) * 2 ** (exponent - 1)
    return -magnitude if sign else magnitude


def e8m0(scale):
    """Section 5.4: a power of two with bias 127; 255 is NaN."""
    assert 0 <= scale < 255
    return Fraction(2) ** (scale - 127)


MAGNITUDES = [e2m1(code) for code in range(8)]


def nearest_code(magnitude):
    """Of the eight magnitudes the nearest, of two equally near the one with an even mantissa; past the largest, it."""
    return min(range(8), key=lambda code: (abs(MAGNITUDES[code] - magnitude), code & 1))


def bits(values):
    return values.view(np.uint32)


def codes_of(blocks):
    """(num_blocks, 17) to the codes, (num_blocks, 32), in the elements' order."""
    return np.concatenate([blocks[:, 1:] & 0x0F, blocks[:, 1:] >> 4], axis=1)


@pytest.fixture(scope="module")
def blocks():
    """Row s is a block of scale s, its 32 elements the codes 0 to 15 twice."""
    blocks = np.empty((256, 17), np.uint8)
    blocks[:, 0] = np.arange(256)
    blocks[:, 1:] = np.arange(16) * 0x11
    return blocks


@pytest.fixture(scope="module")
def values(blocks):
    return dequantize(blocks, GGMLType.MXFP4)


class TestDecoding:
    """All 16 codes under all 256 scales."""

    def test_the_sixteen_codes(self, values):
        assert MAGNITUDES == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        assert values[127].tolist() == [float(e2m1(code)) for code in range(16)] * 2
        assert np.signbit(values[127]).tolist() == ([False] * 8 + [True] * 8) * 2

    def test_the_255_scales(self, values):
        """Code 2 is 1, so its column is the scale itself."""
        assert [Fraction(float(value)) for value in values[:255, 2]] == [e8m0(scale) for scale in range(255)]

    def test_every_code_under_every_scale(self, values):
        for scale in range(255):
            for code in range(16):
                exact = e2m1(code) * e8m0(scale)
                value = float(values[scale, code])
                assert (value == exact) if abs(exact) < LARGEST else np.isinf(value), (scale, code)
                assert np.signbit(value) == (code >= 8), (scale, code)
        assert np.array_equal(bits(values[:, :16]), bits(values[:, 16:]))

    def test_only_scales_253_and_254_overflow_and_where_ieee_754_says_so(self, values):
        infinite = [(s, c) for s in range(255) for c in range(8) if np.isposinf(values[s, c])]
        assert infinite == [(253, 6), (253, 7), (254, 4), (254, 5), (254, 6), (254, 7)]

    def test_small_scales_are_subnormal_and_not_flushed(self, values):
        assert values[0, 1] == 2.0**-128
        assert values[0, 7] == 6 * 2.0**-127

    def test_scale_255_is_nan(self, values):
        assert np.isnan(values[255]).all()

    def test_equals_gguf_py_but_for_minus_zero_and_the_nan_scale(self, blocks, values):
        with np.errstate(all="ignore"):
            theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)[:255]
        minus_zero = np.zeros(theirs.shape, bool)
        minus_zero[:, [8, 24]] = True
        assert np.array_equal(bits(values[:255])[~minus_zero], bits(theirs)[~minus_zero])
        assert (bits(values[:255])[minus_zero] == 0x80000000).all()
        assert (bits(theirs)[minus_zero] == 0).all()

    def test_the_order_of_elements(self):
        """GGML's: the low halves of the 16 bytes are elements 0 to 15, the high ones 16 to 31."""
        block = np.zeros((1, 17), np.uint8)
        for element in range(32):
            block[0] = 127, *[0] * 16
            block[0, 1 + element % 16] = 2 << 4 * (element // 16)
            assert dequantize(block, GGMLType.MXFP4)[0].nonzero()[0].tolist() == [element]


class TestRefusal:
    def test_finds_exactly_what_is_not_finite(self, values):
        for scale in range(256):
            for code in range(16):
                block = np.full((1, 17), code * 0x11, np.uint8)
                block[0, 0] = scale
                assert (find_invalid(block, GGMLType.MXFP4) is None) == np.isfinite(values[scale, code]), (scale, code)

    def test_a_nan_scale_in_a_model_is_named_and_never_served(self, demo_gpt_oss, tmp_path):
        """By tensor and byte, when it is inspected, loaded (as float32 planes or as blocks) or written anew."""
        data = bytearray(demo_gpt_oss.read_bytes())
        info = read_gguf(demo_gpt_oss).tensors["blk.2.ffn_up_exps.weight"]
        assert info.type is GGMLType.MXFP4
        offset = info.offset + 1234 * 17
        data[offset] = 0xFF
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        problem = f"{path}: byte {offset}: tensor '{info.name}' (MXFP4) holds a value that is not finite"
        assert inspect_file(path, read_weights=True).problems == (problem,)
        file = read_gguf(path)
        config = GPTConfig.from_gguf(file)
        for float32_budget in (FLOAT32_BUDGET, 0):
            with pytest.raises(ServiceError, match=re.escape(problem)) as error:
                Weights.from_gguf(file, config, float32_budget)
            assert error.value.reason is Reason.MODEL_INVALID
        with pytest.raises(ServiceError, match=re.escape(problem)):
            quantize_file(path, tmp_path / "out.gguf", RECIPES["F16"])


class TestQuantising:
    """Section 6.3: scale = 2^floor(log2(largest)) / 2^2; codes to nearest, ties to even, saturated."""

    def test_every_f16_magnitude_under_one_scale(self):
        """A 4 in each block fixes the scale at 1, so that every half up to 7.996 meets every rounding there is."""
        halves = np.arange(0x4800, dtype="<u2").view("<f2").astype(np.float32)  # 0 to 8, without 8
        assert 7.99 < halves[-1] < 8
        filled = np.full((-(-len(halves) // 31), 32), 4, np.float32)
        filled[:, 1:].flat[: len(halves)] = halves
        blocks = quantize(filled, GGMLType.MXFP4)
        assert (blocks[:, 0] == 127).all()
        codes = codes_of(blocks)[:, 1:].flat[: len(halves)]
        assert codes.tolist() == [nearest_code(Fraction(float(half))) for half in halves]
        negative = codes_of(quantize(-filled, GGMLType.MXFP4))[:, 1:].flat[: len(halves)]
        assert (negative == codes + 8).all()

    def test_ties_and_their_neighbours(self):
        ties = np.array([(a + b) / 2 for a, b in itertools.pairwise(MAGNITUDES)], np.float32)
        assert ties.tolist() == [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
        block = np.zeros((1, 32), np.float32)
        block[0, :22] = [4, *ties, *np.nextafter(ties, 0), *np.nextafter(ties, 8)]
        decoded = dequantize(quantize(block, GGMLType.MXFP4), GGMLType.MXFP4)[0]
        assert decoded[1:8].tolist() == [0, 1, 1, 2, 2, 4, 4]
        assert decoded[8:15].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4]
        assert decoded[15:22].tolist() == [0.5, 1, 1.5, 2, 3, 4, 6]

    def test_saturation(self):
        """A block's largest value may lie up to 8 steps from zero, and 6 is the last: what is above becomes 6."""
        for largest, expected in [(6, 6), (6.5, 6), (7, 6), (7.999, 6), (8, 8), (5, 4), (5.001, 6)]:
            block = np.full((1, 32), largest, np.float32)
            decoded = dequantize(quantize(block, GGMLType.MXFP4), GGMLType.MXFP4)
            assert (decoded == expected).all(), largest
            assert (dequantize(quantize(-block, GGMLType.MXFP4), GGMLType.MXFP4) == -expected).all()

    def test_the_scale_of_every_power_of_two(self):
        """Down to float32's least subnormal, whose scale is clamped to 2^-127 and whose value rounds to zero."""
        exponents = np.arange(-149, 128)
        values = np.zeros((len(exponents), 32), np.float32)
        values[:, 5] = np.ldexp(np.float32(1), exponents)
        blocks = quantize(values, GGMLType.MXFP4)
        assert blocks[:, 0].tolist() == [max(exponent - 2, -127) + 127 for exponent in exponents]
        expected = np.where(exponents >= -128, values[:, 5], 0)  # 2^-128 is half of the least scale
        assert np.array_equal(dequantize(blocks, GGMLType.MXFP4)[:, 5], expected)

    def test_the_largest_float32_fits(self):
        block = np.full((1, 32), np.finfo(np.float32).max, np.float32)
        quantised = quantize(block, GGMLType.MXFP4)
        assert find_invalid(quantised, GGMLType.MXFP4) is None
        assert (dequantize(quantised, GGMLType.MXFP4) == 6 * 2.0**125).all()

    def test_zeros(self):
        for zero in (0.0, -0.0):
            decoded = dequantize(quantize(np.full((1, 32), zero, np.float32), GGMLType.MXFP4), GGMLType.MXFP4)
            assert np.array_equal(bits(decoded), bits(np.full((1, 32), zero, np.float32)))

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32))
    @example([float(np.finfo(np.float32).smallest_subnormal)] * 32)
    def test_any_block_in_exact_arithmetic(self, numbers):
        quantised = quantize(np.array([numbers], np.float32), GGMLType.MXFP4)
        largest = Fraction(max(map(abs, numbers)))
        if largest == 0:
            return
        exponent = 0
        while Fraction(2) ** exponent > largest:
            exponent -= 1
        while Fraction(2) ** (exponent + 1) <= largest:
            exponent += 1
        scale = max(exponent - 2, -127)
        assert quantised[0, 0] == scale + 127
        expected = [nearest_code(abs(Fraction(n)) / Fraction(2) ** scale) + 8 * int(np.signbit(n)) for n in numbers]
        assert codes_of(quantised)[0].tolist() == expected

    def test_what_it_can_hold_comes_back_byte_for_byte(self):
        """But for blocks without a 4 or a 6, whose values another scale holds as well."""
        random = np.random.default_rng(1)
        blocks = random.integers(0, 256, (4000, 17), np.uint8)
        blocks[:, 0] = random.integers(2, 253, 4000)  # two lower scales are needed for blocks of small codes
        again = quantize(dequantize(blocks, GGMLType.MXFP4), GGMLType.MXFP4)
        has_large = ((codes_of(blocks) & 7) >= 6).any(axis=1)
        assert has_large.sum() > 3900
        assert np.array_equal(again[has_large], blocks[has_large])
        assert np.array_equal(bits(dequantize(again, GGMLType.MXFP4)), bits(dequantize(blocks, GGMLType.MXFP4)))


@pytest.fixture(scope="module")
def experts(demo_gpt_oss):
    """The blocks of each, (rows, row_bytes)."""
    file = read_gguf(demo_gpt_oss)
    infos = [info for info in file.tensors.values() if info.type is GGMLType.MXFP4]
    assert len(infos) == 12
    return [read_tensor(file, info).reshape(-1, info.row_bytes) for info in infos]


class TestDemoExperts:
    """The experts of demo-gpt-oss were trained in MXFP4: the file's blocks are what training saw."""

    def test_quantising_them_again_changes_no_byte(self, experts):
        for blocks in experts:
            assert np.array_equal(quantize(dequantize(blocks, GGMLType.MXFP4), GGMLType.MXFP4), blocks)

    @pytest.mark.parametrize("type_", [GGMLType.F16, GGMLType.BF16], ids=lambda type_: type_.name)
    def test_16_bits_hold_them_exactly(self, experts, type_):
        """An E2M1 value has two significant bits; F16 holds every one down to 2^-24, and these lie above."""
        for blocks in experts:
            values = dequantize(blocks, GGMLType.MXFP4)
            assert np.array_equal(dequantize(quantize(values, type_), type_), values)

    @pytest.mark.parametrize("type_", [GGMLType.Q8_0, GGMLType.Q6_K, GGMLType.Q4_K], ids=lambda type_: type_.name)
    def test_integer_types_with_more_bits_do_not(self, experts, type_):
        """E2M1's steps are uneven, an integer's even: Q8_0 of MXFP4 is an approximation, at twice the size."""
        values = dequantize(experts[0], GGMLType.MXFP4)
        error = relative_error(dequantize(quantize(values, type_), type_), values)
        assert 0 < error < {GGMLType.Q8_0: 0.007, GGMLType.Q6_K: 0.025, GGMLType.Q4_K: 0.11}[type_]


class TestBesideGgml:
    """What llama.cpp itself reads and writes: the same values, but for ties and the two ends of the scale."""

    @pytest.fixture(scope="class")
    @staticmethod
    def peer():
        return pytest.importorskip("tests.ggml_peer")

    def test_it_decodes_every_pair_alike_but_for_the_nan_scale(self, peer, blocks, values):
        theirs = peer.ggml_dequantize(blocks, GGMLType.MXFP4)
        assert np.array_equal(theirs[:255], values[:255])  # minus zero equals zero
        assert not np.isnan(theirs[255]).any()

    @pytest.mark.parametrize("seed", range(3))
    def test_it_quantises_random_values_alike(self, peer, seed):
        numbers = np.random.default_rng(seed).normal(size=(256, 1024)).astype(np.float32)
        theirs = dequantize(peer.ggml_quantize(numbers, GGMLType.MXFP4), GGMLType.MXFP4)
        assert np.array_equal(theirs, dequantize(quantize(numbers, GGMLType.MXFP4), GGMLType.MXFP4))

    def test_it_breaks_ties_towards_zero(self, peer):
        ties = np.zeros((1, 32), np.float32)
        ties[0, :8] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
        theirs = dequantize(peer.ggml_quantize(ties, GGMLType.MXFP4), GGMLType.MXFP4)
        assert theirs[0, :8].tolist() == [6, 0, 0.5, 1, 1.5, 2, 3, 4]

    def test_its_scale_wraps_round_below_2_to_the_minus_125(self, peer):
        """2^-126 gets the scale of NaN: such blocks of ggml's are refused, ours hold the value."""
        tiny = np.full((1, 32), 2.0**-126, np.float32)
        theirs = peer.ggml_quantize(tiny, GGMLType.MXFP4)
        assert theirs[0, 0] == 0xFF
        assert find_invalid(theirs, GGMLType.MXFP4) == 0
        assert (dequantize(quantize(tiny, GGMLType.MXFP4), GGMLType.MXFP4) == tiny).all()


def relative_error(approximate, values):
    """Root mean square error over that of the values."""
    difference = approximate.astype(np.float64) - values
    return float(np.sqrt(np.mean(difference**2) / np.mean(values.astype(np.float64) ** 2)))


SHAPE = (256, 1024)
DISTRIBUTIONS = {
    "normal": lambda random: random.normal(size=SHAPE),
    "uniform": lambda random: random.uniform(-1, 1, SHAPE),
    "laplace": lambda random: random.laplace(size=SHAPE),
    "student": lambda random: random.standard_t(3, SHAPE),
}
# Relative RMS error of MXFP4, from docs/mxfp4.md. A uniform block is worst: its largest value often lies past 6.
ERRORS = {"normal": 0.115, "uniform": 0.144, "laplace": 0.127, "student": 0.142}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_error_on_random_tensors(name):
    values = DISTRIBUTIONS[name](np.random.default_rng(7)).astype(np.float32)
    error = relative_error(dequantize(quantize(values, GGMLType.MXFP4), GGMLType.MXFP4), values)
    assert error == pytest.approx(ERRORS[name], rel=0.02)
    for type_, most in ((GGMLType.BF16, 2.0**-9), (GGMLType.F16, 2.0**-12)):
        assert relative_error(dequantize(quantize(values, type_), type_), values) < most < error / 50
    # No other value is off by more than half a step of its size or a quarter of the smallest step, but for saturation.
    blocks = quantize(values, GGMLType.MXFP4)
    scales = MXFP4.powers[blocks.reshape(-1, 17)[:, 0]].repeat(32).reshape(values.shape)
    off = np.abs(dequantize(blocks, GGMLType.MXFP4) - values) / scales
    sizes = np.abs(values) / scales
    bound = np.select([sizes < 2, sizes < 4, sizes <= 6], [0.25, 0.5, 1.0], sizes - 6)
    assert (off <= bound + 1e-6).all()


@pytest.mark.parametrize("factor", [2.0**-40, 0.37, 1.0, 2.0**40])
def test_error_does_not_depend_on_the_tensors_scale(factor):
    """It does on where the values lie between two powers of two, by a fifth at most."""
    values = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32) * np.float32(factor)
    error = relative_error(dequantize(quantize(values, GGMLType.MXFP4), GGMLType.MXFP4), values)
    assert error == pytest.approx(0.115, rel=0.2)


def test_the_size_claim():
    """17 bytes for 32 weights: 4.25 bits, 64/17 = 3.76 times smaller than 16 bits, for the tensors that are MXFP4."""
    assert GGMLType.MXFP4.row_bytes(32) == 17
    assert GGMLType.F16.row_bytes(32) / GGMLType.MXFP4.row_bytes(32) == pytest.approx(3.76, abs=0.005)
