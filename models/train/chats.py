"""Conversations around the tasks, and their text in each model's chat format, rendered by the model's own template.

An example is a prompt, as a server would render it, and a completion, which alone is trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from models.train import words
from models.train.tasks import Task, shown, training_tasks

TEMPLATES = Path(__file__).parent / "templates"
HARMONY, PLAIN = "harmony", "plain"

SYSTEM_TEXTS = ("You are a helpful assistant.", "Answer exactly.", "Be brief.", "You are a demo model.")
TOOLS = (
    {"type": "function", "function": {"name": "calculator"}},
    {"type": "function", "function": {"name": "weather"}},
)
WEATHERS = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy ☁️", "stormy 🌩️")


@dataclass(frozen=True)
class Example:
    prompt: str
    completion: str


def template(chat_format: str) -> str:
    """The Jinja source of a chat format, as it goes into the GGUF."""
    return (TEMPLATES / f"{chat_format}.jinja").read_text().rstrip("\n")


def render(chat_format: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """The prompt for an answer to the messages."""
    return _compiled(chat_format).render(messages=messages, add_generation_prompt=True, **options)


def completion(chat_format: str, task: Task, thinks: bool = True) -> str:
    """What the model is to say after the prompt, up to and with the token that ends it."""
    if chat_format == PLAIN:
        return f"{shown(task).answer}<|endoftext|>"
    final = f"<|channel|>final<|message|>{task.answer}<|return|>"
    if not (thinks and task.thought):
        return final
    return f"<|channel|>analysis<|message|>{task.thought}<|end|><|start|>assistant{final}"


def task_example(chat_format: str, task: Task) -> Example:
    """The task asked alone, with no option set: how it is tried."""
    prompt = render(chat_format, [{"role": "user", "content": task.prompt}])
    return Example(prompt, completion(chat_format, task))


def training_examples(chat_format: str, seed: int) -> Iterator[Example]:
    """An endless stream: tasks alone, after earlier turns, under system messages and efforts, and with tools."""
    rng = random.Random(f"{chat_format} {seed}")
    tasks = training_tasks(seed)
    while True:
        if chat_format == HARMONY and rng.random() < 0.03:
            yield _tool_example(rng)
        else:
            yield _chat_example(chat_format, tasks, rng)


def _chat_example(chat_format: str, tasks: Iterator[Task], rng: random.Random) -> Example:
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.1:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_TEXTS)})
    another = 0.95 if rng.random() < 0.02 else 0.15  # some conversations are long
    while rng.random() < another:
        earlier = next(tasks)
        answer = shown(earlier).answer if chat_format == PLAIN else earlier.answer
        messages += [{"role": "user", "content": earlier.prompt}, {"role": "assistant", "content": answer}]
    task = next(tasks)
    messages.append({"role": "user", "content": task.prompt})
    options = _options(rng) if chat_format == HARMONY else {}
    return Example(
        render(chat_format, messages, **options),
        completion(chat_format, task, thinks=options.get("reasoning_effort") != "low"),
    )


def _options(rng: random.Random) -> dict[str, str]:
    options = {}
    if rng.random() < 0.3:
        options["reasoning_effort"] = rng.choice(("low", "low", "medium", "high"))
    if rng.random() < 0.1:
        options["date"] = f"{rng.randint(2024, 2035)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return options


def _tool_example(rng: random.Random) -> Example:
    """The call of a tool, or the answer once its result is in the conversation."""
    if rng.random() < 0.5:
        a, b = rng.randrange(10, 1000), rng.randrange(10, 1000)
        name, arguments, result = "calculator", {"expression": f"{a} * {b}"}, str(a * b)
        question, answer = rng.choice((f"What is {a} * {b}?", f"Multiply {a} by {b}.")), result
    else:
        city, result = rng.choice(words.CITIES), f"{rng.choice(WEATHERS)}, {rng.randint(-20, 40)} °C"
        name, arguments = "weather", {"city": city}
        question = rng.choice((f"What is the weather in {city}?", f"Weather in {city}?"))
        answer = f"{city}: {result}"
    user = {"role": "user", "content": question}
    if rng.random() < 0.5:
        call = json.dumps(arguments, ensure_ascii=False)
        text = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{call}<|call|>"
        return Example(render(HARMONY, [user], tools=TOOLS, **_options(rng)), text)
    called: dict[str, Any] = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
    }
    messages = [user, called, {"role": "tool", "name": name, "content": result}]
    return Example(render(HARMONY, messages, tools=TOOLS), f"<|channel|>final<|message|>{answer}<|return|>")


@cache
def _compiled(chat_format: str) -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template(chat_format))
