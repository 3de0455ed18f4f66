"""A GPU as the backend sees it: its context, one stream, memory, kernels by name, graphs.

The device's primary context is retained, so that PyCUDA and cuda-bindings work in the same one. `close` pops it: a
context that is still on the stack when a process ends aborts it.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pycuda.driver as cuda
from cuda.bindings import driver
from numpy.typing import NDArray

from services.executor.cuda.kernels import SOURCES, Entry
from services.executor.step import DeviceLostError
from shared.cuda_compile import Compiler, Module, architecture
from shared.errors import Reason, ServiceError

log = logging.getLogger(__name__)

Grid = tuple[int, int, int]
# Kernels that hold more in shared memory than a block gets unasked. They also divide a multiprocessor's memory alike:
# kernels that do not can't be on it at the same time, and none could start while the one before it ends.
SHARING = ("product", "attention_decode", "attention_wgmma", "normed_route")
TENSOR_MAP = np.dtype("V128")  # a kernel's argument
MAX_BOX_WORDS = 256  # of 4 bytes, in one dimension of a tensor map's box
PROGRAMMATIC = 1  # type of an edge after which the next kernel may start before this one ends


class Device:
    """One GPU, current in the thread that makes it.

    Raises:
        ServiceError: EXECUTOR_UNAVAILABLE if there is no such GPU.
    """

    def __init__(self, index: int = 0) -> None:
        try:
            cuda.init()
            device = cuda.Device(index)
        except cuda.Error as error:
            raise ServiceError(Reason.EXECUTOR_UNAVAILABLE, f"no NVIDIA GPU {index} can be used: {error}.") from None
        self.name: str = device.name()
        self.capability: tuple[int, int] = device.compute_capability()
        self.num_multiprocessors: int = device.multiprocessor_count
        self._context = device.retain_primary_context()
        self._context.push()
        self.stream = cuda.Stream()
        self.max_shared_bytes: int = device.get_attribute(
            cuda.device_attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN  # of a block, its static shared memory included
        )
        self._functions: dict[str, tuple[Any, str]] = {}
        self._allocations: list[Any] = []

    def load(
        self,
        modules: Mapping[Module, Sequence[Entry]],
        cache: Path | None = None,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compile modules and prepare their entry points: types are P for a pointer, i an int, f a float, T a map."""
        cubins = Compiler(SOURCES, architecture(self.capability), cache).compile_all(list(modules), report)
        for module, entries in modules.items():
            loaded = cuda.module_from_buffer(cubins[module])
            for name, entry, types in entries:
                function = loaded.get_function(entry)
                function.prepare([TENSOR_MAP if kind == "T" else kind for kind in types])
                if name.startswith(SHARING):
                    _prefer_shared(function, self.max_shared_bytes)
                self._functions[name] = (function, types)

    def launch(
        self, name: str, grid: Grid, threads: int, *arguments: int | float | bytes, shared_bytes: int = 0
    ) -> None:
        """Start a kernel on the stream, with so much dynamic shared memory for each block."""
        function, types = self._functions[name]
        assert len(arguments) == len(types), f"{name} takes {len(types)} arguments, not {len(arguments)}"
        assert min(grid) > 0
        function.prepared_async_call(grid, (threads, 1, 1), self.stream, *arguments, shared_size=shared_bytes)

    def map_halves(self, address: int, num_rows: int, pitch: int, box_rows: int) -> bytes:
        """A tensor map of rows of half, in boxes of 64 columns and so many rows, swizzled as wgmma.cuh reads them."""
        dtype = driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
        swizzle = driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B
        return _encode_map(dtype, swizzle, address, (pitch, num_rows), (2 * pitch,), (64, box_rows))

    def map_tiles(
        self, address: int, tile_bytes: int, column_tiles: int, num_strips: int, box_tiles: int, box_strips: int
    ) -> bytes:
        """A tensor map of a plane of cuda.v1 in boxes of so many tiles of each of so many strips."""
        piece = min(tile_bytes, MAX_BOX_WORDS * 4)
        sizes = piece // 4, tile_bytes // piece, column_tiles, num_strips
        strides = piece, tile_bytes, tile_bytes * column_tiles
        dtype = driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT32
        swizzle = driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE
        return _encode_map(dtype, swizzle, address, sizes, strides, (*sizes[:2], box_tiles, box_strips))

    def allocate(self, num_bytes: int) -> int:
        """The address of new memory, all zero, 256-byte aligned; it lives until `close`.

        Raises:
            ServiceError: VRAM_EXHAUSTED, naming what is needed and what is free.
        """
        free, _ = cuda.mem_get_info()
        try:
            memory = cuda.mem_alloc(max(num_bytes, 1))
        except cuda.MemoryError:
            message = f"{num_bytes} bytes of GPU memory are needed, {free} are free."
            metadata = {"needed": str(num_bytes), "free": str(free)}
            raise ServiceError(Reason.VRAM_EXHAUSTED, message, metadata=metadata) from None
        self._allocations.append(memory)
        cuda.memset_d8_async(memory, 0, max(num_bytes, 1), self.stream)
        return int(memory)

    def upload(self, address: int, values: Any) -> None:
        """Copy an array or a buffer of the host, in the stream's order.

        It may be changed once this returns; page-locked memory only once the copy has been made.
        """
        cuda.memcpy_htod_async(address, values, self.stream)

    def download(self, address: int, out: NDArray[Any]) -> None:
        """Copy to an array of the host, in the stream's order; complete after `synchronize`."""
        cuda.memcpy_dtoh_async(out, address, self.stream)

    def pinned(self, shape: Sequence[int], dtype: Any) -> NDArray[Any]:
        """An array in page-locked memory, which copies run at full speed from and to."""
        array: NDArray[Any] = cuda.pagelocked_empty(tuple(shape), dtype)
        return array

    def clear(self, address: int, num_bytes: int) -> None:
        """Set memory to zero, in the stream's order."""
        cuda.memset_d8_async(address, 0, num_bytes, self.stream)

    def mark(self) -> Any:
        """An event after everything on the stream so far; its `synchronize` waits for that."""
        event = cuda.Event(cuda.event_flags.DISABLE_TIMING)
        event.record(self.stream)
        return event

    @contextmanager
    def losing(self) -> Iterator[None]:
        """Errors of the GPU within become DeviceLostError: after one of them no call on the context succeeds.

        Raises:
            DeviceLostError
            MemoryError: the GPU's memory ran out, which the context outlives.
        """
        try:
            yield
        except cuda.MemoryError as error:  # no MemoryError of Python's
            raise MemoryError(f"the GPU's memory ran out: {error}") from error
        except (cuda.Error, ServiceError) as error:
            raise DeviceLostError(f"the GPU failed: {error}") from error

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        self.stream.synchronize()

    def measure(self, work: Callable[[], None], repeat: int = 1) -> float:
        """Microseconds of the stream's time that one call of `work` takes, the mean over `repeat`."""
        start, end = cuda.Event(), cuda.Event()
        start.record(self.stream)
        for _ in range(repeat):
            work()
        end.record(self.stream)
        end.synchronize()
        return float(end.time_since(start)) * 1000 / repeat

    def capture(self, work: Callable[[], None]) -> Graph:
        """The kernels that `work` launches, as a graph; nothing runs yet.

        It is the only thing that takes memory of the GPU while requests run. Without that, launching it is `work`.
        """
        handle = driver.CUstream(self.stream.handle)
        _check(driver.cuStreamBeginCapture(handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
        try:
            work()
        finally:
            captured = driver.cuStreamEndCapture(handle)
        (graph,) = _check(captured)
        try:
            if self.capability >= (9, 0):
                _make_edges_programmatic(graph)
            (executable,) = _check(driver.cuGraphInstantiate(graph, 0))
        except MemoryError:
            log.warning("no GPU memory for a graph: steps of its shape launch kernel by kernel, which is slower")
            executable = None
        finally:
            _check(driver.cuGraphDestroy(graph))
        return Graph(executable, handle, work)

    def close(self) -> None:
        """Free what was allocated and leave the context."""
        self.synchronize()
        for memory in self._allocations:
            memory.free()
        self._allocations.clear()
        self._functions.clear()
        self._context.pop()


class Graph:
    """A step's kernels, launched at once; one by one where the GPU had no memory to prepare that."""

    def __init__(self, executable: Any, stream: Any, work: Callable[[], None]) -> None:
        self._executable, self._stream, self._work = executable, stream, work

    def launch(self) -> None:
        if self._executable is None:
            self._work()
        else:
            _check(driver.cuGraphLaunch(self._executable, self._stream))

    def destroy(self) -> None:
        if self._executable is not None:
            _check(driver.cuGraphExecDestroy(self._executable))


def _encode_map(
    dtype: Any,
    swizzle: Any,
    address: int,
    sizes: Sequence[int],  # elements, the innermost first
    strides: Sequence[int],  # bytes, of all dimensions but the innermost
    box: Sequence[int],
) -> bytes:
    """A tensor map. The driver writes it to a multiple of 64, which cuda-bindings can't be told."""
    buffer = ctypes.create_string_buffer(TENSOR_MAP.itemsize + 64)
    start = -ctypes.addressof(buffer) % 64
    rank = len(sizes)
    code = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(buffer) + start),
        int(dtype),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        int(swizzle),
        int(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B),
        int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
    )
    _check((driver.CUresult(code),))
    return buffer.raw[start : start + TENSOR_MAP.itemsize]


def _prefer_shared(function: Any, max_bytes: int) -> None:
    attribute = cuda.function_attribute
    function.set_attribute(attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, max_bytes - function.shared_size_bytes)
    function.set_attribute(attribute.PREFERRED_SHARED_MEMORY_CARVEOUT, 100)


def _make_edges_programmatic(graph: Any) -> None:
    """Let each kernel start while the one before it still runs; the kernels wait themselves (device.cuh)."""
    *_, num_edges = _check(driver.cuGraphGetEdges(graph))
    if num_edges == 0:
        return
    sources, targets, edges, _ = _check(driver.cuGraphGetEdges(graph, num_edges))
    _check(driver.cuGraphRemoveDependencies(graph, sources, targets, edges, num_edges))
    programmatic = []
    for _ in range(num_edges):
        edge = driver.CUgraphEdgeData()
        edge.from_port, edge.to_port, edge.type = 1, 0, PROGRAMMATIC
        programmatic.append(edge)
    _check(driver.cuGraphAddDependencies(graph, sources, targets, programmatic, num_edges))


def _check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    error, *values = result
    if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise MemoryError("the GPU's memory ran out")
    if error != driver.CUresult.CUDA_SUCCESS:
        raise ServiceError(Reason.INTERNAL, f"CUDA: {error.name}.")
    return tuple(values)


def as_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """A contiguous array as its bytes."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
