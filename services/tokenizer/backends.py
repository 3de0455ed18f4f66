"""Encodes text as a model's tokenizer does, on Hugging Face tokenizers, from either of two sources.

gguf-bpe: a byte-level BPE from the vocabulary and merges in the model's GGUF file.
hf-json: the tokenizer.json that came with the model; it must agree with the GGUF file's vocabulary.
Decoding is the same for both (vocabulary.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from services.tokenizer.encoders import encode_ids
from services.tokenizer.panics import panics_as_errors
from services.tokenizer.splits import GPT_4O_SPLIT
from services.tokenizer.tokenizer_json import parse_tokenizer_json
from services.tokenizer.vocabulary import BYTE_OF_CHARACTER, Vocabulary, make_vocabulary
from shared.errors import Reason, ServiceError
from shared.tokenizer_data import (
    BPE_KIND,
    CONTROL_TOKEN,
    NORMAL_TOKEN,
    UNKNOWN_TOKEN,
    UNUSED_TOKEN,
    USER_DEFINED_TOKEN,
    TokenizerData,
)

GGUF_BPE = "gguf-bpe"
HF_JSON = "hf-json"


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer. Safe to use from several threads."""

    backend: str  # GGUF_BPE or HF_JSON
    data: TokenizerData  # without what only making a tokenizer needs: merges, tokenizer.json
    vocabulary: Vocabulary
    plain: tokenizers.Tokenizer  # reads special tokens as text
    special: tokenizers.Tokenizer  # reads special tokens as special

    def encode(self, text: str, *, parse_special: bool, add_special: bool) -> list[int]:
        """The ids of a text.

        Args:
            text: the text.
            parse_special: special tokens in the text are special; else they are text like any other.
            add_special: puts the model's BOS before the text, if the model wants one.
        """
        encoder = self.special if parse_special else self.plain
        with panics_as_errors():
            ids = encode_ids(encoder, text)
        if add_special and self.data.add_bos_token and self.data.bos_token_id is not None:
            return [self.data.bos_token_id, *ids]
        return ids

    def decode(self, token_ids: Sequence[int], *, special_tokens: bool) -> str:
        """The text of ids; TOKEN_ID_INVALID for one outside the vocabulary."""
        return self.vocabulary.table(special_tokens).decode(token_ids)


def make_tokenizer(data: TokenizerData) -> Tokenizer:
    """The tokenizer that a model's data describe: its tokenizer.json where there is one, else its GGUF vocabulary.

    Raises:
        ServiceError: TOKENIZER_UNSUPPORTED, MODEL_INVALID.
    """
    backend = HF_JSON if data.tokenizer_json else GGUF_BPE
    make = _from_json if data.tokenizer_json else _from_gguf
    vocabulary, plain, special = make(data)
    plain.encode_special_tokens = True
    kept = dataclasses.replace(data, merges=(), tokenizer_json=b"")
    return Tokenizer(backend, kept, vocabulary, plain, special)


def _from_gguf(data: TokenizerData) -> tuple[Vocabulary, tokenizers.Tokenizer, tokenizers.Tokenizer]:
    if data.kind != BPE_KIND:
        why = f"{data.model}: tokenizer.ggml.model is {data.kind!r}; only {BPE_KIND!r} is served, or a tokenizer.json."
        raise ServiceError(Reason.TOKENIZER_UNSUPPORTED, why)
    splitters = _splitters(data)
    ids = {text: token_id for token_id, text in enumerate(data.tokens)}
    missing = [byte for character, byte in BYTE_OF_CHARACTER.items() if character not in ids]
    if missing:
        raise _invalid(data, f"the vocabulary has no token for byte 0x{missing[0]:02X}, so some texts have no ids")
    by_type: dict[int, dict[int, str]] = {}
    for token_id, (text, type_) in enumerate(zip(data.tokens, data.token_types, strict=True)):
        by_type.setdefault(type_, {})[token_id] = text
    special_texts = by_type.pop(CONTROL_TOKEN, {}) | by_type.pop(UNKNOWN_TOKEN, {})
    literal_texts = by_type.pop(USER_DEFINED_TOKEN, {})
    by_type.pop(UNUSED_TOKEN, None)
    byte_level_texts = {token_id: text for texts in by_type.values() for token_id, text in texts.items()}
    vocabulary = make_vocabulary(len(data.tokens), byte_level_texts, literal_texts, special_texts)
    model = models.BPE(ids, [(left, right) for left, _, right in (merge.partition(" ") for merge in data.merges)])
    encoders = []
    for _ in range(2):
        encoder = tokenizers.Tokenizer(model)  # both share the model
        encoder.pre_tokenizer = pre_tokenizers.Sequence(splitters)
        encoder.add_tokens([AddedToken(text, normalized=False) for text in literal_texts.values()])
        encoder.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in special_texts.values()]
        )
        encoders.append(encoder)
    return vocabulary, encoders[0], encoders[1]


def _splitters(data: TokenizerData) -> list[pre_tokenizers.PreTokenizer]:
    """What cuts a text into the words that merges stay inside."""
    if data.pre == "gpt-2":
        return [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if data.pre == "gpt-4o":
        return [
            pre_tokenizers.Split(tokenizers.Regex(GPT_4O_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    why = f"{data.model}: tokenizer.ggml.pre is {data.pre!r}; 'gpt-2' and 'gpt-4o' are served, or a tokenizer.json."
    raise ServiceError(Reason.TOKENIZER_UNSUPPORTED, why)


def _from_json(data: TokenizerData) -> tuple[Vocabulary, tokenizers.Tokenizer, tokenizers.Tokenizer]:
    plain, special = (parse_tokenizer_json(data.tokenizer_json, data.model) for _ in range(2))
    texts = {token_id: text for text, token_id in special.get_vocab(with_added_tokens=True).items()}
    added: dict[int, Any] = special.get_added_tokens_decoder()
    for token_id, text in texts.items():
        if token_id >= len(data.tokens):
            raise _invalid(data, f"the tokenizer.json has id {token_id}, the model {len(data.tokens)} ids")
        if data.token_types[token_id] == NORMAL_TOKEN and data.tokens[token_id] != text:
            expected = data.tokens[token_id]
            raise _invalid(data, f"the tokenizer.json is another model's: id {token_id} is {text!r}, not {expected!r}")
    special_texts = {token_id: token.content for token_id, token in added.items() if token.special}
    literal_texts = {token_id: token.content for token_id, token in added.items() if not token.special}
    byte_level_texts = {token_id: text for token_id, text in texts.items() if token_id not in added}
    return make_vocabulary(len(data.tokens), byte_level_texts, literal_texts, special_texts), plain, special


def _invalid(data: TokenizerData, why: str) -> ServiceError:
    return ServiceError(Reason.MODEL_INVALID, f"{data.model}: {why}.")
