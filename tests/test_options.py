"""Keyword arguments to a request."""

import pytest

from mxgpt import MxgptError
from mxgpt.options import GROUPS, Options, build_request
from mxgpt.v1 import executor_pb2 as pb


def test_options_are_the_fields_of_the_contract():
    assert set(Options.__annotations__) == set(GROUPS)
    here = {"request_id", "model", "priority"}
    for part in (pb.Sampling, pb.Stopping, pb.Output, pb.Constraint):
        here |= set(part.DESCRIPTOR.fields_by_name)
    here |= set(pb.Chat.DESCRIPTOR.fields_by_name) - {"messages"}
    assert set(Options.__annotations__) == here


def test_prompts():
    assert build_request("text", {}).text == "text"
    assert list(build_request([1, 2], {}).token_ids.ids) == [1, 2]
    assert build_request([], {}).WhichOneof("input") == "token_ids"
    chat = build_request([{"role": "user", "content": "hi"}], {"date": "2026-01-02"}).chat
    assert (chat.messages[0].role, chat.messages[0].content, chat.date) == ("user", "hi", "2026-01-02")


def test_chat_with_tools():
    tool = {"name": "f", "description": "does", "parameters": {"type": "object"}}
    call = {"name": "f", "arguments": {"x": "é"}}
    messages = [{"role": "assistant", "content": None, "thinking": "hm", "tool_calls": [call]}]
    chat = build_request(messages, {"tools": [tool], "reasoning_effort": "low"}).chat
    assert chat.tools[0].parameters_json == '{"type": "object"}'
    assert chat.messages[0].tool_calls[0].arguments_json == '{"x": "é"}'
    assert chat.messages[0].thinking == "hm"


def test_every_kind_of_field():
    request = build_request(
        "x",
        {
            "temperature": 0,
            "n": 2,
            "logit_bias": {5: -1.0},
            "stop_strings": ["a", "b"],
            "stop_token_ids": [3],
            "ignore_eos": True,
            "logprobs": 0,
            "content": "token_ids",
            "choice": ["yes", "no"],
            "priority": -3,
            "top_k": None,
        },
    )
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_k")
    assert dict(request.sampling.logit_bias) == {5: -1.0}
    assert list(request.stopping.stop_strings) == ["a", "b"]
    assert request.output.HasField("logprobs")
    assert request.output.content == pb.OUTPUT_CONTENT_TOKEN_IDS
    assert list(request.constraint.choice.texts) == ["yes", "no"]
    assert request.priority == -3


def test_one_stop_string_is_not_its_letters():
    assert list(build_request("x", {"stop_strings": "END"}).stopping.stop_strings) == ["END"]


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("x", {"seed": -1}, "sampling.seed"),
        ("x", {"temperature": "hot"}, "sampling.temperature"),
        ("x", {"content": "pictures"}, "output.content"),
        ("x", {"max_tokens": 2**40}, "stopping.max_tokens"),
        ("x", {"date": "2026-01-02"}, "chat.date"),
        ([1, -2], {}, "token_ids.ids"),
        ("half a pair: \ud83d", {}, "text"),
        ("x", {"stop_strings": ["\udcff"]}, "stopping.stop_strings"),
        ([{"role": "user", "content": "\udcff"}], {}, "chat.messages[0]"),
        ([{"role": "user", "contents": "hi"}], {}, "chat.messages[0]"),
        ([{"role": "user", "content": "hi"}], {"tools": [{"description": "nameless"}]}, "chat.tools"),
    ],
)
def test_values_that_do_not_fit_name_their_field(prompt, options, field):
    with pytest.raises(MxgptError) as caught:
        build_request(prompt, options)
    assert caught.value.field == field
    assert caught.value.reason == "FIELD_INVALID"


@pytest.mark.parametrize(
    ("prompt", "field"),
    [("x" * 2**24, "text"), ([2**28] * 2**22, "token_ids"), ([{"role": "user", "content": "x" * 2**24}], "chat")],
    ids=["text", "token ids", "chat"],
)
def test_a_request_larger_than_a_message_says_so(prompt, field):
    with pytest.raises(MxgptError, match=r"bytes, and a message holds 16 MiB at most") as caught:
        build_request(prompt, {})
    assert caught.value.field == field


@pytest.mark.parametrize(("prompt", "options"), [("x", {"temprature": 1}), (["a", "b"], {}), (7, {})])
def test_unknown_options_and_prompts_are_type_errors(prompt, options):
    with pytest.raises(TypeError):
        build_request(prompt, options)
