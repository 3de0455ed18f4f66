"""How float32 values become blocks of the K types, by least squares: nothing here is used in serving.

A group of values shares a scale (and in Q4_K and Q5_K a minimum). The scale that the group's extremes set is not the
one of least error: a slightly smaller one clips the extremes and serves all others better, a larger one may fall
luckier. So several are tried, each is fitted to the codes that it gives, and the one of least squared error is kept.
gguf-py has no quantiser for these types; ggml's tries scales in the same spirit, and weighs large values more.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shared.codecs import Q4_K, Q5_K, Q6_K, Blocks, Bytes, Floats

# Scales tried, as the number of steps that the extremes are to span beyond (or short of) the codes there are.
STRETCHES = np.linspace(-1.2, 1.2, 13, dtype=np.float32)
SMALLEST = np.float32(2.0**-100)  # of what is divided by; far below the smallest F16, which a block's scales are


def encode_q4_k(values: Floats) -> Blocks:
    blocks = np.zeros(len(values), Q4_K.layout)
    codes = _encode_groups(values, blocks, max_code=15).reshape(-1, 4, 2, 32)
    blocks["codes"] = (codes[:, :, 0] | codes[:, :, 1] << 4)[:, :, None]
    return blocks


def encode_q5_k(values: Floats) -> Blocks:
    blocks = np.zeros(len(values), Q5_K.layout)
    codes = _encode_groups(values, blocks, max_code=31)
    low = (codes & 0x0F).reshape(-1, 4, 2, 32)
    blocks["codes"] = (low[:, :, 0] | low[:, :, 1] << 4)[:, :, None]
    blocks["high"] = np.packbits(codes >> 4, axis=1, bitorder="little")[:, :, None]
    return blocks


def encode_q6_k(values: Floats) -> Blocks:
    blocks = np.zeros(len(values), Q6_K.layout)
    groups = values.reshape(-1, 16, 16)
    scales = _fit_scales(groups)
    blocks["scale"] = peak(scales) / np.float32(-128)
    scale = blocks["scale"].astype(np.float32)[:, None]
    blocks["groups"] = np.clip(np.rint(scales * inverse(scale)), -128, 127)
    codes = (_round(groups * inverse(scale * blocks["groups"])[:, :, None], -32, 31) + 32).astype(np.uint8)
    low = (codes & 0x0F).reshape(-1, 2, 2, 64)
    high = (codes >> 4).reshape(-1, 2, 4, 32)
    blocks["low"] = (low[:, :, 0] | low[:, :, 1] << 4)[:, :, None]
    blocks["high"] = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6)[:, :, None]
    return blocks


def peak(values: Floats) -> Floats:
    """The value of largest magnitude, with its sign, along the last axis."""
    index = np.abs(values).argmax(axis=-1, keepdims=True)
    found: Floats = np.take_along_axis(values, index, axis=-1)[..., 0]
    return found


def inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 where it is as good as 0."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=np.abs(scale) >= SMALLEST)


def _encode_groups(
    values: Floats,  # (num_blocks, 256)
    blocks: Blocks,  # of Q4_K or Q5_K: gets its scale, minimum and groups
    max_code: int,
) -> Bytes:
    """The codes, (num_blocks, 8, 32), of groups that span [-minimum, -minimum + scale * max_code]."""
    groups = values.reshape(-1, 8, 32)
    scales, minima = _fit_scales_and_minima(groups, max_code)
    blocks["scale"] = scales.max(axis=1) / np.float32(63)
    blocks["minimum"] = minima.max(axis=1) / np.float32(63)
    scale = blocks["scale"].astype(np.float32)[:, None]
    minimum = blocks["minimum"].astype(np.float32)[:, None]
    scale_codes = _round(scales * inverse(scale), 0, 63).astype(np.uint8)
    minimum_codes = _round(minima * inverse(minimum), 0, 63).astype(np.uint8)
    blocks["groups"] = _pack_groups(scale_codes, minimum_codes)
    offsets = (minimum * minimum_codes)[:, :, None]
    factors = (scale * scale_codes)[:, :, None]
    codes: Bytes = _round((groups + offsets) * inverse(factors), 0, max_code).astype(np.uint8)
    return codes


def _fit_scales_and_minima(groups: Floats, max_code: int) -> tuple[Floats, Floats]:
    """Of each group, (num_blocks, 8, 32), the scale and the minimum, neither negative, (num_blocks, 8)."""
    low = np.minimum(groups.min(axis=2), 0)
    span = np.maximum(groups.max(axis=2), 0) - low
    best_scales, best_minima = span / np.float32(max_code), -low
    least = np.full(span.shape, np.inf, np.float32)
    mean = groups.mean(axis=2)
    for stretch in STRETCHES:
        codes = _round((groups - low[:, :, None]) * (inverse(span) * (max_code + stretch))[:, :, None], 0, max_code)
        mean_code = codes.mean(axis=2)
        centred = codes - mean_code[:, :, None]
        scales = np.sum(centred * groups, axis=2) * inverse(np.sum(centred * centred, axis=2))
        minima = scales * mean_code - mean
        # Values that all lie above zero want a negative minimum, which the format does not have.
        through_zero = np.sum(codes * groups, axis=2) * inverse(np.sum(codes * codes, axis=2))
        scales = np.maximum(np.where(minima < 0, through_zero, scales), 0)
        minima = np.maximum(minima, 0)
        errors = np.sum((codes * scales[:, :, None] - minima[:, :, None] - groups) ** 2, axis=2)
        _keep(errors < least, (least, best_scales, best_minima), (errors, scales, minima))
    return best_scales, best_minima


def _fit_scales(groups: Floats) -> Floats:
    """Of each group, (num_blocks, 16, 16), the scale, of either sign, (num_blocks, 16)."""
    peaks = peak(groups)
    best_scales = peaks / np.float32(-32)
    least = np.full(peaks.shape, np.inf, np.float32)
    for stretch in STRETCHES:
        codes = _round(groups * (inverse(peaks) * (-32 - stretch))[:, :, None], -32, 31)
        scales = np.sum(codes * groups, axis=2) * inverse(np.sum(codes * codes, axis=2))
        errors = np.sum((codes * scales[:, :, None] - groups) ** 2, axis=2)
        _keep(errors < least, (least, best_scales), (errors, scales))
    return best_scales


def _keep(where: npt.NDArray[np.bool_], kept: tuple[Floats, ...], new: tuple[Floats, ...]) -> None:
    """Copy what is new over what is kept."""
    for target, source in zip(kept, new, strict=True):
        np.copyto(target, source, where=where)


def _round(values: Floats, lowest: int, highest: int) -> Floats:
    rounded: Floats = np.clip(np.rint(values), lowest, highest)
    return rounded


def _pack_groups(scales: Bytes, minima: Bytes) -> Bytes:
    """The inverse of `shared.codecs.unpack_groups`."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    rest = (scales[:, 4:] & 0x0F) | (minima[:, 4:] & 0x0F) << 4
    return np.concatenate([first, second, rest], axis=1)
