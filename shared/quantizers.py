"""How float32 values become blocks: for the demo models' exporter and for tests; nothing here is used in serving.

gguf-py quantises to the plain types, and its results are used as they are. It has nothing for IQ4_NL and the
K types, and its MXFP4 wraps the scale of blocks below 2^-125: those are written here, the simple way (round to nearest
under a scale that the block's extremes set), without ggml's search for better scales.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf.quants
import numpy as np

from shared.codecs import IQ4_NL, MXFP4, Q4_K, Q5_K, Q6_K, Blocks, Bytes, Floats
from shared.ggml_type import GGMLType


def encode(values: Floats, type: GGMLType) -> Bytes:
    """Blocks (num_blocks, type_size) of finite values (num_blocks, block_size)."""
    own: dict[GGMLType, Callable[[Floats], Blocks]] = {
        GGMLType.IQ4_NL: _encode_iq4_nl,
        GGMLType.MXFP4: _encode_mxfp4,
        GGMLType.Q4_K: _encode_q4_k,
        GGMLType.Q5_K: _encode_q5_k,
        GGMLType.Q6_K: _encode_q6_k,
    }
    blocks = own[type](values) if type in own else gguf.quants.quantize(values, gguf.GGMLQuantizationType(type))
    return np.ascontiguousarray(blocks).view(np.uint8).reshape(len(values), type.type_size)


def _encode_mxfp4(values: Floats) -> Blocks:
    """OCP Microscaling Formats 1.0, section 6.3: the scale is the largest value's power of two over E2M1's (2^2).

    Codes are rounded to nearest, ties to even, and saturate at 6: what MXFP4 can hold comes back bit for bit.
    """
    blocks = np.zeros(len(values), MXFP4.layout)
    _, exponents = np.frexp(np.abs(values).max(axis=1))  # largest = fraction * 2^exponent, fraction in [0.5, 1)
    scales = np.clip(exponents - 1 - 2, -127, 127)
    magnitudes = np.ldexp(np.abs(values), -scales[:, None])
    codes = np.where(np.signbit(values), 8, 0).astype(np.uint8)
    # A midpoint rounds to the even code: up to codes 2, 4 and 6, hence >=, and down to 0, 2, 4 and 6, hence >.
    codes += (magnitudes > 0.25).astype(np.uint8) + (magnitudes >= 0.75) + (magnitudes > 1.25)
    codes += (magnitudes >= 1.75).astype(np.uint8) + (magnitudes > 2.5) + (magnitudes >= 3.5) + (magnitudes > 5)
    blocks["scale"] = scales + 127
    blocks["codes"] = _pack_nibbles(codes)
    return blocks


def _encode_iq4_nl(values: Floats) -> Blocks:
    """The value of largest magnitude takes step -127; then the scale is fitted to the codes by least squares."""
    blocks = np.zeros(len(values), IQ4_NL.layout)
    scale = _peak(values) / np.float32(-127)
    midpoints = (IQ4_NL.steps[1:] + IQ4_NL.steps[:-1]) / 2
    codes = np.searchsorted(midpoints, values * _inverse(scale)[:, None]).astype(np.uint8)
    steps = IQ4_NL.steps[codes]
    blocks["scale"] = np.sum(steps * values, axis=1) / np.sum(steps * steps, axis=1)
    blocks["codes"] = _pack_nibbles(codes)
    return blocks


def _encode_q4_k(values: Floats) -> Blocks:
    blocks = np.zeros(len(values), Q4_K.layout)
    codes = _encode_groups(values, blocks, max_code=15).reshape(-1, 4, 2, 32)
    blocks["codes"] = (codes[:, :, 0] | codes[:, :, 1] << 4)[:, :, None]
    return blocks


def _encode_q5_k(values: Floats) -> Blocks:
    blocks = np.zeros(len(values), Q5_K.layout)
    codes = _encode_groups(values, blocks, max_code=31)
    low = (codes & 0x0F).reshape(-1, 4, 2, 32)
    blocks["codes"] = (low[:, :, 0] | low[:, :, 1] << 4)[:, :, None]
    blocks["high"] = np.packbits(codes >> 4, axis=1, bitorder="little")[:, :, None]
    return blocks


def _encode_q6_k(values: Floats) -> Blocks:
    blocks = np.zeros(len(values), Q6_K.layout)
    groups = values.reshape(-1, 16, 16)
    scales = _peak(groups) / np.float32(-32)  # (num_blocks, 16)
    blocks["scale"] = _peak(scales) / np.float32(-128)
    scale = blocks["scale"].astype(np.float32)[:, None]
    blocks["groups"] = np.clip(np.rint(scales * _inverse(scale)), -128, 127)
    factors = (scale * blocks["groups"])[:, :, None]
    codes = (np.clip(np.rint(groups * _inverse(factors)), -32, 31) + 32).astype(np.uint8)
    low = (codes & 0x0F).reshape(-1, 2, 2, 64)
    high = (codes >> 4).reshape(-1, 2, 4, 32)
    blocks["low"] = (low[:, :, 0] | low[:, :, 1] << 4)[:, :, None]
    blocks["high"] = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6)[:, :, None]
    return blocks


def _encode_groups(
    values: Floats,  # (num_blocks, 256)
    blocks: Blocks,  # of Q4_K or Q5_K: gets its scale, minimum and groups
    max_code: int,
) -> Bytes:
    """The codes, (num_blocks, 8, 32), of groups that span [-minimum, -minimum + scale * max_code]."""
    groups = values.reshape(-1, 8, 32)
    minima = -np.minimum(groups.min(axis=2), 0)  # (num_blocks, 8)
    scales = (np.maximum(groups.max(axis=2), 0) + minima) / np.float32(max_code)
    blocks["scale"] = scales.max(axis=1) / np.float32(63)
    blocks["minimum"] = minima.max(axis=1) / np.float32(63)
    scale = blocks["scale"].astype(np.float32)[:, None]
    minimum = blocks["minimum"].astype(np.float32)[:, None]
    scale_codes = np.clip(np.rint(scales * _inverse(scale)), 0, 63).astype(np.uint8)
    minimum_codes = np.clip(np.rint(minima * _inverse(minimum)), 0, 63).astype(np.uint8)
    blocks["groups"] = _pack_groups(scale_codes, minimum_codes)
    offsets = (minimum * minimum_codes)[:, :, None]
    factors = (scale * scale_codes)[:, :, None]
    codes: Bytes = np.clip(np.rint((groups + offsets) * _inverse(factors)), 0, max_code).astype(np.uint8)
    return codes


def _pack_groups(scales: Bytes, minima: Bytes) -> Bytes:
    """The inverse of `shared.codecs.unpack_groups`."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    rest = (scales[:, 4:] & 0x0F) | (minima[:, 4:] & 0x0F) << 4
    return np.concatenate([first, second, rest], axis=1)


def _pack_nibbles(codes: Bytes) -> Bytes:
    """(num_blocks, 32) to (num_blocks, 16): elements 0 to 15 become the low nibbles."""
    return codes[:, :16] | (codes[:, 16:] << np.uint8(4))


def _peak(values: Floats) -> Floats:
    """The value of largest magnitude, with its sign, along the last axis."""
    index = np.abs(values).argmax(axis=-1, keepdims=True)
    peak: Floats = np.take_along_axis(values, index, axis=-1)[..., 0]
    return peak


def _inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 where it is 0."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
