"""The command group: loads a command's module only when it is asked for, and turns errors into exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from mxgpt.cli.failures import INTERRUPTED, OK, PIPE_CLOSED, USAGE, report

# Section -> command -> (where its click command is, what it does in a few words).
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Serve": {
        "serve": ("mxgpt.cli.serve:serve", "Load a model and serve it on this machine."),
        "loader": ("services.loader.main:main", "Run a loader alone."),
        "tokenizer": ("services.tokenizer.main:main", "Run a tokenizer alone."),
        "executor": ("services.executor.main:main", "Run an executor alone."),
    },
    "Ask": {
        "generate": ("mxgpt.cli.generate:generate", "Continue a text."),
        "chat": ("mxgpt.cli.chat:chat", "Hold a conversation."),
        "models": ("mxgpt.cli.models:models", "List what a server serves."),
    },
    "Examine": {
        "top": ("mxgpt.cli.top:top", "Watch running services, live."),
        "inspect": ("mxgpt.cli.inspect:inspect", "Show what is in a GGUF file and the memory it will take."),
        "quantize": ("mxgpt.cli.quantize:quantize", "Write a GGUF file with its weights in another type."),
        "compare": ("mxgpt.cli.compare:compare", "Measure what a file lost against another."),
        "bench": ("mxgpt.cli.bench:bench", "Measure a running server."),
        "perplexity": ("mxgpt.cli.perplexity:perplexity", "Measure how well a model predicts a text."),
        "evaluate": ("mxgpt.cli.evaluate:evaluate", "Count the demo tasks that a demo model answers exactly."),
    },
}

_COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, _COMMANDS))
        for section, commands in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(width), help_text) for name, (_, help_text) in commands.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Whoever read our output has gone. Nothing more can be said there, not even at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(PIPE_CLOSED)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no server can answer, 130 interrupted, 141 output not read.",
)
@click.version_option(package_name="mxgpt")
def cli() -> None:
    """Serve GPT models from GGUF files over gRPC.

    \b
    A first try, in two terminals:
      mxgpt serve
      mxgpt chat "What is 348 + 575?"

    \b
    Every command explains itself:
      mxgpt generate --help
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    try:
        code = cli.main(arguments, prog_name="mxgpt", standalone_mode=False)
        return code if isinstance(code, int) else OK
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        return report(error)
