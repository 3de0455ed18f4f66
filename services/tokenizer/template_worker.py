"""Renders chat templates in a process of its own, which holds nothing and may do nothing.

A template is code from a model's file. It runs in Jinja's sandbox, and because a sandbox has had holes and bounds
neither time nor memory, in a process with a bounded address space and bounded CPU time, without an environment,
that can open no file and no socket and start no process: the kernel refuses (syscalls.py). It reads requests from
standard input and writes answers to standard output, each a length (4 bytes, big-endian) and as many bytes of JSON;
the first one says that it is ready, and whether the kernel refuses. Whoever starts it bounds the wall-clock time by
killing it, since nothing inside interrupts a long computation in C.

Run as a script, it imports nothing of mxgpt but the file beside it.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import resource
import runpy
import sys
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_TEMPLATES_KEPT = 16


class TemplateRefusedError(Exception):
    """The template itself refused the messages, by raise_exception."""


class GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, with which templates mark the assistant's part for training."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own type)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja as templates of Hugging Face models expect it; unlike Jinja's own, forbidden attributes are errors."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, GenerationTag],
            cache_size=0,
        )
        self.filters["tojson"] = to_json
        self.globals["raise_exception"] = raise_exception
        del self.globals["lipsum"]  # prints filler text, which it would import from a file

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise jinja2.exceptions.SecurityError(f"access to attribute {attribute!r} is forbidden")


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates print it: unlike Jinja's filter it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    """What a template calls to refuse the messages."""
    raise TemplateRefusedError(message)


class Renderer:
    """Compiles templates, keeps the last few, renders them."""

    def __init__(self, environment: Environment | None = None) -> None:
        self.environment = environment or Environment()
        self._compile = functools.lru_cache(MAX_TEMPLATES_KEPT)(self.environment.from_string)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"text"} or {"error", "is_exhausted"} for {"template", "variables", "today" (YYYY-MM-DD), "max_chars"}."""
        try:
            return {"text": self._render(request)}
        except MemoryError:
            return _error("it ran out of memory", is_exhausted=True)
        except TemplateRefusedError as error:
            return _error(f"it refuses the messages: {error}")
        except Exception as error:
            return _error(f"{type(error).__name__}: {error}")

    def _render(self, request: dict[str, Any]) -> str:
        today = datetime.datetime.fromisoformat(request["today"])
        variables = {**request["variables"], "strftime_now": today.strftime}
        pieces, num_chars = [], 0
        for piece in self._compile(request["template"]).generate(variables):
            num_chars += len(piece)
            if num_chars > request["max_chars"]:
                raise OverflowError(f"the text is longer than {request['max_chars']} characters")
            pieces.append(piece)
        text = "".join(pieces)
        text.encode()  # refuses surrogates, which are no text
        return text


def _error(why: str, is_exhausted: bool = False) -> dict[str, Any]:
    return {"error": why[:500].encode("utf-8", "replace").decode(), "is_exhausted": is_exhausted}


def main() -> None:
    """Serve requests until standard input ends. Arguments: address space in bytes, CPU seconds of a request."""
    max_memory_bytes, cpu_seconds = int(sys.argv[1]), int(sys.argv[2])
    renderer = Renderer()
    _warm_up(renderer)
    error = _limit_process(max_memory_bytes)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    try:
        _write(sink, {"unfiltered": error})
        while request := _read(source):
            _limit_cpu(cpu_seconds)
            _write(sink, renderer.answer(request))
    except BrokenPipeError:
        os._exit(0)  # nobody reads any more; the interpreter would try once more to write, and say so


def _read(source: BinaryIO) -> Any:
    length = source.read(4)
    return json.loads(source.read(int.from_bytes(length, "big"))) if length else None


def _write(sink: BinaryIO, answer: dict[str, Any]) -> None:
    data = json.dumps(answer).encode()
    sink.write(len(data).to_bytes(4, "big") + data)
    sink.flush()


def _warm_up(renderer: Renderer) -> None:
    """Use everything that imports on first use, while files can still be opened."""
    template = (
        "{% for m in messages %}{{ m.content | tojson | trim | upper }}{% endfor %}{{ strftime_now('%d %B %Y') }}"
    )
    variables = {"messages": [{"content": "é"}]}
    request = {"template": template, "variables": variables, "today": "2025-01-01", "max_chars": 100}
    assert "text" in renderer.answer(request)
    assert "error" in renderer.answer({**request, "template": "{{ messages.__class__ }}"})
    assert "error" in renderer.answer({**request, "template": "{{ messages | no_such_filter }}"})
    renderer.answer({**request, "template": "{{ é }}"})  # a name that CPython's compiler has to normalise
    for name in renderer.environment.filters:
        renderer.answer({**request, "template": f"{{{{ 'é' | {name} }}}}"})


def _limit_process(max_memory_bytes: int) -> str:
    """Take away what rendering does not need; returns why system calls could not be filtered, empty if they are."""
    filter_path = Path(__file__).with_name("syscalls.py")
    forbid_all_but_computing = runpy.run_path(str(filter_path))["forbid_all_but_computing"]
    resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    try:
        forbid_all_but_computing()
    except OSError as error:
        return str(error)
    return ""


def _limit_cpu(seconds: int) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + 1 + seconds, hard))


if __name__ == "__main__":
    main()
