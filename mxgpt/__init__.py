"""mxgpt: serves GPT models from GGUF files over gRPC. This package is its client, its CLI and its contract."""

from mxgpt.aio import AsyncClient, AsyncGeneration
from mxgpt.client import Client, Generation
from mxgpt.errors import MxgptError
from mxgpt.results import FinishReason, Output, Piece, Result, Timings, TokenLogprobs, Usage
from mxgpt.retry import RetryPolicy

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
