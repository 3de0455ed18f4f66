"""Keeps what a conversation says from becoming special tokens: only the template's own spellings are special.

A message that contains "<|end|>" would otherwise end itself and go on in another role's name. Such spellings are
broken by a mark before the template runs; where the mark still stands afterwards, the text is encoded as plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.tokenizer.backends import Tokenizer
from services.tokenizer.special_texts import SpecialTexts
from shared.errors import invalid_field

_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # code points that Unicode reserves for use inside a program


@dataclass(frozen=True)
class GuardedChat:
    """A template's variables, and what marks the special tokens spelled in them; None where there are none."""

    variables: Mapping[str, Any]
    mark: str | None


def guard(tokenizer: Tokenizer, variables: Mapping[str, Any], content_keys: tuple[str, ...]) -> GuardedChat:
    """Mark the special tokens that the strings under `content_keys` spell.

    Raises:
        ServiceError: FIELD_INVALID when the conversation uses up all the marks that there are.
    """
    spellings = tokenizer.vocabulary.special_spellings
    content = {key: variables[key] for key in content_keys if key in variables}
    texts = list(_strings(content))
    if spellings is None or not any(spellings.spans(text) for text in texts):
        return GuardedChat(variables, None)
    mark = next((mark for mark in _MARKS if not any(mark in text for text in texts)), None)
    if mark is None:
        raise invalid_field("chat.messages", "hold all of the noncharacters U+FDD0 to U+FDEF")
    return GuardedChat({**variables, **_marked(content, spellings, mark)}, mark)


def encode_rendered(tokenizer: Tokenizer, text: str, mark: str | None) -> tuple[str, list[int]]:
    """The text of a rendered conversation without marks, and its ids."""
    spellings = tokenizer.vocabulary.special_spellings
    if mark is None or spellings is None:
        return text, tokenizer.encode(text, parse_special=True, add_special=False)
    ids: list[int] = []
    position = 0
    for start, end in spellings.spans(text):
        ids += _encode_plain(tokenizer, text[position:start], mark)
        ids.append(tokenizer.vocabulary.special_ids[text[start:end]])
        position = end
    ids += _encode_plain(tokenizer, text[position:], mark)
    return _without(text, mark), ids


def _encode_plain(tokenizer: Tokenizer, text: str, mark: str) -> list[int]:
    return tokenizer.encode(_without(text, mark), parse_special=False, add_special=False)


def _without(text: str, mark: str) -> str:
    escaped = f"\\u{ord(mark):04x}"  # as a template's tojson may have written it
    return text.replace(mark, "").replace(escaped, "")


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _strings(part)]
    return [text for part in value for text in _strings(part)] if isinstance(value, list) else []


def _marked(value: Any, spellings: SpecialTexts, mark: str) -> Any:
    if isinstance(value, str):
        return spellings.replace(value, lambda spelling: spelling[0] + mark + spelling[1:])
    if isinstance(value, Mapping):
        return {_marked(key, spellings, mark): _marked(part, spellings, mark) for key, part in value.items()}
    return [_marked(part, spellings, mark) for part in value] if isinstance(value, list) else value
