"""Writes small GGUF files for tests: whole ones from values, and the parts that a hostile one is put together from."""

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared.ggml_type import GGMLType
from shared.gguf_metadata import ValueType
from shared.quantizers import quantize


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[np.ndarray, GGMLType]] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
) -> Path:
    """Write a valid file; see `gguf_bytes`."""
    path.write_bytes(gguf_bytes(metadata, tensors or {}, version=version, alignment=alignment))
    return path


def gguf_bytes(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[np.ndarray, GGMLType]],
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A valid file's bytes.

    Args:
        metadata: Python values (an int becomes UINT32 or INT64, a float FLOAT32, lists arrays of these), or numpy
            scalars and arrays, which keep their width.
        tensors: by name, float32 values of shape (rows, columns) or alike and the type to quantise them to; or
            ready blocks, uint8 of shape (rows, row_bytes), with their type.
        alignment: written as `general.alignment` where it is not the default of 32.
    """
    keys = [key_record(key, value) for key, value in metadata.items()]
    if alignment != 32:
        keys.append(key_record("general.alignment", alignment))
    records = []
    data = bytearray()
    for name, (values, type_) in tensors.items():
        blocks = values if values.dtype == np.uint8 else quantize(values, type_)
        rows = blocks.shape[-1] // type_.type_size * type_.block_size
        records.append(tensor_record(name, [rows, *reversed(blocks.shape[:-1])], type_, len(data)))
        data += pad(blocks.tobytes(), alignment)
    return pad(header(keys, records, version=version), alignment) + bytes(data)


def header(
    keys: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
) -> bytes:
    """A header of the records given; the counts may lie."""
    keys, tensors = list(keys), list(tensors)
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    return magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A string; its length may lie."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def typed_record(key: str | bytes, type_: int, value: bytes) -> bytes:
    """A key with a value's type and bytes."""
    return string(key) + struct.pack("<I", type_) + value


def array_record(key: str | bytes, element_type: int, count: int, values: bytes) -> bytes:
    """A key with an array's element type, count and bytes."""
    return typed_record(key, ValueType.ARRAY, struct.pack("<IQ", element_type, count) + values)


def key_record(key: str, value: Any) -> bytes:
    """A key with a Python or numpy value (see `gguf_bytes`)."""
    if isinstance(value, str | bytes):
        return typed_record(key, ValueType.STRING, string(value))
    if isinstance(value, list | tuple) and value and isinstance(value[0], str | bytes):
        return array_record(key, ValueType.STRING, len(value), b"".join(map(string, value)))
    array = np.asarray(value) if isinstance(value, np.ndarray | np.generic) else _as_array(value)
    type_ = {type_.dtype: type_ for type_ in NUMBER_TYPES}[array.dtype]
    if array.ndim == 0:
        return typed_record(key, type_, array.tobytes())
    return array_record(key, type_, len(array), array.tobytes())


def tensor_record(name: str | bytes, dimensions: Iterable[int], type_: int, offset: int) -> bytes:
    """A tensor's record; dimensions in GGML's order, columns first."""
    dimensions = list(dimensions)
    return string(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, type_, offset)


def pad(data: bytes, alignment: int = 32) -> bytes:
    return data + bytes(-len(data) % alignment)


NUMBER_TYPES = [type_ for type_ in ValueType if type_ not in (ValueType.STRING, ValueType.ARRAY)]


def _as_array(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if array.dtype.kind == "i" and (array.size == 0 or (array.min() >= 0 and array.max() < 1 << 32)):
        return array.astype(np.uint32)
    return array
