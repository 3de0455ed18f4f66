"""The models, by the `general.architecture` of their files. A new architecture is a new file, named here."""

from __future__ import annotations

from collections.abc import Callable

from services.executor.models.gpt2 import GPT2
from services.executor.models.gpt_oss import GPTOSS
from services.executor.ops import Model, Ops
from services.executor.weights import Weights

MODELS: dict[str, Callable[[Weights, Ops], Model]] = {"gpt2": GPT2, "gpt-oss": GPTOSS}


def build_model(weights: Weights, ops: Ops) -> Model:
    """The model of these weights; `GPTConfig` has refused architectures that are not in `MODELS`."""
    return MODELS[weights.config.architecture](weights, ops)
