"""Target: a model's tokenizer, as the keys of a GGUF file or as a tokenizer.json beside it.

An input is JSON: {"metadata": {...}} changes keys of a sound file (null removes one), {"tokenizer_json": {...}}
members of a sound tokenizer.json. What comes of it is refused by a `ServiceError`, or it survives the way over the
wire, encodes texts to ids of its vocabulary, and decodes them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

from services.tokenizer.backends import Tokenizer, make_tokenizer
from services.tokenizer.vocabulary import BYTE_OF_CHARACTER
from shared.errors import Reason, ServiceError
from shared.gguf import read_gguf
from shared.tokenizer_data import TokenizerData, tokenizer_data_from_gguf
from shared.tokenizer_data_proto import from_pieces, to_pieces
from tests.gguf_files import gguf_bytes

MAX_BYTES = 2048
MAX_SECONDS = 5.0

REFUSALS = frozenset((Reason.MODEL_INVALID, Reason.TOKENIZER_UNSUPPORTED))
SPECIAL = ("<|start|>", "<|end|>")
TOKENS = (*BYTE_OF_CHARACTER, "ab", "Ġab", "abc", *SPECIAL)
TYPES = (1,) * (len(TOKENS) - len(SPECIAL)) + (3,) * len(SPECIAL)
MERGES = ("a b", "Ġ ab", "ab c")
TEXTS = ("", "abc ab  abcabc", "héllo 🚀\n\n日本", "a<|end|>b 1234567 ABC's")


def seeds() -> Iterator[bytes]:
    """Changes that break one thing each, and changes that a sound file may have."""
    for metadata in (
        {},
        {"tokenizer.ggml.pre": "gpt-4o"},
        {"tokenizer.ggml.model": "llama"},
        {"tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]},
        {"tokenizer.ggml.token_type": [1, 2, 3]},
        {"tokenizer.ggml.merges": ["a b", "b a", " ", "a", "a b c", "ab c"]},
        {"tokenizer.ggml.merges": None, "tokenizer.ggml.token_type": None},
        {"tokenizer.ggml.bos_token_id": 260, "tokenizer.ggml.add_bos_token": True},
        {"tokenizer.ggml.eos_token_id": -1, "tokenizer.ggml.padding_token_id": 4294967295},
        {"tokenizer.ggml.eot_token_id": 1.5, "tokenizer.ggml.eom_token_id": "x"},
        {"tokenizer.chat_template": "{{ messages }}", "gpt2.context_length": 0},
    ):
        yield json.dumps({"metadata": metadata}).encode()
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    for change in (
        {},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}},
        {"model": {"type": "WordPiece", "unk_token": "a", "vocab": {}, "max_input_chars_per_word": 0}},
        {"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}},
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True}},
        {"post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}},
        {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        {"truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 1}},
        {"padding": {"strategy": {"Fixed": 9999999}, "direction": "Right", "pad_id": 9, "pad_token": "x"}},
        {"added_tokens": [{"id": 4294967295, "content": "", "special": True}]},
        {"added_tokens": [{"id": 0, "content": "ab", "special": True, "lstrip": True, "normalized": True}]},
        {"version": "9.9"},
    ):
        yield json.dumps({"tokenizer_json": change}).encode()


def examine(data: bytes) -> str:
    """Make a tokenizer of a changed file: "served", the reason of its refusal, or "no change" for other JSON.

    Raises:
        AssertionError: for a tokenizer that was taken and does not work, a refusal without a reason, or time lost.
    """
    try:
        changes = json.loads(data)
    except (ValueError, RecursionError):
        return "no change"
    if not isinstance(changes, dict) or not any(isinstance(changes.get(key), dict) for key in KINDS):
        return "no change"
    start = time.process_time()
    refusal = None
    try:
        for key, examine_changes in KINDS.items():
            if isinstance(changes.get(key), dict):
                examine_changes(changes[key])
    except ServiceError as error:
        refusal = error
    assert time.process_time() - start < MAX_SECONDS
    if refusal is None:
        return "served"
    assert refusal.reason in REFUSALS, refusal
    refusal.message.encode()  # can be sent
    return refusal.reason.name


def _examine_metadata(changes: Mapping[str, Any]) -> None:
    metadata: dict[str, Any] = {
        "general.architecture": "gpt2",
        "gpt2.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": list(TOKENS),
        "tokenizer.ggml.token_type": np.array(TYPES, np.int32),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.eos_token_id": TOKENS.index("<|end|>"),
    }
    for key, value in changes.items():
        if value is None:
            metadata.pop(key, None)
        elif _can_be_written(key, value):
            metadata[key] = value
    contents = gguf_bytes(metadata, {})
    os.ftruncate(_memory_file(), len(contents))
    os.pwrite(_memory_file(), contents, 0)
    data = tokenizer_data_from_gguf(read_gguf(f"/proc/self/fd/{_memory_file()}"), model="fuzzed", digest="d")
    tokenizer = _use(data)
    if tuple(data.tokens) == TOKENS and tuple(data.token_types) == TYPES:
        for text in TEXTS:
            ids = tokenizer.encode(text, parse_special=False, add_special=False)
            assert tokenizer.decode(ids, special_tokens=False) == text


def _examine_tokenizer_json(changes: Mapping[str, Any]) -> None:
    _use(_base_data(json.dumps(_base_tokenizer_json() | changes).encode()))


KINDS = {"metadata": _examine_metadata, "tokenizer_json": _examine_tokenizer_json}


def _use(data: TokenizerData) -> Tokenizer:
    """Send it over the wire, make the tokenizer, and use it; what was believed must hold."""
    received = from_pieces(list(to_pieces(data)))
    assert (received.tokens, received.merges) == (list(data.tokens), list(data.merges))
    assert (received.token_types, received.eog_token_ids) == (list(data.token_types), data.eog_token_ids)
    tokenizer = make_tokenizer(received)
    size = tokenizer.vocabulary.size
    assert size == len(data.tokens)
    for text in TEXTS:
        for parse_special in (False, True):
            ids = tokenizer.encode(text, parse_special=parse_special, add_special=True)
            assert all(0 <= token_id < size for token_id in ids)
            for special_tokens in (False, True):
                tokenizer.decode(ids, special_tokens=special_tokens).encode()
    return tokenizer


def _can_be_written(key: str, value: Any) -> bool:
    """Whether tests/gguf_files.py can write the key; what a file's raw bytes may hold is another target's part."""
    if not key.isascii() or not 1 <= len(key) <= 256:
        return False
    if isinstance(value, list):
        kinds = {type(item) for item in value}
        return len(kinds) == 1 and all(not isinstance(item, list) and _can_be_written(key, item) for item in value)
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return isinstance(value, bool | float) or (isinstance(value, int) and -(1 << 63) <= value < 1 << 63)


@cache
def _memory_file() -> int:
    return os.memfd_create("fuzzed.gguf")


def _base_data(tokenizer_json: bytes) -> TokenizerData:
    return TokenizerData(
        model="fuzzed",
        aliases=(),
        digest="d",
        kind="gpt2",
        pre="gpt-2",
        tokens=TOKENS,
        token_types=TYPES,
        merges=MERGES,
        tokenizer_json=tokenizer_json,
        bos_token_id=None,
        eos_token_id=TOKENS.index("<|end|>"),
        pad_token_id=None,
        eog_token_ids=(TOKENS.index("<|end|>"),),
        chat_template="",
        context_length=64,
        add_bos_token=False,
    )


@cache
def _base_tokenizer_json() -> Mapping[str, Any]:
    """A tokenizer.json of the same vocabulary."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": TOKENS.index(text), "content": text} | added for text in SPECIAL],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {text: token_id for token_id, text in enumerate(TOKENS) if text not in SPECIAL},
            "merges": [merge.split(" ") for merge in MERGES],
        },
    }
