"""The documentation says what the code does."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import Reason
from tests.hostile_files import hostile_files

ROOT = Path(__file__).parents[1]


def test_every_reason_is_documented_with_its_status_and_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \|$", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    assert rows == [(reason.name, reason.status.name, reason.meaning) for reason in Reason]


def test_tests_that_the_page_on_hostile_files_names_are_there() -> None:
    """Each promise of docs/hostile-files.md is held by a test; every test file that it names is followed by some."""
    page = (ROOT / "docs/hostile-files.md").read_text()
    named = set(re.findall(r"`(?:Test\w+)?(?:::)?(test_\w+)`", page)) | set(re.findall(r"`(Test\w+)", page))
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    there = set(re.findall(r"^\s*(?:async )?(?:def|class) (\w+)", sources, re.MULTILINE))
    assert len(named) > 40
    assert named <= there, named - there
    assert set(re.findall(r"\b(test_\w+\.py)", page)) <= {path.name for path in (ROOT / "tests").glob("test_*.py")}


def test_known_flaws_are_all_in_the_corpus() -> None:
    page = (ROOT / "docs/hostile-files.md").read_text()
    listed = re.findall(r"^\| ((?:CVE|llama\.cpp)[^|]+?) \|.*\| corpus[^|]*\|$", page, re.MULTILINE)
    assert set(listed) == {file.source for file in hostile_files()}


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not target.startswith(("http:", "https:", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_commands_about_security_do_what_they_say(tmp_path: Path) -> None:
    """All of them, in order, in one shell; ports are free ones, and what runs at the end is stopped."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs/security.md").read_text(), re.MULTILINE | re.DOTALL)
    script = "set -eu\ntrap 'kill $(jobs -p); wait' EXIT\n" + "echo ---\n".join(blocks)
    script = script.replace("mxgpt serve", "mxgpt serve --port 50051 --loader-port 0 --tokenizer-port 0")
    for port in ("50051", "50052", "50053"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            script = script.replace(port, str(free.getsockname()[1]))
    for name in ("models", "shared", "services", "mxgpt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    for name, arguments in (("python", ""), ("mxgpt", "-m mxgpt")):
        command = tmp_path / "bin" / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, _, served, separate, renewed = done.stdout.split("---\n")
    assert "923" in served
    assert "demo-gpt-oss" in served
    assert "923" in separate
    assert "demo-gpt-oss" in renewed
    keys = (tmp_path / "keys").read_text()
    assert (tmp_path / "alice.new").read_text().strip() in keys
    assert (tmp_path / "alice.token").read_text().strip() not in keys
