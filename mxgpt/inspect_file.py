"""What is in a GGUF file, whether it is sound, and the memory that it will take: no server, nothing loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TypeVar

import numpy as np

from shared import cuda_layout
from shared.cuda_estimate import CudaEstimate, estimate_cuda, kv_bytes
from shared.digest import digest_of, plain_sha256
from shared.errors import ServiceError
from shared.gguf import GGUFFile, StringArray, check_unchanged, read_gguf, read_tensor
from shared.gpt_config import GPTConfig
from shared.layout import plan
from shared.memory import MemoryEstimate, estimate_memory
from shared.quants import find_invalid
from shared.tokenizer_data import TokenizerData, tokenizer_data_from_gguf

T = TypeVar("T")

CONTEXTS = (2048, 8192, 32768)  # tokens, for the table of a GPU's memory
NUMBERS_OF_SEQUENCES = (1, 8, 64)
MAX_TEXT = 60  # characters of a metadata value that are shown


@dataclass(frozen=True)
class TypeCount:
    """The tensors of one type."""

    name: str
    num_tensors: int
    num_values: int
    num_bytes: int

    @property
    def bits_per_value(self) -> float:
        return 8 * self.num_bytes / self.num_values


@dataclass(frozen=True)
class Memory:
    """What the model takes on the CPU, for sequences that fill a context."""

    layout: str
    context: int  # tokens
    num_sequences: int
    estimate: MemoryEstimate


@dataclass(frozen=True)
class CudaMemory:
    """What the model takes of a GPU with one executor, by context and number of sequences at once."""

    estimate: CudaEstimate
    totals: tuple[tuple[int, int, int], ...]  # (tokens of context, sequences, bytes in all)


@dataclass(frozen=True)
class Inspection:
    """All that was found. `problems` is empty for a file that can be served."""

    paths: tuple[Path, ...]
    file_sizes: tuple[int, ...]
    version: int
    metadata: dict[str, str]  # values shortened for a person
    types: tuple[TypeCount, ...]  # most bytes first
    config: GPTConfig | None
    tokenizer: TokenizerData | None
    memory: Memory | None
    cuda_memory: CudaMemory | None
    weights_were_read: bool
    digest: str  # as a loader makes it; empty where the files were not hashed, as is the next
    sha256: tuple[str, ...]  # of each file
    problems: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        return sum(count.num_values for count in self.types)


def inspect_file(
    path: Path,
    context: int | None = None,
    num_sequences: int = 1,
    read_weights: bool = False,
    read_digest: bool = False,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Inspection:
    """Look at a file, or at the first of several shards and the others with it.

    Args:
        context: tokens of a sequence, for the memory; the model's own context length if None.
        num_sequences: sequences at once, for the memory.
        read_weights: also read every weight, in search of values that are no numbers.
        read_digest: also hash the files.
        on_progress: called with the bytes of weights read and of all.

    Raises:
        ServiceError: for a file that can't be read as GGUF at all; everything after that is a problem found.
    """
    gguf = read_gguf(path)
    problems: list[str] = []
    config = _try(problems, lambda: _checked_config(gguf))
    tokenizer = _try(problems, lambda: tokenizer_data_from_gguf(gguf, model=path.stem, digest=""))
    if read_weights:
        problems += _find_invalid_weights(gguf, on_progress)
    digest, sha256 = _hash(gguf) if read_digest else ("", ())
    _try(problems, lambda: check_unchanged(gguf))
    return Inspection(
        paths=gguf.paths,
        file_sizes=gguf.file_sizes,
        version=gguf.version,
        metadata={key: _shorten(gguf.metadata[key]) for key in gguf.metadata},
        types=_count_types(gguf),
        config=config,
        tokenizer=tokenizer,
        memory=None if config is None else _memory(gguf, config, context or config.context_length, num_sequences),
        cuda_memory=None if config is None else _cuda_memory(gguf, config, context, num_sequences),
        weights_were_read=read_weights,
        digest=digest,
        sha256=sha256,
        problems=tuple(problems),
    )


def _try(problems: list[str], look: Callable[[], T]) -> T | None:
    """What `look` returns, or its error among the problems."""
    try:
        return look()
    except ServiceError as error:
        problems.append(f"{error.message} ({error.reason.name})")
        return None


def _checked_config(gguf: GGUFFile) -> GPTConfig:
    config = GPTConfig.from_gguf(gguf)
    config.check_tensors(gguf)
    return config


def _hash(gguf: GGUFFile) -> tuple[str, tuple[str, ...]]:
    stop = Event()
    digest = digest_of(gguf, (), os.cpu_count() or 1, stop)
    return digest, tuple(plain_sha256(path, stop) for path in gguf.paths)


def _find_invalid_weights(gguf: GGUFFile, on_progress: Callable[[int, int], None]) -> list[str]:
    total = sum(info.num_bytes for info in gguf.tensors.values())
    done = 0
    problems = []
    for info in gguf.tensors.values():
        block = find_invalid(read_tensor(gguf, info), info.type)
        if block is not None:
            offset = info.offset + block * info.type.type_size
            where = f"{gguf.paths[info.file_index]}: byte {offset}"
            problems.append(f"{where}: tensor {info.name!r} ({info.type.name}) holds a value that is not finite")
        done += info.num_bytes
        on_progress(done, total)
    return problems


def _count_types(gguf: GGUFFile) -> tuple[TypeCount, ...]:
    counts = []
    for type_ in {info.type for info in gguf.tensors.values()}:
        infos = [info for info in gguf.tensors.values() if info.type is type_]
        num_values = sum(math.prod(info.shape) for info in infos)
        counts.append(TypeCount(type_.name, len(infos), num_values, sum(info.num_bytes for info in infos)))
    return tuple(sorted(counts, key=lambda count: -count.num_bytes))


def _memory(gguf: GGUFFile, config: GPTConfig, context: int, num_sequences: int) -> Memory:
    weights = plan(gguf, config)
    return Memory(weights.layout, context, num_sequences, estimate_memory(config, weights, context, num_sequences))


def _cuda_memory(gguf: GGUFFile, config: GPTConfig, context: int | None, num_sequences: int) -> CudaMemory:
    """For the context asked for, or for some of which each is four times the last; likewise for the sequences."""
    estimate = estimate_cuda(config, cuda_layout.plan(gguf, config))
    contexts = [context] if context else [length for length in CONTEXTS if length < config.context_length]
    if not context:
        contexts.append(config.context_length)
    numbers = sorted({num_sequences, *NUMBERS_OF_SEQUENCES})
    totals = tuple(
        (length, number, estimate.total(kv_bytes(config, length, number))) for length in contexts for number in numbers
    )
    return CudaMemory(estimate, totals)


def _shorten(value: object) -> str:
    if isinstance(value, StringArray | np.ndarray):
        first: Sequence[object] = value[:3] if isinstance(value, StringArray) else value[:3].tolist()
        texts = [str(item)[:12] for item in first]
        return f"[{', '.join(texts)}{', ...' if len(value) > 3 else ''}] ({len(value)})"
    text = " ".join(str(value).split()) if isinstance(value, str) else str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text)} characters)"
