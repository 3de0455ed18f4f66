"""A GGUF header's keys and values, kept as the file's bytes and decoded when asked for.

Strings are UTF-8 by the format, yet files with other bytes exist: a value that is not valid UTF-8 decodes with
U+FFFD in place of each bad byte, so that it can be printed and sent anywhere, and `get_bytes` and
`StringArray.bytes_at` give what the file holds. Keys and tensor names must be valid; the parser sees to it.
"""

from __future__ import annotations

import enum
import itertools
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from shared.errors import Reason, ServiceError


class ValueType(enum.IntEnum):
    """The type of a metadata value, by its number in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of a number; strings and arrays have none."""
        return DTYPES[self]

    @property
    def is_integer(self) -> bool:
        return self in DTYPES and self.dtype.kind in "ui"

    @property
    def is_float(self) -> bool:
        return self in (ValueType.FLOAT32, ValueType.FLOAT64)


DTYPES: dict[ValueType, np.dtype[Any]] = {
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}


class Entry(NamedTuple):
    """Where a value lies in the header; what is not an array has no element type."""

    type: ValueType
    element_type: ValueType | None  # of an array
    offset: int  # of the first value's bytes (of a string: of its length), in bytes from the file's start
    num_values: int
    records: array[int] | None  # of a string array: where each string's length lies, and where the last one ends


class StringArray(Sequence[str]):
    """The strings of an array, decoded one by one as they are asked for (see the module on bad UTF-8)."""

    def __init__(self, buffer: bytearray, records: array[int]) -> None:
        self._buffer = buffer
        self._records = records

    def __len__(self) -> int:
        return len(self._records) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.bytes_at(index).decode("utf-8", "replace")

    def bytes_at(self, index: int) -> bytes:
        """The file's bytes of one string."""
        index = range(len(self))[index]
        return bytes(self._buffer[self._records[index] + 8 : self._records[index + 1]])

    def all_bytes(self) -> list[bytes]:
        """The file's bytes of every string."""
        buffer, records = bytes(self._buffer), self._records
        return [buffer[start + 8 : end] for start, end in itertools.pairwise(records)]

    def __iter__(self) -> Iterator[str]:
        buffer = self._buffer
        start = self._records[0]
        for end in self._records[1:]:
            yield buffer[start + 8 : end].decode("utf-8", "replace")
            start = end

    def __repr__(self) -> str:
        return f"StringArray({len(self)} strings)"


NumberArray: TypeAlias = npt.NDArray[np.integer] | npt.NDArray[np.floating] | npt.NDArray[np.bool_]
Value: TypeAlias = int | float | bool | str | StringArray | NumberArray


class Metadata(Mapping[str, Value]):
    """What a file says about its model, by key, in the file's order.

    `metadata[key]` decodes whatever is there. The getters want one type: they raise a ServiceError (MODEL_INVALID,
    naming file, offset and key) for a value of another type, and for a missing key unless a default is given.
    """

    def __init__(self, path: Path, buffer: bytearray, entries: Mapping[str, Entry]) -> None:
        self.path = path
        self._buffer = buffer
        self._entries = entries

    def __getitem__(self, key: str) -> Value:
        entry = self._entries[key]
        if entry.type == ValueType.STRING:
            return self._string_bytes(entry).decode("utf-8", "replace")
        if entry.type != ValueType.ARRAY:
            return self._scalar(entry)
        if entry.records is not None:
            return StringArray(self._buffer, entry.records)
        return self._number_array(entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def type_of(self, key: str) -> tuple[ValueType, ValueType | None]:
        """A value's type, and its elements' where it is an array."""
        entry = self._entries[key]
        return entry.type, entry.element_type

    def get_int(
        self, key: str, default: int | None = None, *, minimum: int | None = None, maximum: int | None = None
    ) -> int:
        """An integer of any width, checked to lie in [minimum, maximum]; the default is not checked."""
        if default is not None and key not in self:
            return default
        entry = self._require(key)
        if not entry.type.is_integer:
            raise self._wrong_type(key, entry, "an integer")
        value = int(self._scalar(entry))
        if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
            raise self.invalid(key, f"is {value}, outside [{_bound(minimum)}, {_bound(maximum)}]")
        return value

    def get_float(self, key: str, default: float | None = None) -> float:
        """A finite float of 32 or 64 bits."""
        if default is not None and key not in self:
            return default
        entry = self._require(key)
        if not entry.type.is_float:
            raise self._wrong_type(key, entry, "a float")
        value = float(self._scalar(entry))
        if not math.isfinite(value):
            raise self.invalid(key, f"is {value}, not a finite number")
        return value

    def get_bool(self, key: str, default: bool | None = None) -> bool:
        if default is not None and key not in self:
            return default
        entry = self._require(key)
        if entry.type != ValueType.BOOL:
            raise self._wrong_type(key, entry, "a bool")
        return bool(self._scalar(entry))

    def get_str(self, key: str, default: str | None = None) -> str:
        """A string; one that is not valid UTF-8 is refused, unlike by `metadata[key]`."""
        if default is not None and key not in self:
            return default
        try:
            return self.get_bytes(key).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.invalid(key, f"is not valid UTF-8: {error.reason}") from None

    def get_bytes(self, key: str) -> bytes:
        """A required string's bytes as the file has them."""
        entry = self._require(key)
        if entry.type != ValueType.STRING:
            raise self._wrong_type(key, entry, "a string")
        return self._string_bytes(entry)

    def get_strings(self, key: str) -> StringArray:
        """A required array of strings."""
        entry = self._require(key)
        if entry.records is None:
            raise self._wrong_type(key, entry, "an array of strings")
        return StringArray(self._buffer, entry.records)

    def get_ints(self, key: str) -> npt.NDArray[np.int64]:
        """A required array of integers of any width, as int64 of shape (count,)."""
        entry = self._require(key)
        if entry.element_type is None or not entry.element_type.is_integer:
            raise self._wrong_type(key, entry, "an array of integers")
        values = self._number_array(entry)
        if entry.element_type == ValueType.UINT64 and np.any(values > np.iinfo(np.int64).max):
            raise self.invalid(key, "holds a value past the largest signed 64-bit integer")
        return values.astype(np.int64)

    def get_floats(self, key: str) -> npt.NDArray[np.float64]:
        """A required array of finite floats, as float64 of shape (count,)."""
        entry = self._require(key)
        if entry.element_type is None or not entry.element_type.is_float:
            raise self._wrong_type(key, entry, "an array of floats")
        values = self._number_array(entry).astype(np.float64)
        if not np.all(np.isfinite(values)):
            raise self.invalid(key, "holds a value that is not a finite number")
        return values

    def invalid(self, key: str, why: str) -> ServiceError:
        """The error (to be raised) that says what is wrong with a key, where it lies and in which file."""
        entry = self._entries.get(key)
        place = "" if entry is None else f" byte {entry.offset}:"
        facts = {"file": str(self.path), "key": key}
        if entry is not None:
            facts["offset"] = str(entry.offset)
        return ServiceError(Reason.MODEL_INVALID, f"{self.path}:{place} {key} {why}.", metadata=facts)

    def _require(self, key: str) -> Entry:
        if key not in self._entries:
            raise self.invalid(key, "is missing")
        return self._entries[key]

    def _wrong_type(self, key: str, entry: Entry, wanted: str) -> ServiceError:
        found = entry.type.name if entry.element_type is None else f"ARRAY of {entry.element_type.name}"
        return self.invalid(key, f"is {found}, not {wanted}")

    def _scalar(self, entry: Entry) -> int | float | bool:
        value: int | float | bool = np.frombuffer(self._buffer, entry.type.dtype, 1, entry.offset).item()
        return value

    def _string_bytes(self, entry: Entry) -> bytes:
        start = entry.offset + 8
        length = int.from_bytes(self._buffer[entry.offset : start], "little")
        return bytes(self._buffer[start : start + length])

    def _number_array(self, entry: Entry) -> NumberArray:
        """A copy, (count,): aligned, and independent of the header's bytes."""
        assert entry.element_type is not None
        view = np.frombuffer(self._buffer, entry.element_type.dtype, entry.num_values, entry.offset)
        return view.copy()


def _bound(limit: int | None) -> str:
    return "..." if limit is None else str(limit)
