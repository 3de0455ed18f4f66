"""A model's weights in a GPU's memory, as kernels take them: addresses of planes, by tensor name.

It offers what `services.executor.weights.Weights` offers to models, so that the same model files run on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from shared.cuda_layout import CUDA_LAYOUT, STRIP_ROWS, TILE_COLUMNS, Family, family_of, fill, plan
from shared.gguf import GGUFFile
from shared.gpt_config import GPTConfig
from shared.manifest import Plane, Tensor

if TYPE_CHECKING:
    from services.executor.cuda.device import Device


HOPPER = 9, 0  # the compute capability for which wgmma_tiles.cuh is


@dataclass(frozen=True)
class Vector:
    """One or several float32 arrays, one after another."""

    addresses: tuple[int, ...]
    sizes: tuple[int, ...]  # values

    @property
    def address(self) -> int:
        """Of the one array that they form."""
        ends = [address + 4 * size for address, size in zip(self.addresses, self.sizes, strict=True)]
        assert list(self.addresses[1:]) == ends[:-1], "vectors do not lie beside each other"
        return self.addresses[0]


@dataclass(frozen=True)
class Part:
    """Outputs of a matrix that lie in strips one after another, in one family."""

    family: Family
    quants: int
    scales: int  # 0 where the family has none, as below
    minima: int  # of MXFP4 on a Hopper: the largest exponents of its rows, in memory of the executor's own
    first_output: int
    num_outputs: int

    @property
    def num_strips(self) -> int:
        return -(-self.num_outputs // STRIP_ROWS)


@dataclass(frozen=True)
class Matrix:
    """(inputs, outputs) in one part, or in several where tensors do not join."""

    parts: tuple[Part, ...]
    num_inputs: int
    num_outputs: int

    @property
    def num_column_tiles(self) -> int:
        return -(-self.num_inputs // TILE_COLUMNS)


@dataclass(frozen=True)
class ExpertMatrices:
    """One matrix of each expert, one after another; of gate and up both, strip by strip."""

    family: Family
    quants: int
    scales: int
    minima: int
    num_inputs: int
    num_outputs: int  # of one tensor
    num_strips: int  # of one expert

    @property
    def num_column_tiles(self) -> int:
        return -(-self.num_inputs // TILE_COLUMNS)


Strips = TypeVar("Strips", Part, ExpertMatrices)


class CudaWeights:
    """The tensors of a manifest in layout cuda.v1.

    Args:
        config: the model's dimensions.
        tensors: where they lie, by name.
        addresses: of each allocation, in the manifest's order.
        device: where they lie; its kernels are loaded when matrices are asked for.
    """

    def __init__(
        self,
        config: GPTConfig,
        tensors: Mapping[str, Tensor],
        addresses: Sequence[int],
        device: Device,
    ) -> None:
        self.config = config
        self._device = device
        self.layout = CUDA_LAYOUT
        self._tensors = tensors
        self._addresses = addresses

    @classmethod
    def from_gguf(cls, device: Device, gguf: GGUFFile, config: GPTConfig) -> CudaWeights:
        """Load a file into memory of this process's own, as benchmarks and tests do.

        Raises:
            ServiceError: as `GPTConfig.check_tensors`, `shared.cuda_layout.fill` and `Device.allocate`.
        """
        config.check_tensors(gguf)
        planned = plan(gguf, config)
        addresses = []
        for index, size in enumerate(planned.allocation_sizes):
            buffer = bytearray(size)
            fill(planned, gguf, index, memoryview(buffer))
            addresses.append(device.allocate(size))
            device.upload(addresses[-1], buffer)
            device.synchronize()
        return cls(config, planned.tensors, addresses, device)

    @property
    def families(self) -> set[Family]:
        """Of all matrices."""
        return {family_of(tensor) for tensor in self._tensors.values() if tensor.planes[0].role != "values"}

    def vector(self, *names: str) -> Vector:
        planes = [self._tensors[name].planes[0] for name in names]
        sizes = [_num_values(plane) for plane in planes]
        return Vector(tuple(self._address(plane) for plane in planes), tuple(sizes))

    def matrix(self, *names: str) -> Matrix | Vector:
        """One matrix, or several of the same input as one; the router's, which lies as values, as a `Vector`."""
        tensors = [self._tensors[name] for name in names]
        if tensors[0].planes[0].role == "values":
            return self.vector(*names)
        parts: list[Part] = []
        first_output = 0
        for tensor in tensors:
            part = Part(family_of(tensor), *self._planes(tensor), first_output, tensor.shape[-2])
            first_output += part.num_outputs
            if parts and _joins(parts[-1], part, tensor):
                last = parts.pop()
                total = last.num_outputs + part.num_outputs
                part = Part(last.family, last.quants, last.scales, last.minima, last.first_output, total)
            parts.append(part)
        matrix = Matrix(tuple(parts), tensors[0].shape[-1], first_output)
        tiles = matrix.num_column_tiles
        return replace(matrix, parts=tuple(self._with_largest(part, part.num_strips, tiles) for part in parts))

    def expert_matrices(self, *names: str) -> ExpertMatrices:
        tensor = self._tensors[names[0]]
        num_strips = tensor.planes[0].shape[1]
        _, num_outputs, num_inputs = tensor.shape
        matrices = ExpertMatrices(family_of(tensor), *self._planes(tensor), num_inputs, num_outputs, num_strips)
        return self._with_largest(matrices, tensor.shape[0] * num_strips, matrices.num_column_tiles)

    def embedding(self, name: str) -> Matrix:
        matrix = self.matrix(name)
        assert isinstance(matrix, Matrix)
        return matrix

    def _with_largest(self, matrix: Strips, num_strips: int, column_tiles: int) -> Strips:
        """The matrix with what wgmma_tiles.cuh wants to know of MXFP4's rows: 16 bytes a strip, found by a kernel.

        Raises:
            ServiceError: as `Device.allocate`.
        """
        if self._device.capability != HOPPER or matrix.family != Family.MXFP4:
            return matrix
        address = self._device.allocate(num_strips * STRIP_ROWS)
        grid = (-(-num_strips // 8), 1, 1)
        self._device.launch("largest", grid, 256, matrix.scales, address, num_strips, column_tiles)
        return replace(matrix, minima=address)

    def _planes(self, tensor: Tensor) -> tuple[int, int, int]:
        """The addresses of quants, scales and minima."""
        addresses = {plane.role: self._address(plane) for plane in tensor.planes}
        return addresses["quants"], addresses.get("scales", 0), addresses.get("minima", 0)

    def _address(self, plane: Plane) -> int:
        return self._addresses[plane.allocation] + plane.offset


def _num_values(plane: Plane) -> int:
    size = 1
    for length in plane.shape:
        size *= length
    return size


def _joins(last: Part, part: Part, tensor: Tensor) -> bool:
    """Whether a part goes on where the last one ends, in every plane and without padding between."""
    if last.family != part.family or last.num_outputs % STRIP_ROWS != 0:
        return False
    addresses = zip((last.quants, last.scales, last.minima), (part.quants, part.scales, part.minima), strict=True)
    strips = last.num_strips
    strides = [plane.strides[0] for plane in tensor.planes] + [0] * (3 - len(tensor.planes))
    return all(
        start + strips * stride == next_start for (start, next_start), stride in zip(addresses, strides, strict=True)
    )
