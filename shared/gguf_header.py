"""Parses and checks the header of one GGUF file: version, counts, metadata, and the tensors' records.

Each check is one that some parser has lacked; tests/test_gguf.py names the known cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shared.errors import Reason
from shared.ggml_type import UNSERVED_NAMES, GGMLType
from shared.gguf_metadata import Entry, Metadata, ValueType
from shared.gguf_reader import HeaderReader

MAX_NUM_KEYS = 4096  # real files have about 50; each costs memory many times its smallest size in the file
MAX_NUM_TENSORS = 512 * 20  # the most layers a model may have, times the most tensors of one
MAX_KEY_BYTES = (
    256  # the longest in use has about 60; the format's own limit of 65,535 would let names outweigh all else
)
MAX_NAME_BYTES = 63  # GGML_MAX_NAME, less the zero at its end
MAX_ALIGNMENT = 1 << 20
MIN_KEY_RECORD = 8 + 1 + 4 + 1  # name length, name, type, value
MIN_TENSOR_RECORD = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, number of dimensions, one dimension, type, offset


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies, and what it is."""

    name: str
    shape: tuple[int, ...]  # numpy's order (rows, columns): GGML's dimensions reversed
    type: GGMLType
    file_index: int  # into GGUFFile.paths
    offset: int  # of its first byte, from the start of its file
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is, of shape[-1] values."""
        return self.type.row_bytes(self.shape[-1])


@dataclass(frozen=True)
class Header:
    """What one file's header says."""

    version: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]  # in the file's order
    data_start: int  # in bytes from the file's start


def read_header(reader: HeaderReader, file_index: int) -> Header:
    """Parse the header that `reader` stands before, of the model's file number `file_index`.

    Raises:
        ServiceError: as `shared.gguf.read_gguf`.
    """
    version = _read_version(reader)
    num_tensors, num_keys = _read_counts(reader)
    entries = _read_entries(reader, num_keys)
    metadata = Metadata(reader.path, reader.buffer, entries)
    alignment = _alignment(reader, metadata, entries)
    tensors = _read_tensors(reader, num_tensors, file_index, alignment)
    reader.finish()
    return Header(version, metadata, tensors, _align(reader.position, alignment))


def _read_version(reader: HeaderReader) -> int:
    if reader.size == 0:
        reader.refuse(0, "the file is empty")
    start = reader.read_u32("the magic number").to_bytes(4, "little")
    if start != b"GGUF":
        is_pointer = start == b"vers"
        hint = "; it is a Git LFS pointer: fetch the file itself" if is_pointer else ""
        reader.refuse(0, f"not a GGUF file: it starts with {start!r}{hint}")
    version = reader.read_u32("the version")
    if version in (2, 3):
        return version
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version == 1:
        why = "GGUF version 1 is not read, only 2 and 3: convert the file anew"
    elif swapped in (1, 2, 3):
        why = f"the file is big-endian (GGUF version {swapped}), and only little-endian files are read"
    else:
        why = f"GGUF version {version} is not read, only 2 and 3"
    reader.refuse(4, why, Reason.FILE_VERSION_UNSUPPORTED)


def _read_counts(reader: HeaderReader) -> tuple[int, int]:
    """The numbers of tensors and of keys, bounded by the bytes that are left for them."""
    num_tensors = reader.read_u64("the number of tensors")
    num_keys = reader.read_u64("the number of keys")
    counts = (
        (8, "tensors", num_tensors, MIN_TENSOR_RECORD, MAX_NUM_TENSORS),
        (16, "keys", num_keys, MIN_KEY_RECORD, MAX_NUM_KEYS),
    )
    for offset, what, count, min_record, limit in counts:
        if count > reader.num_bytes_left // min_record:
            reader.refuse(offset, f"{count} {what} don't fit into the {reader.num_bytes_left} bytes left")
        if count > limit:
            reader.refuse(offset, f"{count} {what} are more than the {limit} that are read")
    return num_tensors, num_keys


def _read_entries(reader: HeaderReader, num_keys: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for _ in range(num_keys):
        start = reader.position
        key = _read_name(reader, "a key", MAX_KEY_BYTES, "ascii")
        if key in entries:
            reader.refuse(start, f"key {show(key)} is there twice")
        entries[key] = _read_entry(reader, key)
    return entries


def _read_entry(reader: HeaderReader, key: str) -> Entry:
    type_ = _read_value_type(reader, key)
    if type_ == ValueType.ARRAY:
        return _read_array(reader, key)
    offset = reader.position
    if type_ == ValueType.STRING:
        reader.skip(reader.read_u64(f"string {show(key)}"), f"string {show(key)}")
    else:
        reader.skip(type_.dtype.itemsize, f"value {show(key)}")
    if type_ == ValueType.BOOL:
        _check_bools(reader, offset, key)
    return Entry(type_, None, offset, 1, None)


def _read_array(reader: HeaderReader, key: str) -> Entry:
    type_offset = reader.position
    element_type = _read_value_type(reader, key)
    if element_type == ValueType.ARRAY:
        reader.refuse(type_offset, f"{show(key)} is an array of arrays, which are not read")
    count = reader.read_u64(f"the length of array {show(key)}")
    offset = reader.position
    if element_type == ValueType.STRING:
        return Entry(ValueType.ARRAY, element_type, offset, count, reader.skip_strings(count, f"array {show(key)}"))
    reader.skip(count * element_type.dtype.itemsize, f"array {show(key)}")
    if element_type == ValueType.BOOL:
        _check_bools(reader, offset, key)
    return Entry(ValueType.ARRAY, element_type, offset, count, None)


def _read_value_type(reader: HeaderReader, key: str) -> ValueType:
    offset = reader.position
    number = reader.read_u32(f"the type of {show(key)}")
    try:
        return ValueType(number)
    except ValueError:
        reader.refuse(offset, f"{show(key)} has the unknown value type {number}")


def _check_bools(reader: HeaderReader, start: int, key: str) -> None:
    """Refuse bytes other than 0 and 1, from `start` to the reader's position."""
    rest = reader.buffer[start : reader.position].lstrip(b"\0\1")
    if rest:
        reader.refuse(reader.position - len(rest), f"{show(key)} holds {rest[0]} for a bool, which is 0 or 1")


def _alignment(reader: HeaderReader, metadata: Metadata, entries: Mapping[str, Entry]) -> int:
    """`general.alignment`, or the format's default."""
    key = "general.alignment"
    if key not in entries:
        return 32
    if entries[key].type != ValueType.UINT32:
        reader.refuse(entries[key].offset, f"{key} is {entries[key].type.name}, not UINT32")
    alignment = metadata.get_int(key)
    if alignment == 0 or alignment & (alignment - 1) or alignment > MAX_ALIGNMENT:
        reader.refuse(entries[key].offset, f"{key} is {alignment}, not a power of two up to {MAX_ALIGNMENT}")
    return alignment


def _read_tensors(reader: HeaderReader, num_tensors: int, file_index: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensors, whose offsets in the data must be the running sum of the padded sizes before them."""
    tensors: dict[str, TensorInfo] = {}  # with offsets in the data, until it is known where that starts
    end = 0
    for _ in range(num_tensors):
        start = reader.position
        name = _read_name(reader, "a tensor's name", MAX_NAME_BYTES, "utf-8")
        if name in tensors:
            reader.refuse(start, f"tensor {name!r} is there twice")
        shape, type_ = _read_shape(reader, name)
        num_bytes = math.prod(shape) // type_.block_size * type_.type_size
        offset = reader.read_u64(f"the offset of tensor {name!r}")
        expected = _align(end, alignment)
        if offset != expected:
            reader.refuse(reader.position - 8, f"tensor {name!r} has offset {offset}, and {expected} comes next")
        end = offset + num_bytes
        if end > reader.size:
            what = f"tensor {name!r} takes {num_bytes} bytes, which end past the file's {reader.size}"
            reader.refuse(start, f"{what}: it is cut off, or not what it says")
        tensors[name] = TensorInfo(name, shape, type_, file_index, offset, num_bytes)
    data_start = _align(reader.position, alignment)
    for name, tensor in tensors.items():
        end = data_start + tensor.offset + tensor.num_bytes
        if end > reader.size:
            reader.refuse(reader.size, f"the file ends here, and tensor {name!r} at byte {end}: it is cut off")
        tensors[name] = replace(tensor, offset=data_start + tensor.offset)
    return tensors


def _read_shape(reader: HeaderReader, name: str) -> tuple[tuple[int, ...], GGMLType]:
    """A tensor's shape (numpy's order) and type, such that its elements can be counted and fill whole blocks."""
    start = reader.position
    num_dimensions = reader.read_u32(f"the number of dimensions of tensor {name!r}")
    if not 1 <= num_dimensions <= 4:
        reader.refuse(start, f"tensor {name!r} has {num_dimensions} dimensions, not 1 to 4")
    dimensions = [reader.read_u64(f"a dimension of tensor {name!r}") for _ in range(num_dimensions)]
    if min(dimensions) < 1:
        reader.refuse(start + 4, f"tensor {name!r} has the dimensions {dimensions}; each must be at least 1")
    if math.prod(dimensions) >= 1 << 63:
        reader.refuse(start + 4, f"tensor {name!r} has the dimensions {dimensions}, whose product passes 2^63")
    type_offset = reader.position
    number = reader.read_u32(f"the type of tensor {name!r}")
    try:
        type_ = GGMLType(number)
    except ValueError:
        why = f"tensor {name!r} is of type {UNSERVED_NAMES.get(number, 'unknown')} ({number}), which is not served"
        reader.refuse(type_offset, why, Reason.TENSOR_TYPE_UNSUPPORTED)
    if dimensions[0] % type_.block_size:
        why = f"tensor {name!r} has rows of {dimensions[0]}, no multiple of {type_.name}'s block of {type_.block_size}"
        reader.refuse(start + 4, why)
    return tuple(reversed(dimensions)), type_


def _read_name(reader: HeaderReader, what: str, max_bytes: int, encoding: str) -> str:
    start = reader.position
    name = reader.read_string(what, max_bytes=max_bytes)
    if not name:
        reader.refuse(start, f"{what} is empty")
    try:
        return name.decode(encoding)
    except UnicodeDecodeError as error:
        reader.refuse(start + 8 + error.start, f"{what} is not valid {encoding.upper()}")


def show(name: str) -> str:
    """A name from the file for a message: quoted, control characters escaped, and not long."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _align(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment
