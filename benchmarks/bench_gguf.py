"""Parses a header like gpt-oss-20b's with mxgpt and with gguf-py's GGUFReader: seconds, and peak memory.

    python -m benchmarks.bench_gguf [--runs 5]

The file is made here: 201,088 tokens, 446,189 merges, and the 459 tensors of the published file with their types and
shapes; its 12 GB of tensor data are a hole, which takes no disk. Each reader runs in a process of its own, with the
file in the page cache: the peak is the process's (VmHWM), the imports' share stands beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from shared.ggml_type import GGMLType
from shared.gguf import read_gguf

NUM_TOKENS = 201_088
NUM_MERGES = 446_189


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5, help="processes for each of mxgpt's rows (gguf-py gets one)")
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reader:
        print(json.dumps(measure(READERS[arguments.reader], arguments.file)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gpt-oss-20b.gguf"
        header_bytes = make_file(path)
        table = Table(title=f"A header of {header_bytes:,} bytes, {NUM_TOKENS + NUM_MERGES:,} strings, 459 tensors")
        for column in ("reader", "seconds (median)", "slowest", "peak MB", "of it imports"):
            table.add_column(column, justify="left" if column == "reader" else "right")
        for name in READERS:
            results = [run(name, path) for _ in range(1 if name.startswith("gguf-py") else arguments.runs)]
            seconds = [result["seconds"] for result in results]
            peak = max(result["peak"] for result in results)
            imports = max(result["imports"] for result in results)
            times = (f"{statistics.median(seconds):.3f}", f"{max(seconds):.3f}")
            table.add_row(name, *times, f"{peak / 1e6:.0f}", f"{imports / 1e6:.0f}")
    Console().print(table)


def run(name: str, path: Path) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_gguf", "--reader", name, "--file", str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    result: dict[str, float] = json.loads(output.stdout)
    return result


def measure(read: Callable[[Path], int], path: Path) -> dict[str, float]:
    imports = peak_bytes()
    start = time.perf_counter()
    num_strings = read(path)
    seconds = time.perf_counter() - start
    assert num_strings in (0, NUM_TOKENS + NUM_MERGES)
    return {"seconds": seconds, "peak": peak_bytes(), "imports": imports}


def read_with_mxgpt(path: Path) -> int:
    """Parse and check; strings stay as they are until asked for."""
    file = read_gguf(path)
    assert len(file.tensors) == 459
    return 0


def read_and_decode_with_mxgpt(path: Path) -> int:
    """Parse, then make every token and merge a Python string, as building a tokenizer does."""
    metadata = read_gguf(path).metadata
    texts = [list(metadata.get_strings(f"tokenizer.ggml.{name}")) for name in ("tokens", "merges")]
    return sum(map(len, texts))


def read_with_gguf_py(path: Path) -> int:
    from gguf import GGUFReader

    assert len(GGUFReader(path).tensors) == 459
    return 0


READERS: dict[str, Callable[[Path], int]] = {
    "mxgpt read_gguf": read_with_mxgpt,
    "mxgpt read_gguf, all strings decoded": read_and_decode_with_mxgpt,
    "gguf-py GGUFReader": read_with_gguf_py,
}


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def make_file(path: Path) -> int:
    """Write the file; the number of bytes before its tensor data."""
    random = np.random.default_rng(20)
    keys = [
        _string(b"general.architecture") + struct.pack("<I", 8) + _string(b"gpt-oss"),
        _string(b"tokenizer.ggml.tokens") + _strings(random, NUM_TOKENS, 1, 13),
        _string(b"tokenizer.ggml.token_type") + struct.pack("<IIQ", 9, 5, NUM_TOKENS) + bytes(4 * NUM_TOKENS),
        _string(b"tokenizer.ggml.merges") + _strings(random, NUM_MERGES, 3, 23),
    ]
    records = []
    end = 0
    for name, dimensions, type_ in tensors():
        records.append(_string(name.encode()) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        records.append(struct.pack("<IQ", type_, end))
        size = int(np.prod(dimensions)) // type_.block_size * type_.type_size
        end += size + -size % 32
    header = b"GGUF" + struct.pack("<IQQ", 3, len(records) // 2, len(keys)) + b"".join(keys + records)
    header += bytes(-len(header) % 32)
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + end)
    return len(header)


def tensors() -> Iterator[tuple[str, tuple[int, ...], GGMLType]]:
    """gpt-oss-20b's tensors: name, GGML's dimensions, type."""
    f32, q8, mxfp4 = GGMLType.F32, GGMLType.Q8_0, GGMLType.MXFP4
    yield "token_embd.weight", (2880, NUM_TOKENS), q8
    yield "output_norm.weight", (2880,), f32
    yield "output.weight", (2880, NUM_TOKENS), q8
    for i in range(24):
        for name in ("attn_norm", "post_attention_norm"):
            yield f"blk.{i}.{name}.weight", (2880,), f32
        for name, columns, rows in (("q", 2880, 4096), ("k", 2880, 512), ("v", 2880, 512), ("output", 4096, 2880)):
            yield f"blk.{i}.attn_{name}.weight", (columns, rows), q8
            yield f"blk.{i}.attn_{name}.bias", (rows,), f32
        yield f"blk.{i}.attn_sinks.weight", (64,), f32
        yield f"blk.{i}.ffn_gate_inp.weight", (2880, 32), f32
        yield f"blk.{i}.ffn_gate_inp.bias", (32,), f32
        for name in ("gate", "up", "down"):
            yield f"blk.{i}.ffn_{name}_exps.weight", (2880, 2880, 32), mxfp4
            yield f"blk.{i}.ffn_{name}_exps.bias", (2880, 32), f32


def _strings(random: np.random.Generator, count: int, shortest: int, longest: int) -> bytes:
    """An array of strings of random letters, with its type."""
    lengths = random.integers(shortest, longest, count)
    letters = random.integers(97, 123, int(lengths.sum()), np.uint8).tobytes()
    ends = np.cumsum(lengths)
    texts = (letters[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True))
    return struct.pack("<IIQ", 9, 8, count) + b"".join(map(_string, texts))


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


if __name__ == "__main__":
    main()
