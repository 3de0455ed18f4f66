"""Windows, perplexity and percentiles, by themselves."""

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxgpt.bench import percentile, random_prompts
from mxgpt.perplexity import from_logprobs, windows
from mxgpt.tasks import run_all


@given(st.integers(2, 300), st.integers(2, 40), st.data())
def test_windows_score_every_token_but_the_first_once(num_tokens, window, data):
    stride = data.draw(st.integers(1, window - 1))
    found = windows(num_tokens, window, stride)
    scored = [token for part in found for token in range(part.first_scored, part.end)]
    assert scored == list(range(1, num_tokens))
    for part in found:
        assert 0 <= part.start < part.first_scored < part.end <= num_tokens
        assert part.end - part.start <= window
        assert part.first_scored - part.start >= min(window - stride, part.first_scored)


def test_perplexity_of_even_odds():
    measured = from_logprobs([math.log(0.25)] * 8, 9, 9, 4)
    assert measured.value == pytest.approx(4.0)
    assert measured.margin == 0.0


def test_margin_is_the_standard_error():
    measured = from_logprobs([-1.0, -3.0], 3, 3, 1)
    assert measured.mean == 2.0
    assert measured.standard_error == pytest.approx(1.0)
    assert measured.margin == pytest.approx(math.exp(2.0))


def test_percentiles():
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50.0, 90.0, 99.0, 100.0]
    assert percentile([3.0], 0.5) == 3.0
    assert math.isnan(percentile([], 0.5))


def test_random_prompts_are_repeatable_and_differ():
    prompts = random_prompts(3, 5, 100)
    assert prompts == random_prompts(3, 5, 100)
    assert len({tuple(prompt) for prompt in prompts}) == 3


def test_run_all_raises_the_first_failure_itself_and_cancels_the_rest():
    cancelled = []

    async def wait():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def fail():
        await asyncio.sleep(0)
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        asyncio.run(run_all([wait(), fail(), wait()]))
    assert cancelled == [True, True]
