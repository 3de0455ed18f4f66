"""How well a model predicts a text, from the log-probabilities that a server gives of its tokens.

A text longer than the context is read in windows. Each is `stride` tokens further than the one before and scores
only the tokens that no earlier one did, so that a token is seen with at least window - stride tokens before it
(but for those of the first window, whose first token nothing precedes and nothing scores).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mxgpt.aio import AsyncClient
from mxgpt.connection import Connection
from mxgpt.tasks import run_all
from mxgpt.v1 import tokenizer_pb2, tokenizer_pb2_grpc

NUM_AT_ONCE = 4  # windows under way


@dataclass(frozen=True)
class Window:
    """Tokens start to end of a text, of which those from first_scored on count."""

    start: int
    end: int
    first_scored: int


@dataclass(frozen=True)
class Perplexity:
    """What was measured, and how."""

    num_tokens: int  # of the text
    num_scored: int
    window: int
    stride: int
    mean: float  # negative log-likelihood of a token, in nats
    standard_error: float  # of the mean

    @property
    def value(self) -> float:
        return math.exp(self.mean)

    @property
    def margin(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.value * self.standard_error


def windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """The windows of a text; together they score every token but the first, each once."""
    assert 1 <= stride <= window - 1, "every token scored needs one before it in its window"
    found = [Window(0, min(window, num_tokens), 1)]
    while found[-1].end < num_tokens:
        end = min(found[-1].end + stride, num_tokens)
        found.append(Window(end - window, end, found[-1].end))
    return found


def from_logprobs(logprobs: Sequence[float], num_tokens: int, window: int, stride: int) -> Perplexity:
    """The perplexity of tokens with these natural-log probabilities."""
    count = len(logprobs)
    mean = -math.fsum(logprobs) / count
    variance = math.fsum((-logprob - mean) ** 2 for logprob in logprobs) / max(count - 1, 1)
    return Perplexity(num_tokens, count, window, stride, mean, math.sqrt(variance / count))


async def measure(
    client: AsyncClient,
    token_ids: Sequence[int],
    window: int,
    stride: int,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Perplexity:
    """Score a text of at least two tokens.

    Args:
        window: tokens of a window, one less than the server's context at most: a token is drawn after each.
        on_progress: called with the number of windows done and of all.
    """
    todo = windows(len(token_ids), window, stride)
    at_once = asyncio.Semaphore(NUM_AT_ONCE)
    num_done = 0

    async def score(part: Window) -> list[float]:
        nonlocal num_done
        async with at_once:
            ids = token_ids[part.start : part.end]
            result = await client.complete(ids, prompt_logprobs=0, max_tokens=1, temperature=0, content="token_ids")
        num_done += 1
        on_progress(num_done, len(todo))
        # Entry i is of the window's token i + 1.
        return [entry.logprob for entry in result.prompt_logprobs[part.first_scored - part.start - 1 :]]

    scored = await run_all(score(part) for part in todo)
    logprobs = [logprob for part in scored for logprob in part]
    return from_logprobs(logprobs, len(token_ids), window, stride)


async def tokenize(tokenizer: Connection, text: str) -> list[int]:
    """The ids of a text, with what the model wants around one (a BOS, for instance).

    Raises:
        grpc.RpcError: when the tokenizer does not answer.
    """
    async with tokenizer.open_async() as channel:
        stub: Any = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        request = tokenizer_pb2.TokenizeRequest(text=text, add_special=True)
        response = await stub.Tokenize(request, timeout=60.0, metadata=tokenizer.metadata)
    return list(response.token_ids)
