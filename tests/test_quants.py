"""The thirteen tensor types: blocks written by hand, gguf-py bit for bit, and the way back. MXFP4: test_mxfp4."""

import gguf.quants
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.ggml_type import GGMLType
from shared.quantizers import quantize
from shared.quants import dequantize, find_invalid

ALL_TYPES = list(GGMLType)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # OCP Microscaling Formats 1.0, table 5; bit 3 of a code is its sign
IQ4_NL_STEPS = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]

# Root mean square error over that of the values, normally distributed: the type's own resolution.
LARGEST_ERRORS = {
    GGMLType.F32: 0,
    GGMLType.F16: 3e-4,
    GGMLType.BF16: 2e-3,
    GGMLType.Q4_0: 0.095,
    GGMLType.Q4_1: 0.085,
    GGMLType.Q5_0: 0.047,
    GGMLType.Q5_1: 0.042,
    GGMLType.Q8_0: 0.006,
    GGMLType.IQ4_NL: 0.085,
    GGMLType.MXFP4: 0.125,
    GGMLType.Q4_K: 0.0725,
    GGMLType.Q5_K: 0.0365,
    GGMLType.Q6_K: 0.0176,
}


def f16(value):
    return list(np.array([value], "<f2").tobytes())


def nibbles(codes):
    """32 codes in 16 bytes: the first half of them in the low nibbles, the second in the high ones."""
    return [codes[i] | codes[i + 16] << 4 for i in range(16)]


def fifth_bits(codes):
    return list(sum((code >> 4) << i for i, code in enumerate(codes)).to_bytes(4, "little"))


def decode(block, type_):
    assert len(block) == type_.type_size
    return dequantize(np.array([block], np.uint8), type_)[0].tolist()


def reference(blocks, type_):
    """gguf-py's values, (num_rows, num_columns)."""
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(type_))


def random_blocks(type_, num_blocks, seed):
    """Random bytes, (num_blocks, type_size), in all of which every value is finite."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (2 * num_blocks, type_.type_size), np.uint8)
    finite = np.isfinite(reference(blocks, type_)).all(axis=1)
    if type_ == GGMLType.MXFP4:
        finite &= blocks[:, 0] != 0xFF  # which gguf-py takes for 2^128
    assert finite.sum() >= num_blocks
    return blocks[finite][:num_blocks]


def bits(values):
    return values.view(np.uint32)


class TestBlocksByHand:
    """Every type's layout, from blocks small enough to check on paper."""

    codes = (*range(16), *reversed(range(16)))

    def test_f32(self):
        assert decode([0x00, 0x00, 0x20, 0xC1], GGMLType.F32) == [-10.0]

    def test_f16(self):
        assert decode([0x00, 0xC9], GGMLType.F16) == [-10.0]
        assert decode([0x01, 0x00], GGMLType.F16) == [2.0**-24]  # the smallest subnormal

    def test_bf16(self):
        assert decode([0x20, 0xC1], GGMLType.BF16) == [-10.0]
        assert decode([0x80, 0x3F], GGMLType.BF16) == [1.0]

    def test_q4_0(self):
        block = f16(0.5) + nibbles(self.codes)
        assert decode(block, GGMLType.Q4_0) == [0.5 * (code - 8) for code in self.codes]

    def test_q4_1(self):
        block = f16(0.5) + f16(-3) + nibbles(self.codes)
        assert decode(block, GGMLType.Q4_1) == [0.5 * code - 3 for code in self.codes]

    def test_q5_0(self):
        codes = [(7 * i) % 32 for i in range(32)]
        block = f16(-0.25) + fifth_bits(codes) + nibbles([code & 15 for code in codes])
        assert decode(block, GGMLType.Q5_0) == [-0.25 * (code - 16) for code in codes]

    def test_q5_1(self):
        codes = [(5 * i + 3) % 32 for i in range(32)]
        block = f16(2) + f16(0.125) + fifth_bits(codes) + nibbles([code & 15 for code in codes])
        assert decode(block, GGMLType.Q5_1) == [2 * code + 0.125 for code in codes]

    def test_q8_0(self):
        codes = [-128, 127, 0, -1] + [8 * i - 100 for i in range(28)]
        block = f16(0.125) + [code & 0xFF for code in codes]
        assert decode(block, GGMLType.Q8_0) == [0.125 * code for code in codes]

    def test_iq4_nl(self):
        block = f16(0.5) + nibbles(self.codes)
        assert decode(block, GGMLType.IQ4_NL) == [0.5 * IQ4_NL_STEPS[code] for code in self.codes]

    def test_mxfp4(self):
        block = [128, *nibbles(self.codes)]
        signed = E2M1 + [-value for value in E2M1]
        assert decode(block, GGMLType.MXFP4) == [2 * signed[code] for code in self.codes]

    scales = (1, 2, 31, 63, 5, 16, 33, 62)
    minima = (0, 63, 7, 32, 48, 3, 17, 60)

    def packed_groups(self):
        """8 scales and 8 minima of 6 bits in 12 bytes."""
        first = [self.scales[i] | (self.scales[i + 4] >> 4) << 6 for i in range(4)]
        second = [self.minima[i] | (self.minima[i + 4] >> 4) << 6 for i in range(4)]
        rest = [self.scales[i + 4] & 15 | (self.minima[i + 4] & 15) << 4 for i in range(4)]
        return first + second + rest

    def grouped(self, codes):
        return [0.5 * self.scales[i // 32] * code - 0.25 * self.minima[i // 32] for i, code in enumerate(codes)]

    def test_q4_k(self):
        codes = [(3 * i + i // 32) % 16 for i in range(256)]
        packed = [codes[64 * j + i] | codes[64 * j + 32 + i] << 4 for j in range(4) for i in range(32)]
        block = f16(0.5) + f16(0.25) + self.packed_groups() + packed
        assert decode(block, GGMLType.Q4_K) == self.grouped(codes)

    def test_q5_k(self):
        codes = [(11 * i + i // 32) % 32 for i in range(256)]
        low = [codes[64 * j + i] & 15 | (codes[64 * j + 32 + i] & 15) << 4 for j in range(4) for i in range(32)]
        high = [sum((codes[32 * j + i] >> 4) << j for j in range(8)) for i in range(32)]
        block = f16(0.5) + f16(0.25) + self.packed_groups() + high + low
        assert decode(block, GGMLType.Q5_K) == self.grouped(codes)

    def test_q6_k(self):
        codes = [(13 * i + i // 16) % 64 for i in range(256)]
        scales = [(37 * i) % 256 - 128 for i in range(16)]
        low = [codes[128 * j + i] & 15 | (codes[128 * j + 64 + i] & 15) << 4 for j in range(2) for i in range(64)]
        high = [sum((codes[128 * j + 32 * k + i] >> 4) << 2 * k for k in range(4)) for j in range(2) for i in range(32)]
        block = low + high + [scale & 0xFF for scale in scales] + f16(0.5)
        assert decode(block, GGMLType.Q6_K) == [0.5 * scales[i // 16] * (code - 32) for i, code in enumerate(codes)]


class TestAgainstGGUFPy:
    @pytest.mark.parametrize("type_", ALL_TYPES, ids=lambda type_: type_.name)
    def test_block_sizes(self, type_):
        assert gguf.GGMLQuantizationType(type_).name == type_.name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_)] == (type_.block_size, type_.type_size)

    @pytest.mark.parametrize("type_", [t for t in ALL_TYPES if t != GGMLType.MXFP4], ids=lambda type_: type_.name)
    def test_random_blocks_bit_for_bit(self, type_):
        blocks = random_blocks(type_, 4000, seed=type_).reshape(40, -1)
        assert np.array_equal(bits(dequantize(blocks, type_)), bits(reference(blocks, type_)))

    @pytest.mark.parametrize("type_", [GGMLType.F16, GGMLType.BF16], ids=lambda type_: type_.name)
    def test_every_16_bit_value(self, type_):
        blocks = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(1, -1)
        ours, theirs = dequantize(blocks, type_), reference(blocks, type_)
        finite = np.isfinite(theirs)
        assert np.array_equal(bits(ours[finite]), bits(theirs[finite]))
        assert np.array_equal(ours[~finite], theirs[~finite], equal_nan=True)

    @pytest.mark.parametrize("type_", [GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.IQ4_NL], ids=lambda type_: type_.name)
    def test_every_finite_f16_scale(self, type_):
        scales = np.arange(1 << 16, dtype="<u2")
        scales = scales[(scales & 0x7C00) != 0x7C00]
        blocks = np.random.default_rng(0).integers(0, 256, (len(scales), type_.type_size), np.uint8)
        blocks[:, :2] = scales.view(np.uint8).reshape(-1, 2)
        assert np.array_equal(bits(dequantize(blocks, type_)), bits(reference(blocks, type_)))

    def test_bf16_rounds_as_gguf_py_does(self):
        words = np.random.default_rng(4).integers(0, 1 << 32, 20000, np.uint32)
        words[:1000] = (words[:1000] & 0xFFFF0000) | 0x8000  # ties
        values = words.view(np.float32)
        values = values[np.abs(values) < 3e38].reshape(1, -1)  # finite, and far from rounding to infinity
        theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
        assert np.array_equal(quantize(values, GGMLType.BF16), theirs)


class TestFindInvalid:
    @pytest.mark.parametrize("type_", ALL_TYPES, ids=lambda type_: type_.name)
    def test_finds_exactly_the_blocks_with_a_value_that_is_not_finite(self, type_):
        random = np.random.default_rng(type_)
        blocks = random.integers(0, 256, (20000, type_.type_size), np.uint8)
        if type_ == GGMLType.MXFP4:
            blocks[:, 0] = random.choice([0, 1, 127, 252, 253, 254, 255], 20000)
            blocks[::2, 1:] &= 0x33  # so that some products under 253 and 254 fit
        invalid = np.flatnonzero(~np.isfinite(dequantize(blocks, type_)).all(axis=1))
        assert 0 < len(invalid) < len(blocks)
        found = [i for i in range(len(blocks)) if find_invalid(blocks[i : i + 1], type_) is not None]
        assert found == invalid.tolist()

    @pytest.mark.parametrize("type_", ALL_TYPES, ids=lambda type_: type_.name)
    def test_index_counts_through_rows_and_past_a_step(self, type_):
        num_rows, num_blocks = 3, 70000  # more than a step of the search holds
        blocks = np.zeros((num_rows, num_blocks * type_.type_size), np.uint8)
        assert find_invalid(blocks, type_) is None
        flat = blocks.reshape(-1, type_.type_size)
        flat[2 * num_blocks + 69000] = 0xFF
        flat[2 * num_blocks + 69999] = 0xFF
        assert find_invalid(blocks, type_) == 2 * num_blocks + 69000

    @pytest.mark.parametrize("scale", [[0x00, 0x7C], [0x00, 0xFC], [0x01, 0x7C], [0xFF, 0xFF]], ids=str)
    @pytest.mark.parametrize(
        ("type_", "place"),
        [(GGMLType.Q8_0, 0), (GGMLType.Q4_1, 2), (GGMLType.Q5_1, 2), (GGMLType.Q5_K, 2), (GGMLType.Q6_K, 208)],
        ids=lambda value: getattr(value, "name", value),
    )
    def test_infinite_and_nan_scales_and_minima(self, type_, place, scale):
        block = np.zeros((1, type_.type_size), np.uint8)
        block[0, place : place + 2] = scale
        assert find_invalid(block, type_) == 0


class TestQuantize:
    @pytest.mark.parametrize("type_", ALL_TYPES, ids=lambda type_: type_.name)
    def test_error(self, type_):
        values = np.random.default_rng(5).normal(size=(64, 512)).astype(np.float32)
        blocks = quantize(values, type_)
        assert blocks.shape == (64, type_.row_bytes(512))
        assert blocks.dtype == np.uint8
        error = np.sqrt(np.mean((dequantize(blocks, type_) - values) ** 2))
        assert error <= LARGEST_ERRORS[type_]

    @pytest.mark.parametrize("type_", ALL_TYPES, ids=lambda type_: type_.name)
    def test_zeros_and_rows_of_one_sign(self, type_):
        positive = np.random.default_rng(6).uniform(1, 2, (1, 256)).astype(np.float32)
        values = np.concatenate([np.zeros((1, 256), np.float32), positive, -positive])
        decoded = dequantize(quantize(values, type_), type_)
        assert not decoded[0].any()
        assert (decoded[1] > 0).all()
        assert (decoded[2] < 0).all()
        assert np.abs(decoded - values).max() < 0.5  # MXFP4 saturates: 2 becomes 1.5

    @pytest.mark.parametrize("type_", ALL_TYPES, ids=lambda type_: type_.name)
    def test_rows_do_not_depend_on_each_other(self, type_):
        values = np.random.default_rng(7).normal(size=(5, 2, 256)).astype(np.float32)
        blocks = quantize(values, type_)
        assert np.array_equal(blocks[3, 1], quantize(values[3, 1:2], type_)[0])
        assert np.array_equal(dequantize(blocks, type_)[3, 1], dequantize(blocks[3, 1:2], type_)[0])

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(ALL_TYPES), st.integers(0, 2**32 - 1), st.integers(-20, 4))
    def test_any_scale_of_values_stays_finite_and_near(self, type_, seed, exponent):
        values = np.random.default_rng(seed).uniform(-1, 1, (1, 256)).astype(np.float32) * np.float32(2.0**exponent)
        decoded = dequantize(quantize(values, type_), type_)
        # MXFP4 saturates at 6/8 of a power of two; F16 scales are off by 2^-25 times the largest code (Q6_K: 4096).
        assert np.abs(decoded - values).max() <= 0.26 * np.abs(values).max() + 4096 * 2.0**-25

    def test_values_too_large_for_the_scale_are_refused(self):
        with pytest.raises(AssertionError, match="too large for Q8_0"), np.errstate(over="ignore"):
            quantize(np.full((1, 32), 1e10, np.float32), GGMLType.Q8_0)


class TestShapes:
    def test_out_is_filled_and_nothing_around_it(self):
        """Steps, a length that is no multiple of a step, and canaries at both ends."""
        values = np.random.default_rng(8).normal(size=(37, 2 * 4096 + 32)).astype(np.float32)
        blocks = quantize(values, GGMLType.Q8_0)
        memory = np.full(values.size + 2, 12345, np.float32)
        out = memory[1:-1].reshape(values.shape)
        assert dequantize(blocks, GGMLType.Q8_0, out) is out
        assert np.array_equal(out, reference(blocks, GGMLType.Q8_0))
        assert memory[[0, -1]].tolist() == [12345, 12345]

    def test_a_view_with_gaps_decodes_as_its_copy(self):
        blocks = quantize(np.random.default_rng(9).normal(size=(8, 64)).astype(np.float32), GGMLType.Q5_1)
        wide = np.zeros((8, 2 * blocks.shape[1]), np.uint8)
        wide[:, : blocks.shape[1]] = blocks
        assert np.array_equal(dequantize(wide[:, : blocks.shape[1]], GGMLType.Q5_1), dequantize(blocks, GGMLType.Q5_1))

    def test_no_rows(self):
        assert dequantize(np.zeros((0, 34), np.uint8), GGMLType.Q8_0).shape == (0, 32)
        assert find_invalid(np.zeros((0, 34), np.uint8), GGMLType.Q8_0) is None
