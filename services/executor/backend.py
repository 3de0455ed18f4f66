"""Which backend runs a model: the one that its weights' layout is made for."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Sequence

from services.executor.engine_config import EngineConfig
from services.executor.runner import NumpyRunner
from services.executor.step import Runner
from services.executor.weights import Weights
from shared.cuda_memory import GET_PACKAGES, CudaDevice, gpu_unusable, import_readonly
from shared.descriptors import map_readonly
from shared.devices import device_index
from shared.manifest import Manifest
from shared.phases import Phases

log = logging.getLogger(__name__)

Backend = Callable[[Manifest, Sequence[int], EngineConfig], Runner]
"""Maps a model's weights and makes its KV blocks.

The descriptors, one of each allocation, stay the caller's. Raises ServiceError as `NumpyRunner` and `CudaRunner`, and
MemoryError where the host lacks the memory for the KV blocks.
"""


def make_backend(device: str) -> Backend:
    """A device's backend, with the device set up but no memory of a model yet.

    Args:
        device: "cpu" or "cuda:N".

    Raises:
        ServiceError: FIELD_INVALID for a GPU that can't be used, saying what is missing.
    """
    index = device_index(device)
    return _make_numpy_runner if index is None else _make_cuda_backend(index)


def _make_numpy_runner(manifest: Manifest, descriptors: Sequence[int], engine: EngineConfig) -> Runner:
    buffers = [
        map_readonly(descriptor, allocation.num_bytes)
        for descriptor, allocation in zip(descriptors, manifest.allocations, strict=True)
    ]
    return NumpyRunner(
        manifest.config, Weights(manifest, buffers), block_size=engine.block_size, num_blocks=engine.num_blocks
    )


def _make_cuda_backend(index: int) -> Backend:
    phases = Phases(since_start=True)
    phases.lap("interpreter")
    memory = CudaDevice(index)
    phases.lap("context")
    try:  # only here, so that nothing of CUDA is needed where there is no GPU
        from services.executor.cuda.device import Device
        from services.executor.cuda.runner import CudaRunner
        from services.executor.cuda.weights import CudaWeights
    except ImportError as error:
        raise gpu_unusable(f"PyCUDA can't be imported ({error})", GET_PACKAGES, index) from None
    phases.lap("imports")
    device = Device(index)
    atexit.register(device.close)
    phases.lap("stream")

    def make_runner(manifest: Manifest, descriptors: Sequence[int], engine: EngineConfig) -> Runner:
        phases.lap("wait for weights")
        addresses = [
            import_readonly(memory, descriptor, allocation.num_bytes).address
            for descriptor, allocation in zip(descriptors, manifest.allocations, strict=True)
        ]
        phases.lap("weights")
        runner = CudaRunner(
            device,
            CudaWeights(manifest.config, manifest.tensors, addresses, device),
            engine.block_size,
            engine.num_blocks,
            engine.max_batch_tokens,
            engine.max_running,
            report=lambda done, total: log.info("kernel %d of %d is ready", done, total),
        )
        phases.lap("kernels and memory")
        log.info("the engine has started: %s", phases)
        return runner

    return make_runner
