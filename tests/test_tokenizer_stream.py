"""Streamed text against a definition by brute force: after every id, what may be out is out, and nothing else."""

from __future__ import annotations

import string
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxgpt.v1 import tokenizer_pb2
from services.tokenizer.detokenizer import Detokenizer
from services.tokenizer.sequence_text import PlainStream
from services.tokenizer.stop_strings import NOTHING, StopStrings
from services.tokenizer.vocabulary import TokenTable, make_vocabulary
from shared.errors import Reason, ServiceError

ALPHABET = "ab é€👩\u200d"


@st.composite
def cut_texts(draw: st.DrawFn) -> list[bytes]:
    """The bytes of a text, cut anywhere, with some of them broken."""
    data = bytearray(draw(st.text(ALPHABET, max_size=20)).encode())
    for position in draw(st.lists(st.integers(0, 40), max_size=3)):
        if position < len(data):
            data[position] = draw(st.integers(0, 255))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=25)))
    ends = [*cuts, len(data)]
    return [bytes(data[start:end]) for start, end in zip([0, *cuts], ends, strict=True)]


stop_sets = st.lists(st.text(ALPHABET + "\ufffd", min_size=1, max_size=4), max_size=4)


@dataclass(frozen=True)
class Expected:
    """What must be out."""

    num_ids: int
    text: str
    stop: str | None = None


def begun_at_end(data: bytes) -> int:
    """How many bytes at the end begin a character."""
    for length in (1, 2, 3):
        try:
            data[len(data) - length :].decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data" and length <= len(data):
                return length
    return 0


def expected_text(pieces: Sequence[bytes], stops: Sequence[str], min_tokens: int, is_finished: bool) -> Expected:
    """The definition: see text_stream.py and the comments of tokenizer.proto."""
    ends = [len(b"".join(pieces[:count])) for count in range(len(pieces) + 1)]
    data = b"".join(pieces)
    open_bytes = [begun_at_end(data[:end]) for end in ends]
    stable = [data[: end - more].decode("utf-8", "replace") for end, more in zip(ends, open_bytes, strict=True)]
    if is_finished:
        stable[-1], open_bytes[-1] = data.decode("utf-8", "replace"), 0
    text = stable[-1]
    for end in range(1, len(text) + 1):
        num_ids = next(count for count, known in enumerate(stable) if len(known) >= end)
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found and num_ids > min_tokens:
            longest = max(found, key=len)
            return Expected(num_ids, text[: end - len(longest)], longest)
    beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
    num_held = 0 if is_finished else max((len(b) for b in beginnings if text.endswith(b)), default=0)
    num_ids = max(
        count for count, known in enumerate(stable) if not open_bytes[count] and len(known) <= len(text) - num_held
    )
    return Expected(num_ids, stable[num_ids])


def table_of(pieces: Sequence[bytes]) -> TokenTable:
    """A vocabulary in which piece i has id i."""
    texts: list[str | None] = []
    for piece in pieces:
        try:
            texts.append(piece.decode())
        except UnicodeDecodeError:
            texts.append(None)
    return TokenTable(tuple(pieces), tuple(texts))


class Output:
    """Joins what a stream releases."""

    def __init__(self, stream: PlainStream) -> None:
        self.stream = stream
        self.num_ids = 0
        self.text = ""

    def collect(self) -> Expected:
        for segment in self.stream.take():
            assert segment.num_ids > 0
            self.num_ids += segment.num_ids
            self.text += segment.text
        return Expected(self.num_ids, self.text, self.stream.matched_stop)


@settings(max_examples=600, deadline=None)
@given(pieces=cut_texts(), stops=stop_sets, min_tokens=st.integers(0, 8))
def test_after_each_id_what_may_be_out_is_out(pieces: list[bytes], stops: list[str], min_tokens: int) -> None:
    output = Output(PlainStream(table_of(pieces), [], StopStrings(stops) if stops else None, min_tokens, 0))
    for count in range(1, len(pieces) + 1):
        output.stream.feed([count - 1])
        released = output.collect()
        assert released == expected_text(pieces[:count], stops, min_tokens, is_finished=False)
        released.text.encode()
        if released.stop is not None:
            return
    output.stream.finish()
    assert output.collect() == expected_text(pieces, stops, min_tokens, is_finished=True)


@settings(max_examples=300, deadline=None)
@given(pieces=cut_texts(), stops=stop_sets, data=st.data())
def test_a_replay_goes_on_where_the_stream_broke(pieces: list[bytes], stops: list[str], data: st.DataObject) -> None:
    matcher = StopStrings(stops) if stops else None
    table = table_of(pieces)
    first = Output(PlainStream(table, [], matcher, 2, 0))
    num_before = data.draw(st.integers(0, len(pieces)))
    first.stream.feed(range(num_before))
    before = first.collect()
    second = Output(PlainStream(table, [], matcher, 2, before.num_ids))
    num_replayed = data.draw(st.integers(before.num_ids, len(pieces)))
    second.stream.feed(range(num_replayed))
    second.stream.feed(range(num_replayed, len(pieces)))
    whole = Output(PlainStream(table, [], matcher, 2, 0))
    whole.stream.feed(range(len(pieces)))
    for output in (second, whole):
        output.stream.finish()
    after, everything = second.collect(), whole.collect()
    assert before.text + after.text == everything.text
    assert before.num_ids + after.num_ids == everything.num_ids
    assert after.stop == everything.stop


@settings(max_examples=300, deadline=None)
@given(prompt=st.text(ALPHABET, max_size=4), cut=st.integers(1, 3), pieces=cut_texts())
def test_a_prompt_that_ends_inside_a_character(prompt: str, cut: int, pieces: list[bytes]) -> None:
    """The character that the prompt begins is the output's if the output goes on with it, else nobody's."""
    data = prompt.encode()
    data = data[: max(0, len(data) - cut)]
    output = b"".join(pieces)
    begun = data[len(data) - begun_at_end(data) :]
    first = begun + output[:1]
    goes_on = bool(begun and output) and (is_text(first) or begun_at_end(first) == len(first))
    expected = (begun + output if goes_on else output).decode("utf-8", "replace")
    prompt_pieces = [data[index : index + 1] for index in range(len(data))]
    table = table_of([*prompt_pieces, *pieces])
    stream = Output(PlainStream(table, range(len(prompt_pieces)), None, 0, 0))
    for token_id in range(len(prompt_pieces), len(table.pieces)):
        stream.stream.feed([token_id])
    stream.stream.finish()
    assert stream.collect() == Expected(len(pieces), expected)


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@st.composite
def repetitive_texts(draw: st.DrawFn, max_count: int) -> str:
    """Text that begins stop strings again and again, and is often longer than the masks are deep at first."""
    parts = draw(st.lists(st.tuples(st.text("ab", min_size=1, max_size=3), st.integers(1, max_count)), max_size=4))
    return "".join(unit * count for unit, count in parts)


@settings(max_examples=200, deadline=None)
@given(
    stops=st.lists(repetitive_texts(40).filter(bool), min_size=1, max_size=6),
    before=repetitive_texts(50),
    pieces=st.lists(st.text("abc", max_size=6) | repetitive_texts(30), max_size=6),
    num_passed_over=st.integers(0, 4),
    max_masks=st.sampled_from([1, 2, 256]),
)
def test_stop_strings(stops: list[str], before: str, pieces: list[str], num_passed_over: int, max_masks: int) -> None:
    """Against the definition, after each piece of a text; other texts use the same stop strings at the same time."""
    beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.tokenizer.stop_strings.MAX_MASKS", max_masks)
        found = StopStrings(stops)
        state = other_state = NOTHING
        text = ""
        for count, piece in enumerate([before, *pieces]):
            start, text = len(text), text + piece
            passes_over = count < num_passed_over
            state, end, stop = found.step(state, piece, passes_over)
            ended = next((end for end in range(start + 1, len(text) + 1) if text[:end].endswith(tuple(stops))), None)
            if ended is not None and not passes_over:
                longest = max((stop for stop in stops if text[:ended].endswith(stop)), key=len)
                assert (end, stop) == (ended - start, longest)
                return
            assert (end, stop) == (0, "")
            assert found.num_held(state) == max((len(b) for b in beginnings if text.endswith(b)), default=0)
            other_state, _, _ = found.step(other_state, piece[::-1], True)


def test_stop_strings_take_little_more_memory_than_their_characters() -> None:
    """16 KiB of them are what a request may bring for each of its sequences."""
    random = Random(5)
    alphabet = string.ascii_letters
    sets = [["".join(random.choices(alphabet, k=1024)) for _ in range(16)] for _ in range(32)]
    table = table_of([character.encode() for character in alphabet])
    tracemalloc.start()
    try:
        start = time.process_time()
        streams = [PlainStream(table, [], StopStrings(stops), 0, 0) for stops in sets]
        for stream in streams:
            stream.feed(range(len(alphabet)))
        seconds = time.process_time() - start
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / len(streams) < 48 << 10
    assert seconds / len(streams) < 0.05, "tracing included"


def test_text_that_almost_ends_long_stop_strings_costs_little() -> None:
    """100,000 ids, after each of which 16 stop strings are all but complete, take well under ten seconds."""
    stops = ["a" * (1008 + index) + "c" for index in range(15)] + ["ba" * 500 + "c"]
    stream = PlainStream(table_of([b"a", b"aaaaaaaa", b"baba"]), [], StopStrings(stops), 0, 0)
    start = time.process_time()
    stream.feed([0] * 70_000 + [1] * 10_000 + [2] * 20_000)
    assert time.process_time() - start < 5
    assert stream.matched_stop is None


def test_sequences_share_equal_stop_strings() -> None:
    """The outputs of one request have the same; they go with the last sequence that has them."""
    detokenizer = Detokenizer(make_vocabulary(2, {0: "a", 1: "b"}, {}, {}))
    opens = [
        tokenizer_pb2.SequenceOpen(sequence_id=index, stop_strings=["aa", f"b{index // 8}"]) for index in range(16)
    ]
    detokenizer.handle(tokenizer_pb2.DetokenizeStreamRequest(opens=opens))
    assert len(detokenizer._stop_strings) == 2
    detokenizer.handle(tokenizer_pb2.DetokenizeStreamRequest(closed_ids=range(8)))
    assert len(detokenizer._stop_strings) == 1
    tokens = [tokenizer_pb2.SequenceTokens(sequence_id=index, token_ids=[0, 0]) for index in range(8, 16)]
    answer = detokenizer.handle(tokenizer_pb2.DetokenizeStreamRequest(tokens=tokens))
    assert {text.matched_stop for text in answer.texts} == {"aa"}
    assert not detokenizer._stop_strings


def released(texts: Sequence[str], stops: Sequence[str], min_tokens: int = 0) -> list[tuple[int, str]]:
    """What each id releases."""
    output = PlainStream(table_of([text.encode() for text in texts]), [], StopStrings(stops), min_tokens, 0)
    steps = []
    for token_id in range(len(texts)):
        output.feed([token_id])
        segments = output.take()
        steps.append((segments[0].num_ids, segments[0].text) if segments else (0, ""))
    return steps


def test_only_ids_that_overlap_the_beginning_of_a_stop_wait() -> None:
    assert released(["one ", "two", "\n", "\nUs", "x"], ["\n\nUser:"]) == [
        (1, "one "),
        (1, "two"),
        (0, ""),
        (0, ""),
        (3, "\n\nUsx"),
    ]
    assert released(["ab", "a", "b", "c"], ["abc"]) == [(0, ""), (1, "ab"), (0, ""), (3, "")]
    assert released(["xS", "T", "OP", "y"], ["STOP"]) == [(0, ""), (0, ""), (3, "x"), (0, "")]


def test_stops_within_min_tokens_are_passed_over() -> None:
    assert released(["a", ".", "b", ".", "c"], ["."], min_tokens=2) == [(1, "a"), (1, "."), (1, "b"), (1, ""), (0, "")]


def test_the_stop_that_is_complete_first_ends_the_text() -> None:
    stream = PlainStream(table_of([b"xabcd"]), [], StopStrings(["abcd", "bc", "c"]), 0, 0)
    stream.feed([0])
    assert (stream.matched_stop, stream.take()) == ("bc", [(1, "xa", "", "")])


def test_ids_outside_the_vocabulary_are_errors() -> None:
    table = table_of([b"a"])
    for feed in (lambda: PlainStream(table, [1], None, 0, 0), lambda: PlainStream(table, [], None, 0, 0).feed([0, 7])):
        with pytest.raises(ServiceError) as raised:
            feed()
        assert raised.value.reason is Reason.TOKEN_ID_INVALID


def test_a_long_wait_costs_no_more_per_id() -> None:
    """Ids that always end inside a character are all held; 200,000 of them take well under ten seconds."""
    piece = "€".encode()
    table = table_of([piece[:2], piece[2:] + piece[:2]])
    stream = PlainStream(table, [], StopStrings(["€" * 1000 + "x"]), 0, 0)
    stream.feed([0])
    stream.feed([1] * 200_000)
    assert stream.take() == []
    stream.finish()
    [(num_ids, text, _, _)] = stream.take()
    assert num_ids == 200_001
    assert text == "€" * 200_000 + "\ufffd"
