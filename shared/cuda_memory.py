"""GPU memory that has a file descriptor: made by one process, imported by others, read-only.

Only cuda-bindings is needed, no toolkit. Every function wants the device's primary context current in its thread
(`CudaDevice.use`; PyCUDA's retained primary context is the same one).
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

from shared.devices import device_index
from shared.errors import Reason, ServiceError
from shared.layout import round_up

GET_PACKAGES = "pip install '.[cuda]' in mxgpt's clone, for which a CUDA toolkit builds PyCUDA"
GET_COMPILER = "install a CUDA toolkit, or pip install nvidia-cuda-nvrtc nvidia-cuda-runtime"
GET_DRIVER = "install NVIDIA's driver, 580 or later, and pip install '.[cuda]' in mxgpt's clone"


def driver_api(index: int) -> Any:
    """cuda-bindings' driver module.

    Args:
        index: of the GPU that it is wanted for, which an error names.

    Raises:
        ServiceError: FIELD_INVALID, saying what to install.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise gpu_unusable(f"cuda-bindings can't be imported ({error})", GET_PACKAGES, index) from None
    return driver


def require_gpu(device: str) -> None:
    """Refuse a GPU that can't be used before anything is started for it; "cpu" is always there.

    Raises:
        ServiceError: FIELD_INVALID, saying what is missing and how to get it.
    """
    index = device_index(device)
    if index is None:
        return
    open_device(driver_api(index), index)
    if importlib.util.find_spec("pycuda") is None:
        raise gpu_unusable("PyCUDA is not installed", GET_PACKAGES, index)


def open_device(api: Any, index: int) -> Any:
    """The driver's handle of a GPU."""
    try:
        check(api.cuInit(0))
    except (ServiceError, RuntimeError) as error:  # RuntimeError: libcuda is missing
        why = error.message if isinstance(error, ServiceError) else "libcuda.so.1 is missing"
        raise gpu_unusable(f"NVIDIA's driver can't be used ({why})", GET_DRIVER, index) from None
    try:
        return check(api.cuDeviceGet(index))
    except ServiceError as error:
        what = f"the driver knows no GPU {index} ({error.message})"
        raise gpu_unusable(what, "name one that nvidia-smi lists", index) from None


class CudaDevice:
    """One GPU's primary context, which any thread can make current.

    Raises:
        ServiceError: FIELD_INVALID if there is no such GPU or no driver.
    """

    def __init__(self, index: int) -> None:
        self.api = driver_api(index)
        self.index = index
        self._device = open_device(self.api, index)
        attribute = self.api.CUdevice_attribute
        major = check(
            self.api.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self._device)
        )
        minor = check(
            self.api.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, self._device)
        )
        self.capability: tuple[int, int] = (int(major), int(minor))
        self._context = check(self.api.cuDevicePrimaryCtxRetain(self._device))
        self.use()

    @property
    def name(self) -> str:
        return f"cuda:{self.index}"

    @property
    def driver_version(self) -> str:
        """The kernel driver's, such as "580.95.05"; where it does not say, the CUDA version that it supports."""
        try:
            with open("/sys/module/nvidia/version", encoding="ascii") as file:
                return file.read().strip()
        except OSError:
            version = int(check(self.api.cuDriverGetVersion()))
            return f"CUDA {version // 1000}.{version % 1000 // 10}"

    def use(self) -> None:
        """Make the context current in this thread."""
        check(self.api.cuCtxSetCurrent(self._context))

    def free_bytes(self) -> int:
        self.use()
        free, _ = check(self.api.cuMemGetInfo())
        return int(free)

    def used_bytes(self) -> int:
        """Of all processes together."""
        self.use()
        free, total = check(self.api.cuMemGetInfo())
        return int(total) - int(free)


@dataclass(frozen=True)
class Mapping:
    """Memory that is mapped into this process's view of the GPU; `unmap` it once."""

    device: CudaDevice
    address: int
    num_bytes: int  # mapped, a multiple of the device's granularity

    def unmap(self) -> None:
        """End the mapping; the memory lives on while a descriptor or another mapping of it does."""
        api = self.device.api
        check(api.cuMemUnmap(self.address, self.num_bytes))
        check(api.cuMemAddressFree(self.address, self.num_bytes))


def granularity(device: CudaDevice) -> int:
    """Bytes that the size of shared memory is a multiple of."""
    kind = device.api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(check(device.api.cuMemGetAllocationGranularity(_properties(device), kind)))


def create_shared(device: CudaDevice, num_bytes: int) -> tuple[int, Mapping]:
    """New memory of at least `num_bytes`: its descriptor, which keeps it alive, and a writable mapping.

    Raises:
        ServiceError: VRAM_EXHAUSTED.
    """
    api = device.api
    size = round_up(num_bytes, granularity(device))
    handle = check(api.cuMemCreate(size, _properties(device), 0), num_bytes=size)
    try:
        descriptor = int(check(api.cuMemExportToShareableHandle(handle, _posix(api), 0)))
        try:
            os.set_inheritable(descriptor, False)
            mapping = _map(device, handle, size, api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, mapping
    finally:
        check(api.cuMemRelease(handle))


def import_readonly(device: CudaDevice, descriptor: int, num_bytes: int) -> Mapping:
    """Map memory that another process made; a kernel that writes there faults. The descriptor stays the caller's.

    Args:
        num_bytes: that the caller will read; the descriptor's memory must hold them.

    Raises:
        ServiceError: INTERNAL if the descriptor is no such memory, or of another size.
    """
    api = device.api
    size = round_up(num_bytes, granularity(device))
    handle = check(api.cuMemImportFromShareableHandle(descriptor, _posix(api)))
    try:
        return _map(device, handle, size, api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ)
    finally:
        check(api.cuMemRelease(handle))


def is_device_memory(device: CudaDevice, address: int, num_bytes: int) -> bool:
    """Whether an address is of this GPU's own memory, mapped, with so many bytes from it on: by its attributes."""
    api = device.api
    names = api.CUpointer_attribute
    kind, ordinal, start, size = (
        int(check(api.cuPointerGetAttribute(name, address)))
        for name in (
            names.CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            names.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
            names.CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
            names.CU_POINTER_ATTRIBUTE_RANGE_SIZE,
        )
    )
    is_device = kind == int(api.CUmemorytype.CU_MEMORYTYPE_DEVICE)
    return is_device and ordinal == device.index and address + num_bytes <= start + size


def check(result: tuple[Any, ...], num_bytes: int = 0) -> Any:
    """What a call of the driver gave: nothing, one value, or a tuple of several.

    Raises:
        ServiceError: VRAM_EXHAUSTED where memory was asked for and there is none, else INTERNAL naming the error.
    """
    error, *values = result
    if int(error) == 2:  # CUDA_ERROR_OUT_OF_MEMORY
        metadata = {"needed_bytes": str(num_bytes)}
        raise ServiceError(Reason.VRAM_EXHAUSTED, f"the GPU has no {num_bytes} bytes left.", metadata=metadata)
    if int(error) != 0:
        raise ServiceError(Reason.INTERNAL, f"CUDA: {error.name}")
    return values[0] if len(values) == 1 else tuple(values)


def _map(device: CudaDevice, handle: Any, size: int, access: Any) -> Mapping:
    api = device.api
    address = int(check(api.cuMemAddressReserve(size, 0, 0, 0)))
    try:
        check(api.cuMemMap(address, size, 0, handle, 0))
        try:
            wanted = api.CUmemAccessDesc()
            wanted.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            wanted.location.id = device.index
            wanted.flags = access
            check(api.cuMemSetAccess(address, size, [wanted], 1))
        except BaseException:
            api.cuMemUnmap(address, size)
            raise
    except BaseException:
        api.cuMemAddressFree(address, size)
        raise
    return Mapping(device, address, size)


def _properties(device: CudaDevice) -> Any:
    api = device.api
    properties = api.CUmemAllocationProp()
    properties.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device.index
    properties.requestedHandleTypes = _posix(api)
    return properties


def _posix(api: Any) -> Any:
    return api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def gpu_unusable(what: str, remedy: str, index: int | None = None) -> ServiceError:
    """The error (to be raised) for a GPU that can't be used, and what to do about it.

    Args:
        index: of the GPU; None where the fault is not one GPU's.
    """
    device = "a GPU" if index is None else f"--device cuda:{index}"
    return ServiceError(Reason.FIELD_INVALID, f"{device}: {what}; {remedy} (docs/gpu.md).")
