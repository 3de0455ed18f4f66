"""mxgpt: serves GPT models from GGUF files over gRPC. This package is its client, its CLI and its contract."""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mxgpt.aio import AsyncClient, AsyncGeneration
    from mxgpt.client import Client, Generation
    from mxgpt.errors import MxgptError
    from mxgpt.results import FinishReason, Output, Piece, Result, Timings, TokenLogprobs, Usage
    from mxgpt.retry import RetryPolicy

# Imported when first asked for: the command line, which passes through here, must not wait for gRPC (0.2 s), nor even
# for `typing`, before it can say what Ctrl-C does.
_HOMES = {
    "AsyncClient": "mxgpt.aio",
    "AsyncGeneration": "mxgpt.aio",
    "Client": "mxgpt.client",
    "FinishReason": "mxgpt.results",
    "Generation": "mxgpt.client",
    "MxgptError": "mxgpt.errors",
    "Output": "mxgpt.results",
    "Piece": "mxgpt.results",
    "Result": "mxgpt.results",
    "RetryPolicy": "mxgpt.retry",
    "Timings": "mxgpt.results",
    "TokenLogprobs": "mxgpt.results",
    "Usage": "mxgpt.results",
}

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "Client",
    "FinishReason",
    "Generation",
    "MxgptError",
    "Output",
    "Piece",
    "Result",
    "RetryPolicy",
    "Timings",
    "TokenLogprobs",
    "Usage",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
