"""`mxgpt perplexity`: how well a model predicts a text."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click
import grpc

from mxgpt.aio import AsyncClient
from mxgpt.cli.failures import CommandError
from mxgpt.cli.options import door, door_options
from mxgpt.cli.terminal import progress
from mxgpt.connection import Connection
from mxgpt.errors import from_rpc_error
from mxgpt.perplexity import Perplexity, measure, tokenize
from mxgpt.serve import NO_DOOR, ServeError, serving


@click.command(
    epilog="""\b
Examples:
  mxgpt perplexity models/demo-gpt2.gguf story.txt
  mxgpt perplexity model.gguf story.txt --window 512 --stride 256
  mxgpt perplexity --server gpu1:50051 --tokenizer gpu1:50052 story.txt

\b
The text is read in windows. Each begins --stride tokens after the one before and scores only tokens not scored yet,
so every token is predicted from at least window - stride others (the first window's from those before it; its first
token is not scored). A smaller stride is dearer, and lower: compare only figures of the same window and stride.
"""
)
@click.argument("files", nargs=-1, required=True, metavar="[FILE.gguf] TEXT", type=click.Path(path_type=Path))
@click.option("--server", help="Measure a running server's model instead of FILE.gguf.")
@click.option("--tokenizer", default="localhost:50052", show_default=True, help="With --server: its tokenizer.")
@door_options
@click.option("--window", type=click.IntRange(2), help="Tokens of a window. Default: the context, less one.")
@click.option("--stride", type=click.IntRange(1), help="Tokens that a window is further on. Default: half a window.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def perplexity(
    files: tuple[Path, ...],
    server: str | None,
    tokenizer: str,
    window: int | None,
    stride: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the perplexity of a model on TEXT, a file in UTF-8: exp of the mean negative log-likelihood of a token.

    The model in FILE.gguf is served for the while, as `mxgpt serve` does.
    """
    if len(files) != (1 if server else 2):
        raise click.UsageError("give FILE.gguf and TEXT" if not server else "with --server, give TEXT alone")
    try:
        text = files[-1].read_bytes().decode()
    except UnicodeDecodeError as error:
        raise CommandError(f"{files[-1]} is not UTF-8: {error}") from error
    try:
        model = None if server else files[0]
        measured = asyncio.run(_measure(model, server or "", tokenizer, door(options), text, window, stride))
    except ServeError as error:
        raise CommandError(str(error)) from error
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    _print(measured, as_json)


async def _measure(
    model: Path | None,
    server: str,
    tokenizer: str,
    shown: dict[str, Any],
    text: str,
    window: int | None,
    stride: int | None,
) -> Perplexity:
    shown = shown if model is None else NO_DOOR
    async with (
        _addresses(model, server, tokenizer) as (executor, tokenizer_address),
        AsyncClient(executor, **shown) as client,
    ):
        [token_ids] = await tokenize(Connection(tokenizer_address, **shown), [text])
        if len(token_ids) < 2:
            raise CommandError(f"the text has {len(token_ids)} tokens; at least two are needed to predict one")
        longest = (await client.list_models())[0].context_length - 1
        window = window or longest
        stride = stride or max(window // 2, 1)
        if window > longest or stride >= window:
            raise click.UsageError(f"--window goes up to {longest} here, and --stride stays below it")
        with progress() as bar:
            task = bar.add_task("windows", total=None)
            return await measure(
                client, token_ids, window, stride, lambda done, total: bar.update(task, completed=done, total=total)
            )


@contextlib.asynccontextmanager
async def _addresses(model: Path | None, server: str, tokenizer: str) -> AsyncIterator[tuple[str, str]]:
    if model is None:
        yield server, tokenizer
        return
    async with serving(model) as supervisor:
        yield supervisor.address, supervisor.tokenizer_address


def _print(measured: Perplexity, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"perplexity": measured.value, **dataclasses.asdict(measured)}))
        return
    print(
        f"perplexity {measured.value:.4f} +- {measured.margin:.4f} over {measured.num_scored} of "
        f"{measured.num_tokens} tokens (window {measured.window}, stride {measured.stride})"
    )
