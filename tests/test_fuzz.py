"""The fuzzing targets on their seeds and on every input that ever failed, without the fuzzer; a short run with it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from fuzz.__main__ import REGRESSIONS, TARGETS
from tests.stack import ROOT

SECONDS = 8  # of each target, in the slow tests

# Examines the seeds and the regressions of a target. A process of its own: the targets set limits and hooks.
REPLAY = """
import collections, importlib, pathlib, sys
target = importlib.import_module(f"fuzz.{sys.argv[1]}")
kept = [path.read_bytes() for path in sorted(pathlib.Path(sys.argv[2]).glob("*"))]
outcomes = collections.Counter(target.examine(data) for data in (*target.seeds(), *kept))
print(dict(outcomes))
"""


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("gguf_header", {"served", "MODEL_INVALID"}),
        ("tokenizer_files", {"served", "MODEL_INVALID", "TOKENIZER_UNSUPPORTED"}),
        ("chat_template", {"rendered", "failed"}),
    ],
)
def test_seeds_and_regressions(target: str, expected: set[str]) -> None:
    outcomes = eval(python("-c", REPLAY, target, str(REGRESSIONS / target)).splitlines()[-1])
    assert expected <= set(outcomes), "the seeds reach what the target is about"


def test_the_templates_target_sees_what_a_template_reaches() -> None:
    """An environment with a hole: what comes through it fails the target."""
    hole = """
from fuzz import chat_template as target
renderer = target._sandbox().renderer
renderer.environment.globals["reach"] = lambda: open("/etc/hostname").read()
renderer.environment.globals["canary"] = lambda: target.CANARY
for template in (b"{{ reach() }}", b"{{ canary() }}"):
    try:
        target.examine(b"\\1" + template)
    except AssertionError as error:
        print("seen:", error)
"""
    seen = [line for line in python("-c", hole).splitlines() if line.startswith("seen:")]
    assert len(seen) == 2
    assert "caused [\"open('/etc/hostname'" in seen[0]
    assert "reached the worker's globals" in seen[1]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: pip install '.[fuzz]'"
)
@pytest.mark.parametrize("target", TARGETS)
def test_a_short_run(target: str) -> None:
    output = python("-m", "fuzz", target, "--seconds", str(SECONDS))
    executed = re.search(r"number_of_executed_units: (\d+)", output)
    assert executed is not None
    assert int(executed[1]) > 100
    assert f"{target}: " in output.splitlines()[-1]


def python(*arguments: str) -> str:
    """What a Python process wrote; it must end well."""
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"RUST_BACKTRACE": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=290,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-4000:]
    return process.stdout
