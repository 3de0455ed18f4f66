"""Decodes and scans each tensor type with mxgpt, and decodes it with gguf-py: millions of values a second, one thread.

python -m benchmarks.bench_quants [--values 33554432]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import gguf
import numpy as np
from rich.console import Console
from rich.table import Table

from shared.ggml_type import GGMLType
from shared.quantizers import quantize
from shared.quants import dequantize, find_invalid

NUM_COLUMNS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--values", type=int, default=1 << 25, help="values in the tensor (default: 128 MiB of them)")
    num_rows = parser.parse_args().values // NUM_COLUMNS
    values = np.random.default_rng(0).normal(size=(64, NUM_COLUMNS)).astype(np.float32)
    out = np.empty((num_rows, NUM_COLUMNS), np.float32)
    table = Table(title=f"Millions of values a second, tensors of ({num_rows}, {NUM_COLUMNS})")
    for column in ("type", "dequantize", "gguf-py", "find_invalid", "GB/s of blocks scanned"):
        table.add_column(column, justify="left" if column == "type" else "right")
    for type_ in GGMLType:
        blocks = np.tile(quantize(values, type_), (num_rows // 64, 1))
        rows = out[: len(blocks)]
        decode = rate(lambda b=blocks, t=type_, o=rows: dequantize(b, t, o), rows.size)
        peer = rate(lambda b=blocks, t=type_: gguf.quants.dequantize(b, gguf.GGMLQuantizationType(t)), rows.size)
        scan = rate(lambda b=blocks, t=type_: find_invalid(b, t), rows.size)
        gigabytes = scan * blocks.nbytes / rows.size / 1e9
        peer_text = "a view" if type_ == GGMLType.F32 else f"{peer / 1e6:,.0f}"
        table.add_row(type_.name, f"{decode / 1e6:,.0f}", peer_text, f"{scan / 1e6:,.0f}", f"{gigabytes:.1f}")
    Console().print(table)


def rate(action: Callable[[], object], num_values: int) -> float:
    """Values a second, the best of three runs after one that warms up."""
    action()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return num_values / min(seconds)


if __name__ == "__main__":
    main()
