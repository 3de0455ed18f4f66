"""How far a file's weights lie from another's, tensor by tensor: no server, and one tensor of each in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.errors import Reason, ServiceError
from shared.gguf import GGUFFile, TensorInfo, read_gguf, read_tensor
from shared.quants import dequantize

STEP_VALUES = 1 << 22  # decoded at once


@dataclass(frozen=True)
class TensorError:
    """What became of one tensor's values."""

    name: str
    base_type: str
    type: str
    num_values: int
    relative: float  # root mean square error over root mean square of the base's values
    largest: float  # the largest error over the base's largest value

    @property
    def is_exact(self) -> bool:
        return self.relative == 0


def tensor_errors(
    base: Path, other: Path, on_progress: Callable[[int, int], None] = lambda _done, _total: None
) -> list[TensorError]:
    """The errors of every tensor, in the base's order.

    Args:
        on_progress: called with the number of values compared and of all.

    Raises:
        ServiceError: for a file that can't be read, or files whose tensors differ in name or shape.
    """
    base_file, other_file = read_gguf(base), read_gguf(other)
    _check_same_shapes(base_file, other_file)
    total = sum(info.num_elements for info in base_file.tensors.values())
    done = 0
    errors = []
    for name, info in base_file.tensors.items():
        errors.append(_error(base_file, info, other_file, other_file.tensors[name]))
        done += info.num_elements
        on_progress(done, total)
    return errors


def _check_same_shapes(base: GGUFFile, other: GGUFFile) -> None:
    names = base.tensors.keys() | other.tensors.keys()
    for name in sorted(names):
        shapes = [file.tensors[name].shape if name in file.tensors else None for file in (base, other)]
        if shapes[0] != shapes[1]:
            why = f"{other.paths[0]}: tensor {name!r} is {shapes[1]}, and {shapes[0]} in {base.paths[0]}: other models."
            raise ServiceError(Reason.MODEL_INVALID, why, metadata={"file": str(other.paths[0])})


def _error(base: GGUFFile, base_info: TensorInfo, other: GGUFFile, info: TensorInfo) -> TensorError:
    base_rows = read_tensor(base, base_info).reshape(-1, base_info.row_bytes)
    rows = read_tensor(other, info).reshape(-1, info.row_bytes)
    squares = error_squares = largest = largest_error = 0.0
    step = max(STEP_VALUES // info.shape[-1], 1)
    for start in range(0, len(rows), step):
        expected = dequantize(base_rows[start : start + step], base_info.type).astype(np.float64)
        difference = dequantize(rows[start : start + step], info.type) - expected
        squares += float(np.sum(expected**2))
        error_squares += float(np.sum(difference**2))
        largest = max(largest, float(np.abs(expected).max()))
        largest_error = max(largest_error, float(np.abs(difference).max()))
    return TensorError(
        base_info.name,
        base_info.type.name,
        info.type.name,
        info.num_elements,
        _ratio(math.sqrt(error_squares), math.sqrt(squares)),
        _ratio(largest_error, largest),
    )


def _ratio(error: float, size: float) -> float:
    if error == 0:
        return 0.0
    return error / size if size else math.inf
