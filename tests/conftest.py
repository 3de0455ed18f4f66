"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from services.executor.blas import blas_environment

# Before numpy comes in: the tests already run on every core, and threads of BLAS that wait for one another are slow.
os.environ.update(blas_environment(1, os.environ))

from tests.stack import ROOT, Stack, running

# Whatever runs in the background of a shell ignores Ctrl-C, and so would the processes that are started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes is up to what else the machine does.
hypothesis.settings.register_profile("mxgpt", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("mxgpt")


@pytest.fixture(scope="session")
def demo_gpt_oss() -> Path:
    return ROOT / "models" / "demo-gpt-oss.gguf"


@pytest.fixture(scope="session")
def demo_gpt2() -> Path:
    return ROOT / "models" / "demo-gpt2.gguf"


@pytest.fixture(scope="session")
def stack(demo_gpt_oss: Path) -> Iterator[Stack]:
    """All three services over the gpt-oss demo model, shared by the tests that leave it as they found it."""
    with running(demo_gpt_oss) as made:
        yield made
