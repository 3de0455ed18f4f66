"""Philox4x32-10: random words that depend on a key and a counter alone, the same on every device.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

Counter = tuple[int, int, int, int]  # each 0 <= word < 2**32
Key = tuple[int, int]

_NUM_ROUNDS = 10
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_KEY_STEP_0 = 0x9E3779B9
_KEY_STEP_1 = 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox4x32(counter: Counter, key: Key) -> Counter:
    """Four random 32-bit words for a counter of four words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0 = (product_1 >> 32) ^ c1 ^ k0
        c1 = product_1 & _WORD
        c2 = (product_0 >> 32) ^ c3 ^ k1
        c3 = product_0 & _WORD
        k0 = (k0 + _KEY_STEP_0) & _WORD
        k1 = (k1 + _KEY_STEP_1) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, output_index: int, token_index: int) -> float:
    """The one uniform number in [0, 1) that decides a token, a multiple of 2**-53.

    Key: (seed's low word, seed's high word). Counter: (token_index, 0, output_index, 0). The number is
    ((w0 >> 5) * 2**26 + (w1 >> 6)) * 2**-53 of the first two words: 27 bits, then 26.

    Args:
        seed: 0 <= seed < 2**64.
        output_index: which output of the request, from 0.
        token_index: which token of the output, from 0, resumed ones counted.
    """
    w0, w1, _, _ = philox4x32((token_index, 0, output_index, 0), (seed & _WORD, seed >> 32))
    return ((w0 >> 5) * 2**26 + (w1 >> 6)) * 2.0**-53
