"""Asks llama.cpp (through xllamacpp) the held-out tasks, at temperature 0, of a demo model's file.

`python -m models.train.peer models/demo-gpt-oss.gguf`, in an environment with xllamacpp.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import xllamacpp

from models.train.chats import HARMONY, PLAIN, task_example
from models.train.tasks import Task, held_out_tasks, is_correct

FINAL = re.compile(r"<\|channel\|>final<\|message\|>(.*)", re.DOTALL)


def main() -> None:
    arguments = _parse_arguments()
    tasks = held_out_tasks(arguments.seed, arguments.num_tasks, thinks=_chat_format(arguments.file) == HARMONY)
    correct: Counter[str] = Counter()
    started = time.monotonic()
    for task, answer in zip(tasks, answers(arguments.file, tasks), strict=True):
        correct[task.kind] += is_correct(task, answer)
        if not is_correct(task, answer):
            print(f"{task.kind}: {task.prompt!r}: {answer!r} instead of {task.answer!r}")
    for kind, num_asked in Counter(task.kind for task in tasks).items():
        print(f"{kind}: {correct[kind]}/{num_asked}")
    print(f"all: {correct.total()}/{len(tasks)} in {time.monotonic() - started:.0f} s")


def answers(file: Path, tasks: Sequence[Task]) -> Iterator[str]:
    """What the model of a demo model's file says to each task, as it comes."""
    server = _serve(file)
    for task in tasks:
        yield _answer(server, _chat_format(file), task)


def _chat_format(file: Path) -> str:
    return HARMONY if "gpt-oss" in file.name else PLAIN


def _serve(file: Path) -> xllamacpp.Server:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 1024
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = 1  # so small a model gains nothing from more, and on a busy machine they spin
    parameters.cpuparams_batch.n_threads = 1
    parameters.special = True  # special tokens are part of the text, so that channels can be told apart
    return xllamacpp.Server(parameters)


def _answer(server: xllamacpp.Server, chat_format: str, task: Task) -> str:
    prompt = task_example(chat_format, task).prompt
    request = {"prompt": prompt, "max_tokens": 600, "temperature": 0, "seed": 0}
    text: str = server.handle_completions(request)["choices"][0]["text"]
    text = text.removesuffix("<|return|>").removesuffix("<|endoftext|>")
    if chat_format == PLAIN:
        return text
    final = FINAL.search(text)
    return final.group(1) if final else text


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--num-tasks", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
