"""What the engine is asked for and what it answers: plain values, no transport, no device.

A `Request` has been validated and tokenized before the engine sees it. The engine answers with events, each
naming its request; every request ends in one `OutputFinished` per output or in one `RequestFailed`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from shared.errors import ServiceError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the fields and their order of effect are those of mxgpt.v1.Sampling."""

    seed: int  # 0 <= seed < 2**64
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_outputs: int = 1


@dataclass(frozen=True)
class Stopping:
    """When an output ends, as far as the engine can tell: stop strings are found where the text is."""

    max_tokens: int  # resolved: at least 1, fits the context
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # the request's own
    eog_token_ids: frozenset[int] = frozenset()  # the model's, empty with ignore_eos


@dataclass(frozen=True)
class ResumedOutput:
    """What one output had sent before; `finished` outputs are not run again."""

    token_ids: tuple[int, ...] = ()
    finished: bool = False


@dataclass(frozen=True)
class Request:
    """One prompt and everything that decides what follows it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    logprobs: int | None = None  # None: none; k: the drawn id and the k best
    prompt_logprobs: int | None = None
    priority: int = 0  # higher first
    resumed: Mapping[int, ResumedOutput] = field(default_factory=dict)  # by output index


class FinishReason(enum.Enum):
    """Why the engine ended an output; the values are those of mxgpt.v1.FinishReason."""

    STOP = 1
    LENGTH = 2


@dataclass(frozen=True)
class Logprobs:
    """Natural-log probabilities at one position, of the model's own distribution."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), best first, smaller id first among equals


@dataclass(frozen=True)
class RequestStarted:
    """The request's first step has run; sent before its first token, once."""

    request_id: str
    num_cached_tokens: int  # of the prompt, found in the prefix cache
    queue_seconds: float  # from submit to its first step


@dataclass(frozen=True)
class PromptScored:
    """Log-probabilities of prompt positions start, start + 1, ... (start >= 1)."""

    request_id: str
    start: int
    logprobs: tuple[Logprobs, ...]


class TokenDrawn(NamedTuple):
    """One more token of one output. A tuple, for there are many: it is made and sent in a third of the time."""

    request_id: str
    index: int  # type: ignore[assignment]  # over tuple.index, which nobody calls
    token_id: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class OutputFinished:
    """One output has ended; nothing more comes for it.

    `matched_token_id` is the stop or end-of-generation id that ended it. It was drawn and sent as a token.
    """

    request_id: str
    index: int
    reason: FinishReason
    num_output_tokens: int  # resumed ones included
    matched_token_id: int | None = None


@dataclass(frozen=True)
class RequestFailed:
    """The whole request has ended with an error; its blocks are free."""

    request_id: str
    error: ServiceError


Event = RequestStarted | PromptScored | TokenDrawn | OutputFinished | RequestFailed
