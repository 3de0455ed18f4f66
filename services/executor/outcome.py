"""What the logits of a step say: a token drawn for each sequence that draws, scores of prompt tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.executor.request import Logprobs
from services.executor.sampling import draw_tokens, score
from services.executor.scheduler import Plan, Share


@dataclass(frozen=True)
class Outcome:
    """What one sequence's rows of logits gave."""

    share: Share
    token_id: int | None  # None: it does not draw in this step, or its row is not finite
    logprobs: Logprobs | None  # of the token drawn, where asked for
    scores: tuple[Logprobs, ...]  # of the prompt tokens that follow its scored rows
    is_sound: bool  # all its rows were finite


def read_logits(plan: Plan, logits: NDArray[np.float32]) -> list[Outcome]:
    """Draw and score what a step's logits (num_logits, vocab_size) say, in the order of its shares."""
    drawing = [share for share in plan.shares if share.draws]
    if not drawing:
        return [_outcome(share, logits, None) for share in plan.shares]
    rows = logits
    if len(drawing) < len(logits):
        rows = logits[[_draw_row(share) for share in drawing]]
    token_ids = iter(draw_tokens(rows, [share.sequence.sampler for share in drawing]))
    return [_outcome(share, logits, next(token_ids) if share.draws else None) for share in plan.shares]


def _outcome(share: Share, logits: NDArray[np.float32], token_id: int | None) -> Outcome:
    num_top = share.sequence.active.request.logprobs
    logprobs: Logprobs | None = None
    if token_id is not None and num_top is not None:
        logprobs = score(logits[_draw_row(share)], token_id, num_top)
    scores = _prompt_scores(share, logits) if share.num_scored_rows else ()
    is_sound = len(scores) == share.num_scored_rows and (token_id is not None or not share.draws)
    return Outcome(share, token_id, logprobs, scores, is_sound)


def _draw_row(share: Share) -> int:
    return share.logits_start + share.num_scored_rows


def _prompt_scores(share: Share, logits: NDArray[np.float32]) -> tuple[Logprobs, ...]:
    """Scores of the prompt tokens that follow the share's scored rows, up to the first that is not finite."""
    active = share.sequence.active
    assert active.request.prompt_logprobs is not None
    scores: list[Logprobs] = []
    for row in range(share.num_scored_rows):
        token_id = active.request.prompt_token_ids[active.num_scored_rows + row + 1]
        logprobs = score(logits[share.logits_start + row], token_id, active.request.prompt_logprobs)
        if logprobs is None:
            break
        scores.append(logprobs)
    return tuple(scores)
