"""A client in another language: Node's gRPC over examples/node, by the .proto files and by reflection alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from tests.stack import ROOT, Stack

EXAMPLE = ROOT / "examples" / "node"
NODE = shutil.which("node")

pytestmark = [
    pytest.mark.skipif(NODE is None, reason="node is not installed"),
    pytest.mark.skipif(
        not (EXAMPLE / "node_modules" / "@grpc").is_dir(), reason="packages of Node are not installed: make node"
    ),
]


def test_node_generates_cancels_tokenizes_and_reads_errors(stack: Stack) -> None:
    ran = run(
        "--test", "tests/node/clients.test.js", EXECUTOR=stack.executor.address, TOKENIZER=stack.tokenizer.address
    )
    assert ran.returncode == 0, ran.stdout[-6000:]
    counts = dict(re.findall(r"^(?:#|ℹ) (tests|pass|fail|skipped) (\d+)$", ran.stdout, re.MULTILINE))
    assert counts == {"tests": "20", "pass": "20", "fail": "0", "skipped": "0"}


def test_the_example_streams_an_answer_and_tells_an_error(stack: Stack) -> None:
    addresses = (stack.executor.address, stack.tokenizer.address)
    answered = run("examples/node/generate.js", "What is 12 + 30?", *addresses)
    assert (answered.returncode, "42" in answered.stdout) == (0, True), answered.stdout
    refused = run("examples/node/generate.js", "word " * 9000, *addresses)
    assert (refused.returncode, "CONTEXT_LENGTH_EXCEEDED" in refused.stdout) == (1, True), refused.stdout


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Node, its two outputs as one."""
    assert NODE is not None
    return subprocess.run(
        [NODE, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
        check=False,
    )
