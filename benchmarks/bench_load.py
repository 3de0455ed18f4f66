"""The services under many clients, rude ones among them: does every stream end once, and does everything come back?

python -m benchmarks.bench_load [--clients 500] [--rounds 3] [--picture FILE.svg]

Over the gpt-oss demo model on the CPU, clients come at random and keep one stream open each: plain gRPC calls without
retries. Of the streams 30 % are cancelled at random, 10 % are not read after their first message, 10 % have a deadline
that is too short; the rest are read to their end. Prompts and lengths are mixed. After each round everything must be as
it was at the start: no sequence, every KV block free or in the prefix cache, the same leases, descriptors, sockets and
threads, no more memory. At last more requests come at once than the queue holds. Before all that: how soon a cancelled
stream's blocks are free, and what readers that have stopped cost the others. Exits with 1 if anything of this is not as
it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load_clients import KINDS, READS, STALLS, Clients, Stream
from benchmarks.picture import Panel, write_distributions
from benchmarks.processes import Held, held
from mxgpt.bundled import find_model
from mxgpt.cli.terminal import note, print_table
from mxgpt.serve import ServeConfig, Supervisor

ROUND_SECONDS = 5.0  # over which a round's clients come, and for as long they go on
STALL_SECONDS = 5.0  # after which the server gives a reader up
CLOSING_SECONDS = 1.0  # until servers have seen that connections have ended; on a busy machine some of them
PATIENCE_SECONDS = 30.0  # with servers that still hold what they did not hold at the start
MAX_RUNNING, MAX_WAITING = 64, 512
KV_MEMORY_MIB = 64  # all written by the end of a round, so that the engine's memory can be seen to stay what it is
NUM_CANCELLED = 20
NUM_BESIDE_CANCELLED = 16  # which make a step longer than the word's way from a client to the engine
MAX_STEPS_TO_FREE = 1  # the one that runs
NUM_BESIDE = 8  # readers that are watched, and streams beside them
MAX_GROWTH_MB = 8  # of a service's private memory, from the first round to any other
MAX_POOL_THREADS = 8  # that pools may start later than others, once
OPTIONS = {
    "--write-stall-seconds": STALL_SECONDS,
    "--max-running": MAX_RUNNING,
    "--max-waiting": MAX_WAITING,
    "--kv-memory-mib": KV_MEMORY_MIB,
}


@dataclass
class Report:
    """What was measured, and what is not as it should be."""

    wrong: list[str] = field(default_factory=list)
    first_tokens: dict[str, list[float]] = field(default_factory=dict)  # by round, in seconds
    gaps: dict[str, list[float]] = field(default_factory=dict)


async def measure(num_clients: int, num_rounds: int) -> Report:
    """Run it all and print it."""
    report = Report()
    options = tuple(str(word) for option in OPTIONS.items() for word in option)
    async with Supervisor(ServeConfig(find_model(), drain_seconds=1.0, executor_options=options)) as supervisor:
        clients = Clients(supervisor.address, 0, 2 * STALL_SECONDS)
        await measure_cancellation(clients, report)
        await measure_slow_readers(clients)
        await clients.close()
        await asyncio.sleep(CLOSING_SECONDS)
        at_start = held()
        print(f"at the start: {', '.join(_describe(name, each) for name, each in at_start.items())}")
        after_rounds = []
        for number in range(num_rounds):
            after_rounds.append(await measure_round(supervisor, number, num_clients, at_start, report))
            report.wrong += check_held(at_start, after_rounds[0], after_rounds[-1])
        print_latencies(report)
        await measure_flood(supervisor, num_rounds, report)
    return report


async def measure_cancellation(clients: Clients, report: Report) -> None:
    """How soon the blocks of a cancelled stream are free, while other streams keep the engine stepping.

    The engine takes commands between steps, so that the step which runs is to be the only one. On a busy machine the
    word may take longer than that from the client over the server to the engine: the median counts.
    """
    freed = [await clients.seconds_to_free(NUM_BESIDE_CANCELLED) for _ in range(NUM_CANCELLED)]
    seconds, steps = [each for each, _ in freed], [each for _, each in freed]
    print(
        f"cancelled to free blocks, {NUM_CANCELLED} times: median {1000 * statistics.median(seconds):.1f} ms, "
        f"longest {1000 * max(seconds):.1f} ms; {statistics.median(steps):.0f} steps, at most {max(steps)}"
    )
    if statistics.median(steps) > MAX_STEPS_TO_FREE:
        report.wrong.append(f"a cancelled stream stays for {statistics.median(steps):.0f} steps")


async def measure_slow_readers(clients: Clients) -> None:
    """What readers beside them notice of streams whose clients have stopped reading."""
    rows = []
    for kind in (READS, STALLS):
        streams = await clients.at_once([READS] * NUM_BESIDE + [kind] * NUM_BESIDE, num_tokens=400)
        gaps = [gap for stream in streams[:NUM_BESIDE] for gap in stream.gaps]
        rows.append([f"{NUM_BESIDE} that read" if kind == READS else f"{NUM_BESIDE} that stop", *percentiles(gaps)])
        await clients.until_idle()
    print_table([f"{NUM_BESIDE} readers beside", *(f"gap {name}, ms" for name in ("p50", "p90", "p99", "max"))], rows)


async def measure_round(
    supervisor: Supervisor, number: int, num_clients: int, at_start: dict[str, Held], report: Report
) -> dict[str, Held]:
    """Clients of every kind for a few seconds; the executor must be idle after them.

    Returns:
        What each service holds afterwards.
    """
    clients = Clients(supervisor.address, number, 2 * STALL_SECONDS)
    start = time.monotonic()
    streams = await clients.mixed(num_clients, ROUND_SECONDS)
    seconds = time.monotonic() - start
    status = await clients.until_idle()
    await clients.close()
    await asyncio.sleep(CLOSING_SECONDS)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and check_descriptors(at_start, held()):
        await asyncio.sleep(CLOSING_SECONDS)
    name = f"round {number + 1}"
    print(f"{name}: {len(streams)} streams in {seconds:.1f} s, at most {clients.max_open} open at once")
    print_outcomes(streams)
    after = held()  # before asking the loader below, which takes a connection
    print(f"  held: {', '.join(_describe(service, each) for service, each in after.items())}")
    report.wrong += check_streams(streams) + check_idle(status) + await check_leases(supervisor)
    if clients.max_open < 0.9 * num_clients:
        report.wrong.append(f"only {clients.max_open} streams were open at once")
    if not any("DEADLINE_EXCEEDED" in stream.outcomes for stream in streams if stream.kind == STALLS):
        report.wrong.append("no client that stopped reading was given up")
    report.first_tokens[name] = [stream.first_token for stream in streams if stream.first_token]
    report.gaps[name] = [gap for stream in streams if stream.kind != STALLS for gap in stream.gaps]
    return after


async def measure_flood(supervisor: Supervisor, seed: int, report: Report) -> None:
    """More streams at once than run and wait: the queue keeps its bound, and whoever finds it full is told when."""
    clients = Clients(supervisor.address, seed)
    num_taken: list[int] = []  # the bound is on both, for whoever comes waits until the next step, if it may run or not

    async def watch() -> None:
        while True:
            status = await clients.status()
            num_taken.append(status.num_running + status.num_waiting)
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    flood = await clients.at_once([READS] * (MAX_RUNNING + MAX_WAITING + 236))
    watching.cancel()
    status = await clients.until_idle()
    await clients.close()
    print(f"{len(flood)} at once, of which at most {max(num_taken)} were seen to run or wait:")
    print_outcomes(flood)
    report.wrong += check_streams(flood) + check_idle(status)
    if max(num_taken) > MAX_RUNNING + MAX_WAITING:
        report.wrong.append(f"{max(num_taken)} sequences ran or waited")
    if not any("RESOURCE_EXHAUSTED with RetryInfo" in stream.outcomes for stream in flood):
        report.wrong.append("the queue refused nobody with RetryInfo")


def check_streams(streams: Sequence[Stream]) -> list[str]:
    """Streams that did not end exactly once."""
    return [f"a stream that {s.kind} ended in {s.outcomes}" for s in streams if len(s.outcomes) != 1]


def check_idle(status: Any) -> list[str]:
    """What an executor without work still holds."""
    wrong = [
        f"{usage.group}: {usage.num_blocks - usage.num_free} KV blocks are lost"
        for usage in status.blocks  # of which those in the prefix cache count as free
        if usage.num_free < usage.num_blocks
    ]
    if status.num_running or status.num_waiting:
        wrong.append(f"{status.num_running} sequences run and {status.num_waiting} wait")
    return wrong


async def check_leases(supervisor: Supervisor) -> list[str]:
    """Leases beside the executor's own."""
    status = await supervisor.loader_status()
    return [] if status.num_leases == 1 else [f"{status.num_leases} leases are held by one executor"]


def check_held(at_start: dict[str, Held], first: dict[str, Held], now: dict[str, Held]) -> list[str]:
    """What services hold that they did not at the start, or, of memory, after the first round."""
    wrong = check_descriptors(at_start, now)
    for name, each in now.items():
        if each.num_threads > at_start[name].num_threads + MAX_POOL_THREADS:
            wrong.append(f"{name}: num_threads was {at_start[name].num_threads} and is {each.num_threads}")
        if each.private_mb > first[name].private_mb + MAX_GROWTH_MB:
            wrong.append(f"{name}: {first[name].private_mb} MB after the first round, {each.private_mb} MB now")
    return wrong


def check_descriptors(at_start: dict[str, Held], now: dict[str, Held]) -> list[str]:
    """Descriptors and sockets that services have open and had not at the start."""
    return [
        f"{name}: {what} was {getattr(at_start[name], what)} and is {getattr(each, what)}"
        for name, each in now.items()
        for what in ("num_descriptors", "num_sockets")
        if getattr(each, what) > getattr(at_start[name], what)
    ]


def percentiles(seconds: Sequence[float]) -> list[str]:
    """p50, p90, p99 and the largest, in milliseconds."""
    return [f"{1000 * value:.0f}" for value in (*np.percentile(seconds, [50, 90, 99]), max(seconds))]


def print_latencies(report: Report) -> None:
    """Percentiles of every round, and the longest waits of all."""
    names = ["p50", "p90", "p99", "max"]
    rows = [[name, *percentiles(report.first_tokens[name]), *percentiles(report.gaps[name])] for name in report.gaps]
    print_table(["ms", *(f"first {name}" for name in names), *(f"gap {name}" for name in names)], rows)
    longest_first = max(max(times) for times in report.first_tokens.values())
    longest_gap = max(max(times) for times in report.gaps.values())
    print(f"longest wait of a stream: {longest_first:.2f} s for its first token, {longest_gap:.2f} s between two")


def print_outcomes(streams: Sequence[Stream]) -> None:
    """How the streams of each kind ended."""
    for kind in KINDS:
        counts = Counter(outcome for stream in streams if stream.kind == kind for outcome in stream.outcomes)
        if counts:
            print(f"  {kind}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))


def _describe(name: str, each: Held) -> str:
    descriptors = f"{each.num_descriptors} descriptors ({each.num_sockets} sockets)"
    return f"{name} {descriptors}, {each.num_threads} threads, {each.private_mb} MB"


def main() -> int:
    """Returns 0 if everything is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=500, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--picture", type=Path, help="draw the latencies of all rounds into this SVG file")
    arguments = parser.parse_args()
    note(f"{os.cpu_count()} cores; {arguments.clients} clients, {arguments.rounds} rounds")
    report = asyncio.run(measure(arguments.clients, arguments.rounds))
    if arguments.picture is not None:
        first = Panel("From the call to the first token", report.first_tokens)
        write_distributions(arguments.picture, [first, Panel("Between two messages of a stream", report.gaps)])
    for each in sorted(set(report.wrong)):
        print(f"WRONG: {each} ({report.wrong.count(each)} times)")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
