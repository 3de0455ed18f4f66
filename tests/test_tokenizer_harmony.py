"""Harmony over token ids: round trips, every cut, what models get wrong, and that nothing said is lost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.tokenizer.backends import Tokenizer, make_tokenizer
from services.tokenizer.harmony import MAX_HEADER_IDS, HarmonyStream
from services.tokenizer.sequence_text import Segment
from services.tokenizer.stop_strings import StopStrings
from tests.tokenizer_files import GPT_4O, SPECIAL_TOKENS, trained_tokenizer

PROMPT = "<|start|>user<|message|>hi<|end|><|start|>assistant"


@cache
def tokenizer() -> Tokenizer:
    return make_tokenizer(trained_tokenizer(GPT_4O).data())


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, parse_special=True, add_special=False)


def stream(
    prompt: str = PROMPT, stops: Sequence[str] = (), min_tokens: int = 0, num_released: int = 0
) -> HarmonyStream:
    vocabulary = tokenizer().vocabulary
    matcher = StopStrings(stops) if stops else None
    return HarmonyStream(vocabulary.plain, vocabulary.harmony_markers, ids_of(prompt), matcher, 0, num_released)


def joined(segments: Sequence[Segment]) -> list[tuple[str, str, str]]:
    """(channel, recipient, text) of neighbouring segments alike, those without text left out."""
    result: list[tuple[str, str, str]] = []
    for segment in segments:
        if not segment.text:
            continue
        if result and result[-1][:2] == (segment.channel, segment.recipient):
            result[-1] = (*result[-1][:2], result[-1][2] + segment.text)
        else:
            result.append((segment.channel, segment.recipient, segment.text))
    return result


def parsed(text: str, prompt: str = PROMPT, stops: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """What an answer comes to, fed one id at a time."""
    harmony = stream(prompt, stops)
    segments: list[Segment] = []
    for token_id in ids_of(text):
        harmony.feed([token_id])
        segments += harmony.take()
    harmony.finish()
    segments += harmony.take()
    if harmony.matched_stop is None:
        assert sum(segment.num_ids for segment in segments) == len(ids_of(text))
    return joined(segments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel|>final<|message|>Hi there.<|return|>", [("final", "", "Hi there.")]),
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>42<|return|>",
            [("analysis", "", "Hm."), ("final", "", "42")],
        ),
        (
            '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":"Oslo"}<|call|>',
            [("commentary", "functions.get_weather", '{"city":"Oslo"}')],
        ),
        (
            " to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
            [("commentary", "functions.f", "{}")],
        ),
        (
            "<|channel|>analysis<|message|>a<|end|>"
            "<|start|>assistant to=browser.search<|channel|>commentary json<|message|>b<|call|>",
            [("analysis", "", "a"), ("commentary", "browser.search", "b")],
        ),
        ("<|message|>no channel<|return|>", [("", "", "no channel")]),
        ("<|channel|>final<|constrain|>json<|message|>{}<|return|>", [("final", "", "{}")]),
        # An <|end|> left out: the next header begins another message all the same.
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", [("analysis", "", "a"), ("final", "", "b")]),
        (
            "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b",
            [("analysis", "", "a"), ("final", "", "b")],
        ),
        # No header where one belongs: it is text, at once.
        ("Hello there!", [("", "", "Hello there!")]),
        ("hello", [("", "", "hello")]),
        ("<|channel|>final<|message|>a<|end|>more", [("final", "", "a"), ("", "", "more")]),
        ("<|channel|>one two three four five<|message|>x", [("", "", "one two three four fivex")]),
        ("<|channel|>final\n<|message|>x", [("", "", "final\nx")]),
        ("<|channel|>final<|return|>", [("", "", "final")]),
        ("<|channel|>analysis<|channel|>final<|message|>x", [("", "", "analysis"), ("final", "", "x")]),
        # Markers where they mean nothing have no text.
        ("<|channel|>final<|message|>a<|message|>b<|constrain|>c<|return|>", [("final", "", "abc")]),
        ("<|return|><|end|><|call|>", []),
        ("<|start|><|start|><|message|>x", [("", "", "x")]),
        # A header cut short by the end of the output is no text.
        ("<|channel|>analysis", []),
        (" to=functions.f", []),
        ("<|channel|>final<|message|>a<|end|><|start|>assis", [("final", "", "a")]),
        ("", []),
    ],
)
def test_answers(text: str, expected: list[tuple[str, str, str]]) -> None:
    assert parsed(text) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|start|>assistant", [("", "", "x")]),
        ("<|start|>assistant<|channel|>final<|message|>", [("final", "", "x")]),
        ("<|start|>assistant<|channel|>commentary to=functions.f<|message|>{", [("commentary", "functions.f", "x")]),
        ("<|start|>assistant<|channel|>fin", []),
        ("<|start|>assistant<|channel|>final<|message|>a<|end|>", [("", "", "x")]),
        ("plain text", [("", "", "x")]),
        ("", [("", "", "x")]),
        ("<|start|>", []),
    ],
)
def test_where_the_prompt_ends_decides_what_text_is(prompt: str, expected: list[tuple[str, str, str]]) -> None:
    assert parsed("x", prompt) == expected


def test_a_header_begun_in_the_prompt_goes_on() -> None:
    assert parsed("lysis<|message|>x", "<|start|>assistant<|channel|>ana") == [("analysis", "", "x")]
    expected = [("commentary", "functions.f", "x")]
    assert parsed("f<|channel|>commentary<|message|>x", "<|start|>assistant to=functions.") == expected


def test_a_character_begun_in_the_prompt_goes_on_in_the_same_message_only() -> None:
    rocket = ids_of("🚀")
    assert len(rocket) > 1, "the vocabulary knows the rocket; take another character"
    vocabulary = tokenizer().vocabulary
    prompt = [*ids_of("<|start|>assistant<|channel|>final<|message|>"), *rocket[:1]]
    harmony = HarmonyStream(vocabulary.plain, vocabulary.harmony_markers, prompt, None, 0, 0)
    harmony.feed(rocket[1:])
    harmony.finish()
    assert joined(harmony.take()) == [("final", "", "🚀")]
    harmony = HarmonyStream(vocabulary.plain, vocabulary.harmony_markers, [*prompt, *ids_of("<|end|>")], None, 0, 0)
    harmony.feed(ids_of("x"))
    assert joined(harmony.take()) == [("", "", "x")]


def test_a_marker_spelled_in_plain_text_is_text() -> None:
    spelled = tokenizer().encode("<|end|> <|return|>", parse_special=False, add_special=False)
    harmony = stream()
    harmony.feed(ids_of("<|channel|>final<|message|>") + spelled)
    harmony.finish()
    assert joined(harmony.take()) == [("final", "", "<|end|> <|return|>")]


def test_header_ids_come_without_text_and_with_their_messages_channel() -> None:
    harmony = stream()
    header = ids_of("<|channel|>analysis<|message|>")
    for token_id in header[:-1]:
        harmony.feed([token_id])
        assert harmony.take() == []
    harmony.feed(header[-1:])
    assert harmony.take() == [Segment(len(header), "", "analysis", "")]


def test_a_header_without_end_becomes_text() -> None:
    harmony = stream()
    letters = [*ids_of("<|channel|>"), *[ids_of(".")[0]] * (MAX_HEADER_IDS + 10)]
    harmony.feed(letters)
    assert sum(segment.num_ids for segment in harmony.take()) == len(letters)


def test_stop_strings_match_inside_one_message() -> None:
    answer = "<|channel|>analysis<|message|>one ST<|end|><|start|>assistant<|channel|>final<|message|>OP two STOP three"
    assert parsed(answer, stops=["STOP"]) == [("analysis", "", "one ST"), ("final", "", "OP two ")]
    assert parsed("<|channel|>final<|message|>final", stops=["final"]) == []
    assert parsed("Hello there!", stops=["lo th"]) == [("", "", "Hel")]


messages = st.tuples(
    st.sampled_from(("analysis", "commentary", "final", "")),
    st.sampled_from(("", "functions.get_weather", "python")),
    st.booleans(),
    st.text("ab <|>é€👩\n", max_size=12),
    st.sampled_from(("<|end|>", "<|call|>", "<|return|>")),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(messages, min_size=1, max_size=4))
def test_round_trip(spoken: list[tuple[str, str, bool, str, str]]) -> None:
    ids: list[int] = []
    expected: list[Segment] = []
    for index, (channel, recipient, is_in_role, content, end) in enumerate(spoken):
        to = f" to={recipient}" if recipient else ""
        header = "" if index == 0 else "<|start|>assistant"
        header += to if is_in_role or not channel else ""
        header += f"<|channel|>{channel}{'' if is_in_role else to}" if channel else ""
        ids += ids_of(header + "<|message|>")
        ids += tokenizer().encode(content, parse_special=False, add_special=False)
        ids += ids_of(end)
        expected.append(Segment(0, content, channel, recipient))
    harmony = stream()
    harmony.feed(ids)
    harmony.finish()
    assert joined(harmony.take()) == joined(expected)


@cache
def fuzz_ids() -> list[int]:
    words = ("final", " to=", "functions", ".", "é", " ", "\n", "x", "commentary", "json", "STOP", "🚀")
    markers = [text for text in SPECIAL_TOKENS if text != "<|startoftext|>"] * 3
    return sorted({token_id for text in (*markers, *words) for token_id in ids_of(text)})


@settings(max_examples=300, deadline=None)
@given(data=st.data(), length=st.integers(0, 40), stops=st.sampled_from(((), ("STOP",), ("x", "l\n"))))
def test_any_ids_in_any_pieces(data: st.DataObject, length: int, stops: Sequence[str]) -> None:
    """Nothing crashes; cuts don't matter; every id comes out; a replay goes on where the stream broke."""
    ids = data.draw(st.lists(st.sampled_from(fuzz_ids()), min_size=length, max_size=length))
    whole = stream(stops=stops)
    whole.feed(ids)
    whole.finish()
    everything = whole.take()
    num_out = sum(segment.num_ids for segment in everything)
    assert num_out == len(ids) or whole.matched_stop is not None
    num_before = data.draw(st.integers(0, length))
    first = stream(stops=stops)
    before: list[Segment] = []
    for token_id in ids[:num_before]:
        first.feed([token_id])
        before += first.take()
    num_released = sum(segment.num_ids for segment in before)
    second = stream(stops=stops, num_released=num_released)
    second.feed(ids[:num_before])
    second.feed(ids[num_before:])
    second.finish()
    after = second.take()
    assert joined([*before, *after]) == joined(everything)
    assert num_released + sum(segment.num_ids for segment in after) == num_out
