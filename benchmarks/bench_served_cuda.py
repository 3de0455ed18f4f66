"""gpt-oss-20b's full shape served over gRPC from a GPU, beside the engine alone: first token, one stream, 256 streams.

`python -m benchmarks.bench_served_cuda [--folder /tmp] [--layers 24]` writes a file of gpt-oss-20b's full size with
random weights into the folder, unless it is there, starts the three services over it, and drives them with clients in
processes of their own. Rates count the tokens that arrived while every stream was running. Then the engine alone
decodes the same numbers of streams at the same contexts, in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import multiprocessing.pool
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.bench_engine import NUM_PROMPT_TOKENS, NUM_TOKENS, SAMPLINGS, measure_on_gpu
from benchmarks.gpt_oss_file import GPT_OSS_20B, write_file
from mxgpt import AsyncClient
from mxgpt.serve import ServeConfig, Supervisor

FIRST_TOKEN_PROMPT = 1024
NUM_FIRST_TOKENS = 9
STREAMS_OF_A_CLIENT = 32
STREAMS = (1, 64, 256)
NUM_SERVED_TOKENS = 2 * NUM_TOKENS  # of a stream: all run together for a while, however long their prompts take
MAX_ID = 190_000  # of random prompts: below the special tokens
EXECUTOR_OPTIONS = ("--max-running", "256", "--kv-memory-mib", "8192")

Arrivals = list[tuple[float, int]]  # when, on the machine's clock, and how many tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where the file is written")
    parser.add_argument("--layers", type=int, default=24, help="of the model, for a quick look")
    arguments = parser.parse_args()
    path = arguments.folder / f"gpt-oss-20b-{arguments.layers}-layers.gguf"
    if not path.exists():
        write_file(path, replace(GPT_OSS_20B, num_layers=arguments.layers))
    served = asyncio.run(measure_served(path))
    for num_streams, _, seconds, _ in measure_on_gpu(arguments.layers, STREAMS, {"greedy": SAMPLINGS["greedy"]}):
        alone = num_streams / seconds
        rate = served[num_streams]
        print(
            f"{num_streams} streams: served {rate:.0f} tok/s, engine alone {alone:.0f}, {rate / alone:.1%}", flush=True
        )


async def measure_served(path: Path) -> dict[int, float]:
    """Tokens per second by number of streams; prints the time to the first token."""
    config = ServeConfig(path, device="cuda:0", drain_seconds=1.0, executor_options=EXECUTOR_OPTIONS)
    supervisor = Supervisor(config, lambda _label, _line: None, lambda _done, _total: None)
    start = time.perf_counter()
    try:
        await supervisor.start()
        print(f"three services from nothing to healthy: {time.perf_counter() - start:.1f} s", flush=True)
        await measure_first_token(supervisor.address)
        with multiprocessing.get_context("spawn").Pool(max(STREAMS) // STREAMS_OF_A_CLIENT) as pool:
            await asyncio.to_thread(measure_rate, pool, supervisor.address, 8)  # graphs, connections
            return {count: await asyncio.to_thread(measure_rate, pool, supervisor.address, count) for count in STREAMS}
    finally:
        await supervisor.stop()


async def measure_first_token(address: str) -> None:
    """Of a prompt that nothing is known of, on an idle server; the median, the first one apart."""
    taken = []
    async with AsyncClient(address) as client:
        for seed in range(NUM_FIRST_TOKENS + 1):
            start = time.perf_counter()
            async with client.generate(
                random_prompt(seed, FIRST_TOKEN_PROMPT), temperature=0.0, max_tokens=1
            ) as stream:
                async for _ in stream:
                    pass
            taken.append(time.perf_counter() - start)
    median = statistics.median(taken[1:])
    print(
        f"a prompt of {FIRST_TOKEN_PROMPT}, one token, whole call: {median * 1e3:.1f} ms (first {taken[0] * 1e3:.1f})"
    )


def measure_rate(pool: multiprocessing.pool.Pool, address: str, num_streams: int) -> float:
    """Tokens per second that reach clients between the last stream's first token and the first one's last."""
    counts = [min(STREAMS_OF_A_CLIENT, num_streams - start) for start in range(0, num_streams, STREAMS_OF_A_CLIENT)]
    streams = [
        stream
        for own in pool.starmap(run_streams, [(address, count, 1000 * n) for n, count in enumerate(counts)], 1)
        for stream in own
    ]
    begin, end = max(stream[0][0] for stream in streams), min(stream[-1][0] for stream in streams)
    assert begin < end, "the first stream had ended before the last one began"
    num_tokens = sum(count for stream in streams for when, count in stream if begin < when <= end)
    return num_tokens / (end - begin)


def run_streams(address: str, count: int, seed: int) -> list[Arrivals]:
    """So many streams at once from this process: what of each arrived when."""

    async def one(client: AsyncClient, number: int) -> Arrivals:
        arrivals: Arrivals = []
        prompt = random_prompt(seed + number, NUM_PROMPT_TOKENS)
        async with client.generate(prompt, temperature=0.0, max_tokens=NUM_SERVED_TOKENS, ignore_eos=True) as stream:
            async for piece in stream:
                arrivals.append((time.monotonic(), len(piece.token_ids)))
        return arrivals

    async def all_streams() -> list[Arrivals]:
        async with AsyncClient(address) as client:
            return await asyncio.gather(*[one(client, number) for number in range(count)])

    return asyncio.run(all_streams())


def random_prompt(seed: int, num_tokens: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, MAX_ID, num_tokens).tolist()
    return ids


if __name__ == "__main__":
    main()
