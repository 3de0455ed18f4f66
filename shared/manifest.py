"""Where a model's weights lie in memory: allocations that have descriptors, and planes of tensors inside them.

A manifest is made by the loader and read by executors. It is plain data; the bytes are in the allocations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.gpt_config import GPTConfig

WHOLE = 0  # size of pieces where there are none


@dataclass(frozen=True)
class Plane:
    """An array in an allocation.

    Roles: "values" (the tensor as it is), "transposed" (a matrix as (..., inputs, outputs)), "blocks" (the
    file's own quantised blocks, (..., outputs, row_bytes)); GPU layouts add "quants", "scales", "minima".
    """

    role: str
    dtype: str  # NumPy's name
    allocation: int  # index into Manifest.allocations
    offset: int  # bytes from the allocation's start
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model and the planes that hold it."""

    name: str
    type: str  # GGML's name, such as "MXFP4"
    shape: tuple[int, ...]  # rows first
    planes: tuple[Plane, ...]


@dataclass(frozen=True)
class Allocation:
    """One piece of memory that has a descriptor."""

    num_bytes: int
    sha256: str  # of its contents, lower-case hexadecimal; or over the SHA-256s of their pieces, in order
    generation: int
    sha256_piece_bytes: int = WHOLE  # the last piece may be shorter


@dataclass(frozen=True)
class Manifest:
    """Everything that an executor needs to read a model's weights."""

    model: str
    aliases: tuple[str, ...]
    digest: str
    layout: str  # such as "cpu.f32.v1"
    config: GPTConfig
    allocations: tuple[Allocation, ...]
    tensors: Mapping[str, Tensor]
    files: tuple[tuple[str, int], ...]  # (path on the loader's host, bytes)
    eog_token_ids: tuple[int, ...]
