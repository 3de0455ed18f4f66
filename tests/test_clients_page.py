"""The samples of docs/clients.md run as they stand, but for the addresses."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool, json_format, message_factory

from mxgpt.v1 import executor_pb2, tokenizer_pb2
from tests.page_samples import samples
from tests.stack import ROOT, Stack

PAGE = "docs/clients.md"
EXAMPLE = ROOT / "examples" / "node"


def output_of(*command: str, cwd: Path = ROOT) -> str:
    """What a program wrote to both of its outputs; it must end well."""
    ran = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=290, check=False
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def test_python(stack: Stack) -> None:
    output = output_of(sys.executable, "-c", "\n".join(samples(PAGE, "python", stack)))
    assert output.startswith("923\n"), output
    assert "demo-gpt-oss" in output
    assert output.endswith("FIELD_INVALID sampling.top_p\n"), output


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.skipif(not (EXAMPLE / "node_modules").is_dir(), reason="packages of Node are not installed: make node")
@pytest.mark.parametrize("kind", ["from_protos", "by_reflection"])
def test_node(stack: Stack, kind: str) -> None:
    code = "\n".join(samples(PAGE, "js", stack)).replace("./from_protos.js", f"./{kind}.js")
    output = output_of("node", "--input-type=module", "-e", code, cwd=EXAMPLE)
    assert output.startswith("923\n"), output
    assert "1 Cancelled on client\n" in output
    assert "SERVING" in output
    assert "field: 'sampling.top_p'" in output


@pytest.mark.skipif(shutil.which("grpcurl") is None, reason="grpcurl is not installed")
def test_grpcurl(stack: Stack) -> None:
    output = output_of("bash", "-ec", "\n".join(samples(PAGE, "sh", stack)))
    assert "923" in "".join(re.findall(r'"text": "([^"]*)"', output))
    assert '"status": "SERVING"' in output
    assert "ended by its deadline" in output
    assert re.search(r'"reason": ?"FIELD_INVALID"', output)


def test_grpcurls_requests_fit_the_contract() -> None:
    """Also where grpcurl is not installed."""
    pool = descriptor_pool.Default()
    assert executor_pb2.DESCRIPTOR.package == tokenizer_pb2.DESCRIPTOR.package == "mxgpt.v1"
    num_requests = 0
    for words in map(shlex.split, "\n".join(samples(PAGE, "sh")).replace("\\\n", " ").split("grpcurl ")[1:]):
        if "-d" not in words:
            continue
        (symbol,) = (word for word in words if word.startswith("mxgpt.v1."))
        service, _, method = symbol.partition("/")
        input_type = pool.FindServiceByName(service).methods_by_name[method].input_type
        json_format.Parse(words[words.index("-d") + 1], message_factory.GetMessageClass(input_type)())
        num_requests += 1
    assert num_requests >= 5
