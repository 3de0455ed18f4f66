"""Build hook: generate ``mxgpt/v1`` from ``protos/`` whenever the package is built or installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from generate_protos import generate  # noqa: E402


class GenerateProtos(BuildHookInterface):
    """Run ``protoc`` before the files of an editable install, a wheel or an sdist are collected."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate(ROOT)
