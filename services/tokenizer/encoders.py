"""Runs encoders of the tokenizers library, whose `encode` keeps the interpreter lock: 2 s for 2 MiB of text.

`encode_batch` lets go of it. For a short text that is no gain: to get the lock back may take longer than to encode.
"""

from __future__ import annotations

import tokenizers

SHORT_CHARS = 4096  # a text so short takes a millisecond


def encode_ids(encoder: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids of a text."""
    if len(text) <= SHORT_CHARS:
        found = encoder.encode(text, add_special_tokens=False)
    else:
        [found] = encoder.encode_batch_fast([text], add_special_tokens=False)  # "fast": without offsets
    ids: list[int] = found.ids
    return ids


def encode_spans(encoder: tokenizers.Tokenizer, text: str) -> list[tuple[int, tuple[int, int]]]:
    """The ids of a text, and where each begins and ends in it, in characters."""
    if len(text) <= SHORT_CHARS:
        found = encoder.encode(text, add_special_tokens=False)
    else:
        [found] = encoder.encode_batch([text], add_special_tokens=False)
    return list(zip(found.ids, found.offsets, strict=True))
