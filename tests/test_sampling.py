"""Sampling against distributions written out by hand: order of effects, ties, edges, independence of rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from services.executor.philox import uniform
from services.executor.request import Logprobs, Sampling, Stopping
from services.executor.sampling import OutputSampler, draw_tokens, score

INF = math.inf


def make_sampler(vocab_size=8, index=0, prompt=(), output=(), stopping=None, **sampling):
    sampler = OutputSampler(
        Sampling(**{"seed": 5, **sampling}), Stopping(max_tokens=100, **(stopping or {})), index, vocab_size, prompt
    )
    for token_id in output:
        sampler.observe(token_id)
    return sampler


def row(*values):
    return np.array(values, np.float32)


def draw(logits, **kwargs):
    (token_id,) = draw_tokens(logits[None], [make_sampler(len(logits), **kwargs)])
    return token_id


def drawn_ids(logits, num_draws=400, **kwargs):
    """Every id that comes up over many seeds."""
    return {draw(logits, seed=seed, **kwargs) for seed in range(num_draws)}


def by_hand(logits, kept, seed, index=0, token_index=0, temperature=1.0):
    """The inverse of the cumulative distribution over `kept` ids, one id after the other."""
    best = max(float(logits[i]) for i in kept)
    weights = {i: math.exp((float(logits[i]) - best) / temperature) for i in sorted(kept)}
    target = uniform(seed, index, token_index) * sum(weights.values())
    running = 0.0
    for i, weight in weights.items():
        running += weight
        if running > target:
            return i
    raise AssertionError("the draw fell off the end")


# Greedy.


def test_greedy_takes_the_smallest_id_among_equals():
    assert draw(row(1, 3, 3, 2), temperature=0.0) == 1
    assert draw(row(1, 3, 3, 2), temperature=0.0, logit_bias={0: 2.0}) == 0


def test_greedy_with_bias_goes_the_adjusted_way():
    assert draw(row(1, 2, 3), temperature=0.0, logit_bias={0: 2.5}) == 0


# Bias and penalties.


def test_repetition_divides_positive_and_multiplies_negative_logits_of_prompt_and_output():
    logits = row(2.0, 1.5, -1.0, -1.5)
    assert draw(logits, temperature=0.0, repetition_penalty=2.0, prompt=[0]) == 1
    assert draw(logits, temperature=0.0, repetition_penalty=2.0, prompt=[0], output=[1]) == 0
    assert draw(row(-1.0, -1.5), temperature=0.0, repetition_penalty=2.0, prompt=[0]) == 1
    assert draw(row(-1.0, -2.5), temperature=0.0, repetition_penalty=2.0, prompt=[0]) == 0
    assert draw(row(1.0, 0.5, 0.8), temperature=0.0, repetition_penalty=0.5, prompt=[1, 1, 1]) == 0  # a tie, once only


def test_presence_counts_the_output_alone_and_once():
    logits = row(2.0, 1.5)
    assert draw(logits, temperature=0.0, presence_penalty=0.6, prompt=[0, 0]) == 0
    assert draw(logits, temperature=0.0, presence_penalty=0.6, output=[0]) == 1
    assert draw(logits, temperature=0.0, presence_penalty=0.4, output=[0, 0, 0]) == 0


def test_frequency_counts_every_time_in_the_output():
    logits = row(2.0, 1.5)
    assert draw(logits, temperature=0.0, frequency_penalty=0.2, prompt=[0] * 9, output=[0, 0]) == 0
    assert draw(logits, temperature=0.0, frequency_penalty=0.2, output=[0, 0, 0]) == 1


def test_bias_comes_before_penalties():
    # -1 + 2 = 1, which is positive, so it is divided: 0.5. The other way round it would be -2 + 2 = 0.
    assert draw(row(-1.0, 0.25), temperature=0.0, logit_bias={0: 2.0}, repetition_penalty=2.0, prompt=[0]) == 0


def test_negative_penalties_reward():
    assert draw(row(1.0, 1.5), temperature=0.0, presence_penalty=-1.0, output=[0]) == 0


def test_penalties_remember_more_ids_than_they_began_with():
    """Many distinct ids, checked against a plain count."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(300).astype(np.float32) * 3
    output = rng.integers(0, 300, 500).tolist()
    counts = np.bincount(output, minlength=300)
    wanted = logits.astype(np.float64) - 0.3 * (counts > 0) - 0.2 * counts
    got = draw(logits, temperature=0.0, presence_penalty=0.3, frequency_penalty=0.2, output=output, prompt=[1, 2])
    assert got == int(wanted.argmax())


# Temperature and the draw.


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_draw_is_the_inverse_of_the_cumulative_distribution(temperature):
    rng = np.random.default_rng(1)
    for seed in range(100):
        logits = rng.standard_normal(50).astype(np.float32) * 2
        got = draw(logits, seed=seed, index=3, output=[0] * 4, temperature=temperature)
        assert got == by_hand(logits, range(50), seed, 3, 4, temperature)


def test_a_draw_on_the_border_takes_the_id_above_it(monkeypatch):
    monkeypatch.setattr("services.executor.sampling.uniform", lambda seed, index, token: 0.0)
    assert draw(row(-INF, -INF, 0, 0)) == 2
    monkeypatch.setattr("services.executor.sampling.uniform", lambda seed, index, token: 0.5)
    assert draw(row(0, -INF, 0)) == 2
    monkeypatch.setattr("services.executor.sampling.uniform", lambda seed, index, token: 1 - 2.0**-53)
    assert draw(row(0, 0, 0, -INF)) == 2


def test_frequencies_follow_the_distribution():
    logits = np.log(row(0.1, 0.2, 0.3, 0.4))
    counts = np.bincount([draw(logits, seed=seed) for seed in range(4000)], minlength=4)
    assert abs(counts / 4000 - [0.1, 0.2, 0.3, 0.4]).max() < 0.03  # four standard deviations


@pytest.mark.parametrize("temperature", [1e-45, 5e-324, 1e-10])
def test_a_tiny_temperature_is_greedy_and_warns_of_nothing(temperature):
    with np.errstate(all="raise", under="ignore"):
        assert drawn_ids(row(1, 3, -INF, 2.9), 20, temperature=temperature) == {1}


def test_an_id_at_minus_infinity_is_never_drawn():
    assert drawn_ids(row(-INF, 0, -INF, 0, -INF)) == {1, 3}
    assert drawn_ids(row(-INF, 0, -INF, 0, -INF), top_k=4) == {1, 3}
    assert drawn_ids(row(-INF, 0, -INF, 0, -INF), logit_bias={0: 100.0}) == {1, 3}


def test_extreme_bias_leaves_something_to_draw():
    assert drawn_ids(row(3e38, -3e38, 0), 20, logit_bias={0: 100.0}, temperature=0.01) == {0}


# Cuts.


def test_top_k_keeps_the_smaller_ids_among_equals():
    assert drawn_ids(row(1, 2, 1, 2, 2, 1), top_k=2) == {1, 3}
    assert drawn_ids(row(1, 2, 1, 2, 2, 1), top_k=4) == {0, 1, 3, 4}
    assert drawn_ids(row(1, 2, 1, 2, 2, 1), top_k=99) == {0, 1, 2, 3, 4, 5}


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = np.log(row(0.125, 0.5, 0.25, 0.125))
    assert drawn_ids(logits, top_p=1e-9) == {1}
    assert drawn_ids(logits, top_p=0.45) == {1}
    assert drawn_ids(logits, top_p=0.51) == {1, 2}
    assert drawn_ids(logits, top_p=0.8) == {0, 1, 2}  # of the equals 0 and 3 the smaller
    assert drawn_ids(logits, top_p=0.9) == {0, 1, 2, 3}


def test_top_p_that_is_reached_exactly_takes_no_more():
    assert drawn_ids(row(0, 0, 0, 0), top_p=0.5) == {0, 1}
    assert drawn_ids(row(0, 0, 0, 0), top_p=0.500001) == {0, 1, 2}


def test_top_p_is_of_what_top_k_left():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)
    # Of the two kept, 0.4 / 0.7 = 0.57; of all, 0.4.
    assert drawn_ids(logits, top_k=2, top_p=0.55) == {0}
    assert drawn_ids(logits, top_p=0.55) == {0, 1}


def test_min_p_is_relative_to_the_best():
    logits = np.log(np.array([0.4, 0.21, 0.19, 0.2])).astype(np.float32)
    assert drawn_ids(logits, min_p=0.49) == {0, 1, 3}
    assert drawn_ids(row(1, 1, 0.99), min_p=1.0) == {0, 1}


def test_min_p_sees_the_temperature():
    logits = row(0, -1)
    assert drawn_ids(logits, min_p=0.5) == {0}
    assert drawn_ids(logits, min_p=0.5, temperature=2.0) == {0, 1}


@pytest.mark.parametrize("vocab_size", [2, 50, 3000])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 8.0])
def test_cuts_agree_with_a_plain_sort(vocab_size, spread):
    """Every cut written the obvious way, over peaked and flat rows, with ties."""
    rng = np.random.default_rng(vocab_size)
    for seed in range(20):
        logits = np.round(rng.standard_normal(vocab_size) * spread, 2).astype(np.float32)
        top_k = int(rng.integers(0, vocab_size + 2))
        top_p, min_p = float(rng.choice([1.0, 0.999999, 0.95, 0.3])), float(rng.choice([0.0, 0.05]))
        order = sorted(range(vocab_size), key=lambda i, logits=logits: (-logits[i], i))
        kept = order[:top_k] if top_k else order
        best = float(logits[order[0]])
        weights = np.exp(logits.astype(np.float64) - best)
        if top_p < 1:
            total = weights[sorted(kept)].cumsum()[-1]
            running = weights[kept].cumsum()
            kept = kept[: int((running < top_p * total).sum()) + 1]
        kept = [i for i in kept if weights[i] >= min_p]
        wanted = by_hand(logits, kept, seed)
        assert draw(logits, seed=seed, top_k=top_k, top_p=top_p, min_p=min_p) == wanted


# min_tokens.


def test_stops_are_not_drawn_before_min_tokens():
    logits = row(0, 5, 4)
    stopping = {"min_tokens": 2, "stop_token_ids": frozenset({1}), "eog_token_ids": frozenset({2, 900})}
    for num_before, best in ((0, 0), (1, 0), (2, 1)):
        assert draw(logits, temperature=0.0, stopping=stopping, output=[0] * num_before) == best
        assert (1 in drawn_ids(logits, 50, stopping=stopping, output=[0] * num_before)) == (num_before == 2)


def test_the_mask_yields_where_nothing_else_is_left():
    stopping = {"min_tokens": 2, "stop_token_ids": frozenset({0, 2})}
    assert draw(row(1, -INF, 2), temperature=0.0, stopping=stopping) == 2


# Rows.


@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 2}])
def test_logits_that_are_not_finite_give_no_token(value, sampling):
    sound = row(1, 2, 3)
    samplers = [make_sampler(3, **sampling) for _ in range(3)]
    got = draw_tokens(np.stack([sound, row(1, value, 3), sound]), samplers)
    assert got[1] is None
    assert got[0] == got[2] == draw(sound, **sampling)


def test_a_row_of_minus_infinity_gives_no_token():
    assert draw(row(-INF, -INF), temperature=0.0) is None
    assert draw(row(-INF, -INF)) is None


def test_a_row_does_not_depend_on_the_others():
    rng = np.random.default_rng(2)
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 20},
        {"top_p": 0.9},
        {"temperature": 0.7, "top_p": 0.95, "min_p": 0.02},
        {"temperature": 0.0, "repetition_penalty": 1.3},
    ]
    logits = (rng.standard_normal((48, 1001)) * 2).astype(np.float32)
    settings = [{**kinds[number % 6], "seed": number, "index": number % 3, "prompt": [1, 2]} for number in range(48)]
    alone = [draw(logits[number], **setting) for number, setting in enumerate(settings)]
    for order in (range(48), rng.permutation(48), range(7, 20)):
        samplers = [make_sampler(1001, **settings[number]) for number in order]
        assert draw_tokens(logits[list(order)], samplers) == [alone[number] for number in order]


def test_outputs_and_seeds_draw_differently():
    logits = np.zeros(1000, np.float32)
    draws = {draw(logits, seed=seed, index=index) for seed in range(4) for index in range(4)}
    assert len(draws) > 12


def test_a_padded_row_is_drawn_as_a_plain_one():
    """Logits may be columns of a wider matrix."""
    wide = np.random.default_rng(4).standard_normal((3, 64)).astype(np.float32)
    samplers = [make_sampler(50, seed=number, temperature=float(number)) for number in range(3)]
    assert draw_tokens(wide[:, :50], samplers) == draw_tokens(wide[:, :50].copy(), samplers)


# Log-probabilities.


def test_logprobs_are_of_the_raw_distribution():
    logits = row(1, 3, -2, 3, -INF)
    total = math.log(math.e + 2 * math.e**3 + math.e**-2)
    logprobs = score(logits, 0, 3)
    assert logprobs.token_id == 0
    assert logprobs.logprob == pytest.approx(1 - total, rel=1e-12)
    assert [token_id for token_id, _ in logprobs.top] == [1, 3, 0]  # best first, smaller id first among equals
    assert [value for _, value in logprobs.top] == pytest.approx([3 - total, 3 - total, 1 - total], rel=1e-12)
    assert score(logits, 4, 0) == Logprobs(4, -INF, ())


def test_logprobs_of_huge_logits_do_not_overflow():
    with np.errstate(all="raise", under="ignore"):
        assert score(row(3e38, -3e38), 0, 2).top == ((0, 0.0), (1, pytest.approx(-6e38)))


def test_more_top_ids_than_the_vocabulary():
    assert [token_id for token_id, _ in score(row(1, 2), 0, 20).top] == [1, 0]


@pytest.mark.parametrize("values", [(1, math.nan), (1, INF), (-INF, -INF)])
def test_logprobs_of_logits_that_are_not_finite(values):
    assert score(row(*values), 0, 1) is None
