"""Graphs and errors of a GPU, over a driver that only counts what it is asked: no GPU is needed."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest

from services.executor.step import DeviceLostError
from shared.errors import ServiceError
from tests.stack import ROOT


class CountingDriver(ModuleType):
    """Answers what `Device.capture` calls, keeps count of graphs, and says `status` when one is to be made ready."""

    CUresult = SimpleNamespace(
        CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS"),
        CUDA_ERROR_OUT_OF_MEMORY=SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY"),
        CUDA_ERROR_INVALID_VALUE=SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE"),
    )
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)

    def __init__(self):
        super().__init__("driver")
        self.status = self.status_of_launch = self.CUresult.CUDA_SUCCESS
        self.num_graphs = self.num_executables = self.num_launched = 0

    def CUstream(self, handle):
        return handle

    def cuStreamBeginCapture(self, stream, mode):
        return (self.CUresult.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream):
        self.num_graphs += 1
        return self.CUresult.CUDA_SUCCESS, "graph"

    def cuGraphInstantiate(self, graph, flags):
        if self.status is not self.CUresult.CUDA_SUCCESS:
            return self.status, None
        self.num_executables += 1
        return self.CUresult.CUDA_SUCCESS, "executable"

    def cuGraphDestroy(self, graph):
        self.num_graphs -= 1
        return (self.CUresult.CUDA_SUCCESS,)

    def cuGraphExecDestroy(self, executable):
        self.num_executables -= 1
        return (self.CUresult.CUDA_SUCCESS,)

    def cuGraphLaunch(self, executable, stream):
        self.num_launched += 1
        return (self.status_of_launch,)


@pytest.fixture
def driver(monkeypatch):
    driver = CountingDriver()
    bindings, pycuda, of_pycuda = ModuleType("cuda.bindings"), ModuleType("pycuda"), ModuleType("pycuda.driver")
    of_pycuda.Error = type("Error", (Exception,), {})  # as PyCUDA's are: none of Python's
    of_pycuda.MemoryError = type("MemoryError", (of_pycuda.Error,), {})
    bindings.driver, pycuda.driver = driver, of_pycuda
    modules = {"cuda": ModuleType("cuda"), "cuda.bindings": bindings, "pycuda": pycuda, "pycuda.driver": of_pycuda}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return driver


@pytest.fixture
def device(driver):
    """A `Device` without a context: of the module over the counting driver, under a name of its own."""
    spec = importlib.util.spec_from_file_location("device_without_gpu", ROOT / "services/executor/cuda/device.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device = object.__new__(module.Device)
    device.stream, device.capability = SimpleNamespace(handle=1), (8, 6)
    return device


def test_a_graph_launches_its_kernels_at_once(driver, device):
    ran = []
    graph = device.capture(lambda: ran.append(1))
    graph.launch()
    assert (ran, driver.num_launched) == ([1], 1), "the work is called to be captured, and not again"
    graph.destroy()
    assert driver.num_graphs == driver.num_executables == 0


def test_without_memory_for_it_the_work_itself_runs_and_nothing_is_kept(driver, device, caplog):
    ran = []
    driver.status = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    graph = device.capture(lambda: ran.append(1))
    assert driver.num_graphs == 0
    assert "no GPU memory for a graph" in caplog.text
    graph.launch()
    graph.launch()
    assert (len(ran), driver.num_launched) == (3, 0)
    graph.destroy()


def test_another_failure_is_an_error_and_keeps_nothing_either(driver, device):
    driver.status = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(ServiceError, match="CUDA_ERROR_INVALID_VALUE"):
        device.capture(lambda: None)
    assert driver.num_graphs == 0


def test_what_fails_within_a_step_is_the_devices_loss_but_for_memory(driver, device):
    pycuda = sys.modules["pycuda.driver"]
    graph = device.capture(lambda: None)
    driver.status_of_launch = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(DeviceLostError, match="CUDA_ERROR_INVALID_VALUE"), device.losing():
        graph.launch()
    with pytest.raises(DeviceLostError, match="illegal address"), device.losing():
        raise pycuda.Error("illegal address")
    with pytest.raises(MemoryError, match="GPU's memory"), device.losing():
        raise pycuda.MemoryError("out of memory")
