"""`mxgpt bench`: what a running server delivers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import click

from mxgpt.aio import AsyncClient
from mxgpt.bench import Load, Measurement, measure, percentile, random_prompts
from mxgpt.cli.failures import FAILED, OK, CommandError
from mxgpt.cli.options import connection, server_options
from mxgpt.cli.terminal import note, print_table, progress
from mxgpt.options import Prompt

_SHARES = (0.5, 0.9, 0.99)


@click.command(
    epilog="""\b
Examples:
  mxgpt bench                                     # one stream, then what many get:
  mxgpt bench --streams 16 --requests 64
  mxgpt bench --prompt-tokens 1024 --max-tokens 1 # prefill
  mxgpt bench --prompts questions.txt --json
"""
)
@server_options
@click.option("--streams", type=click.IntRange(1), default=1, show_default=True, help="Requests at once.")
@click.option("--requests", type=click.IntRange(1), help="Requests in all. Default: four a stream.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=64, show_default=True, help="Random ids, seeded.")
@click.option("--prompts", type=click.Path(path_type=Path), help="File with a prompt a line, instead of random ids.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Written by every request.")
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--warm-up", type=click.IntRange(0), default=1, show_default=True, help="Requests not counted.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def bench(
    context: click.Context,
    /,
    streams: int,
    requests: int | None,
    prompt_tokens: int,
    prompts: Path | None,
    max_tokens: int,
    temperature: float,
    warm_up: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure a running server as its clients see it: tokens a second, time to the first token, time between tokens.

    Each stream sends a request when its last one has ended. Every request writes --max-tokens tokens, whatever the
    model makes of them. Exit code 1 says that requests failed.
    """
    num_requests = requests or 4 * streams
    measured = asyncio.run(
        _measure(connection(options), prompts, prompt_tokens, warm_up, streams, num_requests, max_tokens, temperature)
    )
    if as_json:
        print(json.dumps(_fields(measured)))
    elif measured.whole:
        _print(measured, streams, num_requests)
    for message in sorted({str(error) for error in measured.errors}):
        note(f"failed: {message}")
    context.exit(FAILED if measured.errors else OK)


async def _measure(
    connect_to: dict[str, Any],
    prompts: Path | None,
    prompt_tokens: int,
    warm_up: int,
    num_streams: int,
    num_requests: int,
    max_tokens: int,
    temperature: float,
) -> Measurement:
    async with AsyncClient(**connect_to) as client:
        model = (await client.list_models())[0]
        if prompt_tokens + max_tokens > model.context_length and prompts is None:
            raise CommandError(f"{model.name} holds {model.context_length} tokens of prompt and output")
        chosen = _prompts(prompts) or random_prompts(warm_up + num_requests, prompt_tokens, model.vocab_size)
        if warm_up:
            await measure(client, Load(chosen[:warm_up], num_streams, warm_up, max_tokens, temperature))
        load = Load(chosen[warm_up:] or chosen, num_streams, num_requests, max_tokens, temperature)
        with progress() as bar:
            task = bar.add_task("requests", total=num_requests)
            return await measure(client, load, lambda done: bar.update(task, completed=done))


def _prompts(path: Path | None) -> list[Prompt]:
    return [line for line in path.read_text().splitlines() if line.strip()] if path else []


def _print(measured: Measurement, num_streams: int, num_requests: int) -> None:
    print(
        f"{num_requests} requests over {num_streams} streams in {measured.seconds:.2f} s, "
        f"{len(measured.errors)} failed\n"
        f"{measured.num_prompt_tokens} prompt tokens ({measured.num_cached_tokens} from the prefix cache), "
        f"{measured.num_output_tokens} written\n"
        f"{measured.output_rate:.1f} tokens/s written by all streams together\n"
    )
    rows = [
        (name, *(f"{1000 * percentile(values, share):.2f}" for share in _SHARES))
        for name, values in _latencies(measured).items()
    ]
    print_table(("MILLISECONDS", *(f"P{100 * share:.0f}" for share in _SHARES)), rows, align="lrrr")


def _fields(measured: Measurement) -> dict[str, Any]:
    latencies = {
        f"{name.replace(' ', '_')}_ms": {
            f"p{100 * share:.0f}": 1000 * percentile(values, share) if values else None for share in _SHARES
        }
        for name, values in _latencies(measured).items()
    }
    return {
        "seconds": measured.seconds,
        "requests": len(measured.whole) + len(measured.errors),
        "failed": len(measured.errors),
        "prompt_tokens": measured.num_prompt_tokens,
        "cached_tokens": measured.num_cached_tokens,
        "output_tokens": measured.num_output_tokens,
        "output_tokens_per_second": measured.output_rate,
        **latencies,
    }


def _latencies(measured: Measurement) -> dict[str, list[float]]:
    return {
        "first token": measured.first_token,
        "between tokens": measured.between_tokens,
        "whole request": measured.whole,
    }
