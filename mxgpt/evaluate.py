"""How many of the demo tasks a served model answers exactly, at temperature 0."""

from __future__ import annotations

import asyncio
import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mxgpt.aio import AsyncClient
from mxgpt.results import Result
from mxgpt.tasks import run_all
from shared.gpt_config import GPT_OSS

NUM_AT_ONCE = 16  # tasks under way
MAX_TOKENS = 1024  # of an answer; longer than any right one


class Task(Protocol):
    """A user's message and the exact answer to it; models/train/tasks.py makes them."""

    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def kind(self) -> str: ...


@dataclass(frozen=True)
class TaskSet:
    """Tasks, and what judges an answer to one."""

    tasks: Sequence[Task]
    is_correct: Callable[[Task, str], bool]


@dataclass(frozen=True)
class Answer:
    """A task and what the model said."""

    task: Task
    text: str
    is_correct: bool
    token_ids: tuple[int, ...]  # of all it said, its reasoning and special tokens included


def demo_tasks(seed: int, num_tasks: int, architecture: str) -> TaskSet:
    """Tasks that no demo model saw in training. They are part of the repository, not of the package.

    Args:
        architecture: of the model; one other than gpt-oss has no channel to think in, and is asked to show its
            working where that is needed.

    Raises:
        ModuleNotFoundError: outside a checkout of the repository.
    """
    module = importlib.import_module("models.train.tasks")
    return TaskSet(module.held_out_tasks(seed, num_tasks, thinks=architecture == GPT_OSS), module.is_correct)


async def answer_tasks(
    client: AsyncClient,
    task_set: TaskSet,
    on_progress: Callable[[int], None] = lambda _done: None,
    max_tokens: int = MAX_TOKENS,
) -> list[Answer]:
    """Ask every task as a conversation of one message; the answers come in the tasks' order.

    Args:
        max_tokens: of an answer, its reasoning included.
        on_progress: called with the number of tasks answered.
    """
    at_once = asyncio.Semaphore(NUM_AT_ONCE)
    num_done = 0

    async def answer(task: Task) -> Answer:
        nonlocal num_done
        async with at_once:
            messages = [{"role": "user", "content": task.prompt}]
            result: Result = await client.chat(messages, temperature=0, max_tokens=max_tokens)
        num_done += 1
        on_progress(num_done)
        return Answer(task, result.content, task_set.is_correct(task, result.content), result.outputs[0].token_ids)

    return await run_all(answer(task) for task in task_set.tasks)


def count_by_kind(answers: Sequence[Answer]) -> dict[str, tuple[int, int]]:
    """Right answers and all of them, for each kind of task, by name."""
    asked = Counter(answer.task.kind for answer in answers)
    right = Counter(answer.task.kind for answer in answers if answer.is_correct)
    return {kind: (right[kind], asked[kind]) for kind in sorted(asked)}
