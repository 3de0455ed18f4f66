"""Logs on stderr: one line a record, with the service's name; prompts and answers appear only where asked for."""

from __future__ import annotations

import logging
import sys
import traceback
from types import TracebackType

_ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def set_up_logs(service: str, level: str = "INFO", *, with_content: bool = False) -> None:
    """Send this process's log records to stderr as "time level service logger: message".

    Args:
        service: named in each record.
        level: the least one that is written.
        with_content: write what exceptions say, which may quote what a client sent; else only where they come from.
    """
    line = f"%(asctime)s %(levelname)s {service} %(name)s: %(message)s"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(line) if with_content else _DiscreetFormatter(line))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _DiscreetFormatter(logging.Formatter):
    """Leaves out of tracebacks what exceptions say."""

    def formatException(self, ei: _ExceptionInfo) -> str:
        error = ei[1]
        assert error is not None
        return "\n".join(reversed([_frames(cause) for cause in _chain(error)]))


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
