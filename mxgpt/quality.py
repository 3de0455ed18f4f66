"""What a file's quantisation does to its model: it is given the same texts and questions as another file.

The comparison is paired: the same token after the same tokens, the same question. So what the texts have in common
cancels out, and a difference in perplexity far smaller than the perplexity's own uncertainty can be told.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from mxgpt.aio import AsyncClient
from mxgpt.evaluate import MAX_TOKENS, Answer, TaskSet, answer_tasks
from mxgpt.perplexity import Passage, score
from mxgpt.results import TokenLogprobs
from mxgpt.serve import serving
from shared.errors import Reason, ServiceError
from shared.gguf import read_gguf

OnProgress = Callable[[str, int, int], None]  # what is being done, how much of it is, and of how much


@dataclass(frozen=True)
class Exam:
    """What a model is given."""

    texts: Mapping[str, Sequence[Passage]] = field(default_factory=dict)  # by a name for the table
    task_set: TaskSet | None = None
    max_tokens: int = MAX_TOKENS  # of an answer


@dataclass(frozen=True)
class Question:
    """A task that has no one right answer."""

    prompt: str
    answer: str = ""
    kind: str = "question"


def questions(prompts: Sequence[str]) -> TaskSet:
    """Prompts to ask for the sake of comparison alone: no answer counts as right."""
    return TaskSet([Question(prompt) for prompt in prompts], lambda _task, _answer: False)


@dataclass(frozen=True)
class Measurement:
    """A file, and what came of its exam."""

    name: str
    num_bytes: int  # of the tensors
    num_weights: int
    entries: Mapping[str, Sequence[TokenLogprobs]] = field(default_factory=dict)  # of each text, each with its best
    answers: Sequence[Answer] = ()

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.num_weights

    @property
    def num_right(self) -> int:
        return sum(answer.is_correct for answer in self.answers)

    def perplexity(self, text: str) -> float:
        entries = self.entries[text]
        return math.exp(-math.fsum(entry.logprob for entry in entries) / len(entries))


@dataclass(frozen=True)
class TextChange:
    """How differently two files predict one text."""

    num_scored: int
    log_ratio: float  # natural logarithm of the perplexity over the base's
    standard_error: float  # of log_ratio
    same_top: float  # share of tokens at which both find the same one likeliest

    @property
    def percent(self) -> float:
        """Change of the perplexity in percent."""
        return 100 * math.expm1(self.log_ratio)

    @property
    def percent_margin(self) -> float:
        """Standard error of `percent`, to first order."""
        return 100 * math.exp(self.log_ratio) * self.standard_error


@dataclass(frozen=True)
class Difference:
    """An answer that is not the base's, token for token."""

    position: int  # of the first token that differs, or that one has and the other has not
    base: Answer
    other: Answer


async def examine(
    paths: Sequence[Path],
    make_exam: Callable[[AsyncClient, str], Awaitable[Exam]],
    on_progress: OnProgress = lambda _what, _done, _total: None,
) -> list[Measurement]:
    """Serve each file for the while, as `mxgpt serve` does on the CPU, and give all of them one exam.

    Args:
        make_exam: called once, with a client and the tokenizer's address of the first file.

    Raises:
        ServiceError: for files that can't be served, or whose vocabularies differ.
        ServeError: when the services do not start.
    """
    _check_same_vocabulary(paths)
    exam = None
    measurements = []
    for path in paths:
        async with serving(path) as supervisor, AsyncClient(**supervisor.connection) as client:
            exam = exam or await make_exam(client, supervisor.tokenizer_address)
            entries, answers = await _take(path.name, client, exam, on_progress)
        measurements.append(replace(weigh(path), entries=entries, answers=answers))
    return measurements


def weigh(path: Path) -> Measurement:
    """A file that has taken no exam yet: its size alone."""
    tensors = read_gguf(path).tensors.values()
    num_bytes, num_weights = sum(info.num_bytes for info in tensors), sum(info.num_elements for info in tensors)
    return Measurement(path.name, num_bytes, num_weights)


def compare_text(base: Measurement, other: Measurement, text: str) -> TextChange:
    """How the second file predicts a text, against the first."""
    pairs = list(zip(base.entries[text], other.entries[text], strict=True))
    changes = [one.logprob - two.logprob for one, two in pairs]
    count = len(changes)
    mean = math.fsum(changes) / count
    variance = math.fsum((change - mean) ** 2 for change in changes) / max(count - 1, 1)
    same = sum(one.top[0][0] == two.top[0][0] for one, two in pairs)
    return TextChange(count, mean, math.sqrt(variance / count), same / count)


def differences(base: Measurement, other: Measurement) -> list[Difference]:
    """The answers in which the two files differ, token by token."""
    return [
        Difference(first_difference(one.token_ids, two.token_ids), one, two)
        for one, two in zip(base.answers, other.answers, strict=True)
        if one.token_ids != two.token_ids
    ]


def first_difference(one: Sequence[int], two: Sequence[int]) -> int:
    """The first position at which two unequal sequences differ; the shorter one's length if it begins the other."""
    pairs = itertools.zip_longest(one, two)
    return next(position for position, (a, b) in enumerate(pairs) if a != b)


async def _take(
    name: str, client: AsyncClient, exam: Exam, on_progress: OnProgress
) -> tuple[Mapping[str, Sequence[TokenLogprobs]], Sequence[Answer]]:
    entries = {}
    for text, passages in exam.texts.items():
        entries[text] = await score(client, passages, 1, partial(on_progress, f"{name}: {text}"))
    if exam.task_set is None:
        return entries, ()
    report = partial(on_progress, f"{name}: questions")
    num_tasks = len(exam.task_set.tasks)
    return entries, await answer_tasks(client, exam.task_set, lambda done: report(done, num_tasks), exam.max_tokens)


def _check_same_vocabulary(paths: Sequence[Path]) -> None:
    key = "tokenizer.ggml.tokens"
    vocabularies = [list(read_gguf(path).metadata.get_strings(key)) for path in paths]
    for path, vocabulary in zip(paths, vocabularies, strict=True):
        if vocabulary != vocabularies[0]:
            why = f"{path}: {key} is not that of {paths[0]}: its tokens can't be compared."
            raise ServiceError(Reason.MODEL_INVALID, why, metadata={"file": str(path)})
