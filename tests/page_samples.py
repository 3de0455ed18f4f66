"""The samples of the documentation's pages, as tests run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.stack import ROOT, Stack, free_ports


def samples(page: str, language: str, stack: Stack | None = None) -> list[str]:
    """A page's samples in a language, with the addresses of a stack where one is given."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    if stack is None:
        return found
    addresses = {"localhost:50051": stack.executor.address, "localhost:50052": stack.tokenizer.address}
    return [re.sub(r"localhost:\d+", lambda match: addresses[match[0]], sample) for sample in found]


def run_commands(blocks: Sequence[str], directory: Path) -> list[str]:
    """What blocks of commands wrote to stdout, in order in one shell; they must end well.

    The directory has what a checkout has; ports are free ones, and what runs at the end is stopped.
    """
    script = "set -eu\ntrap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT\n" + "echo ---\n".join(blocks)
    script = script.replace("mxgpt serve", "mxgpt serve --port 50051 --loader-port 0 --tokenizer-port 0")
    executor = ""
    for port, number in zip(("50051", "50052", "50053"), free_ports(3), strict=True):
        script = script.replace(port, str(number))
        executor = executor or f"localhost:{number}"
    for name in ("models", "shared", "services", "mxgpt"):
        (directory / name).symlink_to(ROOT / name)
    (directory / "bin").mkdir()
    for name, arguments in (("python", ""), ("mxgpt", "-m mxgpt")):
        command = directory / "bin" / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        command.chmod(0o755)
    # Commands that name no server mean the one started here, as they would mean the default port.
    environment = {**os.environ, "PATH": f"{directory}/bin:{os.environ['PATH']}", "MXGPT_SERVER": executor}
    done = subprocess.run(
        ["bash", "-c", script], cwd=directory, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("---\n")
