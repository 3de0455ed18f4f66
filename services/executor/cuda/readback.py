"""What a step brings back from the GPU: token ids, and the rows of logits that the host wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.executor.cuda.device import Device
from services.executor.step import StepResult


@dataclass(frozen=True)
class HostBuffer:
    """Page-locked arrays of one step, free again when the step has been collected."""

    inputs: NDArray[np.int32]  # (num_ints,) what goes to the device
    token_ids: NDArray[np.int32]  # (max_rows,) of rows of logits
    logits: NDArray[np.float32]  # (max_wanted, vocab_size)


@dataclass(frozen=True)
class RowsToDraw:
    """The rows of logits that are not simply argmaxed, and where their parameters lie on the device."""

    parameters: NDArray[np.void]  # (num_rows,) of sampling.ROW_SAMPLING
    address: int


class WantedLogits:
    """The rows of a step's logits that the host reads, brought while they are in the device's memory.

    More than `buffer` holds are brought piece by piece, and waited for.

    Args:
        address: where the rows now in memory begin.
        rows: (num_wanted,) ascending.
        buffer: (max_wanted, vocab_size) page-locked.
    """

    def __init__(self, device: Device, address: int, rows: NDArray[np.int32], buffer: NDArray[np.float32]) -> None:
        self._device, self._address, self._rows, self._buffer = device, address, rows, buffer
        self._waits = len(rows) > len(buffer)
        self.logits = np.empty((len(rows), buffer.shape[1]), np.float32) if self._waits else buffer[: len(rows)]

    def read(self, start: int, stop: int) -> None:
        """Bring those among rows start : stop, which are in memory."""
        if not len(self._rows):
            return
        place, end = np.searchsorted(self._rows, (start, stop)).tolist()
        while place < end:
            count = self._run_length(place, min(end, place + len(self._buffer)))
            target = self._buffer[:count] if self._waits else self.logits[place : place + count]
            row_bytes = self._buffer.strides[0]
            self._device.download(self._address + (int(self._rows[place]) - start) * row_bytes, target)
            if self._waits:
                self._device.synchronize()
                self.logits[place : place + count] = target
            place += count

    def _run_length(self, place: int, end: int) -> int:
        """How many wanted rows follow one another from `place` on."""
        gaps = np.diff(self._rows[place:end]) > 1
        return int(gaps.argmax()) + 1 if gaps.any() else end - place


@dataclass(frozen=True)
class Launched:
    """A step that runs."""

    event: Any  # after all of it
    token_ids: NDArray[np.int32]  # (num_logits,)
    draw_rows: NDArray[np.int32]  # (num_draws,)
    wanted: WantedLogits

    def result(self) -> StepResult:
        """What it gave, once it is over."""
        self.event.synchronize()
        drawn = self.token_ids[self.draw_rows]
        token_ids: list[int | None] = drawn.tolist()
        if len(drawn) and drawn.min() < 0:
            token_ids = [None if token_id < 0 else token_id for token_id in drawn.tolist()]
        return StepResult(token_ids, self.wanted.logits)
