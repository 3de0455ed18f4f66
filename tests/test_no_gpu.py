"""Asked for a GPU where there is none, every process says so in one sentence, and what to install."""

import subprocess
import sys
from pathlib import Path

import pytest

from mxgpt.cli.main import run
from services.executor.backend import make_backend
from shared.cuda_memory import CudaDevice
from shared.devices import device_index
from shared.errors import Reason, ServiceError
from tests.stack import ROOT, free_ports


@pytest.fixture(autouse=True)
def no_gpu() -> None:
    try:
        CudaDevice(0)
    except ServiceError:
        return
    pytest.skip("this machine has a GPU")


def test_the_loader_ends_with_one_sentence(tmp_path: Path, demo_gpt2: Path) -> None:
    ends_with_one_sentence("loader", "--socket", str(tmp_path / "loader.sock"), "--model", str(demo_gpt2))


def test_an_executor_does_not_wait_for_a_loader_to_say_it() -> None:
    ends_with_one_sentence("executor", "--loader", f"127.0.0.1:{free_ports(1)[0]}")


def ends_with_one_sentence(service: str, *options: str) -> None:
    command = [sys.executable, "-m", f"services.{service}", "--listen", "127.0.0.1:0", "--device", "cuda:0", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "ERROR" in line]
    assert "--device cuda:0: " in line
    assert "pip install '.[cuda]'" in line


def test_serve_says_it_before_it_starts_anything(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--device", "cuda:3", "--port", "0"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("mxgpt: --device cuda:3: ")
    assert "pip install '.[cuda]'" in line


def test_the_engine_refuses() -> None:
    with pytest.raises(ServiceError, match=r"cuda:0: .*pip install '\.\[cuda\]'") as caught:
        make_backend("cuda:0")
    assert caught.value.reason is Reason.FIELD_INVALID


def test_devices_have_names() -> None:
    assert device_index("cpu") is None
    assert device_index("cuda:12") == 12
    assert device_index("cuda") == 0
    for name in ("cuda:", "cuda:-1", "gpu:0", "cuda:0x"):
        with pytest.raises(ValueError, match="neither"):
            device_index(name)
