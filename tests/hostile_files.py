"""Hostile GGUF files, built after published flaws of other parsers: each with its source and what must be said of it.

docs/hostile-files.md lists the sources. The files are small; the fuzzer starts from them (fuzz/gguf_header.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shared.ggml_type import GGMLType
from shared.gguf_metadata import ValueType
from tests.gguf_files import array_record, gguf_bytes, header, key_record, pad, string, tensor_record, typed_record

F32 = GGMLType.F32
U64_MAX = (1 << 64) - 1
HEADER_START = 24  # the first key's byte: magic number, version and two counts lie before it


@dataclass(frozen=True)
class HostileFile:
    """One file: what it is after, what it does, its bytes, and a part of the message that refuses it."""

    source: str
    what: str
    data: bytes
    message: str

    def __str__(self) -> str:
        return f"{self.source} {self.what}"


def hostile_files() -> Iterator[HostileFile]:
    """All of them; MODEL_INVALID is the answer to each."""
    yield from _counts_and_lengths()
    yield from _tensors()
    yield from _alignment()
    yield from _arrays()


def _counts_and_lengths() -> Iterator[HostileFile]:
    for count in (1 << 60, 1 << 61, (1 << 64) // 16 + 1, U64_MAX):
        for type_ in (ValueType.STRING, ValueType.UINT8, ValueType.FLOAT64):
            data = header([array_record("k", type_, count, bytes(64))])
            what = f"{count:#x} array elements of {type_.name}: count times size wraps"
            yield HostileFile("CVE-2024-21825, TALOS-2024-1912", what, data, "array 'k'")
    for length in (U64_MAX, U64_MAX - 1, U64_MAX - 7, U64_MAX - 8):
        places = {
            "a key": header([string("k", length)]) + bytes(64),
            "string 'k'": header([typed_record("k", ValueType.STRING, string("v", length))]) + bytes(64),
            "a tensor's name": header([], [string("t", length)]) + bytes(64),
            "array 'k'": header([array_record("k", ValueType.STRING, 2, string("v", length) + bytes(64))]),
        }
        for place, data in places.items():
            what = f"{place} is {length:#x} long: length plus one wraps"
            yield HostileFile("CVE-2024-23496, TALOS-2024-1913", what, data, place)
    for count in ((1 << 64) // 88 + 1, (1 << 64) // 152 + 1, 1 << 61, U64_MAX):
        data = header(num_tensors=count) + bytes(256)
        what = f"{count:#x} tensors: count times record wraps"
        yield HostileFile("CVE-2024-21836, TALOS-2024-1915", what, data, f"{count} tensors don't fit")
    for count in ((1 << 64) // 48 + 1, (1 << 64) // 64 + 1, 1 << 61, U64_MAX):
        data = header(num_keys=count) + bytes(256)
        what = f"{count:#x} keys: count times record wraps"
        yield HostileFile("CVE-2024-23605, TALOS-2024-1916", what, data, f"{count} keys don't fit")
    whole = header([key_record("a", "one"), key_record("b", ["two", "three"]), key_record("c", 4)])
    for length in range(len(whole)):
        what = f"a header cut at byte {length}: clean-up freed keys that had not been read"
        yield HostileFile("CVE-2024-32878", what, whole[:length], "")
    for length in ((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 5):
        data = header([array_record("tokenizer.ggml.tokens", ValueType.STRING, 1, string("token", length))])
        what = f"a token {length:#x} long: its length as a signed integer"
        yield HostileFile("CVE-2025-49847", what, data, "array 'tokenizer.ggml.tokens' takes")


def _tensors() -> Iterator[HostileFile]:
    record = string("t") + struct.pack("<I", 4096) + bytes(8 * 4096) + struct.pack("<IQ", F32, 0)
    what = "4,096 dimensions: more than the array for them holds"
    yield HostileFile("CVE-2024-21802, TALOS-2024-1914", what, header([], [record]), "4096 dimensions, not 1 to 4")
    half = 1 << 62  # bytes; four of them are 2^64
    records = [tensor_record(name, [half // 4], F32, index * half) for index, name in enumerate("abcd")]
    data = header([], [*records, tensor_record("e", [32], F32, 0)]) + bytes(512)
    what = "four tensors of 2^62 bytes: their sum wraps"
    yield HostileFile("CVE-2025-53630", what, data, f"tensor 'a' takes {half} bytes")
    for count in (0x0181_8181_8181_8182, 0x00A4_1A41_A41A_41A5, 1 << 55, 1 << 56):
        data = header([], [tensor_record("t", [32], F32, 0)], num_tensors=count) + bytes(512)
        what = f"{count:#x} tensors: count times an object's overhead, plus the data, wraps (past the fix before)"
        yield HostileFile("CVE-2026-27940", what, data, f"{count} tensors don't fit")
    for dimensions in ([1 << 62], [1 << 31, 1 << 31], [4, (1 << 60) + 1], [32, (1 << 42) + 1, 1 << 15]):
        for type_ in (F32, GGMLType.Q8_0):
            data = header([], [tensor_record("t", dimensions, type_, 0)]) + bytes(4096)
            message = "no multiple of" if dimensions[0] % type_.block_size else "tensor 't' takes"
            what = f"{type_.name} of {dimensions}: elements times size wraps"
            yield HostileFile("CVE-2026-33298", what, data, message)
    data = pad(header([], [tensor_record("t", [1 << 20], F32, 0)])) + bytes(1024)
    what = "a tensor of 4 MiB in a file of 1 KiB: what lies behind the buffer is read, and sent out"
    yield HostileFile("CVE-2026-7482", what, data, "tensor 't' takes 4194304 bytes")


def _alignment() -> Iterator[HostileFile]:
    for alignment in (1 << 31, 1 << 30, 1 << 21):
        data = header([key_record("general.alignment", np.uint32(alignment))])
        what = f"an alignment of {alignment:#x}: no upper bound"
        yield HostileFile("llama.cpp 24997", what, data, f"general.alignment is {alignment}, not a power of two")
    for dimensions in ([4, (1 << 30) - 1, (1 << 30) + 1], [(1 << 62) - 1]):
        records = [tensor_record("a", [64], F32, 0), tensor_record("b", dimensions, F32, 256)]
        what = f"a tensor of {dimensions}: its size, near 2^64, wraps to zero when padded"
        yield HostileFile("llama.cpp 26318", what, pad(header([], records)) + bytes(256), "tensor 'b' takes")
    for value in (np.int32(32), np.uint64(32), np.float32(32), "32", np.uint32([32])):
        data = header([key_record("general.alignment", value)])
        what = f"an alignment as {type(value).__name__}: read as another type"
        yield HostileFile("llama.cpp 26318", what, data, "not UINT32")


def _arrays() -> Iterator[HostileFile]:
    for key in (b"", b"abc"):
        record = typed_record(key, ValueType.ARRAY, struct.pack("<IQ", ValueType.UINT8, 1 << 63))
        what = f"{HEADER_START + len(record)} bytes that claim 2^63: a reader hangs"
        message = "array 'abc' takes" if key else "a key is empty"
        yield HostileFile("llama.cpp 27188", what, header([record]), message)
    nested = struct.pack("<IQ", ValueType.ARRAY, 1 << 62) + struct.pack("<IQ", ValueType.UINT8, 1 << 62)
    what = "2^62 arrays in an array: a reader hangs"
    yield HostileFile("llama.cpp 27188", what, header([typed_record("k", ValueType.ARRAY, nested)]), "array of arrays")


def narrow_arrays() -> bytes:
    """After llama.cpp 26690: arrays of one byte an element, which a reader took for four; valid as far as GGUF goes."""
    ones = np.ones(3, np.int8)
    metadata = {
        "general.architecture": "gpt2",
        "gpt2.context_length": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "c"],
        "tokenizer.ggml.scores": ones,
        "tokenizer.ggml.token_type": ones,
        "tokenizer.ggml.merges": ones,
    }
    return gguf_bytes(metadata, {})
