"""Where the demo models are found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

DEMO_MODEL = "demo-gpt-oss.gguf"


def model_directories() -> list[Path]:
    """Where bundled models may lie, best first: MXGPT_MODELS, the source tree, the environment, the working one."""
    given = os.environ.get("MXGPT_MODELS")
    return [
        *([Path(given)] if given else []),
        Path(__file__).parents[1] / "models",
        Path(sys.prefix) / "share" / "mxgpt" / "models",
        Path.cwd() / "models",
    ]


def find_model(name: str = DEMO_MODEL) -> Path:
    """The path of a bundled model.

    Raises:
        FileNotFoundError: saying where it was looked for.
    """
    candidates = [directory / name for directory in model_directories()]
    for path in candidates:
        if path.is_file():
            return path
    looked = ", ".join(str(path.parent) for path in candidates)
    raise FileNotFoundError(f"the demo model {name} is in none of {looked}; name a model with --model FILE")
