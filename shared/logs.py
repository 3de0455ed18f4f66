"""Logs on stderr: one line a record, as text or as JSON, naming the request that it belongs to.

Prompts and answers appear only where asked for.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from contextvars import ContextVar
from types import TracebackType

FORMATS = ("text", "json")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

# What the lines of the task that runs belong to: the handler of each call is a task of its own.
_fields: ContextVar[dict[str, str]] = ContextVar("log_fields")


def set_up_logs(service: str, level: str = "INFO", log_format: str = "text", *, with_content: bool = False) -> None:
    """Send this process's log records to stderr, as "time level service logger: message" or as JSON.

    Args:
        service: named in each record.
        level: the least one that is written, of LEVELS.
        log_format: one of FORMATS.
        with_content: write what exceptions say, which may quote what a client sent; else only where they come from.
    """
    formatter = _JSONFormatter if log_format == "json" else _TextFormatter
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(service, with_content))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def add_log_fields(**fields: str) -> None:
    """Name what the further lines of the task that runs belong to, as by `request_id`."""
    _fields.set({**log_fields(), **fields})


def log_fields() -> dict[str, str]:
    """What the lines of the task that runs belong to."""
    return _fields.get({})


def json_line(service: str, level: str, logger: str, message: str, **fields: str) -> str:
    """A line as the JSON format has it, with the time of now."""
    return _json_line(time.time(), service, level, logger, message, fields)


def _json_line(seconds: float, service: str, level: str, logger: str, message: str, fields: dict[str, str]) -> str:
    when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"
    line = {"time": when, "level": level, "service": service, "logger": logger, "message": message, **fields}
    return json.dumps(line, ensure_ascii=False)


class _DiscreetFormatter(logging.Formatter):
    """Leaves out of tracebacks what exceptions say, unless it is wanted."""

    def __init__(self, with_content: bool, line: str | None = None) -> None:
        super().__init__(line)
        self._with_content = with_content

    def formatException(self, ei: _ExceptionInfo) -> str:
        if self._with_content:
            return super().formatException(ei)
        error = ei[1]
        assert error is not None
        return "\n".join(reversed([_frames(cause) for cause in _chain(error)]))


class _TextFormatter(_DiscreetFormatter):
    def __init__(self, service: str, with_content: bool) -> None:
        super().__init__(with_content, f"%(asctime)s %(levelname)s {service} %(name)s%(belongs_to)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        # An id is its caller's choice: whatever is in it, a record stays one line.
        named = [f"{name}={_printable(text)}" for name, text in log_fields().items()]
        record.belongs_to = f" [{' '.join(named)}]" if named else ""
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        # Names and paths may come from callers: what would begin a line of its own is spelled, as in JSON.
        record.message = _spelled(record.message)
        return super().formatMessage(record)


class _JSONFormatter(_DiscreetFormatter):
    def __init__(self, service: str, with_content: bool) -> None:
        super().__init__(with_content)
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        fields = log_fields()
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        return _json_line(record.created, self._service, record.levelname, record.name, record.getMessage(), fields)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _spelled(text: str) -> str:
    """The text with line breaks, and whatever else can't be printed, as Python's escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _chain(error: BaseException) -> list[BaseException]:
    """An exception and those that led to it, the last one first."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    return chain


def _frames(error: BaseException) -> str:
    """Where an exception was raised, and its kind."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"Traceback (most recent call last):\n{frames}{type(error).__name__} (--log-content shows what it says)"
