"""Attention of prompts at gpt-oss-20b's shapes, in TFLOP/s: `python -m benchmarks.bench_attention`.

A prompt's rows from some position on, over random keys and values in blocks in random order; one full layer and one
windowed. The kernels for prompts, attention_wgmma.cu and attention_prefill.cu, are measured beside attention.cu. Exits
with 1 where they do not give what that one gives.
"""

from __future__ import annotations

import functools
import statistics
import sys

import numpy as np

from benchmarks.bench_cuda import BLOCK_SIZE
from benchmarks.gpt_oss_file import GPT_OSS_20B
from services.executor.cuda.device import Device
from services.executor.cuda.kernels import ATTENTION_WGMMA_BYTES, modules_of
from services.executor.cuda.kv import make_items
from services.executor.cuda.ops import item_tokens, wide_tokens
from services.executor.step import SequenceSlice, StepBatch

MOST_DIFFERENCE = 0.02  # of values of about 1, whose weights are rounded to half; 4e-3 is what there is
SIZES = [(0, 1024), (0, 8192), (6144, 2048), (28672, 4096)]  # first position, rows


def main() -> int:
    """Returns 0 if all kernels agree."""
    worst = 0.0
    device = Device()
    try:
        modules = modules_of(GPT_OSS_20B, [])
        device.load({module: entries for module, entries in modules.items() if "attention" in module.source})
        print(f"{device.name}: first position, rows; us and TFLOP/s of what is seen: wgmma, prefill, decode kernel")
        for start, num_rows in SIZES:
            worst = float(np.maximum(worst, measure(device, start, num_rows)))
    finally:
        device.close()
    if not worst <= MOST_DIFFERENCE:
        print(f"WRONG: the kernels differ by {worst:.1e}")
        return 1
    return 0


def measure(device: Device, start: int, num_rows: int) -> float:
    """How far the kernels for prompts are from attention.cu at most; not a number if any of them gives none."""
    config, random = GPT_OSS_20B, np.random.default_rng(start)
    num_blocks = -(-(start + num_rows) // BLOCK_SIZE)
    table = random.permutation(num_blocks).astype(np.int32)
    pool = random.standard_normal((num_blocks, config.num_kv_heads, BLOCK_SIZE, config.head_size)).astype(np.float16)
    queries = random.standard_normal((num_rows, config.num_heads, config.head_size)).astype(np.float16)
    batch = StepBatch(
        np.zeros(num_rows, np.int32),
        np.arange(start, start + num_rows, dtype=np.int32),
        [SequenceSlice(0, num_rows, start + num_rows, {})],
        np.zeros(0, np.int32),
    )
    narrow, wide = (make_items(batch, tokens) for tokens in (item_tokens(config, 32), wide_tokens(config)))
    sinks = random.standard_normal(config.num_heads).astype(np.float32)
    sources = (queries, pool, pool[::-1].copy(), narrow, wide, table, sinks)
    addresses = [device.allocate(part.nbytes) for part in sources]
    for address, part in zip(addresses, sources, strict=True):
        device.upload(address, part)
    queries_at, keys, values, narrow_at, wide_at, table_at, sinks_at = addresses
    out = [device.allocate(2 * num_rows * config.query_size) for _ in range(3)]
    counters = device.allocate(4 * len(narrow) * config.num_kv_heads)
    worst = 0.0
    for window in (0, config.sliding_window):
        sizes = (config.num_heads, config.num_kv_heads, BLOCK_SIZE, num_blocks, window, config.query_size)

        shared = (queries_at, keys, values)
        grid = (config.num_kv_heads, len(wide), 1)
        wgmma = (*shared, wide_at, table_at, sinks_at, out[0], *sizes)
        prefill = (*shared, wide_at, table_at, sinks_at, out[1], *sizes, 0)
        decode = (*shared, narrow_at, table_at, sinks_at, out[2], 0, counters, *sizes, 0)
        runs = [
            functools.partial(device.launch, "attention_wgmma", grid, 384, *wgmma, shared_bytes=ATTENTION_WGMMA_BYTES),
            functools.partial(device.launch, "attention_prefill", grid, 128, *prefill),
            functools.partial(device.launch, "attention_2", (config.num_kv_heads, len(narrow), 1), 128, *decode),
        ]
        seen = np.arange(start + 1, start + num_rows + 1)
        flops = 4.0 * config.query_size * (np.minimum(seen, window) if window else seen).sum()
        taken = []
        for run in runs:
            run()
            taken.append(statistics.median(device.measure(run) for _ in range(5)))
        found = [np.empty((num_rows, config.query_size), np.float16) for _ in out]
        for address, array in zip(out, found, strict=True):
            device.download(address, array)
        device.synchronize()
        # attention_wgmma.cu writes its rows spread (spread.cuh).
        found[0] = found[0].reshape(num_rows, -1, 4, 4, 2).swapaxes(2, 3).reshape(found[0].shape)
        differs = float(np.max([np.abs(one.astype(np.float32) - found[2]).max() for one in found[:2]]))
        rates = ", ".join(f"{microseconds:.0f} us {flops / microseconds / 1e6:.0f}" for microseconds in taken)
        print(f"{start:6} {num_rows:6} window {window:4}: {rates}; differ by {differs:.1e}")
        worst = float(np.maximum(worst, differs))
    return worst


if __name__ == "__main__":
    sys.exit(main())
