"""Options that several commands share."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from mxgpt.cli.doorstep import trouble_at
from mxgpt.cli.failures import ServerUnusableError
from mxgpt.client import Client
from mxgpt.connection import DEFAULT_TARGET, Connection
from mxgpt.errors import MxgptError
from shared.errors import Reason
from shared.keys import read_token

F = TypeVar("F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path, dir_okay=False)
_SURROGATE = re.compile("[\ud800-\udfff]")  # stands for a byte that the locale's encoding lacks
_DOOR_NAMES = ("token_file", "tls_root", "tls_certificate", "tls_key", "tls_server_name")


class _Text(click.types.StringParamType):
    """UTF-8, whatever the locale takes the command line for."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return as_utf8(super().convert(value, param, ctx))
        except UnicodeError:
            self.fail("it is not UTF-8", param, ctx)


TEXT = _Text()


def as_utf8(text: str) -> str:
    """Text from the command line or a terminal, where the locale's encoding lacks its characters.

    Raises:
        UnicodeError: when it is no UTF-8 either.
    """
    return os.fsencode(text).decode() if _SURROGATE.search(text) else text


def server_options(command: F) -> F:
    """Where the server is and what to show it; taken out of the arguments again by `connection`."""
    server = click.option(
        "--server",
        type=TEXT,
        default=DEFAULT_TARGET,
        envvar="MXGPT_SERVER",
        show_default=True,
        show_envvar=True,
        help="Address of the executors; several with commas between.",
    )
    return server(door_options(command))


def door_options(command: F) -> F:
    """What to show a server, and what to expect of it; taken out of the arguments again by `door`.

    Where a command with `--server` fails for want of an answer, a look at the server's door says what is amiss there.
    """
    return _apply(
        _explaining(command),
        click.option("--token-file", type=_PATH, help="File with the bearer token to send; else MXGPT_TOKEN."),
        click.option(
            "--tls-root",
            type=_PATH,
            envvar="MXGPT_CA",
            show_envvar=True,
            help="PEM authority of the server's certificate; plain text without.",
        ),
        click.option("--tls-certificate", type=_PATH, help="PEM certificate to show the server."),
        click.option("--tls-key", type=_PATH, help="PEM key of that certificate."),
        click.option("--tls-server-name", type=TEXT, help="Name in the server's certificate, if not the address's."),
    )


def connection(options: dict[str, Any]) -> dict[str, Any]:
    """Take `server_options` out of a command's arguments, as arguments for a client.

    Raises:
        click.UsageError: when the token file can't be read or holds no key.
    """
    return {"target": options.pop("server"), **door(options)}


def door(options: dict[str, Any]) -> dict[str, Any]:
    """Take `door_options` out of a command's arguments, as arguments for a client.

    Raises:
        click.UsageError: when the token file can't be read or holds no key.
    """
    given = {name: options.pop(name) for name in _DOOR_NAMES}
    token_file = given.pop("token_file")
    if token_file is None:
        return given
    try:
        return {"token": read_token(token_file), **given}
    except (OSError, ValueError) as error:
        raise click.UsageError(f"--token-file: {error}") from error


def connect(options: dict[str, Any]) -> Client:
    """A client for `server_options`, which are taken out of a command's arguments.

    Raises:
        click.UsageError: when they don't fit together.
    """
    try:
        return Client(**connection(options))
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error


def generation_options(command: F) -> F:
    """The options of a generation; their defaults are the server's."""
    return _apply(
        command,
        click.option("--model", type=TEXT, help="Name, alias or digest; the server's only model by default."),
        click.option(
            "--max-tokens", "-m", type=click.IntRange(1), help="Most tokens to write. Default: what the context holds."
        ),
        click.option("--min-tokens", type=click.IntRange(0), help="Fewest tokens to write."),
        click.option("--temperature", "-t", type=click.FloatRange(0, 100), help="0 is greedy. Default: 1."),
        click.option("--top-k", type=click.IntRange(0), help="Keep the k most likely tokens; 0 keeps all."),
        click.option(
            "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Keep the smallest set of this probability."
        ),
        click.option("--min-p", type=click.FloatRange(0, 1), help="Keep tokens this likely, relative to the best."),
        click.option(
            "--repetition-penalty",
            type=click.FloatRange(0, 10, min_open=True),
            help="Divides logits of tokens seen. Default: 1.",
        ),
        click.option("--presence-penalty", type=click.FloatRange(-2, 2), help="Subtracted for tokens written before."),
        click.option(
            "--frequency-penalty", type=click.FloatRange(-2, 2), help="Subtracted for each time that they were."
        ),
        click.option(
            "--logit-bias", type=TEXT, multiple=True, metavar="ID=BIAS", help="Added to a token's logit. Repeatable."
        ),
        click.option("--seed", type=click.IntRange(0), help="Makes the draws repeatable."),
        click.option(
            "--stop",
            "stop_strings",
            type=TEXT,
            multiple=True,
            metavar="TEXT",
            help="Ends the text; not shown. Repeatable.",
        ),
        click.option(
            "--stop-token-id",
            "stop_token_ids",
            multiple=True,
            type=click.IntRange(0),
            help="Ends the text. Repeatable.",
        ),
        click.option("--ignore-eos", is_flag=True, help="Go on past the model's own end."),
        click.option("--priority", type=click.IntRange(-100, 100), help="Higher ones are admitted first."),
        click.option("--request-id", type=TEXT, help="Names the request in the server's logs."),
        click.option(
            "--timeout",
            type=click.FloatRange(0, min_open=True),
            metavar="SECONDS",
            help="Give up after this long, retries included.",
        ),
    )


def generation_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `Client.generate` out of `generation_options`.

    Raises:
        click.UsageError: for a logit bias that is none.
    """
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    arguments = {name: value for name, value in given.items() if value is not False}  # but 0 is a value
    if "logit_bias" in arguments:
        arguments["logit_bias"] = dict(_bias(text) for text in arguments["logit_bias"])
    return arguments


def prompt_text(given: str | None) -> str:
    """The prompt: the argument itself, or stdin for "-" or none, less its last newline.

    Raises:
        click.UsageError: when there is none and nobody pipes one in.
    """
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise click.UsageError("give a PROMPT, or pipe one in")
    text = sys.stdin.buffer.read()
    try:
        return text.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"the prompt on stdin is not UTF-8: {error}") from error


def _explaining(command: F) -> F:
    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except MxgptError as error:
            if error.reason == Reason.EXECUTOR_UNAVAILABLE.name and options.get("server"):
                trouble = trouble_at(Connection(**connection(options)))
                if trouble is not None:
                    raise ServerUnusableError(f"no answer ({error.reason}): {trouble}") from error
            raise

    return cast(F, run)


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError as error:
        raise click.UsageError(f"--logit-bias {text!r}: write ID=BIAS, as in 42=-1.5") from error


def _apply(command: F, *options: Callable[[Any], Any]) -> F:
    for option in reversed(options):
        command = option(command)
    return command
