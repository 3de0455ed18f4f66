"""The GPU that tests run on, and small matrices in its memory."""

from types import SimpleNamespace

import numpy as np
import pytest

from shared import cuda_layout
from shared.ggml_type import GGMLType
from shared.layout import plane_array
from shared.manifest import Tensor
from shared.quantizers import quantize
from shared.quants import dequantize


def open_device():
    """The first GPU; without one the test is skipped, and says so."""
    pytest.importorskip("pycuda", reason="PyCUDA is not installed: pip install '.[cuda]'")
    from services.executor.cuda.device import Device
    from shared.errors import ServiceError

    try:
        return Device()
    except ServiceError as error:
        pytest.skip(error.message)


def upload(device, values):
    """The address of an array's copy on the device."""
    values = np.ascontiguousarray(values)
    address = device.allocate(values.nbytes)
    device.upload(address, values)
    device.synchronize()
    return address


def download(device, address, shape, dtype):
    out = np.empty(shape, dtype)
    device.download(address, out)
    device.synchronize()
    return out


def make_weights(device, tensors):
    """CudaWeights of named float32 arrays with their types, those that lie beside each other in one list.

    Args:
        tensors: lists of (name, values, type).

    Returns:
        The weights, and of each name the values that its type can hold.
    """
    from services.executor.cuda.weights import CudaWeights

    made, held, size = {}, {}, 0
    placed = []
    for group in tensors:
        infos = [SimpleNamespace(name=name, shape=values.shape, type=type) for name, values, type in group]
        size = cuda_layout.round_up(size, cuda_layout.ALIGNMENT)
        if not cuda_layout.is_tiled(infos[0].name):
            planes, size = cuda_layout._vector_planes(infos, 0, size)
        elif len(infos) == 2:
            planes, size = cuda_layout._paired_planes(infos, 0, size)
        else:
            planes, size = cuda_layout._matrix_planes(infos, 0, size)
        for (name, values, type), own in zip(group, planes, strict=True):
            made[name] = Tensor(name, type.name, values.shape, tuple(own))
            blocks = quantize(values, type) if type != GGMLType.F32 else np.ascontiguousarray(values).view(np.uint8)
            blocks = blocks.reshape(-1, type.row_bytes(values.shape[-1]))
            held[name] = dequantize(blocks, type).reshape(values.shape)
            placed.append((made[name], blocks))
    buffer = bytearray(size)
    for tensor, blocks in placed:
        cuda_layout.place(tensor, blocks, [plane_array(plane, memoryview(buffer)) for plane in tensor.planes])
    address = upload(device, np.frombuffer(buffer, np.uint8))
    return CudaWeights(None, made, [address], device), held
