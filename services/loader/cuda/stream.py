"""A stream of copies and kernels on a GPU, and page-locked memory to copy from.

By cuda-bindings, not PyCUDA: what is made here is freed by name in whatever thread a load ends, also when an exception
still holds its frames.
"""

from __future__ import annotations

import ctypes
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.cuda_memory import CudaDevice, check


class Stream:
    """Work in order; a context manager, which waits for all of it and frees what was made for it.

    The device's context must be current in the thread that uses it.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._api = device.api
        self.handle = check(self._api.cuStreamCreate(self._api.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self._events: list[Any] = []
        self._allocations: list[int] = []

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        api = self._api
        api.cuStreamSynchronize(self.handle)  # an error of a kernel has been raised by `synchronize`
        for event in self._events:
            api.cuEventDestroy(event)
        for address in self._allocations:
            api.cuMemFree(address)
        api.cuStreamDestroy(self.handle)

    def allocate(self, num_bytes: int) -> int:
        """The address of GPU memory of this process's own.

        Raises:
            ServiceError: VRAM_EXHAUSTED.
        """
        address = int(check(self._api.cuMemAlloc(num_bytes), num_bytes=num_bytes))
        self._allocations.append(address)
        return address

    def clear(self, address: int, num_bytes: int, value: int = 0) -> None:
        """Set bytes of the GPU's memory."""
        check(self._api.cuMemsetD8Async(address, value, num_bytes, self.handle))

    def upload(self, address: int, values: NDArray[np.uint8]) -> None:
        """Copy bytes to the GPU; page-locked ones must stay as they are until an event after it is done."""
        check(self._api.cuMemcpyHtoDAsync(address, values.ctypes.data, values.nbytes, self.handle))

    def download(self, address: int, out: NDArray[Any]) -> None:
        """Copy from the GPU; complete when this returns."""
        check(self._api.cuMemcpyDtoHAsync(out.ctypes.data, address, out.nbytes, self.handle))
        self.synchronize()

    def event(self) -> Event:
        """A mark that can be set on the stream again and again."""
        flags = self._api.CUevent_flags
        event = check(self._api.cuEventCreate(flags.CU_EVENT_BLOCKING_SYNC.value | flags.CU_EVENT_DISABLE_TIMING.value))
        self._events.append(event)
        return Event(self._api, event, self.handle)

    def synchronize(self) -> None:
        """Wait until all is done.

        Raises:
            ServiceError: INTERNAL if a kernel has failed.
        """
        check(self._api.cuStreamSynchronize(self.handle))


def pin(device: CudaDevice, num_bytes: int) -> NDArray[np.uint8]:
    """Page-locked memory of the host, (num_bytes,), for as long as this process lives."""
    address = int(check(device.api.cuMemHostAlloc(num_bytes, 0), num_bytes=num_bytes))
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))


class Event:
    """A place in a stream's work."""

    def __init__(self, api: Any, event: Any, stream: Any) -> None:
        self._api, self._event, self._stream = api, event, stream

    def record(self) -> None:
        """Mark what has been put on the stream so far."""
        check(self._api.cuEventRecord(self._event, self._stream))

    @property
    def is_done(self) -> bool:
        """Whether everything before the mark is done."""
        (error,) = self._api.cuEventQuery(self._event)
        if error == self._api.CUresult.CUDA_ERROR_NOT_READY:
            return False
        check((error,))
        return True

    def wait(self) -> None:
        """Sleep until it is."""
        check(self._api.cuEventSynchronize(self._event))
