"""Finds where a text spells special tokens, in time linear in the text whatever they are.

A regular expression of alternatives tries them all from each character that begins one: gpt-oss's thousand took 5 s
for 2 MiB of "<|". The tokenizers library's automaton (Aho-Corasick) reads a text once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

import tokenizers
from tokenizers import AddedToken, models

from services.tokenizer.encoders import encode_spans

_UNKNOWN = ""  # no spelling is empty


class SpecialTexts:
    """The spellings of a model's special tokens: at least one, none of them empty."""

    def __init__(self, texts: Collection[str]) -> None:
        # A tokenizer that knows nothing else: what lies between spellings is one unknown word each.
        self._finder = tokenizers.Tokenizer(models.WordLevel({_UNKNOWN: 0}, unk_token=_UNKNOWN))
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(texts), max(texts), strict=False))
        self._prefix = "".join(first for first, _ in alike)  # of all: "<|" in gpt-oss, which most texts don't hold
        self._finder.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where spellings begin and end, in characters: from the left, the longest at each place, none overlapping."""
        if self._prefix and self._prefix not in text:
            return []
        return [span for token_id, span in encode_spans(self._finder, text) if token_id != 0]

    def replace(self, text: str, change: Callable[[str], str]) -> str:
        """The text with each spelling changed."""
        pieces = []
        position = 0
        for start, end in self.spans(text):
            pieces += [text[position:start], change(text[start:end])]
            position = end
        return "".join([*pieces, text[position:]])
