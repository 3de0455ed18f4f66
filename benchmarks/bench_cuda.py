"""The CUDA backend on gpt-oss-20b's full shape with random weights in the official file's types.

`python -m benchmarks.bench_cuda [--layers N] [--quick]` prints decoding and prefill speeds beside what the bytes they
move would take at the read bandwidth measured in the same run, and a table of kernels. The engine, sampling and
transport are not in it: a step is `CudaRunner`'s, prefill with the host's work, decoding as the GPU's time for a graph.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpt_oss_file import GPT_OSS_20B
from services.executor.cuda.device import Device
from services.executor.cuda.kv import lay_out, pack
from services.executor.cuda.ops import item_tokens
from services.executor.cuda.runner import CudaRunner
from services.executor.cuda.weights import CudaWeights
from services.executor.step import SequenceSlice, StepBatch
from shared.cuda_compile import Module
from shared.cuda_layout import is_tiled, plan
from shared.ggml_type import GGMLType
from shared.gpt_config import GPTConfig
from shared.layout import Plan
from shared.manifest import Plane

BLOCK_SIZE = 32
MAX_BATCH_TOKENS = 2048
KV_TOKENS = 80_000
READ_BYTES = 4 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24, help="of the model, for a quick look")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    arguments = parser.parse_args()
    config = replace(GPT_OSS_20B, num_layers=arguments.layers)
    device = Device()
    try:
        run(device, config, arguments.quick)
    finally:
        device.close()


def run(device: Device, config: GPTConfig, is_quick: bool) -> None:
    bandwidth = measure_bandwidth(device)
    print(f"{device.name}, sm_{device.capability[0]}{device.capability[1]}, reads {bandwidth / 1e12:.2f} TB/s")
    planned = plan_random(config)
    weights = CudaWeights(config, planned.tensors, fill_randomly(device, planned), device)
    num_blocks = KV_TOKENS // BLOCK_SIZE
    start = time.perf_counter()
    groups = {"full": num_blocks, "window": num_blocks}
    runner = CudaRunner(device, weights, BLOCK_SIZE, groups, MAX_BATCH_TOKENS, max_sequences=256)
    fill_kv(device, runner)
    print(f"kernels and KV ready in {time.perf_counter() - start:.1f} s; weights {planned.num_bytes / 1e9:.2f} GB")
    print("\ndecode, the GPU's time for a step\n streams context      us   tok/s   limit us  share")
    one = [(1, context) for context in (1, 1024, 8192, 32768)]
    sizes = [*one, *((streams, 512) for streams in (8, 16, 32, 64, 128)), (256, 256)]
    for num_streams, context in sizes[:3] if is_quick else sizes:
        batch = decode_batch(config, num_streams, context)
        microseconds = time_decode(device, runner, batch)
        limit = decode_bytes(planned, config, num_streams, context) / bandwidth * 1e6
        rate = num_streams / microseconds * 1e6
        print(f"{num_streams:8} {context:7} {microseconds:7.0f} {rate:7.0f} {limit:10.0f} {limit / microseconds:6.0%}")
    print("\nprefill, the time of forward\n  tokens      ms   tok/s")
    for num_tokens in (512,) if is_quick else (512, 2048, 8192):
        seconds = time_prefill(runner, config, num_tokens)
        print(f"{num_tokens:8} {seconds * 1e3:7.1f} {num_tokens / seconds:7.0f}")
    for num_streams, context in ((1, 1024), (64, 512), (256, 256)):
        print(f"\nkernels of a decoding step, {num_streams} streams, context {context}")
        print_kernels(device, runner, decode_batch(config, num_streams, context))
    print("\nkernels of a prefill step of 2048 tokens")
    print_prefill_kernels(device, runner, prefill_batch(config, 0, 2048))
    runner.close()


def measure_bandwidth(device: Device) -> float:
    """Bytes a second that a kernel reads which does nothing else."""
    memory = device.allocate(READ_BYTES)
    device.load({Module("read"): [("read", "read", "PPl")]})
    out = device.allocate(4)
    times = [
        device.measure(lambda: device.launch("read", (1056, 1, 1), 512, memory, out, READ_BYTES)) for _ in range(12)
    ]
    return READ_BYTES / statistics.median(times[2:]) * 1e6


def plan_random(config: GPTConfig) -> Plan:
    """The plan of a file of this config in the official file's types."""
    tensors = {}
    for name, shape in config.expected_tensors().items():
        is_expert = name.endswith("_exps.weight")
        type = GGMLType.MXFP4 if is_expert else GGMLType.Q8_0 if is_tiled(name) else GGMLType.F32
        tensors[name] = SimpleNamespace(name=name, shape=shape, type=type)
    return plan(cast(Any, SimpleNamespace(tensors=tensors)), config)


def fill_randomly(device: Device, planned: Plan) -> list[int]:
    """Allocations full of random weights; layers of the same kind hold the same, each in memory of its own."""
    random = np.random.default_rng(0)
    addresses: list[int] = []
    last: tuple[int, NDArray[np.uint8]] | None = None
    for index, size in enumerate(planned.allocation_sizes):
        if last is None or last[0] != size:
            buffer = np.zeros(size, np.uint8)
            for tensor in planned.tensors.values():
                for plane in tensor.planes:
                    if plane.allocation == index:
                        view = np.ndarray(plane.shape, plane.dtype, buffer, plane.offset, plane.strides)
                        view[...] = random_plane(random, tensor.name, plane)
            last = size, buffer
        addresses.append(device.allocate(size))
        device.upload(addresses[-1], last[1])
        device.synchronize()
    return addresses


def random_plane(random: np.random.Generator, name: str, plane: Plane) -> NDArray[Any]:
    """Values that keep activations near one."""
    if plane.role == "quants":
        count = int(np.prod(plane.shape)) * np.dtype(plane.dtype).itemsize
        return np.frombuffer(random.bytes(count), plane.dtype).reshape(plane.shape)
    if plane.dtype == "uint8":
        return random.integers(119, 122, plane.shape, np.uint8)
    if plane.dtype == "float16":
        return random.uniform(1e-4, 4e-4, plane.shape).astype(np.float16)
    values = random.standard_normal(plane.shape, np.float32)
    if "norm" in name:
        return 1 + 0.1 * values
    return values * np.float32(0.02 if name.endswith("gate_inp.weight") else 0.1)


def fill_kv(device: Device, runner: CudaRunner) -> None:
    """Keys and values at random: zeros would be read as fast, but weigh all positions alike."""
    random = np.random.default_rng(1).standard_normal(1 << 22).astype(np.float16)
    for layer in runner._kv_layers:
        for pool in (layer.keys, layer.values):
            total = KV_TOKENS // BLOCK_SIZE * layer.block_bytes
            for start in range(0, total, random.nbytes):
                device.upload(pool + start, random[: min(random.nbytes, total - start) // 2])
    device.synchronize()


def decode_batch(config: GPTConfig, num_streams: int, context: int) -> StepBatch:
    """One token each of streams at the same context."""
    random = np.random.default_rng(2)
    blocks = -(-context // BLOCK_SIZE)
    order = random.permutation(KV_TOKENS // BLOCK_SIZE)[: num_streams * blocks].astype(np.int32)
    tables = order.reshape(num_streams, blocks)
    slices = [SequenceSlice(index, 1, context, {"full": table, "window": table}) for index, table in enumerate(tables)]
    rows = np.arange(num_streams, dtype=np.int32)
    ids = random.integers(0, config.vocab_size, num_streams).astype(np.int32)
    return StepBatch(ids, np.full(num_streams, context - 1, np.int32), slices, rows)


def prefill_batch(config: GPTConfig, start: int, num_tokens: int) -> StepBatch:
    """A chunk of one prompt, its last row's logits wanted."""
    table = np.arange(-(-(start + num_tokens) // BLOCK_SIZE), dtype=np.int32)
    ids = np.random.default_rng(start).integers(0, config.vocab_size, num_tokens).astype(np.int32)
    positions = np.arange(start, start + num_tokens, dtype=np.int32)
    slices = [SequenceSlice(0, num_tokens, start + num_tokens, {"full": table, "window": table})]
    return StepBatch(ids, positions, slices, np.array([num_tokens - 1], np.int32))


def time_decode(device: Device, runner: CudaRunner, batch: StepBatch) -> float:
    """Microseconds of a step's graph, the median of 30."""
    logits = runner.forward(batch)
    assert np.isfinite(logits).all()
    graph = runner.graph(runner.shape_of(batch))
    for _ in range(5):
        graph.launch()
    return statistics.median(device.measure(graph.launch, 2) for _ in range(15))


def time_prefill(runner: CudaRunner, config: GPTConfig, num_tokens: int) -> float:
    """Seconds of a prompt in chunks of at most MAX_BATCH_TOKENS, the best of 3."""
    chunks = [
        prefill_batch(config, start, min(MAX_BATCH_TOKENS, num_tokens - start))
        for start in range(0, num_tokens, MAX_BATCH_TOKENS)
    ]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for chunk in chunks:
            logits = runner.forward(chunk)
        times.append(time.perf_counter() - start)
        assert np.isfinite(logits).all()
    return min(times)


def decode_bytes(planned: Plan, config: GPTConfig, num_streams: int, context: int) -> int:
    """Bytes that a step has to move: weights (of experts as many as are expected to be used), keys and values."""
    unused = (1 - config.num_experts_used / config.num_experts) ** num_streams
    total = 0.0
    for tensor in planned.tensors.values():
        size = sum(int(np.prod(plane.shape)) * np.dtype(plane.dtype).itemsize for plane in tensor.planes)
        if tensor.name == "token_embd.weight":
            continue
        total += size * (1 - unused) if "_exps." in tensor.name else size
    position = 4 * config.kv_size * num_streams
    windowed = config.num_windowed_layers
    total += position * (context * (config.num_layers - windowed) + min(context, config.sliding_window) * windowed)
    return int(total)


def print_kernels(device: Device, runner: CudaRunner, batch: StepBatch) -> None:
    """Each kernel's time in a graph that holds only its own launches, over all layers."""
    shape = runner.shape_of(batch)
    step = lay_out(shape, runner.kv_groups, runner._inputs)
    tokens = item_tokens(runner._config, shape.tile_rows)
    device.upload(runner._inputs, pack(batch, step, BLOCK_SIZE, tokens, runner._inputs))
    runner.graph(shape).launch()

    def work() -> None:
        runner._run_head(runner._model.forward(runner._ops.prepare(step), runner._kv_layers))

    calls = record_calls(device, work, {})
    print(f"{'kernel':28}{'grid':>18} calls  us each   us all")
    for key, launches in calls.items():
        graph = device.capture(functools.partial(launch_all, launches))
        graph.launch()
        total = statistics.median(device.measure(graph.launch) for _ in range(9))
        graph.destroy()
        print(f"{key[0]:28}{key[1]!s:>18} {len(launches):5} {total / len(launches):8.2f} {total:8.1f}")


def launch_all(launches: list[Any]) -> None:
    for launch in launches:
        launch()


def print_prefill_kernels(device: Device, runner: CudaRunner, batch: StepBatch) -> None:
    """Each kernel's time by events around it."""
    runner.forward(batch)
    times: dict[Any, list[float]] = {}
    launch = device.launch

    def timed(name: str, grid: Any, threads: int, *arguments: Any, **shared: int) -> None:
        microseconds = device.measure(lambda: launch(name, grid, threads, *arguments, **shared))
        times.setdefault((name, grid), []).append(microseconds)

    device.launch = timed  # type: ignore[method-assign]
    try:
        runner.forward(batch)
    finally:
        device.launch = launch  # type: ignore[method-assign]
    print(f"{'kernel':28}{'grid':>18} calls  us each   us all")
    for (name, grid), taken in times.items():
        print(f"{name:28}{grid!s:>18} {len(taken):5} {statistics.mean(taken):8.2f} {sum(taken):8.1f}")


def record_calls(device: Device, work: Any, calls: dict[Any, list[Any]]) -> dict[Any, list[Any]]:
    """The launches of `work`, by kernel and grid, without running them."""
    launch = device.launch
    device.launch = lambda name, grid, threads, *arguments, **shared: calls.setdefault((name, grid), []).append(  # type: ignore
        functools.partial(launch, name, grid, threads, *arguments, **shared)
    )
    try:
        work()
    finally:
        device.launch = launch  # type: ignore[method-assign]
    return calls


if __name__ == "__main__":
    main()
