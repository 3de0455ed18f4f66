"""What streams that share an executor notice of one another: long prompts, priorities, preemption, shared prefixes.

python -m benchmarks.bench_fairness [--quick]

Over the gpt-oss demo model on the CPU, through all three services. Each part says what it compares; where tokens are to
be the same whatever else runs, they are compared with those of a quiet run. Exits with 1 if any differ, or if
priorities are not honoured.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.bench_load import percentiles
from models.train.tasks import held_out_tasks
from mxgpt import AsyncClient
from mxgpt.bundled import find_model
from mxgpt.cli.terminal import note, print_table
from mxgpt.serve import ServeConfig, Supervisor

CHUNK, WHOLE = 128, 2048  # tokens of a step; the second takes in any prompt at once
NUM_READERS = 4
NUM_AT_ONCE = 4  # that run, where priorities are measured
LONG_PROMPT = 1600  # tokens
VOCABULARY = range(200, 1000)  # ids that are text


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    num_long_prompts: int = 12
    num_urgent: int = 8
    num_preempted: int = 12
    num_prefixes: int = 6
    num_questions: int = 12  # after each prefix


QUICK = Size(num_long_prompts=3, num_urgent=3, num_preempted=6, num_prefixes=2, num_questions=4)


@dataclass
class Read:
    """A stream as its reader saw it."""

    token_ids: tuple[int, ...] = ()
    first_seconds: float = 0.0  # from the call to the first piece
    arrivals: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_prompt_tokens: int = 0


async def read(client: AsyncClient, prompt: Any, **options: Any) -> Read:
    """One stream to its end."""
    begin, stream = time.monotonic(), Read()
    generation = client.generate(prompt, **options)
    async for _ in generation:
        stream.arrivals.append(time.monotonic())
    result = generation.result
    stream.first_seconds = stream.arrivals[0] - begin
    stream.token_ids = result.outputs[0].token_ids
    if result.usage is not None:
        stream.num_cached_tokens, stream.num_prompt_tokens = (
            result.usage.num_cached_tokens,
            result.usage.num_prompt_tokens,
        )
    return stream


def served(*options: str) -> Supervisor:
    return Supervisor(ServeConfig(find_model(), drain_seconds=1.0, executor_options=options))


def gaps_within(streams: Sequence[Read], begin: float, end: float) -> list[float]:
    """Seconds between pieces that came from `begin` to `end`."""
    gaps = []
    for stream in streams:
        arrivals = [arrival for arrival in stream.arrivals if begin <= arrival <= end]
        gaps += [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    return gaps


async def measure_long_prompts(size: Size) -> list[str]:
    """Between-token latency of readers while long prompts enter one after the other, in pieces and whole."""
    chance = random.Random(1)
    prompts = [chance.choices(VOCABULARY, k=LONG_PROMPT) for _ in range(size.num_long_prompts)]
    rows, outputs = [], []
    for max_batch_tokens in (CHUNK, WHOLE):
        async with (
            served("--max-batch-tokens", str(max_batch_tokens)) as supervisor,
            AsyncClient(supervisor.address) as client,
        ):
            reading = [
                asyncio.create_task(read(client, [300 + i, 301, 302], max_tokens=2000, ignore_eos=True, seed=i))
                for i in range(NUM_READERS)
            ]
            await asyncio.sleep(0.5)
            begin = time.monotonic()
            entered = [await read(client, prompt, max_tokens=1, temperature=0) for prompt in prompts]
            end = time.monotonic()
            for task in reading:
                if task.done():
                    return ["readers ended before the last long prompt had entered"]
            readers = await asyncio.gather(*reading)
        outputs.append([stream.token_ids for stream in (*entered, *readers)])
        first = statistics.median(stream.first_seconds for stream in entered)
        name = f"in pieces of {CHUNK}" if max_batch_tokens == CHUNK else "whole"
        rows.append([name, *percentiles(gaps_within(readers, begin, end)), f"{1000 * first:.0f}"])
    print(f"{NUM_READERS} readers while {size.num_long_prompts} prompts of {LONG_PROMPT} tokens enter, ms:")
    print_table(["prompts enter", *(f"gap {name}" for name in ("p50", "p90", "p99", "max")), "their first token"], rows)
    return [] if outputs[0] == outputs[1] else ["the size of the pieces changed tokens"]


async def measure_priorities(size: Size) -> list[str]:
    """Waits for the first token behind a full queue: what came early against what came late and is urgent."""
    async with (
        served("--max-running", str(NUM_AT_ONCE), "--max-batch-tokens", "256") as supervisor,
        AsyncClient(supervisor.address) as client,
    ):
        options: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "temperature": 0}
        early = [asyncio.create_task(read(client, [300 + i, 301], priority=0, **options)) for i in range(40)]
        while (await client.status()).num_waiting < 30 and not early[0].done():  # until most of them have come
            await asyncio.sleep(0.01)
        urgent = [
            asyncio.create_task(read(client, [400 + i, 301], priority=5, **options)) for i in range(size.num_urgent)
        ]
        patient = [
            asyncio.create_task(read(client, [500 + i, 301], priority=-5, **options)) for i in range(size.num_urgent)
        ]
        waits = {
            "0, of 40 that came first": await asyncio.gather(*early),
            "5, that came later": await asyncio.gather(*urgent),
            "-5, with them": await asyncio.gather(*patient),
        }
    rows = [[name, *first(streams)] for name, streams in waits.items()]
    print(f"first token behind a queue, {NUM_AT_ONCE} run at once, ms:")
    print_table(["priority", "p50", "p90", "p99", "max"], rows)
    normal, raised, lowered = ([stream.arrivals[0] for stream in streams] for streams in waits.values())
    # Those of the last turn and the first of the next sort begin in the same steps; a reader sees them in any order.
    num_overtaken = sum(arrival > min(lowered) for arrival in normal)
    is_honoured = max(raised) < statistics.median(normal) and num_overtaken <= NUM_AT_ONCE
    return [] if is_honoured else ["priorities were not honoured"]


async def measure_preemption(size: Size) -> list[str]:
    """The same streams where blocks are plenty and where they run out: same tokens, more time."""
    rows, outputs = [], []
    for kv_memory_mib in (64, 4):
        async with (
            served("--kv-memory-mib", str(kv_memory_mib)) as supervisor,
            AsyncClient(supervisor.address) as client,
        ):
            begin = time.monotonic()
            streams = await asyncio.gather(
                *(
                    read(client, [300 + i, 301, 302], max_tokens=300, ignore_eos=True, seed=i, temperature=i % 2)
                    for i in range(size.num_preempted)
                )
            )
            seconds = time.monotonic() - begin
            status = await client.status()
        outputs.append([stream.token_ids for stream in streams])
        num_blocks = min(group.num_blocks for group in status.blocks)
        rows.append([f"{num_blocks} of {status.blocks[0].block_size} tokens", status.num_preemptions, f"{seconds:.1f}"])
    print(f"{size.num_preempted} streams of 300 tokens:")
    print_table(["KV blocks of a group", "preemptions", "seconds"], rows)
    wrong = [] if outputs[0] == outputs[1] else ["preemption changed tokens"]
    if rows[0][1] or not rows[1][1]:
        wrong.append("sequences were to be preempted in the second run, and there alone")
    return wrong


async def measure_prefixes(size: Size) -> list[str]:
    """Questions after long prefixes that they share: the first to each computes it, the others find it."""
    tasks = [task.prompt for task in held_out_tasks(7, size.num_prefixes * (size.num_questions + 40))]
    prompts = []
    for number in range(size.num_prefixes):
        examples = " ".join(tasks[40 * number : 40 * (number + 1)])
        questions = tasks[40 * size.num_prefixes + number :: size.num_prefixes][: size.num_questions]
        prompts.append([[_message("system", examples), _message("user", question)] for question in questions])
    options: dict[str, Any] = {"max_tokens": 24, "seed": 3, "temperature": 1.0}
    async with served() as supervisor, AsyncClient(supervisor.address) as client:
        cold = [await read(client, asked[0], **options) for asked in prompts]
        warm = [await read(client, prompt, **options) for asked in prompts for prompt in asked[1:]]
        # Prompts whose log-probabilities are wanted are computed anew, all of them.
        anew = [await read(client, prompt, prompt_logprobs=0, **options) for asked in prompts for prompt in asked]
    hit = sum(stream.num_cached_tokens for stream in warm) / sum(stream.num_prompt_tokens for stream in warm)
    print(f"{size.num_prefixes} prefixes, {size.num_questions} questions after each:")
    rows = [
        [name, len(streams), statistics.mean(s.num_prompt_tokens for s in streams).__round__(), share, *first(streams)]
        for name, streams, share in (("first to a prefix", cold, "0 %"), ("the others", warm, f"{hit:.1%}"))
    ]
    print_table(["prompts", "number", "tokens, mean", "found cached", "first p50, ms", "p90", "p99", "max"], rows)
    wrong = [] if all(stream.num_cached_tokens == 0 for stream in anew) else ["a prompt was not computed anew"]
    by_prefix = len(prompts[0])
    with_cache = [
        stream.token_ids
        for number in range(len(prompts))
        for stream in (cold[number], *warm[number * (by_prefix - 1) : (number + 1) * (by_prefix - 1)])
    ]
    if with_cache != [stream.token_ids for stream in anew]:
        wrong.append("the prefix cache changed tokens")
    if hit < 0.5:
        wrong.append(f"the prefix cache found {hit:.1%}")
    return wrong


def first(streams: Sequence[Read]) -> list[str]:
    return percentiles([stream.first_seconds for stream in streams])


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


async def measure(size: Size) -> list[str]:
    """Run every part and print it; what is not as it should be."""
    wrong = []
    for part in (measure_long_prompts, measure_priorities, measure_preemption, measure_prefixes):
        wrong += await part(size)
        print()
    return wrong


def main() -> int:
    """Returns 0 if everything is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fraction of it, to see that it works")
    arguments = parser.parse_args()
    note(f"{os.cpu_count()} cores")
    wrong = asyncio.run(measure(QUICK if arguments.quick else Size()))
    for each in wrong:
        print(f"WRONG: {each}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
