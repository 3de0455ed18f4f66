"""Philox4x32-10 against its authors' known answers, and the uniform number that a token is drawn with."""

from __future__ import annotations

import numpy as np
import pytest

from services.executor.philox import philox4x32, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, words):
    assert philox4x32(counter, key) == words


def test_agrees_with_a_second_formulation():
    """numpy's uint64 arithmetic, written as the paper's tables of words."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        counter = [int(word) for word in rng.integers(0, 2**32, 4)]
        key = [int(word) for word in rng.integers(0, 2**32, 2)]
        words, keys = np.array(counter, np.uint64), np.array(key, np.uint64)
        for _ in range(10):
            products = words[[0, 2]] * np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
            high, low = products >> np.uint64(32), products & np.uint64(ONES)
            words = np.array([high[1] ^ words[1] ^ keys[0], low[1], high[0] ^ words[3] ^ keys[1], low[0]], np.uint64)
            keys = (keys + np.array([0x9E3779B9, 0xBB67AE85], np.uint64)) & np.uint64(ONES)
        assert philox4x32(tuple(counter), tuple(key)) == tuple(words.tolist())


def test_uniform_takes_27_and_26_bits_of_the_first_two_words():
    # Counter and key of zeros: the first known answer.
    assert uniform(0, 0, 0) == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53


def test_uniform_places_seed_output_and_token():
    w0, w1, _, _ = philox4x32((7, 0, 3, 0), (0x89ABCDEF, 0x01234567))
    assert uniform(0x0123456789ABCDEF, 3, 7) == ((w0 >> 5) * 2**26 + (w1 >> 6)) / 2**53


def test_uniform_numbers_are_spread_evenly():
    numbers = np.array([uniform(2**64 - 1, 1, token) for token in range(20000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_squared < 45  # 19 degrees of freedom: 0.1 % lie above 43.8
