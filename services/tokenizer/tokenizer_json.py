"""What of a tokenizer.json is served: byte-level BPE over text that is split by expressions known to end in time.

The file is hostile input, and much of what the format allows is code: a regular expression that takes a tenth of a
second for each character, a normaliser that makes the library panic on use, a dropout that draws ids at random. So
each part is one that models have, or the file is refused by name; the parts that ids don't need are taken off.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models

from services.tokenizer.panics import panics_as_errors
from services.tokenizer.splits import KNOWN_SPLITS
from shared.errors import Reason, ServiceError

# Both cut the text at the expression's matches and keep all of it: (behavior, invert).
_KEEPING = (("Isolated", False), ("Removed", True))


def parse_tokenizer_json(contents: bytes, model: str) -> tokenizers.Tokenizer:
    """A tokenizer.json as a tokenizer that maps any text to ids in bounded time.

    Args:
        contents: the file's.
        model: the name of its model, for messages.

    Raises:
        ServiceError: MODEL_INVALID if it can't be read, TOKENIZER_UNSUPPORTED for a part that is not served.
    """
    try:
        with panics_as_errors():
            tokenizer = tokenizers.Tokenizer.from_buffer(contents)
    except Exception as error:  # the library's own, of no common class
        why = f"{model}: the tokenizer.json can't be read: {error}."
        raise ServiceError(Reason.MODEL_INVALID, why) from None
    for part in _unserved_parts(tokenizer):
        why = f"{model}: the tokenizer.json has {part}; without the file the vocabulary in the GGUF file is used."
        raise ServiceError(Reason.TOKENIZER_UNSUPPORTED, why)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None  # adds special tokens and moves offsets; neither is asked for
    return tokenizer


def _unserved_parts(tokenizer: tokenizers.Tokenizer) -> Iterator[str]:
    model = tokenizer.model
    if not isinstance(model, models.BPE):
        yield f"a model of type {type(model).__name__}, where BPE is served"
    elif model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        yield "a BPE with dropout, prefixes or suffixes, which are not served"
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        yield "a decoder other than ByteLevel, so that its text can't be streamed"
    normalizer = _state(tokenizer.normalizer)
    if normalizer.get("type", "NFC") != "NFC":
        yield f"a normaliser of type {normalizer['type']}, where NFC or none is served"
    splitters = list(_flat(_state(tokenizer.pre_tokenizer)))
    if not any(splitter.get("type") == "ByteLevel" for splitter in splitters):
        yield "no pre-tokenizer of type ByteLevel, which turns text into bytes"
    for splitter in splitters:
        if splitter.get("type") not in ("ByteLevel", "Split"):
            yield f"a pre-tokenizer of type {splitter.get('type')}, where ByteLevel and Split are served"
        elif splitter["type"] == "Split" and splitter["pattern"].get("Regex") not in KNOWN_SPLITS:
            yield f"a split by {json.dumps(splitter['pattern'])[:200]}, which is none of the expressions known to end"
        elif splitter["type"] == "Split" and (splitter["behavior"], splitter["invert"]) not in _KEEPING:
            yield f"a split with behaviour {splitter['behavior']}, which does not keep all of the text apart"


def _state(part: Any) -> Mapping[str, Any]:
    """What a part of a tokenizer is, as the file says it; empty where there is none."""
    state: Mapping[str, Any] = json.loads(part.__getstate__()) if part is not None else {}
    return state


def _flat(pre_tokenizer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if pre_tokenizer.get("type") == "Sequence":
        for part in pre_tokenizer["pretokenizers"]:
            yield from _flat(part)
    elif pre_tokenizer:
        yield pre_tokenizer
