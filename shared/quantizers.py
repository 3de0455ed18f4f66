"""Float32 values to blocks: for `mxgpt quantize`, the demo models' exporter and tests; serving imports none of it.

gguf-py quantises to the plain types, and its results are used as they are. It has nothing for IQ4_NL and the
K types (`k_quantizers`), its MXFP4 wraps the scale of blocks below 2^-125, and its BF16 makes half a million values a
second: those are written here.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf.quants
import numpy as np

from shared.codecs import BF16, IQ4_NL, MXFP4, Blocks, Bytes, Floats
from shared.ggml_type import GGMLType
from shared.k_quantizers import encode_q4_k, encode_q5_k, encode_q6_k, inverse, peak
from shared.quants import find_invalid


def quantize(
    values: Floats,  # (..., num_columns), finite
    type: GGMLType,
) -> Bytes:
    """Blocks, (..., row_bytes) uint8, of values rounded to what `type` can hold."""
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    flat = np.ascontiguousarray(values).reshape(-1, type.block_size)
    blocks = encode(flat, type).reshape(*values.shape[:-1], type.row_bytes(values.shape[-1]))
    assert find_invalid(blocks, type) is None, f"the values are too large for {type.name}"
    return blocks


def encode(values: Floats, type: GGMLType) -> Bytes:
    """Blocks (num_blocks, type_size) of finite values (num_blocks, block_size)."""
    own: dict[GGMLType, Callable[[Floats], Blocks]] = {
        GGMLType.BF16: _encode_bf16,
        GGMLType.IQ4_NL: _encode_iq4_nl,
        GGMLType.MXFP4: _encode_mxfp4,
        GGMLType.Q4_K: encode_q4_k,
        GGMLType.Q5_K: encode_q5_k,
        GGMLType.Q6_K: encode_q6_k,
    }
    blocks = own[type](values) if type in own else gguf.quants.quantize(values, gguf.GGMLQuantizationType(type))
    return np.ascontiguousarray(blocks).view(np.uint8).reshape(len(values), type.type_size)


def _encode_bf16(values: Floats) -> Blocks:
    """The upper half of each value's bits, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype("<u2").view(BF16.layout)


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
    scale = peak(values) / np.float32(-127)
    midpoints = (IQ4_NL.steps[1:] + IQ4_NL.steps[:-1]) / 2
    codes = np.searchsorted(midpoints, values * inverse(scale)[:, None]).astype(np.uint8)
    steps = IQ4_NL.steps[codes]
    blocks["scale"] = np.sum(steps * values, axis=1) / np.sum(steps * steps, axis=1)
    blocks["codes"] = _pack_nibbles(codes)
    return blocks


def _pack_nibbles(codes: Bytes) -> Bytes:
    """(num_blocks, 32) to (num_blocks, 16): elements 0 to 15 become the low nibbles."""
    return codes[:, :16] | (codes[:, 16:] << np.uint8(4))
