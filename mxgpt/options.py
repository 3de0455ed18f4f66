"""The keyword arguments of a generation, and the request that they make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from mxgpt.errors import invalid_field
from mxgpt.v1 import executor_pb2 as pb
from shared.config import MAX_MESSAGE_BYTES

Message = Mapping[str, Any]  # role, content and, where there are any, name, thinking, tool_calls
Prompt = str | Sequence[int] | Sequence[Message]


class Options(TypedDict, total=False):
    """Options of a generation, named as in mxgpt.v1.GenerateRequest, whose comments state ranges and defaults."""

    request_id: str
    model: str
    priority: int
    # Sampling
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logit_bias: Mapping[int, float]
    n: int
    # Stopping
    max_tokens: int
    min_tokens: int
    stop_strings: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    # Output
    logprobs: int
    prompt_logprobs: int
    content: Literal["text_and_token_ids", "text", "token_ids"]
    special_tokens: bool
    # Chat, beside the messages
    tools: Sequence[Mapping[str, Any]]  # name, description, parameters (a JSON Schema)
    reasoning_effort: str
    date: str
    # Constraint: one of them
    json_schema: str
    regex: str
    choice: Sequence[str]
    grammar: str


def _fields(name: str) -> dict[str, str]:
    """Field names of a message in GenerateRequest, each with the name of the message's own field."""
    message = pb.GenerateRequest.DESCRIPTOR.fields_by_name[name].message_type
    assert message is not None
    return {field.name: name for field in message.fields}


# Option name -> the part of the request that it belongs to; "" for the request itself.
GROUPS: dict[str, str] = {
    **dict.fromkeys(("request_id", "model", "priority"), ""),
    **dict.fromkeys(("tools", "reasoning_effort", "date"), "chat"),
    **_fields("sampling"),
    **_fields("stopping"),
    **_fields("output"),
    **_fields("constraint"),
}


def build_request(prompt: Prompt, options: Mapping[str, Any]) -> pb.GenerateRequest:
    """The request for a prompt: text, token ids, or messages of a chat. An option that is None counts as not given.

    Raises:
        TypeError: for an option that does not exist, as for any keyword argument, or a prompt of another kind.
        MxgptError: FIELD_INVALID for a value that its field can't hold, or more than one message may carry.
    """
    request = pb.GenerateRequest()
    _set_prompt(request, prompt)
    for name, value in options.items():
        if name not in GROUPS:
            raise TypeError(f"unexpected option {name!r}")
        if value is not None:
            _set_option(request, name, value)
    _check_size(request)
    return request


def _check_size(request: pb.GenerateRequest) -> None:
    size, field = request.ByteSize(), request.WhichOneof("input")
    assert field is not None
    if size > MAX_MESSAGE_BYTES:
        raise invalid_field(
            field, f"the request takes {size} bytes, and a message holds {MAX_MESSAGE_BYTES >> 20} MiB at most"
        )


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        try:
            request.text = prompt
        except ValueError as error:
            raise invalid_field("text", str(error)) from error
        return
    items: list[Any] = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        request.chat.messages.extend(_chat_message(index, item) for index, item in enumerate(items))
        return
    try:
        request.token_ids.ids.extend(items)
    except ValueError as error:
        raise invalid_field("token_ids.ids", str(error)) from error
    request.token_ids.SetInParent()  # an empty prompt is the server's to refuse


def _set_option(request: pb.GenerateRequest, name: str, value: Any) -> None:
    group = GROUPS[name]
    path = f"{group}.{name}" if group else name
    if group == "chat" and request.WhichOneof("input") != "chat":
        raise invalid_field(path, "goes with messages of a chat, not with a text or token ids")
    target: Any = getattr(request, group) if group else request
    try:
        if name == "content":
            target.content = pb.OutputContent.Value(f"OUTPUT_CONTENT_{value.upper()}")
        elif name == "tools":
            target.tools.extend(_tool(tool) for tool in value)
        elif name == "choice":
            target.choice.texts.extend(value)
        elif name == "logit_bias":
            target.logit_bias.update(value)
        elif name in ("stop_strings", "stop_token_ids"):
            getattr(target, name).extend([value] if isinstance(value, str) else value)
        else:
            setattr(target, name, value)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise invalid_field(path, f"{value!r} does not fit: {error}") from error


def _chat_message(index: int, message: Message) -> pb.ChatMessage:
    try:
        fields = dict(message)
        calls = [_tool_call(call) for call in fields.pop("tool_calls", None) or ()]
        texts = {name: text for name, text in fields.items() if text is not None}
        return pb.ChatMessage(**texts, tool_calls=calls)
    except (TypeError, ValueError, KeyError) as error:
        raise invalid_field(f"chat.messages[{index}]", str(error)) from error


def _tool_call(call: Mapping[str, Any]) -> pb.ToolCall:
    return pb.ToolCall(name=call["name"], arguments_json=_as_json(call.get("arguments", {})))


def _tool(tool: Mapping[str, Any]) -> pb.Tool:
    parameters = tool.get("parameters")
    return pb.Tool(
        name=tool["name"],
        description=tool.get("description", ""),
        parameters_json="" if parameters is None else _as_json(parameters),
    )


def _as_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
