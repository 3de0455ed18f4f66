"""A wheel installs what it takes to serve: code, generated contract, demo models."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.stack import ROOT


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_wheel_serves_the_demo_model_by_itself(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "mxgpt/v1/executor_pb2.py" in names
    assert not [name for name in names if name.startswith(("tests/", "models/"))]
    target = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(target)], check=True)
    subprocess.run([str(target / "bin/python"), "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    chat = [str(target / "bin/python"), "-m", "mxgpt.demo"]
    answer = subprocess.run(chat, check=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "923" in answer.stdout
