"""Deployment: what images install is what the package asks for, and the compose file runs for real."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from typing import Any

import pytest
import yaml

from deploy.rehearse import engine_missing
from shared.config import ServerConfig
from tests.stack import ROOT

BASE_IMAGE = os.environ.get("MXGPT_BASE_IMAGE", "python:3.11-slim-bookworm")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMAND_LINE_ONLY = {"rich"}  # what no service needs
OF_A_GPU = ("loader-cuda", "executor-cuda")
COMMANDS = (["docker-compose"], ["docker", "compose"])  # 1.29 as a rule, and v2


def requirements(group: str) -> set[str]:
    found: set[str] = set()
    for entry in PROJECT["dependency-groups"][group]:
        found |= requirements(entry["include-group"]) if isinstance(entry, dict) else {entry}
    return found


def name_of(requirement: str) -> str:
    return re.split(r"[<>=~!]", requirement)[0]


def test_images_install_what_the_package_asks_for() -> None:
    together = set().union(*(requirements(group) for group in ("loader", "tokenizer", "executor")))
    expected = {each for each in PROJECT["project"]["dependencies"] if name_of(each) not in COMMAND_LINE_ONLY}
    assert together == expected | set(PROJECT["project"]["optional-dependencies"]["otel"])


@pytest.mark.parametrize("service", ["loader", "tokenizer", "executor"])
def test_a_service_imports_only_what_its_image_has(service: str) -> None:
    every = {name_of(each) for each in PROJECT["project"]["dependencies"]}
    absent = sorted(every - {name_of(each) for each in requirements(service)})
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import services.{service}.main, shared.health"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_images_for_a_gpu_add_what_the_extra_asks_for_and_a_compiler() -> None:
    added = requirements("executor-cuda") - requirements("executor")
    assert added == set(PROJECT["project"]["optional-dependencies"]["cuda"]) | requirements("nvrtc")
    without = {each for each in added if name_of(each) != "pycuda"}
    assert requirements("loader-cuda") - requirements("loader") == without


@pytest.fixture(params=COMMANDS, ids=" ".join)
def compose(request: pytest.FixtureRequest) -> list[str]:
    """A command that reads compose files; no engine is needed for that."""
    command: list[str] = request.param
    found = shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True, check=False)
    if not found or found.returncode != 0:
        pytest.skip(f"the compose file was not read by {' '.join(command)}: it is not installed")
    return command


def services_of(compose: list[str], *profiles: str) -> dict[str, Any]:
    options = [part for profile in profiles for part in ("--profile", profile)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MXGPT_", "COMPOSE_"))}
    command = [*compose, *options, "config"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = yaml.safe_load(result.stdout)["services"]
    return found


def test_compose_accepts_the_file_with_every_profile(compose: list[str]) -> None:
    services = services_of(compose, "cuda", "watch")
    assert {name for name, each in services.items() if not each.get("profiles")} == {
        "loader", "tokenizer", "executor", "gateway"
    }  # fmt: skip
    for name in OF_A_GPU:
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["device_ids"], device["capabilities"]) == ("nvidia", ["0"], ["gpu"])


def test_services_are_confined_and_may_drain() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    ours = {name: each for name, each in services.items() if each.get("profiles") != ["watch"]}
    assert len(ours) == 8
    for each in ours.values():
        assert each["read_only"]
        assert each["cap_drop"] == ["ALL"]
        assert int(each["stop_grace_period"].removesuffix("s")) > ServerConfig(listen="127.0.0.1:0").drain_seconds


def test_a_loader_and_executors_of_a_gpu_share_sockets_and_kernels() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    shared = {"sockets:/run/mxgpt", "cubins:/var/cache/mxgpt"}
    for name in OF_A_GPU:
        assert shared <= set(services[name]["volumes"])
        assert services[name]["deploy"] == services["loader-cuda"]["deploy"]


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
