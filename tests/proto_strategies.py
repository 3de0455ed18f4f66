"""Any message of a type, by Hypothesis: every field, to its extremes, with values that mean something among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import strategies as st

MAX_DEPTH = 5

_TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["", "\0", "a" * 1025, "<|end|>", "{}", "[1", "🚀", "../x"]))
_FLOATS = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, 0.5, float("nan"), float("inf"), 1e-40]))


def _integers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.one_of(st.integers(0, 9), st.integers(low, high), st.sampled_from([low, 0, 1, high]))


_SCALARS: Mapping[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_INT32: _integers(-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_UINT32: _integers(0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_INT64: _integers(-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT64: _integers(0, (1 << 64) - 1),
    FieldDescriptor.CPPTYPE_FLOAT: _FLOATS,
    FieldDescriptor.CPPTYPE_DOUBLE: st.one_of(st.floats(), _FLOATS),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(-1, 9),  # proto3 carries numbers that no name stands for
}


def messages(type_: Any, known: Mapping[str, st.SearchStrategy[Any]] | None = None) -> st.SearchStrategy[Any]:
    """Messages of a class.

    Args:
        known: by a field's full name, values that are often right; half of that field's values are drawn from it.
    """
    return st.composite(lambda draw: _draw(draw, type_.DESCRIPTOR, known or {}, MAX_DEPTH))()


def _draw(
    draw: Callable[[st.SearchStrategy[Any]], Any],
    descriptor: Descriptor,
    known: Mapping[str, st.SearchStrategy[Any]],
    depth: int,
) -> Any:
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        is_message = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
        chances = 12 if field.full_name in known else 5  # of 16: what is known leads further, if it is there
        if (is_message and depth == 0) or draw(st.integers(0, 15)) >= chances:
            continue
        if is_message and field.message_type.GetOptions().map_entry:
            key_field, value_field = (field.message_type.fields_by_name[name] for name in ("key", "value"))
            entries = st.dictionaries(_values(key_field, known), _values(value_field, known), max_size=3)
            getattr(message, field.name).update(draw(entries))
        elif is_message and field.is_repeated:
            for _ in range(draw(st.integers(0, 2))):
                getattr(message, field.name).append(_draw(draw, field.message_type, known, depth - 1))
        elif is_message:
            getattr(message, field.name).CopyFrom(_draw(draw, field.message_type, known, depth - 1))
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(_values(field, known), max_size=4)))
        else:
            setattr(message, field.name, draw(_values(field, known)))
    return message


def _values(field: FieldDescriptor, known: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        any_value = st.binary(max_size=40) if field.type == FieldDescriptor.TYPE_BYTES else _TEXTS
    else:
        any_value = _SCALARS[field.cpp_type]
    likely = known.get(field.full_name)
    return any_value if likely is None else st.one_of(likely, any_value)
