"""Both backends against a tokenizer.json that `tokenizers` reads itself, on the conformance strings."""

from __future__ import annotations

import re
from functools import cache

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from services.tokenizer.backends import GGUF_BPE, HF_JSON, Tokenizer, make_tokenizer
from services.tokenizer.encoders import SHORT_CHARS
from services.tokenizer.sequence_text import PlainStream
from shared.errors import Reason, ServiceError
from tests.conformance_strings import conformance_strings
from tests.tokenizer_files import GPT_2, GPT_4O, SPECIAL_TOKENS, TrainedTokenizer, trained_tokenizer

STRINGS = conformance_strings()


def test_there_are_enough_strings() -> None:
    assert len(STRINGS) >= 1000
    assert len(set(STRINGS)) == len(STRINGS)


@pytest.fixture(scope="module", params=[GPT_2, GPT_4O])
def trained(request: pytest.FixtureRequest) -> TrainedTokenizer:
    return trained_tokenizer(request.param)


@pytest.fixture(scope="module")
def gguf_bpe(trained: TrainedTokenizer) -> Tokenizer:
    return make_tokenizer(trained.data())


@pytest.fixture(scope="module")
def hf_json(trained: TrainedTokenizer) -> Tokenizer:
    return make_tokenizer(trained.data(tokenizer_json=trained.json.encode()))


@pytest.mark.parametrize("parse_special", [False, True])
def test_encoding_is_that_of_the_tokenizer_json(
    trained: TrainedTokenizer, gguf_bpe: Tokenizer, hf_json: Tokenizer, parse_special: bool
) -> None:
    reference = tokenizers.Tokenizer.from_str(trained.json)
    reference.encode_special_tokens = not parse_special
    assert (gguf_bpe.backend, hf_json.backend) == (GGUF_BPE, HF_JSON)
    for text in STRINGS:
        expected = reference.encode(text, add_special_tokens=False).ids
        assert gguf_bpe.encode(text, parse_special=parse_special, add_special=False) == expected, text
        assert hf_json.encode(text, parse_special=parse_special, add_special=False) == expected, text


@pytest.mark.parametrize("parse_special", [False, True])
def test_long_texts_are_encoded_as_short_ones(
    trained: TrainedTokenizer, gguf_bpe: Tokenizer, parse_special: bool
) -> None:
    """They take another way through the library, and so do the spellings in them."""
    reference = tokenizers.Tokenizer.from_str(trained.json)
    reference.encode_special_tokens = not parse_special
    text = "".join(STRINGS)
    assert len(text) > SHORT_CHARS
    expected = reference.encode(text, add_special_tokens=False).ids
    assert gguf_bpe.encode(text, parse_special=parse_special, add_special=False) == expected
    spellings = gguf_bpe.vocabulary.special_spellings
    assert spellings is not None
    pattern = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    assert spellings.spans(text) == [match.span() for match in pattern.finditer(text)] != []


@pytest.mark.parametrize("special_tokens", [False, True])
def test_decoding_is_that_of_the_tokenizer_json(
    trained: TrainedTokenizer, gguf_bpe: Tokenizer, hf_json: Tokenizer, special_tokens: bool
) -> None:
    reference = tokenizers.Tokenizer.from_str(trained.json)
    for text in STRINGS:
        ids = reference.encode(text, add_special_tokens=False).ids
        expected = reference.decode(ids, skip_special_tokens=not special_tokens)
        assert gguf_bpe.decode(ids, special_tokens=special_tokens) == expected
        assert hf_json.decode(ids, special_tokens=special_tokens) == expected
        if special_tokens:
            assert expected == text


def test_ids_cut_inside_characters_decode_as_tokenizers_does(trained: TrainedTokenizer, gguf_bpe: Tokenizer) -> None:
    reference = tokenizers.Tokenizer.from_str(trained.json)
    num_invalid = 0
    for text in STRINGS:
        ids = reference.encode(text, add_special_tokens=False).ids
        for piece in (ids[1:], ids[:-1], ids[::-1]):
            expected = reference.decode(piece, skip_special_tokens=False)
            assert gguf_bpe.decode(piece, special_tokens=True) == expected
            num_invalid += "\ufffd" in expected
    assert num_invalid > 500


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_ids_stream_to_what_tokenizers_decodes(data: st.DataObject) -> None:
    trained = trained_tokenizer(GPT_4O)
    tokenizer, reference = make_once(GPT_4O), reference_once(GPT_4O)
    some_ids = st.one_of(st.integers(0, 300), st.integers(0, len(trained.tokens) - 1))
    ids = data.draw(st.lists(some_ids, max_size=30))
    stream = PlainStream(tokenizer.vocabulary.plain, [], None, 0, 0)
    pieces = []
    while ids[sum(map(len, pieces)) :]:
        rest = ids[sum(map(len, pieces)) :]
        pieces.append(rest[: data.draw(st.integers(1, len(rest)))])
    texts = []
    for piece in pieces:
        stream.feed(piece)
        texts += [segment.text for segment in stream.take()]
    stream.finish()
    texts += [segment.text for segment in stream.take()]
    assert "".join(texts) == reference.decode(ids, skip_special_tokens=True)


@cache
def make_once(pre: str) -> Tokenizer:
    return make_tokenizer(trained_tokenizer(pre).data())


@cache
def reference_once(pre: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(trained_tokenizer(pre).json)


def test_text_survives_without_permission(gguf_bpe: Tokenizer) -> None:
    special_ids = set(gguf_bpe.vocabulary.special_texts)
    for text in (*STRINGS, *SPECIAL_TOKENS):
        ids = gguf_bpe.encode(text, parse_special=False, add_special=False)
        assert special_ids.isdisjoint(ids)
        assert gguf_bpe.decode(ids, special_tokens=False) == text


def test_bos_comes_first_where_the_model_wants_one(trained: TrainedTokenizer) -> None:
    data = trained.data(add_bos_token=True)
    for tokenizer in (
        make_tokenizer(data),
        make_tokenizer(trained.data(tokenizer_json=trained.json.encode(), add_bos_token=True)),
    ):
        plain = tokenizer.encode("text", parse_special=False, add_special=False)
        assert tokenizer.encode("text", parse_special=False, add_special=True) == [data.bos_token_id, *plain]


def test_o200k_keeps_marks_and_capitals_with_their_words() -> None:
    """Words as OpenAI's o200k splits them; a token never spans two of them."""
    tokenizer = make_tokenizer(trained_tokenizer(GPT_4O).data())
    words = tokenizer.plain.pre_tokenizer.pre_tokenize_str
    expected = {
        "ÉCOLE École": ["ÉCOLE", " École"],
        "HTTPServer": ["HTTPServer"],
        "helloWorld": ["hello", "World"],
        "DON'T don't": ["DON'T", " don't"],
        "a\u0301e\u0301": ["a\u0301e\u0301"],
        "1234567": ["123", "456", "7"],
        "x //\n\ny": ["x", " //\n\n", "y"],
        "a   b": ["a", "  ", " b"],
    }
    for text, split in expected.items():
        found = [text[start:end] for _, (start, end) in words(text)]
        assert found == split


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "llama"}, Reason.TOKENIZER_UNSUPPORTED),
        ({"pre": "llama-bpe"}, Reason.TOKENIZER_UNSUPPORTED),
        ({"pre": ""}, Reason.TOKENIZER_UNSUPPORTED),
        ({"tokenizer_json": b"{"}, Reason.MODEL_INVALID),
        ({"tokenizer_json": b"[]"}, Reason.MODEL_INVALID),
        ({"tokenizer_json": b"\xff\xfe"}, Reason.MODEL_INVALID),
    ],
)
def test_what_cannot_be_served_is_refused(changes: dict[str, object], reason: Reason) -> None:
    with pytest.raises(ServiceError) as raised:
        make_tokenizer(trained_tokenizer(GPT_2).data(**changes))
    assert raised.value.reason is reason


def test_a_vocabulary_without_some_byte_is_refused() -> None:
    trained = trained_tokenizer(GPT_2)
    tokens = tuple("<none>" if text == "Ġ" else text for text in trained.tokens)
    merges = tuple(merge for merge in trained.merges if "Ġ" not in merge.split(" "))
    with pytest.raises(ServiceError, match="byte 0x20"):
        make_tokenizer(trained.data(tokens=tokens, merges=merges))


def test_another_models_tokenizer_json_is_refused() -> None:
    trained = trained_tokenizer(GPT_2)
    other = trained_tokenizer(GPT_4O)
    with pytest.raises(ServiceError, match=r"another model's: id \d+ is"):
        make_tokenizer(trained.data(tokenizer_json=other.json.encode()))
    with pytest.raises(ServiceError, match=r"the tokenizer\.json has id"):
        make_tokenizer(
            trained.data(
                tokens=trained.tokens[:-1], token_types=trained.token_types[:-1], tokenizer_json=trained.json.encode()
            )
        )


def test_a_tokenizer_json_that_is_not_byte_level_is_refused() -> None:
    json = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).to_str()
    with pytest.raises(ServiceError) as raised:
        make_tokenizer(trained_tokenizer(GPT_2).data(tokenizer_json=json.encode()))
    assert raised.value.reason is Reason.TOKENIZER_UNSUPPORTED


def test_an_id_outside_the_vocabulary_is_refused(gguf_bpe: Tokenizer) -> None:
    for token_id in (gguf_bpe.vocabulary.size, 2**32 - 1):
        with pytest.raises(ServiceError, match=f"Token id {token_id} is outside the vocabulary of") as raised:
            gguf_bpe.decode([0, token_id], special_tokens=False)
        assert raised.value.reason is Reason.TOKEN_ID_INVALID
