"""Reads GGUF files: what a model says about itself, and where each of its tensors lies.

A file is hostile input: it is parsed in one bounded pass over bytes that were read (`gguf_reader`), and everything
it claims is checked before it is believed. What comes out is consistent: keys and names are unique, and every
tensor is of a served type, whole and inside its file. Whether the tensors make a model is not asked here.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf_header import MAX_NUM_TENSORS, TensorInfo, read_header
from shared.gguf_metadata import Metadata, NumberArray, StringArray, Value
from shared.gguf_reader import HeaderReader

__all__ = [
    "FileStamp",
    "GGMLType",
    "GGUFFile",
    "Metadata",
    "NumberArray",
    "StringArray",
    "TensorInfo",
    "Value",
    "check_unchanged",
    "open_unchanged",
    "read_at",
    "read_gguf",
    "read_tensor",
]


@dataclass(frozen=True)
class FileStamp:
    """What tells a file from its replacement."""

    device: int
    inode: int
    size: int
    modified: int  # ns


@dataclass(frozen=True)
class GGUFFile:
    """A model's files (one, or its shards in order), parsed and checked; the metadata is that of the first."""

    paths: tuple[Path, ...]
    version: int
    metadata: Metadata
    tensors: Mapping[str, TensorInfo]  # in the files' order
    data_starts: tuple[int, ...]  # of each file: where tensor data begins, in bytes
    stamps: tuple[FileStamp, ...]  # of each file, as it was when parsed

    @property
    def file_sizes(self) -> tuple[int, ...]:
        return tuple(stamp.size for stamp in self.stamps)


def read_gguf(path: str | Path) -> GGUFFile:
    """Parse and check a GGUF file, together with its siblings where it is the first of several shards.

    Raises:
        ServiceError: MODEL_NOT_FOUND (missing, or not to be opened), FILE_VERSION_UNSUPPORTED,
            TENSOR_TYPE_UNSUPPORTED, MODEL_INVALID (all else that is wrong with it; the message names file, byte
            offset and reason), MODEL_CHANGED (it shrank while it was read).
    """
    first = _read_file(Path(path), 0)
    num_shards = first.metadata.get_int("split.count", 1)
    named = re.fullmatch(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", first.paths[0].name, re.DOTALL)
    if num_shards <= 1 and (named is None or int(named[3]) <= 1):
        return first
    _check_shard(first, 0, num_shards, named)
    assert named is not None
    names = [f"{named[1]}-{i + 1:05d}-of-{num_shards:05d}.gguf" for i in range(num_shards)]
    shards = [first]
    tensors = dict(first.tensors)
    for index, name in enumerate(names[1:], start=1):
        shard = _read_file(first.paths[0].with_name(name), index)
        _check_shard(shard, index, num_shards, named)
        for tensor in shard.tensors.values():
            if tensor.name in tensors:
                raise _invalid(shard, f"tensor {tensor.name!r} is in an earlier shard too")
            tensors[tensor.name] = tensor
        if len(tensors) > MAX_NUM_TENSORS:
            raise _invalid(shard, f"brings the tensors to {len(tensors)}; {MAX_NUM_TENSORS} are read")
        shards.append(shard)
    num_tensors = first.metadata.get_int("split.tensors.count")
    if num_tensors != len(tensors):
        raise first.metadata.invalid("split.tensors.count", f"is {num_tensors}, but the shards hold {len(tensors)}")
    return GGUFFile(
        paths=tuple(shard.paths[0] for shard in shards),
        version=first.version,
        metadata=first.metadata,
        tensors=tensors,
        data_starts=tuple(shard.data_starts[0] for shard in shards),
        stamps=tuple(shard.stamps[0] for shard in shards),
    )


def read_tensor(file: GGUFFile, info: TensorInfo) -> npt.NDArray[np.uint8]:
    """A tensor's bytes as they lie in the file, (num_bytes,).

    Raises:
        ServiceError: MODEL_CHANGED if the file is not the one that was parsed, MODEL_INVALID if it can't be read.
    """
    data = np.empty(info.num_bytes, np.uint8)
    with open_unchanged(file, info.file_index) as descriptor:
        read_at(file, info.file_index, descriptor, data.data, info.offset, info.name)
    return data


@contextlib.contextmanager
def open_unchanged(file: GGUFFile, index: int) -> Iterator[int]:
    """A descriptor of a model's file, for `read_at`.

    Raises:
        ServiceError: MODEL_CHANGED if it is not the one that was parsed.
    """
    path = file.paths[index]
    with _open_regular(path) as (descriptor, stamp):
        if stamp != file.stamps[index]:
            raise _changed(path)
        yield descriptor


def read_at(
    file: GGUFFile, index: int, descriptor: int, out: memoryview, offset: int, what: str = "its contents"
) -> None:
    """Fill `out` with the bytes of a file from `offset` on.

    Raises:
        ServiceError: MODEL_CHANGED if there are fewer, MODEL_INVALID if they can't be read, naming `what` they are.
    """
    path = file.paths[index]
    num_read = 0
    while num_read < out.nbytes:
        try:
            count = os.preadv(descriptor, [out[num_read:]], offset + num_read)
        except OSError as error:
            why = f"{path}: byte {offset + num_read}: reading {what} failed: {error.strerror}."
            raise ServiceError(Reason.MODEL_INVALID, why) from None
        if count == 0:
            raise _changed(path)
        num_read += count


def check_unchanged(file: GGUFFile) -> None:
    """Raise MODEL_CHANGED if a file has been replaced, written or cut since it was parsed."""
    for path, stamp in zip(file.paths, file.stamps, strict=True):
        with _open_regular(path) as (_, stamp_now):
            if stamp_now != stamp:
                raise _changed(path)


def _read_file(path: Path, file_index: int) -> GGUFFile:
    with _open_regular(path) as (descriptor, stamp):
        header = read_header(HeaderReader(descriptor, path, stamp.size), file_index)
    return GGUFFile((path,), header.version, header.metadata, header.tensors, (header.data_start,), (stamp,))


def _check_shard(shard: GGUFFile, index: int, num_shards: int, named: re.Match[str] | None) -> None:
    """Refuse a file that is not shard `index` of `num_shards` by its keys, or by the first shard's name."""
    count = shard.metadata.get_int("split.count")
    number = shard.metadata.get_int("split.no")
    if named is None:
        why = f"is {count}, but a shard must be named like NAME-00001-of-{count:05d}.gguf to find the others"
        raise shard.metadata.invalid("split.count", why)
    if count != num_shards or count != int(named[3]):
        raise shard.metadata.invalid("split.count", f"is {count}, but the first shard is named 1 of {int(named[3])}")
    if index == 0 and (number != 0 or int(named[2]) != 1):
        first = f"{named[1]}-{1:05d}-of-{num_shards:05d}.gguf"
        raise shard.metadata.invalid("split.no", f"is {number}: this is not the first shard, name {first} instead")
    if number != index:
        raise shard.metadata.invalid("split.no", f"is {number}, not {index}")


@contextlib.contextmanager
def _open_regular(path: Path) -> Iterator[tuple[int, FileStamp]]:
    """A descriptor of a regular file; O_NONBLOCK, so that opening a pipe without a writer returns."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ServiceError(Reason.MODEL_NOT_FOUND, f"{path}: can't be opened: {reason}.") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ServiceError(Reason.MODEL_INVALID, f"{path}: byte 0: it is {kind}.", metadata={"file": str(path)})
        yield descriptor, FileStamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    finally:
        os.close(descriptor)


def _invalid(file: GGUFFile, why: str) -> ServiceError:
    path = str(file.paths[0])
    return ServiceError(Reason.MODEL_INVALID, f"{path}: byte 8: {why}.", metadata={"file": path, "offset": "8"})


def _changed(path: Path) -> ServiceError:
    why = f"{path}: the file has changed since it was opened; load the model again."
    return ServiceError(Reason.MODEL_CHANGED, why, metadata={"file": str(path)})
