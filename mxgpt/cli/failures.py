"""Exit codes, and errors as one line that says what to do next."""

from __future__ import annotations

import sys

import click

from mxgpt.cli.terminal import printable
from mxgpt.errors import MxgptError
from shared.errors import Reason, ServiceError, Status

OK = 0
FAILED = 1
USAGE = 2
UNAVAILABLE = 3  # no server can be reached, or none that can serve now
INTERRUPTED = 130  # 128 + SIGINT
PIPE_CLOSED = 141  # 128 + SIGPIPE

_HINTS = {
    "EXECUTOR_UNAVAILABLE": "Start a server with `mxgpt serve`, or name another one with --server.",
    "UNAUTHENTICATED": "Give the server's token with --token-file or in MXGPT_TOKEN.",
    "PERMISSION_DENIED": "The server's key file gives each key its role.",
    "CONTEXT_LENGTH_EXCEEDED": "Shorten the prompt, or ask for fewer tokens.",
    "MODEL_NOT_FOUND": "`mxgpt models` lists what is served.",
    "CHAT_TEMPLATE_MISSING": "`mxgpt generate` continues plain text.",
    "DEADLINE": "Give it longer with --timeout.",
    "QUEUE_FULL": "Try again in a while, or start another executor.",
    "KV_EXHAUSTED": "Ask for fewer tokens or outputs, or serve with a larger --kv-memory-mib.",
    "MEMORY_EXHAUSTED": "`mxgpt inspect FILE` shows what a model takes.",
}


class CommandError(Exception):
    """A failure of a command itself: one sentence, and what to do next."""

    exit_code = FAILED


class ServerUnusableError(CommandError):
    """A server is there, and can't be talked to in this way."""

    exit_code = UNAVAILABLE


def report(error: Exception) -> int:
    """Say on stderr what went wrong; returns the exit code.

    Raises:
        Exception: the error itself where it is a defect of ours, whose traceback is wanted.
    """
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, MxgptError):
        _print(_with_hint(error.message, error.reason))
        return UNAVAILABLE if error.is_unavailable else FAILED
    if isinstance(error, ServiceError):
        _print(_with_reason(error.message, error.reason.name))
        return UNAVAILABLE if error.status is Status.UNAVAILABLE else FAILED
    if isinstance(error, CommandError | OSError):
        _print(str(error))
        return error.exit_code if isinstance(error, CommandError) else FAILED
    raise error


def _with_hint(message: str, reason: str) -> str:
    named = _with_reason(message, reason)
    return f"{named}. {_HINTS[reason]}" if reason in _HINTS else named


def _with_reason(message: str, reason: str) -> str:
    return f"{message.rstrip('.')} ({reason})" if reason in Reason.__members__ else message


def _print(message: str) -> None:
    print("mxgpt: " + printable(" ".join(message.split())), file=sys.stderr, flush=True)
