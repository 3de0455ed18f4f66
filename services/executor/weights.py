"""A model's weights as arrays over the memory that a manifest describes; nothing is copied.

A `Matrix` hides which layout it lies in: `columns(start, stop)` gives a piece of the transposed matrix, a view where
it lies decoded, and decoded on the spot where it lies as the file's blocks, to the same bits.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.ggml_type import GGMLType
from shared.gguf import GGUFFile
from shared.gpt_config import GPTConfig
from shared.layout import COLUMN_MULTIPLE, FLOAT32_BUDGET, fill, plan, plane_array, round_up
from shared.manifest import Allocation, Manifest, Plane, Tensor
from shared.quants import dequantize

Floats = NDArray[np.float32]


class Matrix(Protocol):
    """A weight matrix, to be multiplied from the right: (rows, num_inputs) @ (num_inputs, num_outputs)."""

    num_inputs: int
    num_outputs: int
    width: int  # num_outputs, rounded up to a multiple of 16

    def columns(self, start: int, stop: int) -> Floats:
        """Columns of the transposed matrix, (num_inputs, stop - start), each row contiguous.

        0 <= start < stop <= width; what lies past num_outputs is zero.
        """
        ...

    def rows(self, ids: NDArray[np.integer]) -> Floats:
        """Rows of the matrix as the file has it, (len(ids), num_inputs): embeddings."""
        ...


class DecodedMatrix:
    """A matrix that lies in memory as float32, transposed."""

    def __init__(
        self,
        array: Floats,  # (num_inputs, width)
        num_outputs: int,
    ) -> None:
        self.array = array
        self.num_inputs, self.width = array.shape
        self.num_outputs = num_outputs

    def columns(self, start: int, stop: int) -> Floats:
        return self.array[:, start:stop]

    def rows(self, ids: NDArray[np.integer]) -> Floats:
        return np.ascontiguousarray(self.array[:, ids].T)


class BlockMatrix:
    """Matrices of one input that lie in memory as the file's blocks, their outputs one after another."""

    def __init__(
        self,
        parts: Sequence[tuple[NDArray[np.uint8], GGMLType]],  # each (outputs, row_bytes) and its type
        num_inputs: int,
    ) -> None:
        self.parts = parts
        self.num_inputs = num_inputs
        self.num_outputs = sum(len(blocks) for blocks, _ in parts)
        self.width = round_up(self.num_outputs, COLUMN_MULTIPLE)

    def columns(self, start: int, stop: int) -> Floats:
        tile = np.zeros((self.num_inputs, stop - start), np.float32)
        first = 0  # column of the part's first output
        for blocks, type in self.parts:
            begin, end = max(start, first), min(stop, first + len(blocks))
            if begin < end:
                tile[:, begin - start : end - start] = dequantize(blocks[begin - first : end - first], type).T
            first += len(blocks)
        return tile

    def rows(self, ids: NDArray[np.integer]) -> Floats:
        ((blocks, type),) = self.parts
        values: Floats = dequantize(blocks[ids], type)
        return values


class GatheredMatrix:
    """A matrix of which only rows are read: it lies as the file has it, as float32."""

    def __init__(
        self,
        array: Floats,  # (rows, num_inputs)
    ) -> None:
        self.array = array

    def rows(self, ids: NDArray[np.integer]) -> Floats:
        rows: Floats = self.array[ids]
        return rows


class Rows(Protocol):
    """What embeddings are read from: any matrix, or one that lies as rows."""

    def rows(self, ids: NDArray[np.integer]) -> Floats: ...


class Weights:
    """The tensors of a manifest, by name.

    Args:
        manifest: where they lie.
        buffers: the memory of each allocation, in the manifest's order.
    """

    def __init__(self, manifest: Manifest, buffers: Sequence[memoryview]) -> None:
        assert len(buffers) == len(manifest.allocations)
        self.config = manifest.config
        self.layout = manifest.layout
        self._tensors = manifest.tensors
        self._buffers = buffers

    @classmethod
    def from_gguf(cls, gguf: GGUFFile, config: GPTConfig, float32_budget: int = FLOAT32_BUDGET) -> Weights:
        """Load a file into this process's own memory, as benchmarks, tests and tools do.

        Raises:
            ServiceError: as `GPTConfig.check_tensors` and `shared.layout.fill`.
        """
        config.check_tensors(gguf)
        planned = plan(gguf, config, float32_budget)
        buffers = [memoryview(mmap.mmap(-1, size)) for size in planned.allocation_sizes]
        for index, buffer in enumerate(buffers):
            fill(planned, gguf, index, buffer)
        files = tuple((str(path), size) for path, size in zip(gguf.paths, gguf.file_sizes, strict=True))
        allocations = tuple(Allocation(size, sha256="", generation=0) for size in planned.allocation_sizes)
        manifest = Manifest("", (), "", planned.layout, config, allocations, planned.tensors, files, ())
        return cls(manifest, buffers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all allocations."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def vector(self, *names: str) -> Floats:
        """A norm's weight, a bias or the sinks; of several tensors the one array that they form side by side,
        (..., the sum of their last dimensions)."""
        return self._side_by_side([self._tensors[name] for name in names])

    def matrix(self, *names: str) -> Matrix:
        """One matrix, or several of the same input as one, (inputs, the sum of their outputs) when transposed."""
        tensors = [self._tensors[name] for name in names]
        return self._matrices(tensors)[0]

    def expert_matrices(self, *names: str) -> list[Matrix]:
        """For each expert its matrix, as `matrix` would give it."""
        return self._matrices([self._tensors[name] for name in names])

    def embedding(self, name: str) -> Rows:
        """A matrix whose rows are gathered."""
        tensor = self._tensors[name]
        if tensor.planes[0].role == "values":
            return GatheredMatrix(self._array(tensor.planes[0]).view(np.float32))
        return self._matrices([tensor])[0]

    def _matrices(self, tensors: Sequence[Tensor]) -> list[Matrix]:
        num_outputs = sum(tensor.shape[-2] for tensor in tensors)
        num_inputs = tensors[0].shape[-1]
        if tensors[0].planes[0].role == "transposed":
            array = self._side_by_side(tensors)
            return [DecodedMatrix(matrix, num_outputs) for matrix in array.reshape(-1, *array.shape[-2:])]
        assert tensors[0].planes[0].role == "blocks"
        parts = []
        for tensor in tensors:
            blocks = self._array(tensor.planes[0]).view(np.uint8)
            parts.append([(matrix, GGMLType[tensor.type]) for matrix in blocks.reshape(-1, *blocks.shape[-2:])])
        return [BlockMatrix(matrices, num_inputs) for matrices in zip(*parts, strict=True)]

    def _side_by_side(self, tensors: Sequence[Tensor]) -> Floats:
        """The array that tensors form whose planes are column ranges of it; transposed ones with their padding."""
        planes = [tensor.planes[0] for tensor in tensors]
        first = planes[0]
        column = 0
        for plane in planes:
            assert plane.offset == first.offset + 4 * column, "planes do not lie side by side"
            column += plane.shape[-1]
        width = first.strides[-2] // 4 if len(first.shape) > 1 else column
        whole = Plane(
            first.role, first.dtype, first.allocation, first.offset, (*first.shape[:-1], width), first.strides
        )
        return self._array(whole).view(np.float32)

    def _array(self, plane: Plane) -> NDArray[np.generic]:
        return plane_array(plane, self._buffers[plane.allocation])
