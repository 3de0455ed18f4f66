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
from mxgpt.results import TokenLogprobs
from mxgpt.tasks import run_all
from mxgpt.v1 import tokenizer_pb2, tokenizer_pb2_grpc

NUM_AT_ONCE = 4  # passages under way


@dataclass(frozen=True)
class Window:
    """Tokens start to end of a text, of which those from first_scored on count."""

    start: int
    end: int
    first_scored: int


@dataclass(frozen=True)
class Passage:
    """Tokens to read in one go, of which those from first_scored on, at least 1, count."""

    token_ids: Sequence[int]
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
    passages = window_passages(token_ids, window, stride)
    entries = await score(client, passages, on_progress=on_progress)
    return from_logprobs([entry.logprob for entry in entries], len(token_ids), window, stride)


def window_passages(token_ids: Sequence[int], window: int, stride: int) -> list[Passage]:
    """A text of at least two tokens as the passages that its windows are."""
    parts = windows(len(token_ids), window, stride)
    return [Passage(token_ids[part.start : part.end], part.first_scored - part.start) for part in parts]


async def score(
    client: AsyncClient,
    passages: Sequence[Passage],
    num_top: int = 0,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[TokenLogprobs]:
    """The log-probabilities of every token that counts, in order.

    Args:
        num_top: how many of the likeliest tokens to name beside each.
        on_progress: called with the number of passages done and of all.
    """
    at_once = asyncio.Semaphore(NUM_AT_ONCE)
    num_done = 0

    async def score_one(passage: Passage) -> Sequence[TokenLogprobs]:
        nonlocal num_done
        async with at_once:
            result = await client.complete(
                passage.token_ids, prompt_logprobs=num_top, max_tokens=1, temperature=0, content="token_ids"
            )
        num_done += 1
        on_progress(num_done, len(passages))
        return result.prompt_logprobs[passage.first_scored - 1 :]  # entry i is of the passage's token i + 1

    scored = await run_all(score_one(passage) for passage in passages)
    return [entry for part in scored for entry in part]


async def tokenize(
    tokenizer: Connection,
    texts: Sequence[str],
    *,
    parse_special: bool = False,
    add_special: bool = True,
) -> list[list[int]]:
    """The ids of each text.

    Args:
        parse_special: read special tokens in the texts as what they name.
        add_special: add what the model wants around a text (a BOS, for instance).

    Raises:
        grpc.RpcError: when the tokenizer does not answer.
    """
    async with tokenizer.open_async() as channel:
        stub: Any = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        token_ids = []
        for text in texts:
            request = tokenizer_pb2.TokenizeRequest(text=text, parse_special=parse_special, add_special=add_special)
            token_ids.append(list((await stub.Tokenize(request, timeout=60.0, metadata=tokenizer.metadata)).token_ids))
    return token_ids
