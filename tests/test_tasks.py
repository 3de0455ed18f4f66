"""The demo models' tasks: deterministic, checkable, and never both trained on and held out; the files they made."""

from __future__ import annotations

import datetime
import random
import re
from itertools import islice
from pathlib import Path

import gguf
import pytest

from models.train import words
from models.train.chats import HARMONY, PLAIN, TOOLS, completion, render, task_example, template, training_examples
from models.train.haiku import TOPICS, haiku, is_haiku, num_syllables
from models.train.tasks import (
    EXACT,
    FREE,
    WORKED_ALOUD,
    Task,
    held_out_tasks,
    is_correct,
    is_held_out,
    shown,
    strip_marks,
    training_tasks,
)

MODELS = Path(__file__).parent.parent / "models"
NUM_TASKS = 960


@pytest.fixture(scope="module")
def held_out() -> list[Task]:
    return held_out_tasks(seed=3, num_tasks=NUM_TASKS)


def _of(kind: str, tasks: list[Task]) -> list[Task]:
    chosen = [task for task in tasks if task.kind == kind]
    assert len(chosen) >= 20
    return chosen


def _last_line_list(prompt: str) -> str:
    """What stands after the colon that ends a wording."""
    return prompt.split(": ", 1)[1]


def test_the_same_seed_gives_the_same_tasks(held_out: list[Task]) -> None:
    assert held_out == held_out_tasks(seed=3, num_tasks=NUM_TASKS)
    assert held_out != held_out_tasks(seed=4, num_tasks=NUM_TASKS)
    assert list(islice(training_tasks(5), 200)) == list(islice(training_tasks(5), 200))


def test_held_out_tasks_are_distinct_and_of_every_exact_kind(held_out: list[Task]) -> None:
    assert len({task.prompt for task in held_out}) == len(held_out) == NUM_TASKS
    assert {task.kind for task in held_out} == set(EXACT)


def test_no_trained_prompt_is_a_held_out_one() -> None:
    held_out = {_plain(task.prompt) for task in held_out_tasks(seed=0, num_tasks=5000)}
    trained = {_plain(task.prompt) for task in islice(training_tasks(0), 40_000)}
    assert len(trained) > 30_000
    assert not held_out & trained


def _plain(prompt: str) -> str:
    return prompt.lower().rstrip(".?!")


def test_the_split_goes_by_content_in_the_promised_share() -> None:
    rng = random.Random(0)
    problems = [EXACT["add"][0](rng) for _ in range(20_000)]
    share = sum(is_held_out("add", problem) for problem in problems) / len(problems)
    assert 0.04 < share < 0.06
    assert len(problems[0].phrasings) > 1


def test_sums_and_differences_are_right(held_out: list[Task]) -> None:
    for task in _of("add", held_out):
        assert int(task.answer) == sum(map(int, re.findall(r"\d+", task.prompt)))
        assert task.thought.endswith(f"={task.answer}")
    for task in _of("subtract", held_out):
        first, second = map(int, re.findall(r"\d+", task.prompt))
        wanted = second - first if task.prompt.startswith("Subtract") else first - second
        assert int(task.answer) == wanted
        assert task.thought.endswith(task.answer)


def test_every_step_of_written_arithmetic_is_right() -> None:
    steps = 0
    for task in islice((t for t in training_tasks(1) if t.kind in ("add", "subtract")), 2000):
        for left, right in re.findall(r"(\d+(?:[+-]\d+)+)=(-?\d+)", task.thought):
            steps += 1
            assert sum(map(int, re.findall(r"[+-]?\d+", left))) == int(right), task
    assert steps > 4000


def test_days_and_months_agree_with_the_calendar(held_out: list[Task]) -> None:
    monday = datetime.date(2024, 1, 1)
    for task in _of("weekday", held_out):
        start = next(name for name in words.WEEKDAYS if name in task.prompt)
        distance = int(re.findall(r"\d+", task.prompt)[0]) * (1 if "after" in task.prompt else -1)
        date = monday + datetime.timedelta(days=words.WEEKDAYS.index(start) + distance)
        assert f"{date:%A}" == task.answer
    for task in _of("month", held_out):
        start = next(name for name in words.MONTHS if name in task.prompt)
        distance = int(re.findall(r"\d+", task.prompt)[0]) * (1 if "after" in task.prompt else -1)
        assert words.MONTHS[(words.MONTHS.index(start) + distance) % 12] == task.answer


def test_word_tasks_are_right(held_out: list[Task]) -> None:
    for task in _of("sort_words", held_out):
        assert task.answer.split(", ") == sorted(_last_line_list(task.prompt).split(", "))
    for task in _of("sort_numbers", held_out):
        assert list(map(int, task.answer.split(", "))) == sorted(map(int, _last_line_list(task.prompt).split(", ")))
    for task in _of("reverse_words", held_out):
        assert task.answer.split()[::-1] == _last_line_list(task.prompt).split()
    for task in _of("reverse_letters", held_out):
        wanted = ", ".join("-".join(word[::-1]) for word in _last_line_list(task.prompt).split())
        assert task.answer == wanted
    for task in _of("count_letter", held_out):
        letter = re.search(r"letter (\w)", task.prompt)
        assert letter is not None
        assert int(task.answer) == _last_line_list(task.prompt).count(letter.group(1))


def test_what_is_asked_for_often_lies_beyond_the_window(held_out: list[Task]) -> None:
    far = [task for task in _of("find", held_out) if len(task.prompt) > 300]
    assert far
    for task in _of("find", held_out):
        name = re.findall(r"\w+", task.prompt)[-1]
        assert f" {name} {task.answer}" in task.prompt


def test_multi_byte_answers_are_there(held_out: list[Task]) -> None:
    answers = "".join(task.answer for task in held_out)
    for sample in ("é", "ó", "ü", "猫", "と", "🐱", "👨‍👩‍👧", "☀️"):
        assert sample in answers


def test_strip_marks() -> None:
    assert strip_marks("Łódź crème São großes") == "Łodz creme Sao großes"


def test_haiku_have_five_seven_five() -> None:
    rng = random.Random(0)
    for i in range(2000):
        topic = TOPICS[i % len(TOPICS)]
        text = haiku(rng, topic)
        assert is_haiku(text)
        assert topic in text.split("\n")[0]
    assert num_syllables("once again the moon") == 5
    assert num_syllables("once again the modem") == 0
    assert not is_haiku("the moon\nthe moon\nthe moon")


def test_is_correct_is_exact_but_for_haiku() -> None:
    task = Task("What is 1 + 1?", "2", "add")
    assert is_correct(task, "2")
    assert not is_correct(task, " 2")
    poem = haiku(random.Random(1), "moon")
    assert is_correct(Task("haiku: moon", haiku(random.Random(2), "moon"), "haiku"), poem)
    assert not is_correct(Task("haiku: moon", poem, "haiku"), "no haiku")


def test_a_model_that_cannot_think_shows_its_working(held_out: list[Task]) -> None:
    aloud = held_out_tasks(seed=3, num_tasks=NUM_TASKS, thinks=False)
    for task, other in zip(held_out, aloud, strict=True):
        assert task.prompt == other.prompt
        assert (task.answer != other.answer) == (task.kind in WORKED_ALOUD)
        assert other.answer.endswith(task.answer)
        assert completion(PLAIN, task) == f"{shown(task).answer}<|endoftext|>"


def test_harmony_prompts_and_completions() -> None:
    task = Task("What is 8 + 5?", "13", "add", "8+5=13. 8+5=13")
    example = task_example(HARMONY, task)
    assert example.prompt == "<|start|>user<|message|>What is 8 + 5?<|end|><|start|>assistant"
    assert example.completion == (
        "<|channel|>analysis<|message|>8+5=13. 8+5=13<|end|><|start|>assistant<|channel|>final<|message|>13<|return|>"
    )
    assert completion(HARMONY, task, thinks=False) == "<|channel|>final<|message|>13<|return|>"


def test_the_harmony_template_with_everything() -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
        {"role": "user", "content": "Thanks"},
    ]
    assert render(HARMONY, messages, reasoning_effort="low", date="2026-01-02", tools=TOOLS) == (
        "<|start|>system<|message|>Reasoning: low\nDate: 2026-01-02\n<|end|>"
        "<|start|>developer<|message|>Tools: calculator weather<|end|>"
        "<|start|>developer<|message|>Be brief.<|end|>"
        "<|start|>user<|message|>Weather?<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Zürich"}<|call|>'
        "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>rain<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Rain.<|end|>"
        "<|start|>user<|message|>Thanks<|end|><|start|>assistant"
    )


def test_the_plain_template() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "3+4"},
    ]
    assert render(PLAIN, messages) == (
        "System:\nBe brief.\nUser:\nHi\nAssistant:\nHello!<|endoftext|>User:\n3+4\nAssistant:\n"
    )


@pytest.mark.parametrize("chat_format", [HARMONY, PLAIN])
def test_training_examples_are_deterministic_and_end_in_an_end(chat_format: str) -> None:
    examples = list(islice(training_examples(chat_format, 1), 500))
    assert examples == list(islice(training_examples(chat_format, 1), 500))
    ends = ("<|return|>", "<|call|>") if chat_format == HARMONY else ("<|endoftext|>",)
    assert all(example.completion.endswith(ends) for example in examples)


@pytest.mark.parametrize(("name", "chat_format", "most"), [("gpt-oss", HARMONY, 12e6), ("gpt2", PLAIN, 8e6)])
def test_the_bundled_files_carry_this_template_and_single_digits(name: str, chat_format: str, most: float) -> None:
    path = MODELS / f"demo-{name}.gguf"
    assert path.stat().st_size <= most
    fields = gguf.GGUFReader(path).fields
    assert fields["general.architecture"].contents() == name
    assert fields["tokenizer.chat_template"].contents() == template(chat_format)
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert [token for token in tokens if any(digit in token for digit in "0123456789")] == sorted("0123456789")


def test_free_kinds_are_trained_and_never_held_out(held_out: list[Task]) -> None:
    trained = {task.kind for task in islice(training_tasks(2), 5000)}
    assert trained == set(EXACT) | set(FREE)
    assert not {task.kind for task in held_out} & set(FREE)
