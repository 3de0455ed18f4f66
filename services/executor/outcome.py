"""What a step's result says: the token of each sequence that draws, log-probabilities of it and of prompt tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.executor.plan import Plan, Share
from services.executor.request import Logprobs
from services.executor.sampling import score
from services.executor.step import StepResult


class Outcome(NamedTuple):
    """What one sequence's rows of logits gave."""

    share: Share
    token_id: int | None  # None: it does not draw in this step, or its row is not finite
    logprobs: Logprobs | None  # of the token drawn, where asked for
    scores: tuple[Logprobs, ...]  # of the prompt tokens that follow its scored rows
    is_sound: bool  # all its rows were finite


def read_result(plan: Plan, result: StepResult) -> list[Outcome]:
    """What a step gave to each of its shares, in their order."""
    token_ids = iter(result.token_ids)
    return [_outcome(share, result.logits, next(token_ids) if share.draws else None) for share in plan.shares]


def _outcome(share: Share, logits: NDArray[np.float32], token_id: int | None) -> Outcome:
    is_drawn = token_id is not None or not share.draws
    if not share.num_wanted:
        return Outcome(share, token_id, None, (), is_drawn)
    request = share.sequence.active.request
    logprobs: Logprobs | None = None
    if token_id is not None and request.logprobs is not None:
        logprobs = score(logits[share.first_wanted + share.num_scored_rows], token_id, request.logprobs)
    scores = _prompt_scores(share, logits) if share.num_scored_rows else ()
    return Outcome(share, token_id, logprobs, scores, is_drawn and len(scores) == share.num_scored_rows)


def _prompt_scores(share: Share, logits: NDArray[np.float32]) -> tuple[Logprobs, ...]:
    """Scores of the prompt tokens that follow the share's scored rows, up to the first that is not finite."""
    request = share.sequence.active.request
    assert request.prompt_logprobs is not None
    scores: list[Logprobs] = []
    for row in range(share.num_scored_rows):
        token_id = request.prompt_token_ids[share.first_scored + row + 1]
        logprobs = score(logits[share.first_wanted + row], token_id, request.prompt_logprobs)
        if logprobs is None:
            break
        scores.append(logprobs)
    return tuple(scores)
