"""Logs on stderr: one line a record, as text or as JSON, naming the request that it belongs to.

Prompts and answers never appear in them.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar

FORMATS = ("text", "json")

# What the lines of the task that runs belong to: the handler of each call is a task of its own.
_fields: ContextVar[dict[str, str]] = ContextVar("log_fields")


def set_up_logs(service: str, level: str = "INFO", log_format: str = "text") -> None:
    """Send this process's log records to stderr, as "time level service logger: message" or as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JSONFormatter(service) if log_format == "json" else _TextFormatter(service))
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


class _TextFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {service} %(name)s%(belongs_to)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        # An id is its caller's choice: whatever is in it, a record stays one line.
        named = [f"{name}={_printable(text)}" for name, text in log_fields().items()]
        record.belongs_to = f" [{' '.join(named)}]" if named else ""
        return super().format(record)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


class _JSONFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        fields = log_fields()
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        return _json_line(record.created, self._service, record.levelname, record.name, record.getMessage(), fields)
