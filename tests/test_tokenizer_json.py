"""Which tokenizer.json files are served, and what becomes of those that would take hours, draw at random or panic."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from services.tokenizer.backends import HF_JSON, make_tokenizer
from services.tokenizer.panics import PanicError, panics_as_errors
from services.tokenizer.splits import GPT_2_SPLIT, GPT_4_SPLIT, GPT_4O_SPLIT, KNOWN_SPLITS
from shared.errors import Reason, ServiceError
from tests.tokenizer_files import GPT_2, GPT_4O, O200K, trained_tokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SLOW = "(a+)+$"  # gives up after a tenth of a second, from each character on


def split(**changes: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": O200K}, "behavior": "Isolated", "invert": False} | changes


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(parts)}}


def make(changes: dict[str, Any], model: dict[str, Any] | None = None, pre: str = GPT_2) -> Any:
    trained = trained_tokenizer(pre)
    contents = json.loads(trained.json) | changes
    contents["model"] |= model or {}
    return make_tokenizer(trained.data(tokenizer_json=json.dumps(contents).encode()))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "a normaliser of type Lowercase"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
            "a normaliser of type Replace",
        ),
        ({"normalizer": {"type": "Sequence", "normalizers": []}}, "a normaliser of type Sequence"),
        ({"pre_tokenizer": None}, "no pre-tokenizer of type ByteLevel"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no pre-tokenizer of type ByteLevel"),
        (sequence(split()), "no pre-tokenizer of type ByteLevel"),
        (sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL), "a pre-tokenizer of type Digits"),
        (sequence(split(pattern={"Regex": SLOW}), BYTE_LEVEL), "a split by"),
        (sequence({"type": "Sequence", "pretokenizers": [split(pattern={"Regex": SLOW})]}, BYTE_LEVEL), "a split by"),
        (sequence(split(pattern={"String": ""}), BYTE_LEVEL), "a split by"),
        (sequence(split(behavior="Removed"), BYTE_LEVEL), "a split with behaviour Removed"),
        (sequence(split(behavior="MergedWithNext"), BYTE_LEVEL), "a split with behaviour MergedWithNext"),
        ({"decoder": {"type": "Fuse"}}, "a decoder other than ByteLevel"),
        ({"decoder": None}, "a decoder other than ByteLevel"),
    ],
)
def test_a_part_that_is_not_served_is_named(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ServiceError, match=part) as raised:
        make(changes)
    assert raised.value.reason is Reason.TOKENIZER_UNSUPPORTED
    assert "without the file the vocabulary in the GGUF file is used" in raised.value.message


@pytest.mark.parametrize("model", [{"dropout": 0.5}, {"end_of_word_suffix": "</w>"}])
def test_a_model_that_draws_or_adds_is_not_served(model: dict[str, Any]) -> None:
    with pytest.raises(ServiceError) as raised:
        make({}, model)
    assert raised.value.reason in (Reason.TOKENIZER_UNSUPPORTED, Reason.MODEL_INVALID)


def test_a_prefix_on_which_the_library_panics_is_an_invalid_file() -> None:
    with pytest.raises(ServiceError, match="panicked") as raised:
        make({}, {"continuing_subword_prefix": "####"})
    assert raised.value.reason is Reason.MODEL_INVALID


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}},
        {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}},
        sequence(split(behavior="Removed", invert=True), BYTE_LEVEL | {"use_regex": False}),
        sequence(split(pattern={"Regex": GPT_4_SPLIT}), BYTE_LEVEL | {"use_regex": False}),
    ],
)
def test_what_models_have_is_served(changes: dict[str, Any]) -> None:
    tokenizer = make(changes, pre=GPT_4O)
    assert tokenizer.backend == HF_JSON
    text = "Ünïted 12345\n\n  states' of 日本"
    ids = tokenizer.encode(text, parse_special=False, add_special=False)
    assert tokenizer.decode(ids, special_tokens=False) == text


def test_known_splits_are_those_that_models_have() -> None:
    assert O200K == GPT_4O_SPLIT
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    ours = pre_tokenizers.Split(tokenizers.Regex(GPT_2_SPLIT), "isolated")
    text = "it's  12 x!?\n\n 日本 don'T"
    assert [span for _, span in ours.pre_tokenize_str(text)] == [span for _, span in byte_level.pre_tokenize_str(text)]


@pytest.mark.slow
@pytest.mark.parametrize("expression", sorted(KNOWN_SPLITS), ids=len)
@pytest.mark.parametrize("piece", [" ", "\n", "A", "日", "Aʰ", "\u0301", "!"])
def test_known_splits_end_on_texts_of_two_mebibytes(expression: str, piece: str) -> None:
    """No text makes one backtrack until it gives up; the last character takes away what the rest hoped for."""
    splitter = pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    text = piece * ((2 << 20) // len(piece.encode())) + "a"
    start = time.process_time()
    with panics_as_errors():
        assert splitter.pre_tokenize_str(text)[-1][1][1] == len(text)
    assert time.process_time() - start < 20


def test_a_panic_becomes_an_error_that_handlers_see() -> None:
    splitter = pre_tokenizers.Split(tokenizers.Regex(SLOW), "isolated")
    with pytest.raises(PanicError, match="retry-limit"), panics_as_errors():
        splitter.pre_tokenize_str("a" * 64 + "!")
    with pytest.raises(KeyError), panics_as_errors():
        raise KeyError
