"""Conversations as the variables that chat templates expect; the names are those of Hugging Face models."""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection
from typing import Any, NoReturn

from mxgpt.v1 import executor_pb2
from services.tokenizer.backends import Tokenizer
from shared.errors import invalid_field

ROLES = frozenset(("system", "developer", "user", "assistant", "tool"))
REASONING_EFFORTS = frozenset(("low", "medium", "high"))
MAX_JSON_DEPTH = 64  # of objects and arrays in one another; what walks through them recurses
CONTENT_KEYS = ("messages", "tools")  # the variables that hold what others wrote


def template_variables(tokenizer: Tokenizer, chat: executor_pb2.Chat) -> dict[str, Any]:
    """The variables for a template, as JSON values.

    Raises:
        ServiceError: FIELD_INVALID, naming the field.
    """
    if not chat.messages:
        raise invalid_field("chat.messages", "at least one message is needed")
    if chat.reasoning_effort and chat.reasoning_effort not in REASONING_EFFORTS:
        raise invalid_field("chat.reasoning_effort", f"is {chat.reasoning_effort!r}; low, medium and high are known")
    variables: dict[str, Any] = {
        "messages": [_message(message, f"chat.messages[{index}]") for index, message in enumerate(chat.messages)],
        "add_generation_prompt": True,
        "bos_token": _special_text(tokenizer, tokenizer.data.bos_token_id),
        "eos_token": _special_text(tokenizer, tokenizer.data.eos_token_id),
        "pad_token": _special_text(tokenizer, tokenizer.data.pad_token_id),
    }
    if chat.tools:
        variables["tools"] = [_tool(tool, f"chat.tools[{index}]") for index, tool in enumerate(chat.tools)]
    if chat.reasoning_effort:
        variables["reasoning_effort"] = chat.reasoning_effort
    if chat.date:
        variables["date"] = today(chat)
    return variables


def today(chat: executor_pb2.Chat) -> str:
    """The date that templates print, YYYY-MM-DD.

    Raises:
        ServiceError: FIELD_INVALID.
    """
    if not chat.date:
        return datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        return datetime.datetime.strptime(chat.date, "%Y-%m-%d").date().isoformat()
    except ValueError:
        raise invalid_field("chat.date", f"{chat.date!r:.40} is no date like 2025-12-31") from None


def _message(message: executor_pb2.ChatMessage, path: str) -> dict[str, Any]:
    """A message; what is empty is left out, except for the content, which templates take for granted."""
    if message.role not in ROLES:
        raise invalid_field(f"{path}.role", f"is {message.role!r:.40}; known are {', '.join(sorted(ROLES))}")
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        fields["name"] = message.name
    if message.thinking:
        fields["thinking"] = message.thinking
    if message.tool_calls:
        fields["tool_calls"] = [
            {"type": "function", "function": _tool_call(call, f"{path}.tool_calls[{index}]")}
            for index, call in enumerate(message.tool_calls)
        ]
    return fields


def _tool_call(call: executor_pb2.ToolCall, path: str) -> dict[str, Any]:
    if not call.name:
        raise invalid_field(f"{path}.name", "is empty")
    arguments = _parse_json(call.arguments_json, f"{path}.arguments_json") if call.arguments_json else {}
    return {"name": call.name, "arguments": arguments}


def _tool(tool: executor_pb2.Tool, path: str) -> dict[str, Any]:
    if not tool.name:
        raise invalid_field(f"{path}.name", "is empty")
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    if tool.parameters_json:
        parameters = _parse_json(tool.parameters_json, f"{path}.parameters_json")
        if not isinstance(parameters, dict):
            raise invalid_field(f"{path}.parameters_json", "is no JSON object")
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def _parse_json(text: str, path: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # an escape may be half of a surrogate pair, which is no text
        return value
    except ValueError as error:
        raise invalid_field(path, f"is no valid JSON: {error}"[:300]) from None
    except RecursionError:
        raise invalid_field(path, f"is nested deeper than {MAX_JSON_DEPTH} levels") from None


def _check_depth(value: Any) -> None:
    """Raise RecursionError for a value nested too deep, as json.loads does for much deeper ones."""
    nested = [value]
    for _ in range(MAX_JSON_DEPTH):
        nested = [part for each in nested for part in _parts(each) if isinstance(part, (dict, list))]
        if not nested:
            return
    raise RecursionError


def _parts(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _special_text(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.decode([token_id], special_tokens=True)
