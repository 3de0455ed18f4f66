"""`mxgpt evaluate`: how many of the demo tasks a demo model answers exactly."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click

from mxgpt.aio import AsyncClient
from mxgpt.bundled import find_model
from mxgpt.cli.failures import FAILED, OK, CommandError
from mxgpt.cli.options import door, door_options
from mxgpt.cli.terminal import print_table, progress
from mxgpt.evaluate import Answer, answer_tasks, count_by_kind, demo_tasks
from mxgpt.serve import ServeError, serving


@click.command(
    epilog="""\b
Examples:
  mxgpt evaluate                                        # the bundled gpt-oss demo model
  mxgpt evaluate models/demo-gpt2.gguf --tasks 960
  mxgpt evaluate --server localhost:50051 --minimum 0.95 --wrong

\b
The tasks are made by models/train/tasks.py of the repository, which must be at hand. They are held out: no demo
model saw them in training. Exit code 1 says that fewer than --minimum of them were answered exactly.
"""
)
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--server", help="Ask a running server instead of serving a model for the while.")
@door_options
@click.option("--tasks", "num_tasks", type=click.IntRange(1), default=480, show_default=True, help="Number of tasks.")
@click.option("--seed", type=int, default=1, show_default=True, help="Which tasks.")
@click.option("--minimum", type=click.FloatRange(0, 1), default=0.95, show_default=True, help="Share to pass.")
@click.option("--wrong", is_flag=True, help="Show the wrong answers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def evaluate(
    context: click.Context,
    /,
    model: Path | None,
    server: str | None,
    num_tasks: int,
    seed: int,
    minimum: float,
    wrong: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask a demo model tasks with checkable answers, greedily, and count the answers that are exact.

    MODEL is served for the while, as `mxgpt serve` does; the bundled gpt-oss demo model if none is given.
    """
    if model is not None and server is not None:
        raise click.UsageError("give MODEL or --server, not both")
    try:
        answers = asyncio.run(_ask(model, server, door(options), num_tasks, seed))
    except ServeError as error:
        raise CommandError(str(error)) from error
    share = sum(answer.is_correct for answer in answers) / len(answers)
    _print(answers, share, wrong, as_json)
    context.exit(OK if share >= minimum else FAILED)


async def _ask(
    model: Path | None, server: str | None, shown: dict[str, Any], num_tasks: int, seed: int
) -> list[Answer]:
    async with _connection(model, server, shown) as connection, AsyncClient(**connection) as client:
        architecture = (await client.list_models())[0].architecture
        try:
            task_set = demo_tasks(seed, num_tasks, architecture)
        except ModuleNotFoundError as error:
            raise CommandError(f"the tasks are in the repository: run this in a checkout of it ({error})") from error
        with progress() as bar:
            task = bar.add_task("tasks", total=num_tasks)
            return await answer_tasks(client, task_set, lambda done: bar.update(task, completed=done))


@contextlib.asynccontextmanager
async def _connection(model: Path | None, server: str | None, shown: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Arguments of a client for the server named, or for one that serves the model for the while."""
    if server is not None:
        yield {"target": server, **shown}
        return
    async with serving(model or find_model()) as supervisor:
        yield supervisor.connection


def _print(answers: list[Answer], share: float, wrong: bool, as_json: bool) -> None:
    kinds = count_by_kind(answers)
    if as_json:
        print(json.dumps({"share": share, "tasks": len(answers), "kinds": kinds}))
        return
    rows = [(kind, right, asked, f"{right / asked:.1%}") for kind, (right, asked) in kinds.items()]
    num_right = sum(answer.is_correct for answer in answers)
    print_table(("KIND", "RIGHT", "ASKED", "SHARE"), [*rows, ("all", num_right, len(answers), f"{share:.1%}")], "lrrr")
    if wrong:
        for answer in answers:
            if not answer.is_correct:
                print(f"\n{answer.task.prompt}\n  wanted: {answer.task.answer!r}\n  got:    {answer.text!r}")
