"""How the blocks of each tensor type decode: one class per type, with the block's layout.

A class has `layout`, the block as a numpy structured type; `scales`, which of its fields are F16 factors; and
`decode`, which fills `out`, (num_blocks, block_size) float32, from `blocks`, (num_blocks,) of that layout. The order
of operations is ggml's, each rounded to float32, so that results equal gguf-py's bit for bit (MXFP4's exceptions:
docs/decisions/004-mxfp4-corner-cases.md). Layouts: ggml-common.h.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

Blocks: TypeAlias = npt.NDArray[Any]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]


class Codec(abc.ABC):
    """What the classes below have in common; none is ever made into an object."""

    layout: ClassVar[np.dtype[Any]]
    scales: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    @abc.abstractmethod
    def decode(blocks: Blocks, out: Floats) -> None: ...


class F32(Codec):
    """4 bytes: the value."""

    layout = np.dtype([("value", "<f4")])

    @staticmethod
    def decode(blocks: Blocks, out: Floats) -> None:
        out[:, 0] = blocks["value"]


class F16(Codec):
    """2 bytes: the value in IEEE half precision."""

    layout = np.dtype([("value", "<f2")])
    scales = ("value",)

    @staticmethod
    def decode(blocks: Blocks, out: Floats) -> None:
        out[:, 0] = blocks["value"]


class BF16(Codec):
    """2 bytes: the upper half of the value's float32."""

    layout = np.dtype([("value", "<u2")])

    @staticmethod
    def decode(blocks: Blocks, out: Floats) -> None:
        np.left_shift(blocks["value"], 16, out=out[:, 0].view(np.uint32), dtype=np.uint32)


class Q4_0(Codec):  # noqa: N801 (the format's own name, as below)
    """18 bytes: scale F16, 32 codes of 4 bits (see `_nibbles`). value = scale * (code - 8)."""

    layout = np.dtype([("scale", "<f2"), ("codes", "u1", 16)])
    scales = ("scale",)

    @staticmethod
    def decode(blocks: Blocks, out: Floats) -> None:
        codes = _nibbles(blocks["codes"]).view(np.int8)
        codes -= 8
        np.multiply(codes, _column(blocks["scale"]), out=out)


class Q4_1(Codec):  # noqa: N801
    """20 bytes: scale F16, minimum F16, 32 codes of 4 bits. value = scale * code + minimum."""

    layout = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("codes", "u1", 16)])
    scales = ("scale", "minimum")

    @staticmethod
    def decode(blocks: Blocks, out: Floats) -> None:
        np.multiply(_nibbles(blocks["codes"]), _column(blocks["scale"]), out=out)
        out += _column(blocks["minimum"])


class Q5_0(Codec):  # noqa: N801
    """22 bytes: scale F16, 32 fifth bits (element i's is bit i), 32 codes of 4 bits. value = scale * (code - 16)."""

    layout = np.dtype([("scale", "<f2"), ("high", "u1", 4), ("codes", "u1", 16)])
    scales = ("scale",)

    @staticmethod
    def decode(blocks: Blocks, out: Floats) -> None:
        codes = _five_bits(blocks["codes"], blocks["high"]).view(np.int8)
        codes -= 16
        np.multiply(codes, _column(blocks["scale"]), out=out)


class Q5_1(Codec):  # noqa: N801
    """24 bytes: scale F16, minimum F16, 32 fifth bits, 32 codes of 4 bits. value = scale * code + minimum."""

    layout = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("high", "u1", 4), ("codes", "u1", 16)])
    scales = ("scale", "minimum")

    @staticmethod
    def decode(blocks: Blocks, out: Floats) -> None:
        np.multiply(_five_bits(blocks["codes"], blocks["high"]), _column(blocks["scale"]), out=out)
        out += _column(blocks["minimum"])


class Q8_0(Codec):  # noqa: N801
    """34 bytes: scale F16, 32 signed codes of 8 bits. value = scale * code."""

    layout = np.dtype([("scale", "<f2"), ("codes", "i1", 32)])
    scales = ("scale",)

    @staticmethod
    def decode(blocks: Blocks, out: Floats) -> None:
        np.multiply(blocks["codes"], _column(blocks["scale"]), out=out)


class IQ4_NL(Codec):  # noqa: N801
    """18 bytes: scale F16, 32 codes of 4 bits that name one of 16 uneven steps. value = scale * step."""

    layout = np.dtype([("scale", "<f2"), ("codes", "u1", 16)])
    scales = ("scale",)
    steps = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)

    @staticmethod
    def decode(blocks: Blocks, out: Floats) -> None:
        np.multiply(IQ4_NL.steps.take(_nibbles(blocks["codes"])), _column(blocks["scale"]), out=out)


class MXFP4(Codec):
    """17 bytes: scale E8M0, 32 codes E2M1 of 4 bits (OCP Microscaling Formats 1.0).

    value = code's value * 2^(scale - 127). Scale 0xFF is NaN; a product past float32's range is an infinity, as
    IEEE 754 rounds it.
    """

    layout = np.dtype([("scale", "u1"), ("codes", "u1", 16)])
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    powers = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan)).astype(np.float32)

    @staticmethod
    def decode(blocks: Blocks, out: Floats) -> None:
        np.multiply(MXFP4.values.take(_nibbles(blocks["codes"])), MXFP4.powers.take(blocks["scale"])[:, None], out=out)


class Q4_K(Codec):  # noqa: N801
    """144 bytes: scale F16, scale of minima F16, 8 scales and 8 minima of 6 bits, 256 codes of 4 bits.

    Eight groups of 32: value = scale * group's scale * code - scale of minima * group's minimum. Byte i of the
    j-th 32 bytes of codes has element i of group 2j in its low nibble, of group 2j + 1 in the high one.
    """

    layout = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("groups", "u1", 12), ("codes", "u1", (4, 1, 32))])
    scales = ("scale", "minimum")

    @staticmethod
    def decode(blocks: Blocks, out: Floats) -> None:
        codes = _split(blocks["codes"], 4).reshape(-1, 8, 32)
        _decode_groups(blocks, codes, out)


class Q5_K(Codec):  # noqa: N801
    """176 bytes: as Q4_K, with 32 bytes of fifth bits before the codes: bit j of byte i is of element i in group j."""

    layout = np.dtype(
        [
            ("scale", "<f2"),
            ("minimum", "<f2"),
            ("groups", "u1", 12),
            ("high", "u1", (1, 1, 32)),
            ("codes", "u1", (4, 1, 32)),
        ]
    )
    scales = ("scale", "minimum")

    @staticmethod
    def decode(blocks: Blocks, out: Floats) -> None:
        codes = _split(blocks["codes"], 4).reshape(-1, 8, 32)
        codes |= _split(blocks["high"], 1).reshape(-1, 8, 32) << np.uint8(4)
        _decode_groups(blocks, codes, out)


class Q6_K(Codec):  # noqa: N801
    """210 bytes: 256 low halves of 4 bits, 256 high parts of 2 bits, 16 signed scales of 8 bits, scale F16.

    Sixteen groups of 16: value = scale * group's scale * (code - 32). Byte i of the j-th 64 low bytes has
    elements 128j + i (low nibble) and 128j + 64 + i; byte i of the j-th 32 high bytes has, from its lowest bits on,
    elements 128j + i, + 32, + 64 and + 96.
    """

    layout = np.dtype([("low", "u1", (2, 1, 64)), ("high", "u1", (2, 1, 32)), ("groups", "i1", 16), ("scale", "<f2")])
    scales = ("scale",)

    @staticmethod
    def decode(blocks: Blocks, out: Floats) -> None:
        codes = _split(blocks["low"], 4).reshape(-1, 16, 16)
        codes |= _split(blocks["high"], 2).reshape(-1, 16, 16) << np.uint8(4)
        signed = codes.view(np.int8)
        signed -= 32
        factors = _column(blocks["scale"]) * blocks["groups"]  # (num_blocks, 16)
        np.multiply(signed, factors[:, :, None], out=out.reshape(-1, 16, 16))


def _column(scale: npt.NDArray[np.float16]) -> Floats:
    """(num_blocks,) as float32 of shape (num_blocks, 1)."""
    return scale.astype(np.float32)[:, None]


def _nibbles(codes: Bytes) -> Bytes:
    """(num_blocks, 16) to (num_blocks, 32): the low nibbles are elements 0 to 15, the high ones 16 to 31."""
    nibbles = np.empty((len(codes), 32), np.uint8)
    np.bitwise_and(codes, 0x0F, out=nibbles[:, :16])
    np.right_shift(codes, 4, out=nibbles[:, 16:])
    return nibbles


def _five_bits(codes: Bytes, high: Bytes) -> Bytes:
    """Codes of 5 bits, (num_blocks, 32), from (num_blocks, 16) nibbles and (num_blocks, 4) fifth bits."""
    fifth = np.unpackbits(high, axis=1, bitorder="little")
    fifth <<= 4
    fifth |= _nibbles(codes)
    return fifth


def _split(packed: Bytes, width: int) -> Bytes:
    """(num_blocks, m, 1, n) to (num_blocks, m, 8 / width, n): each byte's fields of `width` bits, the lowest first."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return (packed >> shifts) & np.uint8((1 << width) - 1)


def unpack_groups(groups: Bytes) -> tuple[Bytes, Bytes]:
    """The scales and minima, each (num_blocks, 8) of 6 bits, of the 12 bytes that Q4_K and Q5_K hold them in.

    Bytes 0 to 3: scales 0 to 3, and in the upper two bits those of scales 4 to 7; bytes 4 to 7: the minima likewise;
    bytes 8 to 11: the lower four bits of scales 4 to 7 (low nibble) and of minima 4 to 7 (high nibble).
    """
    first, second, rest = groups[:, 0:4], groups[:, 4:8], groups[:, 8:12]
    scales = np.concatenate([first & 0x3F, (rest & 0x0F) | ((first >> 2) & 0x30)], axis=1)
    minima = np.concatenate([second & 0x3F, (rest >> 4) | ((second >> 2) & 0x30)], axis=1)
    return scales, minima


def _decode_groups(
    blocks: Blocks,  # of Q4_K or Q5_K
    codes: Bytes,  # (num_blocks, 8, 32)
    out: Floats,  # (num_blocks, 256)
) -> None:
    scales, minima = unpack_groups(blocks["groups"])
    factors = _column(blocks["scale"]) * scales
    offsets = _column(blocks["minimum"]) * minima
    grouped = out.reshape(-1, 8, 32)
    np.multiply(codes, factors[:, :, None], out=grouped)
    grouped -= offsets[:, :, None]
