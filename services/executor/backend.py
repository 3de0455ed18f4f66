"""Which backend runs a model: the one that its weights' layout is made for."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Sequence

from services.executor.engine_config import EngineConfig
from services.executor.runner import NumpyRunner
from services.executor.step import Runner
from services.executor.weights import Weights
from shared.cuda_layout import CUDA_LAYOUT
from shared.cuda_memory import GET_PACKAGES, CudaDevice, device_index, gpu_unusable, import_readonly
from shared.descriptors import map_readonly
from shared.layout import LAYOUTS
from shared.manifest import Manifest
from shared.phases import Phases

log = logging.getLogger(__name__)


def layouts_of(device: str) -> Sequence[str]:
    """The layouts that a device's backend reads, best first."""
    return LAYOUTS if device_index(device) is None else (CUDA_LAYOUT,)


def make_runner(manifest: Manifest, descriptors: Sequence[int], engine: EngineConfig, device: str) -> Runner:
    """Map a model's weights and make its KV blocks.

    Args:
        descriptors: one of each allocation; they stay the caller's.
        device: "cpu" or "cuda:N".

    Raises:
        ServiceError: as `NumpyRunner` and `CudaRunner`.
        MemoryError: the host lacks the memory for the KV blocks.
    """
    index = device_index(device)
    if index is not None:
        return _make_cuda_runner(manifest, descriptors, engine, index)
    buffers = [
        map_readonly(descriptor, allocation.num_bytes)
        for descriptor, allocation in zip(descriptors, manifest.allocations, strict=True)
    ]
    return NumpyRunner(
        manifest.config, Weights(manifest, buffers), block_size=engine.block_size, num_blocks=engine.num_blocks
    )


def _make_cuda_runner(manifest: Manifest, descriptors: Sequence[int], engine: EngineConfig, index: int) -> Runner:
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
