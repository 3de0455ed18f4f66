"""What the engine adds to a step: the host's work for it, and on a GPU how much of the step's own speed is left.

`python -m benchmarks.bench_engine` times the host's part alone, with a runner that computes nothing: scheduling, the
step's arrays as the CUDA backend packs them, delivering, and the message to the server process.
`python -m benchmarks.bench_engine --gpu` runs the engine over gpt-oss-20b's full shape with random weights and compares
its rate with that of the bare graphs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from services.executor.cuda.kv import Shape, lay_out, pack
from services.executor.engine import Engine
from services.executor.engine_config import EngineConfig
from services.executor.messages import Events
from services.executor.messages import pack as pack_message
from services.executor.request import Request, Sampling, Stopping
from services.executor.step import FULL, WINDOW, Draws, KVGroup, Runner, StepBatch, StepResult

BLOCK_SIZE = 32
NUM_BLOCKS = 2500  # of each group
NUM_PROMPT_TOKENS = 100
NUM_TOKENS = 160
STREAMS = (1, 8, 64, 256)
SAMPLINGS = {
    "greedy": Sampling(seed=1, temperature=0.0),
    "temperature 1": Sampling(seed=1),
    "top_p 0.95": Sampling(seed=1, top_p=0.95),
    "top_k 40": Sampling(seed=1, top_k=40),
    "penalties": Sampling(seed=1, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.1),
}


class IdleRunner:
    """Packs steps as the CUDA backend does and computes nothing: every token drawn is 7."""

    depth = 2
    vocab_size = 201_088
    kv_groups = (KVGroup(FULL, 12, 0), KVGroup(WINDOW, 12, 128))

    def __init__(self) -> None:
        self._num_drawn: deque[int] = deque()
        self._buffer = np.empty(1 << 20, np.int32)

    def launch(self, batch: StepBatch, draws: Draws) -> None:
        num_rows, num_sequences = len(batch.token_ids), len(batch.sequences)
        shape = Shape(num_rows, len(batch.logits_rows), num_sequences, num_rows, 16, 16, 1)
        pack(batch, lay_out(shape, self.kv_groups, 0), BLOCK_SIZE, 2, 0, draws, self._buffer)
        self._num_drawn.append(len(draws.rows))

    def collect(self) -> StepResult:
        return StepResult([7] * self._num_drawn.popleft(), np.empty((0, self.vocab_size), np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="run gpt-oss-20b's shape on the first GPU")
    parser.add_argument("--layers", type=int, default=24, help="of the model, for a quick look")
    arguments = parser.parse_args()
    if arguments.gpu:
        run_on_gpu(arguments.layers)
    else:
        run_alone()


def run_alone() -> None:
    print("the host's work for a decoding step, ms of this process's time, median")
    print(" streams   step  message")
    for num_streams in STREAMS:
        steps, messages = zip(*times_of(make_engine(IdleRunner()), num_streams, SAMPLINGS["greedy"]), strict=True)
        print(f"{num_streams:8}{statistics.median(steps) * 1e3:7.2f}{statistics.median(messages) * 1e3:9.2f}")


def make_engine(runner: Runner) -> Engine:
    num_blocks = {FULL: NUM_BLOCKS, WINDOW: NUM_BLOCKS}
    bounds = {"max_context": 4096, "max_batch_tokens": 2048, "max_running": 256}
    return Engine(runner, EngineConfig(num_blocks=num_blocks, block_size=BLOCK_SIZE, **bounds))


def submit(engine: Engine, num_streams: int, sampling: Sampling) -> None:
    rng = np.random.default_rng(0)
    for number in range(num_streams):
        prompt = tuple(rng.integers(0, 200_000, NUM_PROMPT_TOKENS).tolist())
        engine.submit(Request(str(number), prompt, sampling, Stopping(NUM_TOKENS)))


def times_of(engine: Engine, num_streams: int, sampling: Sampling) -> Iterator[tuple[float, float]]:
    """Seconds of the process's own time for each decoding step, and for its message."""
    submit(engine, num_streams, sampling)
    while engine.has_work:
        start = time.process_time()
        events = engine.step()
        middle = time.process_time()
        pack_message(Events(events))
        if len(events) == num_streams:
            yield middle - start, time.process_time() - middle


def run_on_gpu(num_layers: int) -> None:
    print(f"{num_layers} layers, contexts of {NUM_PROMPT_TOKENS} to {NUM_PROMPT_TOKENS + NUM_TOKENS}")
    print(" streams sampling          us a step   tok/s  bare graph us  share")
    for num_streams, name, seconds, bare in measure_on_gpu(num_layers, STREAMS, SAMPLINGS):
        rate, share = num_streams / seconds, bare / seconds
        print(f"{num_streams:8} {name:16}{seconds * 1e6:11.0f}{rate:8.0f}{bare * 1e6:15.0f}{share:7.1%}", flush=True)


def measure_on_gpu(
    num_layers: int, streams: Sequence[int], samplings: Mapping[str, Sampling]
) -> Iterator[tuple[int, str, float, float]]:
    """Streams, sampling, seconds of a step of the engine and of its bare graph, over gpt-oss-20b's shape."""
    from dataclasses import replace

    from benchmarks import bench_cuda
    from benchmarks.gpt_oss_file import GPT_OSS_20B
    from services.executor.cuda.device import Device
    from services.executor.cuda.runner import CudaRunner
    from services.executor.cuda.weights import CudaWeights

    device = Device()
    try:
        config = replace(GPT_OSS_20B, num_layers=num_layers)
        planned = bench_cuda.plan_random(config)
        weights = CudaWeights(config, planned.tensors, bench_cuda.fill_randomly(device, planned), device)
        num_blocks = {FULL: NUM_BLOCKS, WINDOW: NUM_BLOCKS}
        runner = CudaRunner(device, weights, BLOCK_SIZE, num_blocks, 2048, max_sequences=256)
        for num_streams in streams:
            batch = bench_cuda.decode_batch(config, num_streams, NUM_PROMPT_TOKENS + NUM_TOKENS)
            bare = bench_cuda.time_decode(device, runner, batch) / 1e6
            for name, sampling in samplings.items():
                yield num_streams, name, seconds_of_a_step(make_engine(runner), num_streams, sampling), bare
        runner.close()
    finally:
        device.close()


def seconds_of_a_step(engine: Engine, num_streams: int, sampling: Sampling) -> float:
    """Of the wall clock, the mean over the second half of the tokens, when every graph has been captured."""
    submit(engine, num_streams, sampling)
    ends = []
    while engine.has_work:
        if len(engine.step()) == num_streams:
            ends.append(time.perf_counter())
    half = ends[len(ends) // 2 :]
    return (half[-1] - half[0]) / (len(half) - 1)


if __name__ == "__main__":
    main()
