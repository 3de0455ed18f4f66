"""The benchmark of the CPU backend runs and says what it measured."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.stack import ROOT


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bench_cpu(tmp_path, demo_gpt2):
    command = [sys.executable, "-m", "benchmarks.bench_cpu", "--repetitions", "1", "--models", str(demo_gpt2)]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "rates.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    has_peer = importlib.util.find_spec("xllamacpp") is not None
    assert ("llama.cpp: not measured" in done.stdout) is not has_peer
    rows = json.loads((tmp_path / "rates.json").read_text())["rows"]
    assert [(row["model"], row["streams"]) for row in rows] == [("demo-gpt2", 1), ("demo-gpt2", 16)]
    for row in rows:
        assert set(row["rates"]) == {"engine", "served"} | ({"llama.cpp"} if has_peer else set())
        assert all(rate > 0 for rates in row["rates"].values() for rate in rates)
