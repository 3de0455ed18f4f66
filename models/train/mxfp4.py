"""MXFP4 in PyTorch: the one rounding that training sees and the exporter writes.

A block of 32 weights has a scale, a power of two, and codes: E2M1, so 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign.
Of the scales the smallest is taken that brings the block's largest weight to 7 or under, so that it is rounded to 6
at most, by half a step more than any other weight is.
"""

from __future__ import annotations

import torch

BLOCK_SIZE = 32
LARGEST_CODE = 6.0
CLIPPED_FROM = 7.0
SCALE_BIAS = 127
# E2M1 magnitude times two, to its code.
CODE_OF_DOUBLE = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 6: 5, 8: 6, 12: 7}


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """The weights as MXFP4 holds them, the gradient passed straight through."""
    result: torch.Tensor = _RoundThrough.apply(weight)  # type: ignore[no-untyped-call]
    return result


def split(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., rows, columns) to block exponents (num_blocks, 1) and E2M1 values (num_blocks, 32), all float32."""
    blocks = weight.reshape(-1, BLOCK_SIZE)
    largest = blocks.abs().amax(dim=1, keepdim=True).clamp_min(2.0**-100)
    exponents = torch.ceil(torch.log2(largest / CLIPPED_FROM))
    return exponents, _round_e2m1(blocks * torch.exp2(-exponents))


def pack(weight: torch.Tensor) -> torch.Tensor:
    """(..., rows, columns) float32 to GGML's bytes, (..., rows, columns / 32 * 17) uint8.

    A block is its scale byte, then 16 bytes: elements 0 to 15 in the low halves, 16 to 31 in the high ones.
    """
    exponents, values = split(weight)
    table = torch.zeros(13, dtype=torch.uint8)
    table[list(CODE_OF_DOUBLE)] = torch.tensor(list(CODE_OF_DOUBLE.values()), dtype=torch.uint8)
    codes = table[(2 * values.abs()).to(torch.int64)] | ((values < 0).to(torch.uint8) << 3)
    scales = (exponents + SCALE_BIAS).to(torch.uint8)
    half = BLOCK_SIZE // 2
    packed = torch.cat((scales, codes[:, :half] | (codes[:, half:] << 4)), dim=1)
    return packed.view(*weight.shape[:-1], -1)


def _round_e2m1(values: torch.Tensor) -> torch.Tensor:
    """To the nearest code, ties to the even one."""
    size = values.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (torch.round(values / step) * step).clamp(-LARGEST_CODE, LARGEST_CODE)


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: torch.Tensor) -> torch.Tensor:
        exponents, values = split(weight)
        return (values * torch.exp2(exponents)).view_as(weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient
