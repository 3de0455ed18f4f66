"""The services under load: every stream ends once, everything comes back, and nobody is treated unfairly."""

import subprocess
import sys

import pytest

from tests.stack import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "benchmark",
    [
        ["bench_load", "--clients", "120", "--rounds", "2"],
        ["bench_fairness", "--quick"],
        ["bench_divergence", "--tokens", "2000"],
    ],
    ids=lambda b: b[0],
)
def test_a_short_round_of_the_benchmark_finds_nothing_wrong(tmp_path, benchmark):
    name, *options = benchmark
    if name == "bench_load":
        options += ["--picture", str(tmp_path / "load.svg")]
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    if name == "bench_load":
        assert (tmp_path / "load.svg").read_text().count("<polyline") == 4, "two panels of two rounds"
