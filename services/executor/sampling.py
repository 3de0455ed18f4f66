"""From logits to token ids: bias, penalties, temperature, cuts, one draw; and log-probabilities.

A token depends on its own row of logits, its output's past, and (seed, output index, token index): on nothing
else in the batch. Rows that are greedy share one argmax, which compares and never adds; every other row is
computed by itself in float64, in an order of additions that its vocabulary alone decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from services.executor.philox import uniform
from services.executor.request import Logprobs, Sampling, Stopping

Values = NDArray[np.float64]
Ids = NDArray[np.intp]


def draw_tokens(logits: NDArray[np.float32], outputs: Sequence[OutputSampler]) -> list[int | None]:
    """The next token of each output; None where the model's logits are not finite enough to draw from.

    A row must hold no NaN and no +inf, and at least one finite value; -inf marks an id never drawn.

    Args:
        logits: (num_outputs, vocab_size).
        outputs: the sampler of each row, having observed every token before this one.
    """
    best = logits.argmax(axis=1)  # the smallest id among equals; a NaN counts as the largest
    largest = logits[np.arange(len(outputs)), best]
    token_ids: list[int | None] = best.tolist()
    for row, (output, is_finite) in enumerate(zip(outputs, np.isfinite(largest).tolist(), strict=True)):
        if not is_finite:
            token_ids[row] = None
        elif not output.takes_argmax:
            token_ids[row] = output.draw(logits[row])
    return token_ids


def score(logits: NDArray[np.float32], token_id: int, num_top: int) -> Logprobs | None:
    """Log-probabilities under the model's own distribution; None where the logits are not finite.

    Args:
        logits: (vocab_size,), as the model gave them.
        token_id: the id drawn or given.
        num_top: how many of the most likely ids to list.
    """
    largest = float(logits.max())
    if not np.isfinite(largest):
        return None
    shifted = logits.astype(np.float64)
    shifted -= largest
    log_sum = float(np.log(np.exp(shifted).sum()))
    top_ids = _largest(logits, num_top)
    order = np.argsort(-shifted[top_ids], kind="stable")
    top = [(int(top_id), float(shifted[top_id]) - log_sum) for top_id in top_ids[order]]
    return Logprobs(token_id, float(shifted[token_id]) - log_sum, tuple(top))


class OutputSampler:
    """Draws the tokens of one output; it remembers what penalties and the token index need.

    Args:
        sampling, stopping: of the request.
        index: which output of the request.
        vocab_size: length of a row of logits.
        prompt_token_ids: what the repetition penalty counts as seen from the start.
    """

    def __init__(
        self, sampling: Sampling, stopping: Stopping, index: int, vocab_size: int, prompt_token_ids: Iterable[int]
    ) -> None:
        self.num_tokens = 0  # observed so far: the index of the token to draw next
        self.sampling = sampling
        self.index = index
        self.min_tokens = stopping.min_tokens
        stop_ids = stopping.stop_token_ids | stopping.eog_token_ids
        self.stop_ids = np.array(sorted(id_ for id_ in stop_ids if id_ < vocab_size), np.intp)
        self.bias_ids = np.array(list(sampling.logit_bias.keys()), np.intp)
        self.biases = np.array(list(sampling.logit_bias.values()), np.float64)
        self.seen = SeenIds(prompt_token_ids) if _has_penalties(sampling) else None
        self.is_plain_greedy = sampling.temperature == 0 and not sampling.logit_bias and self.seen is None

    @property
    def takes_argmax(self) -> bool:
        """Whether the next token is simply the best of the model's logits."""
        return self.is_plain_greedy and not self._masks_stops

    def observe(self, token_id: int) -> None:
        """Count a token of the output, drawn or resumed."""
        self.num_tokens += 1
        if self.seen is not None:
            self.seen.count(token_id)

    def draw(self, logits: NDArray[np.float32]) -> int:
        """The next token for a row of logits (vocab_size,) whose largest value is finite."""
        values = self._adjusted(logits)
        if self.sampling.temperature == 0:
            return int(values.argmax())
        ids, weights = self._cut(values)
        cumulative = weights.cumsum()
        # The best weight is 1, so the sum is at least 1, and u <= 1 - 2**-53 keeps the product below it.
        target = uniform(self.sampling.seed, self.index, self.num_tokens) * cumulative[-1]
        drawn = int(cumulative.searchsorted(target, side="right"))
        return drawn if ids is None else int(ids[drawn])

    @property
    def _masks_stops(self) -> bool:
        return self.num_tokens < self.min_tokens and len(self.stop_ids) > 0

    def _adjusted(self, logits: NDArray[np.float32]) -> Values:
        """Logits after bias, penalties and the mask of min_tokens, (vocab_size,)."""
        values = logits.astype(np.float64)
        if len(self.bias_ids):
            values[self.bias_ids] += self.biases
        if self.seen is not None:
            self._penalise(values, self.seen)
        if self._masks_stops:
            unmasked = values[self.stop_ids]
            values[self.stop_ids] = -np.inf
            if values.max() == -np.inf:  # nothing else is left to draw: the mask yields
                values[self.stop_ids] = unmasked
        return values

    def _penalise(self, values: Values, seen: SeenIds) -> None:
        sampling = self.sampling
        ids, counts = seen.ids, seen.counts
        penalised = values[ids]
        if sampling.repetition_penalty != 1:
            factor = sampling.repetition_penalty
            penalised = np.where(penalised > 0, penalised / factor, penalised * factor)
        penalised = penalised - sampling.presence_penalty * (counts > 0)
        values[ids] = penalised - sampling.frequency_penalty * counts

    def _cut(self, values: Values) -> tuple[Ids | None, Values]:
        """The ids that may be drawn, ascending (None: all), and their weights; the largest weight is 1."""
        sampling = self.sampling
        ids: Ids | None = None
        if 0 < sampling.top_k < len(values):
            ids = _largest(values, sampling.top_k)
            values = values[ids]
        values -= values.max()
        with np.errstate(over="ignore"):  # a tiny temperature turns all but the best into -inf
            values /= sampling.temperature
        weights: Values = np.exp(values, out=values)
        if sampling.top_p < 1:
            kept = _nucleus(weights, sampling.top_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        if sampling.min_p > 0:
            (kept,) = (weights >= sampling.min_p).nonzero()
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        return ids, weights


class SeenIds:
    """The distinct ids of prompt and output, and how often each came in the output."""

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        distinct = dict.fromkeys(prompt_token_ids)
        self._places = {token_id: place for place, token_id in enumerate(distinct)}
        self._ids = np.array(list(distinct), np.intp)
        self._counts = np.zeros(len(distinct), np.int64)

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.int64]:
        return self._counts[: len(self._places)]

    def count(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty(place + 16, np.intp)))
            self._counts = np.concatenate((self._counts, np.zeros(place + 16, np.int64)))
        self._ids[place] = token_id
        self._counts[place] += 1


def _has_penalties(sampling: Sampling) -> bool:
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0)


def _largest(values: NDArray[np.floating], count: int) -> Ids:
    """Where the `count` largest values stand, ascending; among equals the first ones."""
    if count >= len(values):
        return np.arange(len(values))
    if count == 0:
        return np.empty(0, np.intp)
    rank = len(values) - count
    threshold = np.partition(values, rank)[rank]
    (above,) = (values > threshold).nonzero()
    equal = (values == threshold).nonzero()[0][: count - len(above)]
    return np.sort(np.concatenate((above, equal)))


def _nucleus(weights: Values, top_p: float) -> Ids:
    """Where the smallest set of largest weights that reaches `top_p` of their sum stands, ascending.

    Weights are taken in descending order, equals in ascending order of id, until their running sum is at least
    top_p times the sum of all (taken in ascending order of id); the one that reaches it is kept.
    """
    total = weights.cumsum()[-1]
    # All weights below this one together stay below (1 - top_p) of the total, so that the set is reached without
    # them, and far fewer need sorting. The best weight is 1: the bound keeps it whatever rounding does.
    (candidates,) = (weights >= min(1.0, (1 - top_p) * total / len(weights))).nonzero()
    order = candidates[(-weights[candidates]).argsort(kind="stable")]
    num_kept = int(weights[order].cumsum().searchsorted(top_p * total, side="left")) + 1
    return np.sort(order[:num_kept])
