"""The loader's kernels: compiled for its GPU when it starts, or found in the cache, and started on a stream."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from services.loader.cuda.stream import Stream
from shared.cuda_compile import Compiler, Module, architecture
from shared.cuda_memory import CudaDevice, check
from shared.ggml_type import GGMLType

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "kernels"
HASH = Module("sha256")
THREADS = 256  # of a block; the most that the kernels are compiled for

# Of the entry points, the types of their arguments: P a pointer, L 64 bits, i an int.
_TILED = "PLLPPPPLiiiii"
ENTRIES = {"repack": _TILED, "expand": _TILED, "values": "PLLPPLL", "sha256": "PPLi"}
_TYPES = {"P": ctypes.c_void_p, "L": ctypes.c_uint64, "i": ctypes.c_int}


def repack_module(type: GGMLType) -> Module:
    """What repacks tensors of one type."""
    return Module("repack", (("TYPE", int(type)),))


MODULES = (HASH, *(repack_module(type) for type in GGMLType))


class Kernels:
    """All kernels of the loader, compiled; those of a type are put on the GPU when it first occurs.

    Args:
        cache: folder of cubins; None is the user's own.

    Raises:
        ServiceError: FIELD_INVALID if there is no compiler.
    """

    def __init__(self, device: CudaDevice, cache: Path | None = None) -> None:
        self._device = device
        compiler = Compiler(SOURCES, architecture(device.capability), cache)
        self._cubins = compiler.compile_all(
            MODULES, lambda done, total: log.debug("kernel %d of %d is ready", done, total)
        )
        self._functions: dict[tuple[Module, str], Any] = {}
        self._lock = Lock()

    def launch(
        self,
        stream: Stream,
        module: Module,
        kernel: str,
        num_threads: int,
        arguments: Sequence[int],
        block: int = THREADS,
    ) -> None:
        """Start a kernel with `num_threads` threads at least."""
        types = ENTRIES[kernel]
        assert len(arguments) == len(types), f"{kernel} takes {len(types)} arguments, not {len(arguments)}"
        values = (tuple(arguments), tuple(_TYPES[letter] for letter in types))
        blocks = -(-num_threads // block)
        api = self._device.api
        check(
            api.cuLaunchKernel(self._function(module, kernel), blocks, 1, 1, block, 1, 1, 0, stream.handle, values, 0)
        )

    def _function(self, module: Module, kernel: str) -> Any:
        with self._lock:
            if (module, kernel) not in self._functions:
                image = np.frombuffer(self._cubins[module], np.uint8)
                loaded = check(self._device.api.cuModuleLoadData(image.ctypes.data))
                function = check(self._device.api.cuModuleGetFunction(loaded, kernel.encode()))
                self._functions[module, kernel] = function
            return self._functions[module, kernel]
