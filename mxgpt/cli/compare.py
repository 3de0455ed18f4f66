"""`mxgpt compare`: what files lost, or gained, against another file of the same model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import click
import grpc

from mxgpt.aio import AsyncClient
from mxgpt.cli.failures import CommandError
from mxgpt.cli.terminal import json_text, print_table, printable, progress
from mxgpt.connection import Connection
from mxgpt.errors import from_rpc_error
from mxgpt.evaluate import MAX_TOKENS, TaskSet, demo_tasks
from mxgpt.perplexity import Passage, tokenize, window_passages
from mxgpt.quality import Exam, differences, examine, questions, weigh
from mxgpt.quality_picture import draw
from mxgpt.quality_report import Report, describe, fields, panel, table
from mxgpt.serve import NO_DOOR, ServeError
from mxgpt.tensor_error import TensorError, tensor_errors

PATH = click.Path(path_type=Path)


@click.command(
    epilog="""\b
Examples:
  mxgpt compare model-f16.gguf model-mxfp4.gguf                       # the weights alone
  mxgpt compare model-f16.gguf model-q8_0.gguf model-mxfp4.gguf --text story.txt --prompts questions.txt
  mxgpt compare models/demo-gpt2.gguf demo-gpt2-mxfp4.gguf --tasks 240 --picture cost.svg

\b
The weights are compared tensor by tensor. With --text, --prompts or --tasks each file is served in turn on the CPU:
--text is scored in windows, and the change in perplexity comes with its standard error, token paired with token;
--prompts (a line each) and --tasks (the demo models' held-out ones, from the repository) are answered greedily, and
answers that differ in any token are listed. Two files can be compared only if tensors and vocabulary are the same.
"""
)
@click.argument("base", metavar="BASE.gguf", type=PATH)
@click.argument("others", nargs=-1, required=True, metavar="OTHER.gguf...", type=PATH)
@click.option("--text", type=PATH, help="A file in UTF-8 to score.")
@click.option(
    "--window", type=click.IntRange(2), default=512, show_default=True, help="Tokens of a window of the text."
)
@click.option("--stride", type=click.IntRange(1), default=256, show_default=True, help="Tokens that windows lie apart.")
@click.option("--prompts", type=PATH, help="A file of prompts to answer, a line each.")
@click.option("--tasks", "num_tasks", type=click.IntRange(1), help="Number of demo tasks to answer.")
@click.option("--max-tokens", type=click.IntRange(1), default=MAX_TOKENS, show_default=True, help="Of an answer.")
@click.option("--tensors", is_flag=True, help="Show every tensor's error.")
@click.option("--picture", type=PATH, help="Draw the table into this SVG file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(
    base: Path,
    others: tuple[Path, ...],
    text: Path | None,
    window: int,
    stride: int,
    prompts: Path | None,
    num_tasks: int | None,
    max_tokens: int,
    tensors: bool,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Compare files of one model, in other types, with BASE.gguf: weights, perplexity, answers."""
    if prompts is not None and num_tasks is not None:
        raise click.UsageError("give --prompts or --tasks, not both")
    if stride >= window:
        raise click.UsageError("--stride stays below --window")
    paths = [base, *others]
    if len({path.name for path in paths}) < len(paths):
        raise click.UsageError("the files need names of their own")
    lines = [line for line in _read(prompts).splitlines() if line.strip()] if prompts else []
    make_exam = None
    if text is not None or lines or num_tasks is not None:
        make_exam = _exam_maker(_read(text) if text else None, window, stride, lines, num_tasks, max_tokens)
    try:
        report = _report(paths, make_exam, is_judged=num_tasks is not None)
    except ServeError as error:
        raise CommandError(str(error)) from error
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    if picture is not None:
        picture.write_text(draw([panel(report)]))
    if as_json:
        print(json_text(fields(report), indent=2))
    else:
        _print(report, tensors)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8: {error}") from error


def _exam_maker(
    text: str | None, window: int, stride: int, prompts: Sequence[str], num_tasks: int | None, max_tokens: int
) -> Callable[[AsyncClient, str], Awaitable[Exam]]:
    async def make(client: AsyncClient, tokenizer: str) -> Exam:
        model = (await client.list_models())[0]
        texts: dict[str, Sequence[Passage]] = {}
        if text is not None:
            if window >= model.context_length:
                raise click.UsageError(f"--window goes up to {model.context_length - 1} here")
            [token_ids] = await tokenize(Connection(tokenizer, **NO_DOOR), [text])
            if len(token_ids) < 2:
                raise CommandError(f"the text has {len(token_ids)} tokens; at least two are needed to predict one")
            texts["text"] = window_passages(token_ids, window, stride)
        task_set = questions(prompts) if prompts else None
        if num_tasks is not None:
            task_set = _demo_tasks(num_tasks, model.architecture)
        return Exam(texts, task_set, max_tokens)

    return make


def _demo_tasks(num_tasks: int, architecture: str) -> TaskSet:
    try:
        return demo_tasks(1, num_tasks, architecture)
    except ModuleNotFoundError as error:
        raise CommandError(f"the tasks are in the repository: run this in a checkout of it ({error})") from error


def _report(
    paths: Sequence[Path], make_exam: Callable[[AsyncClient, str], Awaitable[Exam]] | None, is_judged: bool
) -> Report:
    """The weights compared and, if there is an exam, the models; without one nothing is served."""
    errors: dict[str, Sequence[TensorError]] = {}
    with progress() as bar:
        task = bar.add_task("")

        def on_progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        for path in paths[1:]:
            errors[path.name] = tensor_errors(paths[0], path, partial(on_progress, f"{path.name}: weights"))
        if make_exam is None:
            measurements = [weigh(path) for path in paths]
        else:
            measurements = asyncio.run(examine(paths, make_exam, on_progress))
    return Report(paths[0].name, measurements, errors, is_judged)


def _print(report: Report, with_tensors: bool) -> None:
    header, rows, align = table(report)
    print_table(header, rows, align=align)
    for measurement in report.measurements[1:]:
        for difference in differences(report.base, measurement):
            print(printable(f"{measurement.name}: {describe(difference, report.is_judged)}"))
        if with_tensors:
            print(f"\n{measurement.name}")
            lines = [
                (e.name, e.base_type, e.type, f"{100 * e.relative:.4g} %", f"{100 * e.largest:.4g} %")
                for e in report.errors[measurement.name]
            ]
            print_table(("TENSOR", "FIRST", "NOW", "OFF (RMS)", "LARGEST, OF THE LARGEST"), lines, align="lllrr")
