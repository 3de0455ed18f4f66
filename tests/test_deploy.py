"""Deployment: what images install is what the package asks for, and the compose file runs for real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

import pytest

from deploy.rehearse import engine_missing
from tests.stack import ROOT

BASE_IMAGE = os.environ.get("MXGPT_BASE_IMAGE", "python:3.11-slim-bookworm")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMAND_LINE_ONLY = {"rich"}  # what no service needs


def requirements(group: str) -> set[str]:
    found: set[str] = set()
    for entry in PROJECT["dependency-groups"][group]:
        found |= requirements(entry["include-group"]) if isinstance(entry, dict) else {entry}
    return found


def name_of(requirement: str) -> str:
    return re.split(r"[<>=~!]", requirement)[0]


def test_images_install_what_the_package_asks_for() -> None:
    together = set().union(*(requirements(group) for group in ("loader", "tokenizer", "executor")))
    expected = set(PROJECT["project"]["dependencies"])
    assert together == {each for each in expected if name_of(each) not in COMMAND_LINE_ONLY}


@pytest.mark.parametrize("service", ["loader", "tokenizer", "executor"])
def test_a_service_imports_only_what_its_image_has(service: str) -> None:
    every = {name_of(each) for each in PROJECT["project"]["dependencies"]}
    absent = sorted(every - {name_of(each) for each in requirements(service)})
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import services.{service}.main, shared.health"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compose_for_real() -> None:
    why = engine_missing()
    if not why and docker("image", "inspect", BASE_IMAGE).returncode != 0:
        pull = docker("pull", BASE_IMAGE)
        why = f"{BASE_IMAGE} can't be pulled: {pull.stderr.strip():.200}" if pull.returncode != 0 else ""
    if why:
        pytest.skip(f"the compose file was not run: {why}")
    command = [sys.executable, "-m", "deploy.rehearse", "--base-image", BASE_IMAGE, "--network", "host"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
