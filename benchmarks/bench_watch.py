"""What watching costs: tokens a second served, and processor time a token, with metrics, traces and neither.

python -m benchmarks.bench_watch [--streams 16] [--repetitions 7]

Each way of watching has services of its own over the gpt-oss demo model; they are measured in turns, so that whatever
else the machine does befalls all of them alike, and medians are printed. Where metrics are on, they are scraped every
second, 15 times as often as Prometheus would by default. Processor time is that of the executor's server process, which
does the counting; it is the steadier figure where the machine is shared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from mxgpt import AsyncClient
from mxgpt.bench import Load, measure, random_prompts
from mxgpt.bundled import find_model
from mxgpt.cli.terminal import note, print_table
from mxgpt.serve import ServeConfig, Supervisor
from mxgpt.top.scrape import scrape

SCRAPE_SECONDS = 1.0
PROMPT_TOKENS = 32
MAX_TOKENS = 64
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Way:
    """One way of watching, and what was measured of it."""

    name: str
    config: ServeConfig
    rates: list[float] = field(default_factory=list)  # tokens a second
    costs: list[float] = field(default_factory=list)  # microseconds of the server process a token


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    model = find_model()
    with tempfile.TemporaryDirectory() as directory:
        ways = [
            Way("nothing", ServeConfig(model, log_level="WARNING")),
            Way("metrics, scraped each second", ServeConfig(model, log_level="WARNING", metrics_port=0)),
            Way(
                "metrics, traces of every request, logs",
                ServeConfig(model, metrics_port=0, traces=f"file:{directory}/spans", log_format="json"),
            ),
        ]
        async with contextlib.AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(Supervisor(way.config)) for way in ways]
            for repetition in range(-1, arguments.repetitions):
                for way, server in zip(ways, servers, strict=True):
                    await _measure(way, server, arguments.streams, repetition)
    print_table(
        ("WATCHED BY", "TOKENS/S", "OF NOTHING", "SERVER µs/TOKEN"),
        [
            (
                way.name,
                f"{statistics.median(way.rates):,.0f}",
                f"{statistics.median(way.rates) / statistics.median(ways[0].rates):.3f}",
                f"{statistics.median(way.costs):.1f}",
            )
            for way in ways
        ],
        align="lrrr",
    )


async def _measure(way: Way, server: Supervisor, num_streams: int, repetition: int) -> None:
    """One repetition; the first, numbered -1, is not counted."""
    scraping = asyncio.create_task(_scrape_on(server.metrics_addresses))
    async with AsyncClient(server.address) as client:
        vocab_size = (await client.list_models())[0].vocab_size
        num_requests = 4 * num_streams
        prompts = random_prompts(num_requests, PROMPT_TOKENS, vocab_size, seed=repetition)
        process_id = server.process_id("executor")
        before = _processor_seconds(process_id)
        found = await measure(client, Load(prompts, num_streams, num_requests, MAX_TOKENS))
        spent = _processor_seconds(process_id) - before
    scraping.cancel()
    assert not found.errors, found.errors
    if repetition >= 0:
        way.rates.append(found.output_rate)
        way.costs.append(1e6 * spent / found.num_output_tokens)
        note(f"{way.name}: {found.output_rate:,.0f} tokens/s, {way.costs[-1]:.1f} µs/token")


async def _scrape_on(addresses: list[str]) -> None:
    while True:
        for address in addresses:
            await asyncio.to_thread(scrape, address)
        await asyncio.sleep(SCRAPE_SECONDS)


def _processor_seconds(process_id: int) -> float:
    """User and system time of a process, without its children."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


if __name__ == "__main__":
    asyncio.run(main())
