"""What each type costs a model: size, error of the weights, perplexity, right answers, and every answer that turned.

    python -m benchmarks.quality [FILE.gguf ...] [--types F16,Q8_0,Q4_K_M,MXFP4] [--tasks 480] [--picture FILE.svg]

Every file (both demo models if none is named) is first written anew in F32, then from that in each type, by
`mxgpt quantize`; all are served in turn, as `mxgpt serve` does on the CPU, and compared with the F32 one. There the
weights are decoded to float32 and every sum is float32, whatever their type: what differs is the weights alone.

A demo model answers held-out tasks greedily, and two texts are scored: the right answers to those tasks, reasoning
included, and haiku, whose next word is open. Any other file wants --text: it is scored in windows, and asked nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from models.train.chats import HARMONY, PLAIN, task_example
from models.train.tasks import Task, held_out_tasks, training_tasks
from mxgpt.aio import AsyncClient
from mxgpt.bundled import find_model
from mxgpt.cli.terminal import note, print_table, progress
from mxgpt.connection import Connection
from mxgpt.evaluate import demo_tasks
from mxgpt.perplexity import Passage, tokenize, window_passages
from mxgpt.quality import Exam, differences, examine
from mxgpt.quality_picture import draw
from mxgpt.quality_report import Report, describe, fields, panel, table
from mxgpt.quantize_file import quantize_file
from mxgpt.recipes import RECIPES, tensor_types
from mxgpt.serve import NO_DOOR
from mxgpt.tensor_error import tensor_errors
from shared.gguf import read_gguf
from shared.gpt_config import GPT_OSS, GPTConfig

DEMO_MODELS = ("demo-gpt-oss.gguf", "demo-gpt2.gguf")
BASE = "F32"
TYPES = "F16,Q8_0,Q4_K_M,MXFP4_MOE,MXFP4"
SEED = 1
HAIKU_SEED = 99  # not the one of training
NUM_HAIKU = 120
WINDOW, STRIDE = 512, 256
NUM_SHOWN = 12  # differences of a file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.gguf", help="default: both demo models")
    parser.add_argument("--types", default=TYPES, help=f"with commas between, of {', '.join(RECIPES)}; default {TYPES}")
    parser.add_argument("--tasks", type=int, default=480, help="tasks that a demo model is asked")
    parser.add_argument("--text", type=Path, help="score this text instead of the demo tasks")
    parser.add_argument("--picture", type=Path, help="draw the table into this SVG file")
    parser.add_argument("--json", type=Path, help="write all figures and differences to this file")
    arguments = parser.parse_args()
    types = arguments.types.split(",")
    if unknown := [name for name in types if name not in RECIPES]:
        sys.exit(f"{', '.join(unknown)}: not one of {', '.join(RECIPES)}")
    text = arguments.text.read_text() if arguments.text else None
    reports = []
    for path in arguments.files or [find_model(name) for name in DEMO_MODELS]:
        if text is None and path.name not in DEMO_MODELS:
            sys.exit(f"{path.name} is no demo model and knows none of the demo tasks: give it a --text")
        reports.append(_measure(path, types, arguments.tasks, text))
        _print(reports[-1])
    if arguments.picture:
        arguments.picture.write_text(draw([panel(report) for report in reports]))
    if arguments.json:
        arguments.json.write_text(json.dumps([fields(report) for report in reports], indent=1, ensure_ascii=False))


def _measure(path: Path, types: list[str], num_tasks: int, text: str | None) -> Report:
    architecture = GPTConfig.from_gguf(read_gguf(path)).architecture
    make_exam = _demo_exam(architecture, num_tasks) if text is None else _text_exam(text)
    with tempfile.TemporaryDirectory(prefix="mxgpt-") as directory, progress() as bar:
        paths = _write_variants(path, types, Path(directory))
        errors = {variant.name: tensor_errors(paths[0], variant) for variant in paths[1:]}
        task = bar.add_task("")
        measurements = asyncio.run(
            examine(
                paths,
                make_exam,
                lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            )
        )
    return Report(path.stem, measurements, errors, is_judged=text is None)


def _write_variants(path: Path, types: list[str], directory: Path) -> list[Path]:
    """The model in F32, and from that in each type that gives something no earlier one gave."""
    paths = [directory / BASE]
    quantize_file(path, paths[0], RECIPES[BASE])
    file = read_gguf(paths[0])
    config = GPTConfig.from_gguf(file)
    seen = [tensor_types(RECIPES[BASE], file, config)]
    for name in types:
        tensors = tensor_types(RECIPES[name], file, config)
        if tensors in seen:
            note(f"{path.name}: {name} is left out, an earlier type gives the same")
            continue
        seen.append(tensors)
        paths.append(directory / name)
        quantize_file(paths[0], paths[-1], RECIPES[name])
    return paths


def _demo_exam(architecture: str, num_tasks: int) -> Callable[[AsyncClient, str], Awaitable[Exam]]:
    """Held-out tasks to answer, and two texts: their right answers, and haiku."""

    async def make(_client: AsyncClient, tokenizer: str) -> Exam:
        task_set, connection = demo_tasks(SEED, num_tasks, architecture), Connection(tokenizer, **NO_DOOR)
        haiku = (task for task in training_tasks(HAIKU_SEED) if task.kind == "haiku")
        chat_format = HARMONY if architecture == GPT_OSS else PLAIN
        texts = {
            "right answers": await _completions(chat_format, held_out_tasks(SEED, num_tasks), connection),
            "haiku": await _completions(chat_format, list(itertools.islice(haiku, NUM_HAIKU)), connection),
        }
        return Exam(texts, task_set)

    return make


async def _completions(chat_format: str, tasks: list[Task], tokenizer: Connection) -> list[Passage]:
    """Each task as a conversation, of which the model's part counts, its end included."""
    examples = [task_example(chat_format, task) for task in tasks]
    prompts = await tokenize(tokenizer, [e.prompt for e in examples], parse_special=True, add_special=False)
    answers = await tokenize(tokenizer, [e.completion for e in examples], parse_special=True, add_special=False)
    return [Passage(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def _text_exam(text: str) -> Callable[[AsyncClient, str], Awaitable[Exam]]:
    async def make(client: AsyncClient, tokenizer: str) -> Exam:
        [token_ids] = await tokenize(Connection(tokenizer, **NO_DOOR), [text])
        window = min(WINDOW, (await client.list_models())[0].context_length - 1)
        return Exam({"text": window_passages(token_ids, window, min(STRIDE, window - 1))})

    return make


def _print(report: Report) -> None:
    print(f"\n{report.title}")
    header, rows, align = table(report)
    print_table(header, rows, align=align)
    for text in report.texts:
        print(f"{text}: {len(report.base.entries[text]):,} tokens scored")
    for measurement in report.measurements[1:]:
        found = differences(report.base, measurement)
        for difference in found[:NUM_SHOWN]:
            print(f"{measurement.name}: {describe(difference, report.is_judged)}")
        if len(found) > NUM_SHOWN:
            print(f"{measurement.name}: ... and {len(found) - NUM_SHOWN} more; --json has them all")


if __name__ == "__main__":
    main()
