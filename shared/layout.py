"""How a model's weights lie in memory on the CPU: planned from the file's header, then filled piece by piece.

There is one allocation for each transformer layer and one, the last, for the rest. Every vector and every matrix
starts at a multiple of 64 bytes, and what pads the gaps is zero. Two layouts:

"cpu.f32.v1": everything is decoded to float32. A matrix that enters products is "transposed", (inputs, outputs),
its rows padded with zeros to a multiple of 16 values: the one form in which OpenBLAS gives a row of a product the
same bits whatever other rows there are (docs/decisions/001-cpu-weight-layout-and-row-invariance.md). Matrices that
are multiplied with the same input (q, k, v; the experts' gate and up) are column ranges of one.

"cpu.blocks.v1", for models whose float32 planes would not fit a budget: such matrices stay as the file's "blocks",
to be decoded tile by tile when they are used; the rest is as above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import Reason, ServiceError
from shared.gguf import GGUFFile, TensorInfo, read_tensor
from shared.gpt_config import GPTConfig, is_matrix
from shared.manifest import Plane, Tensor
from shared.quants import dequantize, find_invalid

FLOAT32_LAYOUT = "cpu.f32.v1"
BLOCKS_LAYOUT = "cpu.blocks.v1"
LAYOUTS = (FLOAT32_LAYOUT, BLOCKS_LAYOUT)
FLOAT32_BUDGET = 4 << 30  # bytes

ALIGNMENT = 64  # bytes: a cache line, and a vector of AVX-512
COLUMN_MULTIPLE = 16  # values in a row of a transposed matrix
DECODE_VALUES = 1 << 20  # decoded at once while filling

# Tensors that lie side by side: matrices multiplied with the same input, and their biases.
FUSED = (
    ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
)


@dataclass(frozen=True)
class Plan:
    """Where everything will lie; nothing is allocated yet."""

    layout: str
    allocation_sizes: tuple[int, ...]  # bytes
    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(self.allocation_sizes)


def plan(gguf: GGUFFile, config: GPTConfig, float32_budget: int = FLOAT32_BUDGET) -> Plan:
    """The plan of a file whose tensors `config.check_tensors` has accepted.

    Args:
        float32_budget: most bytes that the float32 layout may take; else the file's blocks are kept.
    """
    decoded = _plan(gguf, config, FLOAT32_LAYOUT)
    return decoded if decoded.num_bytes <= float32_budget else _plan(gguf, config, BLOCKS_LAYOUT)


def fill(
    plan: Plan,
    gguf: GGUFFile,
    allocation_index: int,
    buffer: memoryview,  # plan.allocation_sizes[allocation_index] bytes, all zero
    report: Callable[[int], None] | None = None,
) -> None:
    """Read, check, decode and place the tensors of one allocation.

    Args:
        report: called with the number of file bytes of each tensor once it is placed.

    Raises:
        ServiceError: MODEL_INVALID for a weight that is not finite (the message names file, offset and tensor),
            MODEL_CHANGED if a file is not the one that was parsed.
    """
    assert buffer.nbytes == plan.allocation_sizes[allocation_index]
    for tensor in plan.tensors.values():
        (plane,) = tensor.planes
        if plane.allocation != allocation_index:
            continue
        info = gguf.tensors[tensor.name]
        data = read_tensor(gguf, info)
        refuse_invalid(gguf, info, data)
        _place(info, data, plane_array(plane, buffer), plane.role)
        if report is not None:
            report(info.num_bytes)


def plane_array(plane: Plane, buffer: memoryview) -> NDArray[np.generic]:
    """The plane as an array over its allocation's bytes; read-only where these are."""
    return np.ndarray(plane.shape, np.dtype(plane.dtype), buffer, plane.offset, plane.strides)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not less than `value`."""
    return -(-value // multiple) * multiple


def _plan(gguf: GGUFFile, config: GPTConfig, layout: str) -> Plan:
    sizes = [0] * (config.num_layers + 1)
    tensors: dict[str, Tensor] = {}
    for name in config.expected_tensors():
        if name in tensors:
            continue
        allocation = int(name.split(".")[1]) if name.startswith("blk.") else config.num_layers
        role = _role(name, config, layout)
        infos = [gguf.tensors[member] for member in _side_by_side(name, role)]
        offset = round_up(sizes[allocation], ALIGNMENT)
        planes, end = _planes(infos, role, allocation, offset)
        sizes[allocation] = end
        for info, plane in zip(infos, planes, strict=True):
            tensors[info.name] = Tensor(info.name, info.type.name, info.shape, (plane,))
    return Plan(layout, tuple(round_up(size, ALIGNMENT) for size in sizes), tensors)


def _role(name: str, config: GPTConfig, layout: str) -> str:
    if not is_matrix(name) or name == "position_embd.weight":
        return "values"
    if layout == BLOCKS_LAYOUT:
        return "blocks"
    is_only_gathered = name == "token_embd.weight" and not config.tied_head
    return "values" if is_only_gathered else "transposed"


def _side_by_side(name: str, role: str) -> Sequence[str]:
    """The tensors that lie in one array with this one, itself first or alone."""
    if role == "blocks" or not name.startswith("blk."):
        return [name]
    blk, layer, own_name = name.split(".", 2)
    group = next((group for group in FUSED if group[0] == own_name), (own_name,))
    return [f"{blk}.{layer}.{member}" for member in group]


def _planes(infos: Sequence[TensorInfo], role: str, allocation: int, offset: int) -> tuple[list[Plane], int]:
    """The planes of tensors that lie side by side from `offset` on, and where the array that they form ends."""
    if role == "blocks":
        (info,) = infos
        shape = (*info.shape[:-1], info.row_bytes)
        plane = Plane(role, "uint8", allocation, offset, shape, _strides(shape, 1))
        return [plane], offset + info.num_bytes
    if role == "transposed":
        shapes = [(*info.shape[:-2], info.shape[-1], info.shape[-2]) for info in infos]
        width = round_up(sum(shape[-1] for shape in shapes), COLUMN_MULTIPLE)
    else:
        shapes = [info.shape for info in infos]
        width = sum(shape[-1] for shape in shapes)
    strides = _strides((*shapes[0][:-1], width), 4)
    planes = []
    column = 0
    for shape in shapes:
        planes.append(Plane(role, "float32", allocation, offset + 4 * column, shape, strides))
        column += shape[-1]
    return planes, offset + 4 * math.prod(shapes[0][:-1]) * width


def _strides(shape: Sequence[int], item_size: int) -> tuple[int, ...]:
    """Bytes from one element to the next along each axis of a C-ordered array."""
    return tuple(item_size * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def refuse_invalid(gguf: GGUFFile, info: TensorInfo, data: NDArray[np.uint8]) -> None:
    """Raise MODEL_INVALID for a weight that is not finite, naming file, offset and tensor."""
    block = find_invalid(data, info.type)
    if block is not None:
        raise not_finite(gguf, info, block)


def not_finite(gguf: GGUFFile, info: TensorInfo, block: int) -> ServiceError:
    """The error (to be raised) for a block of a tensor that holds what no weight may be."""
    path, offset = str(gguf.paths[info.file_index]), info.offset + block * info.type.type_size
    why = f"{path}: byte {offset}: tensor {info.name!r} ({info.type.name}) holds a value that is not finite."
    return ServiceError(Reason.MODEL_INVALID, why, metadata={"file": path, "offset": str(offset)})


def _place(info: TensorInfo, data: NDArray[np.uint8], target: NDArray[np.generic], role: str) -> None:
    """Put a tensor's bytes where its plane is, decoding some rows at a time."""
    blocks = data.reshape(-1, info.row_bytes)  # (rows, row_bytes)
    if role == "blocks":
        target.reshape(blocks.shape)[...] = blocks
        return
    columns = info.shape[-1]
    matrices = target.reshape(1, *target.shape) if target.ndim == 2 else target
    rows = info.shape[-2] if target.ndim > 1 else 1
    for start, stop in _pieces(len(blocks), rows, max(1, DECODE_VALUES // columns)):
        values = dequantize(blocks[start:stop], info.type)  # (stop - start, columns)
        if target.ndim == 1:
            target[...] = values[0]
            continue
        matrix, row = divmod(start, rows)
        place = matrices[matrix].T if role == "transposed" else matrices[matrix]
        place[row : row + stop - start] = values


def _pieces(num_rows: int, rows_per_matrix: int, max_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover `num_rows`, none across the border of a matrix."""
    for matrix in range(0, num_rows, rows_per_matrix):
        for start in range(matrix, matrix + rows_per_matrix, max_rows):
            yield start, min(start + max_rows, matrix + rows_per_matrix)
