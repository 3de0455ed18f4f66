"""A tensor's way from the file's blocks to the planes of layout "cuda.v1", as kernel launches for the bytes that came.

The bytes of a model's files form a stream: each file begins at a multiple of `READ_BYTES`, one after another. What has
come of it last lies in a window on the GPU, byte p at p modulo the window's size, a power of two. As soon as the whole
rows of some strips lie there they are repacked; so a tensor may be larger than the window, a strip may not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.cuda_layout import FAMILIES, STRIP_ROWS, family_of, is_paired
from shared.digest import READ_BYTES
from shared.ggml_type import GGMLType
from shared.gguf import GGUFFile, TensorInfo
from shared.layout import Plan, round_up
from shared.manifest import Tensor

MIN_WINDOW_BYTES = 128 << 20


@dataclass(frozen=True)
class Launch:
    """A kernel of a type's module, to be started with this many threads at least."""

    type: GGMLType
    kernel: str
    num_threads: int
    arguments: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """The last bytes of the stream."""

    address: int
    num_bytes: int  # a power of two, and a multiple of READ_BYTES

    def place(self, position: int) -> int:
        """The address of a byte of the stream."""
        return self.address + position % self.num_bytes


def window_bytes(plan: Plan, file: GGUFFile) -> int:
    """The size of a window in which every strip has room, with what is read at once before and behind it."""
    strips = [_strip_bytes(tensor, file.tensors[tensor.name]) for tensor in plan.tensors.values()]
    needed = max(MIN_WINDOW_BYTES, max(strips) + 3 * READ_BYTES)
    return 1 << (needed - 1).bit_length()


def file_starts(file: GGUFFile) -> Sequence[int]:
    """Of each file, where in the stream it begins."""
    starts = [0]
    for size in file.file_sizes[:-1]:
        starts.append(starts[-1] + round_up(size, READ_BYTES))
    return starts


class Repacking:
    """One tensor, in order of the stream.

    Args:
        tensor: where it goes.
        info: where it is in its file.
        file_start: where this file begins in the stream.
        addresses: of each allocation.
        window: over the stream.
        found: address of two 64-bit words, which kernels set where weights are not to be served (repack.cu).
    """

    def __init__(
        self,
        tensor: Tensor,
        info: TensorInfo,
        file_start: int,
        addresses: Mapping[int, int],
        window: Window,
        found: int,
    ) -> None:
        self.tensor = tensor
        self.start = file_start + info.offset
        self.end = self.start + info.num_bytes
        self._info = info
        self._window = window
        self._found = found
        self._planes = {plane.role: addresses[plane.allocation] + plane.offset for plane in tensor.planes}
        self._num_units = 0  # strips, or of vectors blocks, that are done

    @property
    def is_done(self) -> bool:
        return self._num_units == self._units_before(self.end)

    @property
    def bytes_done(self) -> int:
        """Of the file's."""
        if self._is_vector:
            return self._num_units * self._info.type.type_size
        matrix, strip = divmod(self._num_units, self._strips_per_matrix)
        rows = self.tensor.shape[-2]
        return (matrix * rows + min(strip * _strip_rows(self.tensor), rows)) * self._info.row_bytes

    def advance(self, position: int) -> Launch | None:
        """What there is to do once the stream has come as far as `position`; None where that is nothing new."""
        first, last = self._num_units, self._units_before(min(position, self.end))
        if last <= first:
            return None
        self._num_units = last
        return self._values(first, last - first) if self._is_vector else self._strips(first, last - first)

    @property
    def _is_vector(self) -> bool:
        return self.tensor.planes[0].role == "values"

    def _units_before(self, position: int) -> int:
        """Strips whose rows, or blocks that, lie whole before a position."""
        num_bytes = max(0, position - self.start)
        if self._is_vector:
            return num_bytes // self._info.type.type_size
        matrix, row = divmod(num_bytes // self._info.row_bytes, self.tensor.shape[-2])
        return matrix * self._strips_per_matrix + row // _strip_rows(self.tensor)

    @property
    def _strips_per_matrix(self) -> int:
        return -(-self.tensor.shape[-2] // _strip_rows(self.tensor))

    def _values(self, first: int, count: int) -> Launch:
        type = self._info.type
        arguments = (self._window.address, self._window.num_bytes - 1, self.start, self._planes["values"], self._found)
        return Launch(type, "values", count * type.block_size, (*arguments, first, count))

    def _strips(self, first: int, count: int) -> Launch:
        tensor, type = self.tensor, self._info.type
        *_, rows, columns = tensor.shape
        num_upper = _strip_rows(tensor) // 8
        own = family_of(tensor) == FAMILIES[type]
        threads = count * -(-columns // 64) * 64 * num_upper
        return Launch(
            type,
            "repack" if own else "expand",
            threads,
            (
                self._window.address,
                self._window.num_bytes - 1,
                self.start,
                self._planes["quants"],
                self._planes.get("scales", 0),
                self._planes.get("minima", 0),
                self._found,
                first,
                count,
                rows,
                columns,
                self._strips_per_matrix,
                num_upper,
            ),
        )


def repackings(plan: Plan, file: GGUFFile, addresses: Mapping[int, int], window: Window, found: int) -> list[Repacking]:
    """Of all tensors of a plan, in the order in which they come; `found` has 16 bytes for each in the plan's order."""
    starts = file_starts(file)
    made = [
        Repacking(tensor, info, starts[info.file_index], addresses, window, found + 16 * index)
        for index, tensor in enumerate(plan.tensors.values())
        for info in (file.tensors[tensor.name],)
    ]
    return sorted(made, key=lambda each: each.start)


def _strip_rows(tensor: Tensor) -> int:
    """Rows of a strip that are this tensor's: all, or half of them where two tensors share strips."""
    return STRIP_ROWS // 2 if is_paired(tensor.name) else STRIP_ROWS


def _strip_bytes(tensor: Tensor, info: TensorInfo) -> int:
    """Of what is repacked at once, at least."""
    if tensor.planes[0].role == "values":
        return info.type.type_size
    return _strip_rows(tensor) * info.row_bytes
