"""The services under load: every stream ends once, and everything comes back."""

import subprocess
import sys

import pytest

from tests.stack import ROOT


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_clients_rude_ones_among_them() -> None:
    command = [sys.executable, "-m", "benchmarks.bench_load", "--streams", "120", "--rounds", "2"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
