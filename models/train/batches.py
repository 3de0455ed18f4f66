"""Rows of packed examples, made by worker processes while the GPU trains; a batch is a function of its index alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from models.train.chats import Example, task_example, training_examples
from models.train.tasks import Task
from models.train.tokenizer import id_of

IGNORED = -100  # a target that the loss passes over


@dataclass
class Batch:
    """Rows of examples one after the other, the last one padded; each array (num_rows, row_length)."""

    ids: torch.Tensor
    document_ids: torch.Tensor  # which example of the batch a token belongs to, from 1; 0 is padding
    targets: torch.Tensor  # the next token where it is part of a completion, else IGNORED

    def pin_memory(self) -> Batch:
        return Batch(self.ids.pin_memory(), self.document_ids.pin_memory(), self.targets.pin_memory())

    def to(self, device: str) -> Batch:
        ids, document_ids, targets = (
            array.to(device, non_blocking=True) for array in (self.ids, self.document_ids, self.targets)
        )
        return Batch(ids, document_ids, targets)


class TrainingBatches(Dataset[Batch]):
    """Batch i is made from seed + i."""

    def __init__(
        self, tokenizer: Tokenizer, chat_format: str, seed: int, num_batches: int, num_rows: int, length: int
    ) -> None:
        self.tokenizer, self.chat_format, self.seed = tokenizer.to_str(), chat_format, seed
        self.num_batches, self.num_rows, self.length = num_batches, num_rows, length

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Batch:
        examples = training_examples(self.chat_format, self.seed + index)
        return pack(Tokenizer.from_str(self.tokenizer), examples, self.num_rows, self.length)


def load(batches: TrainingBatches, num_workers: int) -> Iterable[Batch]:
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=8 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def held_out_batch(
    tokenizer: Tokenizer, chat_format: str, tasks: list[Task], num_rows: int, length: int
) -> tuple[Batch, int]:
    """As many of the tasks as fit, in order, and how many that is; task i is document i + 1."""
    batch = pack(tokenizer, (task_example(chat_format, task) for task in tasks), num_rows, length)
    return batch, int(batch.document_ids.max())


def pack(tokenizer: Tokenizer, examples: Iterator[Example], num_rows: int, length: int) -> Batch:
    """Fills rows in order; an example longer than a row is left out."""
    batch = Batch(
        torch.full((num_rows, length), id_of(tokenizer, "<|endoftext|>")),
        torch.zeros((num_rows, length), dtype=torch.int64),
        torch.full((num_rows, length), IGNORED),
    )
    row, start, document = 0, 0, 1
    for prompt_ids, completion_ids in _encode(tokenizer, examples):
        size = len(prompt_ids) + len(completion_ids)
        if size > length:
            continue
        if start + size > length:
            row, start = row + 1, 0
            if row == num_rows:
                break
        end, answered = start + size, start + len(prompt_ids)
        batch.ids[row, start:end] = torch.tensor(prompt_ids + completion_ids)
        batch.document_ids[row, start:end] = document
        batch.targets[row, answered - 1 : end - 1] = torch.tensor(completion_ids)
        start, document = end, document + 1
    return batch


def _encode(tokenizer: Tokenizer, examples: Iterator[Example]) -> Iterator[tuple[list[int], list[int]]]:
    while group := list(islice(examples, 256)):
        prompts = tokenizer.encode_batch([example.prompt for example in group], add_special_tokens=False)
        completions = tokenizer.encode_batch([example.completion for example in group], add_special_tokens=False)
        for prompt, completion in zip(prompts, completions, strict=True):
            yield prompt.ids, completion.ids
