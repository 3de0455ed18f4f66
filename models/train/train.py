"""Trains both demo models on one GPU and writes their GGUF files: `python -m models.train.train --out models/`."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from models.train.batches import IGNORED, Batch, TrainingBatches, held_out_batch, load
from models.train.chats import HARMONY, PLAIN
from models.train.export import export_gpt2, export_gpt_oss
from models.train.model import Gpt2, Gpt2Config, GptOss, GptOssConfig
from models.train.tasks import Task, held_out_tasks
from models.train.tokenizer import FORMATS, train_tokenizer

ROW_LENGTH = 1024
NUM_HELD_OUT = 4000
HELD_OUT_SEED = 1
Forward = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Recipe:
    """How one demo model is trained."""

    name: str
    chat_format: str
    make: Callable[[], Any]
    export: Callable[..., None]
    num_steps: int
    num_rows: int = 32
    peak_rate: float = 3e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05
    max_gradient_norm: float = 1.0
    balance_weight: float = 0.01


RECIPES = (
    Recipe("gpt-oss", HARMONY, lambda: GptOss(GptOssConfig()), export_gpt_oss, num_steps=8000),
    Recipe("gpt2", PLAIN, lambda: Gpt2(Gpt2Config()), export_gpt2, num_steps=8000),
)


def main() -> None:
    arguments = _parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for recipe in RECIPES:
        if arguments.only in (None, recipe.name):
            train(recipe, arguments)


def train(recipe: Recipe, arguments: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = train_tokenizer(FORMATS[recipe.chat_format], arguments.seed)
    model = recipe.make().to(device)
    num_steps = arguments.steps or recipe.num_steps
    num_rows = arguments.rows or recipe.num_rows
    length = ROW_LENGTH
    batches = TrainingBatches(tokenizer, recipe.chat_format, arguments.seed, num_steps, num_rows, length)
    tasks = held_out_tasks(HELD_OUT_SEED, NUM_HELD_OUT)
    held_out, num_tasks = held_out_batch(tokenizer, recipe.chat_format, tasks, num_rows, length)
    held_out, tasks = held_out.to(device), tasks[:num_tasks]
    forward: Forward = model if arguments.eager else torch.compile(model, dynamic=False)

    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps, recipe.warmup_steps))
    started = reported = time.monotonic()
    for step, batch in enumerate(load(batches, arguments.workers), 1):
        loss = _step(forward, batch.to(device), recipe, optimizer, model)
        schedule.step()
        if step % arguments.report_every == 0 or step == num_steps:
            correct = _count_correct(forward, held_out, tasks)
            now = time.monotonic()
            rate = arguments.report_every * num_rows * length / (now - reported)
            print(
                f"{recipe.name} step {step}/{num_steps} loss {loss.item():.4f} "
                f"held-out {correct.total() / len(tasks):.4f} {rate:.0f} tokens/s {now - started:.0f} s",
                flush=True,
            )
            recipe.export(model, tokenizer, arguments.out / f"demo-{recipe.name}.gguf")
            reported = time.monotonic()
    _report_kinds(recipe.name, correct, tasks)


def _step(
    forward: Forward, batch: Batch, recipe: Recipe, optimizer: torch.optim.Optimizer, model: nn.Module
) -> torch.Tensor:
    with torch.autocast(batch.ids.device.type, torch.bfloat16):
        logits, balance = forward(batch.ids, batch.document_ids)
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED)
    torch.autograd.backward(loss + recipe.balance_weight * balance)
    nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _count_correct(forward: Forward, held_out: Batch, tasks: list[Task]) -> Counter[str]:
    """Tasks by kind whose completion, thought and all, is at every token the likeliest one: what greedy decoding says.

    Gradients stay enabled: without them the model would be compiled once more.
    """
    with torch.autocast(held_out.ids.device.type, torch.bfloat16):
        logits, _ = forward(held_out.ids, held_out.document_ids)
    wrong = (logits.argmax(dim=-1) != held_out.targets) & (held_out.targets != IGNORED)
    wrong_documents = set(held_out.document_ids[wrong].tolist())
    return Counter(task.kind for document, task in enumerate(tasks, 1) if document not in wrong_documents)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.98), fused=True)


def _rate(step: int, num_steps: int, warmup_steps: int) -> float:
    """The learning rate's share of its peak: up in a line, down in a line to nothing."""
    return min((step + 1) / warmup_steps, max(0.0, (num_steps - step) / max(1, num_steps - warmup_steps)))


def _report_kinds(name: str, correct: Counter[str], tasks: list[Task]) -> None:
    asked = Counter(task.kind for task in tasks)
    for kind, num_asked in asked.items():
        print(f"{name} {kind}: {correct[kind]}/{num_asked}")
    print(f"{name} all: {correct.total()}/{len(tasks)} = {correct.total() / len(tasks):.2%}", flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the .gguf files and checkpoints")
    parser.add_argument("--only", choices=[recipe.name for recipe in RECIPES], help="train one of the two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--rows", type=int, help="rows a batch, instead of the recipe's")
    parser.add_argument(
        "--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="processes that make text"
    )
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--report-every", type=int, default=1000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
