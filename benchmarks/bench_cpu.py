"""The demo models on the CPU: mxgpt's engine alone, mxgpt served over gRPC, and llama.cpp, in one run.

    python -m benchmarks.bench_cpu [--threads 1] [--repetitions 5] [--json FILE]

All three get the same prompts (held-out tasks, through the model's own chat template, as token ids), write the same
number of tokens greedily past any end, and use the same number of threads for the model. Rates are tokens written a
second by all streams together, from the first request to the last token, prompts included: medians of repetitions
that take turns, so that a busy moment of the machine hits all alike. "Served" is everything that a user meets: text
goes in and comes out, through tokenizer, executor and client as processes of their own, on the same cores.
llama.cpp runs inside its process, without a server around it; it is an extra: pip install '.[peers]'.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.train.tasks import held_out_tasks
from mxgpt import AsyncClient
from mxgpt.bundled import find_model
from mxgpt.cli.terminal import note, print_table
from mxgpt.serve import ServeConfig, Supervisor
from mxgpt.tasks import run_all
from services.executor.blas import blas_environment

MODELS = ("demo-gpt-oss.gguf", "demo-gpt2.gguf")
STREAMS = {1: 256, 16: 128}  # number of streams: tokens that each writes
CONTEXT = 512  # of llama.cpp's slots; prompt and output fit
SEED = 11

Run = Callable[[], Awaitable[float]]  # runs once; returns tokens a second


@dataclass(frozen=True)
class Row:
    """Rates of one model and number of streams, in tokens a second, one entry a repetition."""

    model: str
    num_streams: int
    rates: dict[str, list[float]]  # by contestant

    def median(self, name: str) -> float | None:
        return statistics.median(self.rates[name]) if name in self.rates else None

    def ratio(self, name: str, to: str) -> float | None:
        """Median of the ratios of repetitions, each of the same moment."""
        if name not in self.rates or to not in self.rates:
            return None
        return statistics.median(a / b for a, b in zip(self.rates[name], self.rates[to], strict=True))


class Worker:
    """A contestant in a process of its own, told what to do by lines of JSON."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._process: Any = None

    async def start(self, num_threads: int) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, **blas_environment(num_threads, os.environ)},
        )
        await self._answer()

    async def rate(self, prompts: list[list[int]], max_tokens: int) -> float:
        """Tokens a second of one job."""
        job = {"prompts": prompts, "max_tokens": max_tokens, "context": CONTEXT}
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        answer = await self._answer()
        assert answer["tokens"] == len(prompts) * max_tokens
        return float(answer["tokens"] / answer["seconds"])

    async def stop(self) -> None:
        self._process.stdin.close()
        await self._process.wait()

    async def _answer(self) -> dict[str, Any]:
        line = await self._process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(self._command)} ended without an answer")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1, help="for the model, of each contestant")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--models", nargs="+", type=Path, help="the demo models if none are named")
    parser.add_argument("--json", type=Path, help="write every rate to this file")
    arguments = parser.parse_args()
    paths = arguments.models or [find_model(name) for name in MODELS]
    has_peer = importlib.util.find_spec("xllamacpp") is not None
    _describe(arguments.threads, arguments.repetitions, has_peer)
    rows = [
        row
        for path in paths
        for row in asyncio.run(_measure_model(path, arguments.threads, arguments.repetitions, has_peer))
    ]
    _print(rows)
    if arguments.json:
        fields = [{"model": row.model, "streams": row.num_streams, "rates": row.rates} for row in rows]
        arguments.json.write_text(json.dumps({"threads": arguments.threads, "rows": fields}, indent=2) + "\n")


async def _measure_model(path: Path, num_threads: int, repetitions: int, has_peer: bool) -> list[Row]:
    engine = Worker("benchmarks.cpu_engine", str(path))
    llama = Worker("benchmarks.cpu_llama", str(path), str(num_threads)) if has_peer else None
    config = ServeConfig(path, drain_seconds=1.0, executor_options=("--threads", str(num_threads)))
    async with Supervisor(config) as supervisor, AsyncClient(**supervisor.connection) as client:
        workers = [engine, llama] if llama else [engine]
        for worker in workers:
            await worker.start(num_threads)
        questions = [task.prompt for task in held_out_tasks(SEED, max(STREAMS))]
        prompts = [await _prompt_ids(client, question) for question in questions]
        rows = []
        for num_streams, max_tokens in STREAMS.items():
            contestants = _contestants(
                client, engine, llama, questions[:num_streams], prompts[:num_streams], max_tokens
            )
            rows.append(Row(path.stem, num_streams, await _take_turns(contestants, repetitions)))
            note(f"{path.stem}, {num_streams} streams: done")
        for worker in workers:
            await worker.stop()
    return rows


def _contestants(
    client: AsyncClient,
    engine: Worker,
    llama: Worker | None,
    questions: list[str],
    prompts: list[list[int]],
    max_tokens: int,
) -> dict[str, Run]:
    """How to run each once, by name, in the order in which they take turns."""
    runs: dict[str, Run] = {
        "engine": lambda: engine.rate(prompts, max_tokens),
        "served": lambda: _served_rate(client, questions, max_tokens),
    }
    if llama is not None:
        peer = llama
        runs["llama.cpp"] = lambda: peer.rate(prompts, max_tokens)
    return runs


async def _take_turns(contestants: dict[str, Run], repetitions: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(repetitions + 1):
        for name, run in contestants.items():
            rate = await run()
            if repetition > 0:  # the first one warms up
                rates[name].append(rate)
    return rates


async def _served_rate(client: AsyncClient, questions: list[str], max_tokens: int) -> float:
    async def stream(question: str) -> int:
        generation = client.generate(_chat(question), max_tokens=max_tokens, temperature=0, ignore_eos=True)
        num_tokens = 0
        async for piece in generation:
            num_tokens += len(piece.token_ids)
        return num_tokens

    start = time.perf_counter()
    num_tokens = sum(await run_all(stream(question) for question in questions))
    assert num_tokens == len(questions) * max_tokens
    return num_tokens / (time.perf_counter() - start)


async def _prompt_ids(client: AsyncClient, question: str) -> list[int]:
    """What the model's chat template and tokenizer make of a question."""
    return list((await client.complete(_chat(question), max_tokens=1)).prompt_token_ids)


def _chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _describe(num_threads: int, repetitions: int, has_peer: bool) -> None:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    load = os.getloadavg()[0]
    busy = ': other work runs here, and "served" suffers most from it' if load > 1.0 else ""
    print(f"{_processor()}, {len(os.sched_getaffinity(0))} cores; load average {load:.2f} at the start{busy}")
    print(f"numpy {np.__version__} with {blas['name']} {blas['version']}; {num_threads} thread(s) for each model")
    if has_peer:
        print(f"llama.cpp: xllamacpp {importlib.import_module('xllamacpp').__version__}")
    else:
        print("llama.cpp: not measured, xllamacpp is not installed (pip install '.[peers]')")
    lengths = ", ".join(f"{n} stream(s) of {tokens} tokens" for n, tokens in STREAMS.items())
    print(f"{lengths}; medians of {repetitions} repetitions that take turns\n", flush=True)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _print(rows: list[Row]) -> None:
    header = ("MODEL", "STREAMS", "ENGINE", "SERVED", "LLAMA.CPP", "SERVED/ENGINE", "ENGINE/LLAMA.CPP")
    table = [
        (
            row.model,
            row.num_streams,
            *(_text(row.median(name), ".1f") for name in ("engine", "served", "llama.cpp")),
            _text(row.ratio("served", "engine"), ".2f"),
            _text(row.ratio("engine", "llama.cpp"), ".2f"),
        )
        for row in rows
    ]
    print_table(header, table, align="lrrrrrr")


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    main()
