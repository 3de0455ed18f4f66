"""A tokenizer read from a GGUF file: values, refusals, and the way over the wire."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import Reason, ServiceError
from shared.gguf import read_gguf
from shared.tokenizer_data import (
    MAX_CHAT_TEMPLATE_BYTES,
    TokenizerData,
    end_of_generation_ids,
    read_tokenizer_json,
    tokenizer_data_from_gguf,
)
from shared.tokenizer_data_proto import from_pieces, to_pieces
from tests.gguf_files import write_gguf
from tests.tokenizer_files import GPT_4O, SPECIAL_TOKENS, trained_tokenizer


def read(path: Path, **changes: Any) -> TokenizerData:
    """The tokenizer of a file whose metadata have these changes; None leaves a key out, "__" stands for a dot."""
    gguf = read_gguf(write_gguf(path / "model.gguf", trained_tokenizer(GPT_4O).metadata(**changes)))
    return tokenizer_data_from_gguf(gguf, model="name", digest="digest", aliases=["alias"])


def test_values(tmp_path: Path) -> None:
    trained = trained_tokenizer(GPT_4O)
    data = read(
        tmp_path,
        tokenizer__chat_template="{{ é }}",
        tokenizer__ggml__add_bos_token=True,
        tokenizer__ggml__token_type=None,
    )
    assert tuple(data.tokens) == trained.tokens
    assert tuple(data.merges) == trained.merges
    assert tuple(data.token_types) == (1,) * len(trained.tokens)
    assert (data.model, data.digest, data.aliases) == ("name", "digest", ("alias",))
    assert (data.kind, data.pre, data.context_length) == ("gpt2", "gpt-4o", 256)
    assert data.bos_token_id == trained.id_of("<|startoftext|>")
    assert data.eos_token_id == trained.id_of("<|return|>")
    assert data.pad_token_id == trained.id_of("<|endoftext|>")
    assert (data.chat_template, data.add_bos_token, data.tokenizer_json) == ("{{ é }}", True, b"")
    assert tuple(read(tmp_path).token_types) == trained.token_types


def test_what_a_file_leaves_out(tmp_path: Path) -> None:
    data = read(
        tmp_path,
        tokenizer__ggml__pre=None,
        tokenizer__ggml__bos_token_id=None,
        tokenizer__ggml__eos_token_id=None,
        tokenizer__ggml__padding_token_id=None,
    )
    assert (data.bos_token_id, data.eos_token_id, data.pad_token_id) == (None, None, None)
    assert (data.pre, data.chat_template, data.add_bos_token) == ("", "", False)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokenizer__ggml__model": None}, "tokenizer.ggml.model is missing"),
        ({"tokenizer__ggml__tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer__ggml__tokens": np.zeros(5, np.int32)}, "is ARRAY of INT32, not an array of strings"),
        ({"tokenizer__ggml__tokens": ["a", "b", "a"]}, "1 tokens that repeat"),
        ({"tokenizer__ggml__token_type": np.ones(5, np.int32)}, "has 5 entries for"),
        ({"tokenizer__ggml__token_type": ["a"]}, "not an array of integers"),
        ({"tokenizer__ggml__merges": None}, "merges is missing"),
        ({"tokenizer__ggml__merges": np.zeros(5, np.uint8)}, "not an array of strings"),
        ({"tokenizer__ggml__merges": ["ab"]}, "entry 0, 'ab', does not join"),
        ({"tokenizer__ggml__merges": ["a b", " b"]}, "does not join"),
        ({"tokenizer__ggml__merges": ["a "]}, "does not join"),
        ({"tokenizer__ggml__merges": ["a b c"]}, "does not join"),
        ({"tokenizer__ggml__merges": ["q 😀"]}, "does not join"),
        ({"tokenizer__ggml__bos_token_id": 10**6}, "tokenizer.ggml.bos_token_id is 1000000, outside"),
        ({"tokenizer__ggml__eos_token_id": -1}, "tokenizer.ggml.eos_token_id is -1, outside"),
        ({"tokenizer__ggml__padding_token_id": 2**40}, "padding_token_id is"),
        ({"tokenizer__ggml__eot_token_id": 10**6}, "eot_token_id is"),
        ({"tokenizer__ggml__bos_token_id": "1"}, "is STRING, not an integer"),
        ({"tokenizer__ggml__add_bos_token": 1}, "not a bool"),
        ({"tokenizer__chat_template": "x" * (MAX_CHAT_TEMPLATE_BYTES + 1)}, "chat_template takes more than"),
        ({"gpt2__context_length": 0}, "context_length is 0"),
        ({"gpt2__context_length": None}, "context_length is missing"),
    ],
)
def test_refusals_name_file_and_key(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ServiceError) as raised:
        read(tmp_path, **changes)
    assert raised.value.reason is Reason.MODEL_INVALID
    assert match in raised.value.message
    assert "model.gguf" in raised.value.message


@pytest.mark.parametrize("type_", [-1, 7])
def test_unknown_token_types_are_refused(tmp_path: Path, type_: int) -> None:
    types = np.ones(len(trained_tokenizer(GPT_4O).tokens), np.int32)
    types[-1] = type_
    with pytest.raises(ServiceError, match=f"holds {type_}, which is no token type"):
        read(tmp_path, tokenizer__ggml__token_type=types)


def test_tokens_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = trained_tokenizer(GPT_4O).write_gguf(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes().replace(b"<|startoftext|>", b"<|st\xff\xfe\xfdoftext|>", 1))
    with pytest.raises(ServiceError, match=r"tokenizer\.ggml\.tokens entry \d+ is not valid UTF-8"):
        tokenizer_data_from_gguf(read_gguf(path), model="", digest="")


def test_ids_that_end_generation() -> None:
    def ids_of(texts: list[str], *named_ids: int | None) -> tuple[int, ...]:
        return end_of_generation_ids({text.encode(): token_id for token_id, text in enumerate(texts)}, named_ids)

    gpt_oss = ["a", "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|call|>", "<|end|>"]
    assert ids_of(gpt_oss, 3, None) == (2, 3, 4)
    assert ids_of(["<|end|>", "<|endoftext|>", "a"], None) == (0, 1)
    assert ids_of(["<|end|>", "<|return|>", "x"], 2) == (0, 1, 2)
    assert ids_of(["<|im_end|>", "<|eot_id|>"]) == (0, 1)
    assert ids_of(["a", "b"], 1, None) == (1,)
    assert ids_of(["a", "b"], None) == ()


def test_harmonys_ids_that_end_generation() -> None:
    data = trained_tokenizer(GPT_4O).data()
    expected = {SPECIAL_TOKENS.index(text) for text in ("<|endoftext|>", "<|return|>", "<|call|>")}
    first = len(data.tokens) - len(SPECIAL_TOKENS) - 4
    assert {token_id - first for token_id in data.eog_token_ids} == expected


def test_over_the_wire(tmp_path: Path) -> None:
    data = replace(read(tmp_path, tokenizer__chat_template="{{ x }}"), tokenizer_json=bytes(range(256)) * 9000)
    received = from_pieces(list(to_pieces(data)))
    assert received == replace(
        data, tokens=list(data.tokens), token_types=list(data.token_types), merges=list(data.merges)
    )
    bare = replace(data, bos_token_id=None, eos_token_id=0, pad_token_id=None, tokenizer_json=b"", merges=())
    received = from_pieces(list(to_pieces(bare)))
    assert (received.bos_token_id, received.eos_token_id, received.pad_token_id) == (None, 0, None)
    assert (received.tokenizer_json, received.merges) == (b"", [])


def test_a_stream_cut_short_is_noticed(tmp_path: Path) -> None:
    pieces = list(to_pieces(replace(read(tmp_path), tokenizer_json=b"{}")))
    for missing in range(len(pieces)):
        with pytest.raises(ServiceError) as raised:
            from_pieces(pieces[:missing] + pieces[missing + 1 :])
        assert raised.value.reason is Reason.LOADER_UNAVAILABLE


def test_a_tokenizer_json_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ServiceError) as raised:
        read_tokenizer_json(tmp_path / "tokenizer.json")
    assert raised.value.reason is Reason.MODEL_NOT_FOUND
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    assert read_tokenizer_json(tmp_path / "tokenizer.json") == b"{}"
