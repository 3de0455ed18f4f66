"""Layout "cuda.v1": how a model's weights lie in a GPU's memory, planned from the file's header, then filled.

A matrix (outputs, inputs) is cut into tiles of 16 rows by 64 columns, two blocks of 32 columns, padded with zeros to
whole tiles; strips of 16 rows follow one another, in each its tiles. In a tile, a warp's lane 4 g + t holds rows g and
g + 8 at columns 8 t to 8 t + 7 of each block: its share of a tensor core's operand, in pieces of 16 bytes that lie
beside those of the next lane (services/executor/cuda/kernels/weights.cuh). The thirteen types fall into seven
families, each a plane of quants and, but for the last three, of scales, and perhaps of minima:

family    types                       quants                             scales, minima              bits a weight
MXFP4     MXFP4                       4 bits, permuted (`_twiddle`)      byte for 32 values          4.25
INT8      Q8_0, Q5_0, Q4_0, IQ4_NL    byte, code + 128                   half for 32                 8.5
AFFINE32  Q4_1, Q5_1, Q4_K, Q5_K      byte, code + 128                   float and float for 32      10
AFFINE16  Q6_K                        byte, code + 128                   float for 16                10
F32, F16, BF16                        the values                         none                        32, 16, 16

Tensors that are read as one lie beside each other: q, k and v strip after strip; of the experts' gate and up each
strip has eight rows of gate, then eight of up, so that a lane meets both halves of an activation. If the types of
these two belong to different families, both lie as F32. Vectors, and the router's matrix, which is small and decides
much, are "values": float32, C order. There is one allocation for each layer and one, the last, for the rest.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared import codecs
from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import GGUFFile, TensorInfo, read_tensor
from shared.gpt_config import GPTConfig, is_matrix
from shared.layout import FUSED, Plan, plane_array, refuse_invalid, round_up
from shared.manifest import Plane, Tensor
from shared.quants import CODECS, dequantize

CUDA_LAYOUT = "cuda.v1"
ALIGNMENT = 256  # bytes, of every group of planes
STRIP_ROWS = 16
TILE_COLUMNS = 64
MAX_HALF = 65504.0

Array = NDArray[Any]


class Family(enum.IntEnum):
    """How weights are coded; the numbers are those of weights.cuh."""

    MXFP4 = 0
    INT8 = 1
    AFFINE32 = 2
    AFFINE16 = 3
    F32 = 4
    F16 = 5
    BF16 = 6


FAMILIES = {
    GGMLType.MXFP4: Family.MXFP4,
    GGMLType.Q8_0: Family.INT8,
    GGMLType.Q5_0: Family.INT8,
    GGMLType.Q4_0: Family.INT8,
    GGMLType.IQ4_NL: Family.INT8,
    GGMLType.Q4_1: Family.AFFINE32,
    GGMLType.Q5_1: Family.AFFINE32,
    GGMLType.Q4_K: Family.AFFINE32,
    GGMLType.Q5_K: Family.AFFINE32,
    GGMLType.Q6_K: Family.AFFINE16,
    GGMLType.F32: Family.F32,
    GGMLType.F16: Family.F16,
    GGMLType.BF16: Family.BF16,
}

# Of each family's planes: role, type, and the shape of a tile with its axes named by letters. g and t are a lane's,
# b the block, u the upper rows, v the eight columns, h the half block, q the half of the eight columns.
TILES: Mapping[Family, Sequence[tuple[str, str, Mapping[str, int]]]] = {
    Family.MXFP4: [
        ("quants", "uint32", {"g": 8, "t": 4, "b": 2, "u": 2}),
        ("scales", "uint8", {"g": 8, "b": 2, "u": 2}),
    ],
    Family.INT8: [
        ("quants", "uint8", {"b": 2, "g": 8, "t": 4, "u": 2, "v": 8}),
        ("scales", "float16", {"g": 8, "b": 2, "u": 2}),
    ],
    Family.AFFINE32: [
        ("quants", "uint8", {"b": 2, "g": 8, "t": 4, "u": 2, "v": 8}),
        ("scales", "float32", {"g": 8, "b": 2, "u": 2}),
        ("minima", "float32", {"g": 8, "b": 2, "u": 2}),
    ],
    Family.AFFINE16: [
        ("quants", "uint8", {"b": 2, "g": 8, "t": 4, "u": 2, "v": 8}),
        ("scales", "float32", {"h": 2, "g": 8, "b": 2, "u": 2}),
    ],
    Family.F32: [("quants", "float32", {"b": 2, "u": 2, "q": 2, "g": 8, "t": 4, "v": 4})],
    Family.F16: [("quants", "float16", {"b": 2, "u": 2, "g": 8, "t": 4, "v": 8})],
    Family.BF16: [("quants", "uint16", {"b": 2, "u": 2, "g": 8, "t": 4, "v": 8})],
}


def family_of(tensor: Tensor) -> Family:
    """The family of a matrix by its first plane; several types share one, and a mixed pair lies as F32."""
    shape, dtype = tensor.planes[0].shape, tensor.planes[0].dtype
    own = FAMILIES[GGMLType[tensor.type]]
    _, own_dtype, tile = TILES[own][0]
    return own if dtype == own_dtype and len(shape) - len(tensor.shape) == len(tile) else Family.F32


def plan(gguf: GGUFFile, config: GPTConfig) -> Plan:
    """The plan of a file whose tensors `config.check_tensors` has accepted."""
    sizes = [0] * (config.num_layers + 1)
    tensors: dict[str, Tensor] = {}
    for name in config.expected_tensors():
        if name in tensors:
            continue
        allocation = int(name.split(".")[1]) if name.startswith("blk.") else config.num_layers
        infos = [gguf.tensors[member] for member in _beside_each_other(name)]
        offset = round_up(sizes[allocation], ALIGNMENT)
        if not is_tiled(name):
            planes, end = _vector_planes(infos, allocation, offset)
        elif len(infos) == 2:
            planes, end = _paired_planes(infos, allocation, offset)
        else:
            planes, end = _matrix_planes(infos, allocation, offset)
        sizes[allocation] = end
        for info, own in zip(infos, planes, strict=True):
            tensors[info.name] = Tensor(info.name, info.type.name, info.shape, tuple(own))
    return Plan(CUDA_LAYOUT, tuple(round_up(size, ALIGNMENT) for size in sizes), tensors)


def fill(
    plan: Plan,
    gguf: GGUFFile,
    allocation_index: int,
    buffer: memoryview,  # plan.allocation_sizes[allocation_index] bytes of the host, all zero
    report: Callable[[int], None] | None = None,
) -> None:
    """Read, check, repack and place the tensors of one allocation, on the host.

    Raises:
        ServiceError: MODEL_INVALID for a weight that is not finite or, in a matrix of F32 or BF16, past the range of
            half, in which products run; MODEL_CHANGED if a file is not the one that was parsed.
    """
    assert buffer.nbytes == plan.allocation_sizes[allocation_index]
    for tensor in plan.tensors.values():
        if tensor.planes[0].allocation != allocation_index:
            continue
        info = gguf.tensors[tensor.name]
        data = read_tensor(gguf, info)
        refuse_invalid(gguf, info, data)
        place(tensor, data.reshape(-1, info.row_bytes), [plane_array(plane, buffer) for plane in tensor.planes])
        if report is not None:
            report(info.num_bytes)


def place(
    tensor: Tensor,
    blocks: NDArray[np.uint8],  # (rows, row_bytes), the file's
    targets: Sequence[Array],  # over the tensor's planes
) -> None:
    """Repack one tensor into its planes."""
    type = GGMLType[tensor.type]
    if tensor.planes[0].role == "values":
        targets[0].reshape(len(blocks), -1)[...] = dequantize(blocks, type)
        return
    family = family_of(tensor)
    num_upper = 1 if is_paired(tensor.name) else 2
    rows = tensor.shape[-2]
    matrices = [target.reshape(-1, *target.shape) if len(tensor.shape) == 2 else target for target in targets]
    for index in range(len(blocks) // rows):
        parts = split(blocks[index * rows : (index + 1) * rows], type, family)
        if family in (Family.F32, Family.BF16):
            _refuse_large(tensor.name, parts["quants"], family)
        for (role, _, axes), matrix in zip(TILES[family], matrices, strict=True):
            matrix[index] = _tiles(role, parts[role], family, axes, num_upper)


def is_tiled(name: str) -> bool:
    """Whether the tensor of this name lies in tiles rather than as float32 values."""
    return is_matrix(name) and not name.endswith("ffn_gate_inp.weight")


def is_paired(name: str) -> bool:
    """Whether the tensor of this name shares its strips with another one, eight rows each."""
    return name.endswith(("ffn_gate_exps.weight", "ffn_up_exps.weight"))


def split(blocks: NDArray[np.uint8], type: GGMLType, family: Family) -> Mapping[str, Array]:
    """The codes (rows, columns) and what belongs to them (rows, blocks), by the role of the plane that takes them."""
    rows = len(blocks)
    if family == Family.F32:
        return {"quants": dequantize(blocks, type)}
    fields = np.ascontiguousarray(blocks).reshape(-1).view(CODECS[type].layout)
    if family in (Family.F16, Family.BF16):
        return {"quants": fields["value"].reshape(rows, -1)}
    parts = _fields(fields, type)
    return {role: values.reshape(rows, -1) for role, values in parts.items()}


def _fields(fields: Any, type: GGMLType) -> Mapping[str, Array]:
    """Codes (blocks, values), scales and minima of the file's blocks; minima are what is added."""
    if type == GGMLType.MXFP4:
        return {"quants": codecs._nibbles(fields["codes"]), "scales": fields["scale"]}
    if type == GGMLType.Q8_0:
        return {"quants": fields["codes"].view(np.uint8) ^ np.uint8(0x80), "scales": fields["scale"]}
    if type in (GGMLType.Q4_K, GGMLType.Q5_K):
        codes = codecs._split(fields["codes"], 4).reshape(-1, 8, 32)
        if type == GGMLType.Q5_K:
            codes |= codecs._split(fields["high"], 1).reshape(-1, 8, 32) << np.uint8(4)
        scales, minima = codecs.unpack_groups(fields["groups"])
        return {
            "quants": codes | np.uint8(0x80),
            "scales": codecs._column(fields["scale"]) * scales,
            "minima": -(codecs._column(fields["minimum"]) * minima),
        }
    if type == GGMLType.Q6_K:
        codes = codecs._split(fields["low"], 4).reshape(-1, 16, 16)
        codes |= codecs._split(fields["high"], 2).reshape(-1, 16, 16) << np.uint8(4)
        return {"quants": codes + np.uint8(96), "scales": codecs._column(fields["scale"]) * fields["groups"]}
    if type in (GGMLType.Q5_0, GGMLType.Q5_1):
        codes = codecs._five_bits(fields["codes"], fields["high"])
    else:
        codes = codecs._nibbles(fields["codes"])
    if type in (GGMLType.Q4_1, GGMLType.Q5_1):
        scales, minima = (fields[name].astype(np.float32) for name in ("scale", "minimum"))
        return {"quants": codes | np.uint8(0x80), "scales": scales, "minima": minima}
    if type == GGMLType.IQ4_NL:
        codes = (codecs.IQ4_NL.steps + 128).astype(np.uint8)[codes]
    else:
        codes += np.uint8(128 - (8 if type == GGMLType.Q4_0 else 16))
    return {"quants": codes, "scales": fields["scale"]}


def _tiles(
    role: str,
    values: Array,  # (rows, columns), or of each block (rows, blocks)
    family: Family,
    axes: Mapping[str, int],
    num_upper: int,
) -> Array:
    """Values in the order of a plane, (strips, column tiles, axes of a tile), with one half of each strip or both."""
    is_code = role == "quants"
    zero = 128 if is_code and values.dtype == np.uint8 and family != Family.MXFP4 else 0
    per_tile = TILE_COLUMNS if is_code else 4 if family == Family.AFFINE16 else 2
    rows, columns = values.shape
    padded = np.full((round_up(rows, 8 * num_upper), round_up(columns, per_tile)), zero, values.dtype)
    padded[:rows, :columns] = values
    strips, tiles = len(padded) // (8 * num_upper), padded.shape[1] // per_tile
    shaped = padded.reshape(strips, num_upper, 8, tiles, 2, -1)  # strip, u, g, tile, b, and what is in a block
    letters = "sugkb"
    if is_code:
        shaped = shaped.reshape(*shaped.shape[:-1], 4, 8)
        letters += "tv"
        if family == Family.MXFP4:
            shaped, letters = _twiddle(shaped), letters[:-1]
        elif family == Family.F32:
            shaped, letters = shaped.reshape(*shaped.shape[:-1], 2, 4), "sugkbtqv"
    elif family == Family.AFFINE16:
        letters += "h"
    else:
        shaped = shaped[..., 0]
    return shaped.transpose([letters.index(letter) for letter in ("s", "k", *axes)])


def _twiddle(
    codes: NDArray[np.uint8],  # (..., 8) of 4 bits: a sign above three bits of magnitude
) -> NDArray[np.uint32]:
    """Eight codes in a word, (...): codes 2 i and 2 i + 1 in its lower and upper half, so that one shift and one mask,
    or two, bring both to where half has sign, exponent and mantissa (weights.cuh)."""
    words = np.zeros(codes.shape[:-1], np.uint32)
    for pair, (sign, magnitude) in enumerate(((15, 9), (12, 6), (14, 3), (13, 0))):
        for upper in range(2):
            code = codes[..., 2 * pair + upper].astype(np.uint32)
            words |= (code >> np.uint32(3)) << np.uint32(sign + 16 * upper)
            words |= (code & np.uint32(7)) << np.uint32(magnitude + 16 * upper)
    return words


def _beside_each_other(name: str) -> Sequence[str]:
    """The tensors whose planes lie beside this one's, itself first or alone."""
    if not name.startswith("blk."):
        return [name]
    blk, layer, own_name = name.split(".", 2)
    group = next((group for group in FUSED if group[0] == own_name), (own_name,))
    return [f"{blk}.{layer}.{member}" for member in group]


def _vector_planes(infos: Sequence[TensorInfo], allocation: int, offset: int) -> tuple[list[list[Plane]], int]:
    """Float32 arrays one after another."""
    planes = []
    for info in infos:
        planes.append([Plane("values", "float32", allocation, offset, info.shape, _strides(info.shape, 4))])
        offset += 4 * math.prod(info.shape)
    return planes, offset


def _matrix_planes(infos: Sequence[TensorInfo], allocation: int, offset: int) -> tuple[list[list[Plane]], int]:
    """Of each role the planes of all matrices one after another, so that matrices of one family can be read as one."""
    planes: list[list[Plane]] = [[] for _ in infos]
    for role_index in range(3):
        offset = round_up(offset, ALIGNMENT)
        for info, own in zip(infos, planes, strict=True):
            roles = TILES[FAMILIES[info.type]]
            if role_index < len(roles):
                role, dtype, axes = roles[role_index]
                shape = (*_tile_grid(info, STRIP_ROWS), *axes.values())
                size = np.dtype(dtype).itemsize
                own.append(Plane(role, dtype, allocation, offset, shape, _strides(shape, size)))
                offset += size * math.prod(shape)
    return planes, offset


def _paired_planes(infos: Sequence[TensorInfo], allocation: int, offset: int) -> tuple[list[list[Plane]], int]:
    """Gate and up: each has one half of the rows of every strip."""
    families = {FAMILIES[info.type] for info in infos}
    family = families.pop() if len(families) == 1 else Family.F32
    planes: list[list[Plane]] = [[], []]
    for role, dtype, axes in TILES[family]:
        offset = round_up(offset, ALIGNMENT)
        grid, size = _tile_grid(infos[0], STRIP_ROWS // 2), np.dtype(dtype).itemsize
        strides = _strides((*grid, *axes.values()), size)
        upper = len(grid) + list(axes).index("u")
        shape = (*grid, *(1 if axis == "u" else length for axis, length in axes.items()))
        for index, own in enumerate(planes):
            own.append(Plane(role, dtype, allocation, offset + index * strides[upper], shape, strides))
        offset += size * math.prod(grid) * math.prod(axes.values())
    return planes, offset


def _tile_grid(info: TensorInfo, rows_per_strip: int) -> tuple[int, ...]:
    """(experts, strips, column tiles), without experts for one matrix."""
    *experts, rows, columns = info.shape
    return (*experts, -(-rows // rows_per_strip), -(-columns // TILE_COLUMNS))


def _strides(shape: Sequence[int], item_size: int) -> tuple[int, ...]:
    """Bytes from one element to the next along each axis of a C-ordered array."""
    return tuple(item_size * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _refuse_large(name: str, values: Array, family: Family) -> None:
    if family == Family.BF16:
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    largest = float(np.abs(values).max())
    if largest > MAX_HALF:
        raise too_large(name, largest)


def too_large(name: str, largest: float) -> ServiceError:
    """The error (to be raised) for a weight past the range in which products run."""
    why = f"tensor {name!r} holds {largest:g}; products on the GPU take weights up to {MAX_HALF:g}."
    return ServiceError(Reason.MODEL_INVALID, why)
