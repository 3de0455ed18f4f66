"""Target: chat templates in the sandbox of the template worker, in this process, without the limits of its own.

The limits end a template that loops or takes memory; what the sandbox itself must not let through is asked here: an
audit hook (sys.addaudithook) sees every file, socket, process, import and library call that Python makes, and a
canary lies in the globals that a template must not reach.

An input of which the first byte is even is read as choices in a grammar of expressions and statements, which makes
templates that compile; what fails in one of these gives an undefined value, and the rest of it is tried all the same.
The others are a template's text, which the worker's own environment renders.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import Any, NoReturn

import jinja2

from services.tokenizer import template_worker
from services.tokenizer.template_worker import Environment, Renderer
from tests.hostile_templates import ESCAPES, ORDINARY

MAX_BYTES = 256
CPU_SECONDS = 0.1  # of a template, which is then given up: what it would do for ever is no news
MEMORY_BYTES = 256 << 20  # of address space that a template may take, as in the worker
MAX_CHARS = 20_000
CANARY = "canary-4f1d"

FORBIDDEN_EVENTS = (
    *("open", "os.", "socket.", "subprocess.", "shutil.", "ctypes.", "import", "pty.", "tempfile.", "mmap."),
)

# CPython looks for the source of a syntax error in code that Jinja has made, such as a break outside a loop.
HARMLESS_EVENTS = (("open", ("<template>", "rb", 0)),)

VARIABLES: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hé {0.__class__} %s 🚀"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, None]}}}],
        },
    ],
    "tools": [{"type": "function", "function": {"name": "f", "description": "d"}}],
    "add_generation_prompt": True,
    "bos_token": "<|start|>",
    "eos_token": "<|end|>",
}

NAMES = (
    *VARIABLES,
    *("self", "super", "loop", "caller", "varargs", "kwargs", "x", "ns", "f"),
    *("namespace", "cycler", "joiner", "range", "dict", "raise_exception", "strftime_now"),
)
ATTRIBUTES = (
    *("role", "content", "items", "keys", "get", "format", "format_map", "join", "split", "strip", "upper", "encode"),
    *("index", "index0", "first", "last", "previtem", "nextitem", "cycle", "changed", "append", "update", "pop", "mro"),
    *("__class__", "__init__", "__globals__", "__mro__", "__base__", "__subclasses__", "__self__", "__func__"),
    *("__call__", "__code__", "__dict__", "__builtins__", "__import__", "__getattribute__", "__reduce_ex__"),
    *("__module__", "__doc__", "__wrapped__", "gi_frame", "gi_code", "cr_frame", "ag_frame", "tb_frame", "f_back"),
    *("f_globals", "f_builtins", "func_globals", "environment", "_environment", "_module", "blocks", "parent"),
    *("name", "eval_ctx", "_func", "template"),
)
LITERALS = ("0", "1", "-1", "3", "1.5", "true", "none", "''", "'x'", "'{0.__class__.__mro__}'", "'%(a)s'", "[]", "{}")
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", " in ", " and ", " or ", " not in ")
MAX_DEPTH = 4


class BoundedEnvironment(Environment):
    """What one operator computes in C ends at once: no signal interrupts it, and the worker's limits are not here."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if any(_size(value) > 1000 for value in (left, right)):
            raise OverflowError("too large for the fuzzer")
        return super().call_binop(context, operator, left, right)


class ForgivingEnvironment(BoundedEnvironment):
    """A template goes on after what failed in it, or was forbidden; few of the grammar's would get far otherwise."""

    intercepted_binops = frozenset(("*", "**", "%", "+", "-", "/", "//"))
    intercepted_unops = frozenset(("+", "-"))

    def __init__(self) -> None:
        super().__init__()
        self.undefined = jinja2.ChainableUndefined
        self.loader = jinja2.FunctionLoader(lambda _: None)
        self.filters = {name: _forgiving(call) for name, call in self.filters.items()}
        self.tests = {name: _forgiving(call) for name, call in self.tests.items()}
        self.getattr, self.getitem, self.call, self.call_binop, self.call_unop = map(  # type: ignore[method-assign]
            _forgiving, (self.getattr, self.getitem, self.call, self.call_binop, self.call_unop)
        )


def _forgiving(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)  # with the mark by which Jinja knows that a filter wants the context
    def forgiving(*arguments: Any, **named: Any) -> Any:
        try:
            return call(*arguments, **named)
        except (RecursionError, MemoryError):  # to go on after these would take for ever
            raise
        except Exception:
            return jinja2.ChainableUndefined()

    return forgiving


class OutOfTimeError(BaseException):
    """The template has had its time."""


def seeds() -> Iterator[bytes]:
    """Known ways out of Jinja's sandbox, what real templates do, and some choices in the grammar."""
    for template in (*ESCAPES.values(), *ORDINARY):
        yield b"\1" + template.encode("utf-8", "surrogatepass")[: MAX_BYTES - 1]
    for first in range(0, 256, 8):
        yield bytes([0, *((first + 37 * index) % 256 for index in range(64))])


def examine(data: bytes) -> str:
    """Render a template: "rendered", "failed", or "out of time".

    Raises:
        AssertionError: for one that reached what it must not.
    """
    sandbox = _sandbox()
    is_grammar = bool(data) and data[0] % 2 == 0
    template = _Grammar(data[1:]).template() if is_grammar else data[1:].decode("utf-8", "replace")
    renderer = sandbox.forgiving if is_grammar else sandbox.renderer
    request = {"template": template, "variables": VARIABLES, "today": "2025-08-07", "max_chars": MAX_CHARS}
    answer: dict[str, Any] | None = None
    with sandbox.watched(), contextlib.suppress(OutOfTimeError):
        answer = renderer.answer(request)
    assert not sandbox.events, f"{template!r} caused {sandbox.events[:3]}"
    if answer is None:
        return "out of time"
    said = answer.get("text", answer.get("error"))
    assert isinstance(said, str)
    assert len(said) <= MAX_CHARS
    assert CANARY not in said, f"{template!r} reached the worker's globals"
    return "rendered" if "text" in answer else "failed"


class _Grammar:
    """Makes a template of bytes, each of which is a choice; when they end, every choice is the first."""

    def __init__(self, choices: bytes) -> None:
        self._choices = iter(choices)

    def template(self) -> str:
        statements = []
        while (choice := next(self._choices, None)) is not None and len(statements) < 4:
            statements.append(self._statement(choice, 0))
        return "".join(statements)

    def _pick(self, options: tuple[str, ...]) -> str:
        return options[next(self._choices, 0) % len(options)]

    def _statement(self, choice: int, depth: int) -> str:
        if depth >= MAX_DEPTH:
            return "{{ x }}"
        expression = self._expression(depth + 1)
        match choice % 14:
            case 0 | 1 | 2:
                return f"{{{{ {expression} }}}}"
            case 3:
                return f"{{% set {self._pick(('x', 'f', 'self', 'messages'))} = {expression} %}}"
            case 4:
                return f"{{% set ns = namespace(x={expression}) %}}{{% set ns.x = {self._expression(depth + 1)} %}}"
            case 5:
                return f"{{% for x in {expression}|list %}}{self._body(depth)}{{% endfor %}}"
            case 6:
                body = f"{self._body(depth)}{{{{ loop(x|list) }}}}"
                return f"{{% for x in {expression}|list recursive %}}{body}{{% endfor %}}"
            case 7:
                return f"{{% if {expression} %}}{self._body(depth)}{{% else %}}{self._body(depth)}{{% endif %}}"
            case 8:
                return f"{{% macro f(x={expression}) %}}{self._body(depth)}{{% endmacro %}}{{{{ f() }}}}"
            case 9:
                macro = f"{{% macro f(x) %}}{{{{ caller(x, {self._expression(depth + 1)}) }}}}{{% endmacro %}}"
                return f"{macro}{{% call(x, ns) f({expression}) %}}{self._body(depth)}{{% endcall %}}"
            case 10:
                return f"{{% filter {self._pick(_filters())}|string %}}{self._body(depth)}{{% endfilter %}}"
            case 11:
                return f"{{% with x = {expression} %}}{self._body(depth)}{{% endwith %}}"
            case 12:
                words = (
                    "include {}|string ignore missing",
                    "include [{}] ignore missing",
                    "import {} as x",
                    "extends {}",
                )
                return f"{{% {self._pick(words[: 3 if depth else 4]).format(expression)} %}}"
            case _:
                return f"{{% generation %}}{self._body(depth)}{{% endgeneration %}}"

    def _body(self, depth: int) -> str:
        return self._statement(next(self._choices, 0), depth + 1)

    def _expression(self, depth: int) -> str:
        if depth >= MAX_DEPTH:
            return self._pick(NAMES)
        choice = next(self._choices, 0) % 16
        if choice < 3:
            return self._pick(NAMES)
        if choice == 3:
            return self._pick(LITERALS)
        inner = self._expression(depth + 1)
        match choice:
            case 4 | 5:
                return f"{inner}.{self._pick(ATTRIBUTES)}"
            case 6:
                return f"{inner}['{self._pick(ATTRIBUTES)}']"
            case 7:
                return f"({inner}|attr('{self._pick(ATTRIBUTES)}'))"
            case 8:
                return f"({inner}|{self._pick(_filters())})"
            case 9:
                return f"({inner}|{self._pick(_filters())}({self._expression(depth + 1)}))"
            case 10:
                return f"({inner}|map({self._pick(MAP_ARGUMENTS)})|list)"
            case 11:
                return f"{inner}()"
            case 12:
                return f"{inner}({self._expression(depth + 1)})"
            case 13:
                return f"({inner}{self._pick(OPERATORS)}{self._expression(depth + 1)})"
            case 14:
                return f"[{inner}, {self._expression(depth + 1)}][{self._pick(LITERALS)}]"
            case _:
                return f"({inner} if x is {self._pick(_tests())} else {{'x': {self._expression(depth + 1)}}})"


MAP_ARGUMENTS = ("attribute='__class__'", "'attr', '__class__'", "'tojson'", "attribute='content'", "'format', 1")


@cache
def _filters() -> tuple[str, ...]:
    return tuple(sorted(Environment().filters))


@cache
def _tests() -> tuple[str, ...]:
    return tuple(sorted(name for name in Environment().tests if name.isidentifier() and name not in ("in", "true")))


@dataclass
class Sandbox:
    """The renderers, and what was seen happening while one rendered."""

    renderer: Renderer
    forgiving: Renderer
    events: list[str] = field(default_factory=list)
    is_watched: bool = False

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook; one can't be taken away again."""
        if self.is_watched and event.startswith(FORBIDDEN_EVENTS) and (event, arguments) not in HARMLESS_EVENTS:
            self.events.append(f"{event}{arguments!r:.100}")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        self.events.clear()
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS, CPU_SECONDS)  # again, where something caught the first one
        self.is_watched = True
        try:
            yield
        finally:
            self.is_watched = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@cache
def _sandbox() -> Sandbox:
    """The only one of this process, under its limits; it has imported all that it will."""
    sandbox = Sandbox(Renderer(BoundedEnvironment()), Renderer(ForgivingEnvironment()))
    template_worker._warm_up(sandbox.renderer)
    template_worker.to_json.__globals__["CANARY"] = CANARY
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (num_pages * resource.getpagesize() + MEMORY_BYTES, hard))
    sys.addaudithook(sandbox.hear)
    signal.signal(signal.SIGVTALRM, _give_up)
    return sandbox


def _give_up(*_: object) -> NoReturn:
    raise OutOfTimeError


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, str | list | tuple) else 0
