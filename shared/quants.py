"""Tensor data of all thirteen types to float32, and the search for what no weight may be; back: `shared.quantizers`.

A tensor's bytes have shape (..., row_bytes), its values (..., num_columns): a row is a whole number of blocks.
Work goes in steps of 64 Ki values, so that temporaries take less than a megabyte and stay in the cache.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shared import codecs
from shared.codecs import Blocks, Bytes, Codec, Floats
from shared.ggml_type import GGMLType

STEP_VALUES = 1 << 16

CODECS: dict[GGMLType, type[Codec]] = {
    GGMLType.F32: codecs.F32,
    GGMLType.F16: codecs.F16,
    GGMLType.BF16: codecs.BF16,
    GGMLType.Q4_0: codecs.Q4_0,
    GGMLType.Q4_1: codecs.Q4_1,
    GGMLType.Q5_0: codecs.Q5_0,
    GGMLType.Q5_1: codecs.Q5_1,
    GGMLType.Q8_0: codecs.Q8_0,
    GGMLType.IQ4_NL: codecs.IQ4_NL,
    GGMLType.MXFP4: codecs.MXFP4,
    GGMLType.Q4_K: codecs.Q4_K,
    GGMLType.Q5_K: codecs.Q5_K,
    GGMLType.Q6_K: codecs.Q6_K,
}


def dequantize(
    blocks: Bytes,  # (..., row_bytes)
    type: GGMLType,
    out: Floats | None = None,  # (..., num_columns), contiguous
) -> Floats:
    """The values, (..., num_columns) float32, in `out` if it is given."""
    flat = _as_blocks(blocks, type)
    num_columns = blocks.shape[-1] // type.type_size * type.block_size
    if out is None:
        out = np.empty((*blocks.shape[:-1], num_columns), np.float32)
    assert out.shape == (*blocks.shape[:-1], num_columns), (
        f"out is {out.shape} for blocks {blocks.shape} of {type.name}"
    )
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    flat_out = out.reshape(-1, type.block_size)
    step = STEP_VALUES // type.block_size
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are for find_invalid to report
        for start in range(0, len(flat), step):
            CODECS[type].decode(flat[start : start + step], flat_out[start : start + step])
    return out


def find_invalid(
    blocks: Bytes,  # (..., row_bytes)
    type: GGMLType,
) -> int | None:
    """The index of the first block, counted through the rows, with a value that is not finite; None if all are.

    So a scale that is NaN or infinite is found (in MXFP4: 0xFF), and in MXFP4 also a product past float32's range.
    """
    flat = _as_blocks(blocks, type)
    for start in range(0, len(flat), STEP_VALUES):
        invalid = _are_invalid(flat[start : start + STEP_VALUES], type)
        if invalid.any():
            return start + int(invalid.argmax())
    return None


def _as_blocks(blocks: Bytes, type: GGMLType) -> Blocks:
    """(..., row_bytes) uint8 as (num_blocks,) of the type's layout."""
    assert blocks.dtype == np.uint8
    assert blocks.shape[-1] % type.type_size == 0, f"rows of {blocks.shape[-1]} bytes are not blocks of {type.name}"
    return np.ascontiguousarray(blocks).reshape(-1).view(CODECS[type].layout)


def _are_invalid(blocks: Blocks, type: GGMLType) -> npt.NDArray[np.bool_]:
    """For each block whether a value is not finite: by its scales where these decide, for they are few."""
    invalid = np.zeros(len(blocks), np.bool_)
    if type == GGMLType.F32:
        np.logical_not(np.isfinite(blocks["value"]), out=invalid)
    elif type == GGMLType.BF16:
        np.equal(blocks["value"] & 0x7F80, 0x7F80, out=invalid)
    elif type == GGMLType.MXFP4:
        large = np.flatnonzero(blocks["scale"] >= 253)  # below, no code's product can pass float32's range
        invalid[large] = ~np.isfinite(dequantize(blocks[large].view(np.uint8).reshape(-1, 17), type)).all(axis=1)
    for name in CODECS[type].scales:
        invalid |= (blocks[name].view("<u2") & 0x7C00) == 0x7C00
    return invalid
