"""Loading gpt-oss-20b into a GPU's memory: how fast, beside what limits it, and with how much of the host's.

python -m benchmarks.bench_load_cuda [--folder /tmp] [--layers 24]

Writes a file of gpt-oss-20b's full size with random weights (12.1 GB), unless it is there.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np

from benchmarks.bench_cuda import GPT_OSS_20B
from benchmarks.gpt_oss_file import write_file
from services.loader.cuda.memory import CudaMemory
from services.loader.cuda.stream import Stream
from services.loader.loading import LoadOptions, Source, load_model
from shared.cuda_memory import CudaDevice
from shared.digest import READ_BYTES

NUM_THREADS = min(16, os.cpu_count() or 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where the file is written")
    parser.add_argument("--layers", type=int, default=24, help="of the model, for a quick look")
    arguments = parser.parse_args()
    config = replace(GPT_OSS_20B, num_layers=arguments.layers)
    path = arguments.folder / f"gpt-oss-{arguments.layers}-layers.gguf"
    if not path.exists():
        start = time.perf_counter()
        num_bytes = write_file(path, config)
        print(f"wrote {num_bytes} bytes in {time.perf_counter() - start:.1f} s")
    print(f"PCIe, page-locked to GPU: {measure_link():.1f} GB/s")
    for what, work in (("read", read_only), ("read and hash", read_and_hash)):
        print(f"{what}, {NUM_THREADS} threads, page cache: {measure_pieces(path, work):.1f} GB/s")
    memory = CudaMemory(0, NUM_THREADS)
    options = LoadOptions(num_threads=NUM_THREADS, memory=memory)
    for _ in range(3):
        start = time.perf_counter()
        model = load_model(Source(path, "m"), options, itertools.count(1), lambda _: None, Event())
        seconds = time.perf_counter() - start
        print(f"loaded in {seconds:.2f} s: {path.stat().st_size / seconds / 1e9:.1f} GB/s")
        start = time.perf_counter()
        for descriptor, allocation in zip(model.descriptors, model.manifest.allocations, strict=True):
            memory.verify(descriptor, allocation, Event())
        print(f"verified in {time.perf_counter() - start:.2f} s")
        model.free()


def measure_link() -> float:
    """GB a second, from page-locked memory in pieces as a load's."""
    with Stream(device := CudaDevice(0)) as stream:
        device.use()
        buffer, address = stream.pin(64 << 20), stream.allocate(64 << 20)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            for offset in range(0, buffer.nbytes, READ_BYTES):
                stream.upload(address + offset, buffer[offset : offset + READ_BYTES])
            stream.synchronize()
            times.append(time.perf_counter() - start)
    return 64 * 2**20 / statistics.median(times) / 1e9


def read_only(descriptor: int, offset: int, buffer: np.ndarray) -> int:
    return os.preadv(descriptor, [buffer.data], offset)


def read_and_hash(descriptor: int, offset: int, buffer: np.ndarray) -> int:
    count = os.preadv(descriptor, [buffer.data], offset)
    hashlib.sha256(buffer.data[:count]).digest()
    return count


def measure_pieces(path: Path, work) -> float:
    """GB a second of a file's first 4 GiB, by all threads."""
    buffers = [np.zeros(READ_BYTES, np.uint8) for _ in range(NUM_THREADS)]
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(NUM_THREADS) as pool:
        total = min(path.stat().st_size, 4 << 30)

        def run(thread: int) -> None:
            for offset in range(thread * READ_BYTES, total, NUM_THREADS * READ_BYTES):
                work(file.fileno(), offset, buffers[thread])

        start = time.perf_counter()
        list(pool.map(run, range(NUM_THREADS)))
        return total / (time.perf_counter() - start) / 1e9


if __name__ == "__main__":
    main()
