"""`mxgpt chat`: a conversation, at a terminal or through pipes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from mxgpt.cli.answers import AnswerPrinter
from mxgpt.cli.options import (
    TEXT,
    as_utf8,
    connect,
    generation_arguments,
    generation_options,
    prompt_text,
    server_options,
)
from mxgpt.cli.remarks import describe_speed, note_lengths
from mxgpt.cli.terminal import is_terminal, note
from mxgpt.client import Client
from mxgpt.results import Output

_COMMANDS_HELP = "/reset starts anew, /exit (or Ctrl-D) ends, Ctrl-C stops an answer."


@click.command(
    epilog="""\b
Examples:
  mxgpt chat                                     # a conversation
  mxgpt chat "What is 348 + 575?"                # one question
  echo "Sort these words: river, apple, stone" | mxgpt chat - --system "Be brief."
  printf 'What is 2 + 3?\\nCount from 3 to 12.\\n' | mxgpt chat    # a turn for each line
"""
)
@click.argument("message", required=False, type=TEXT)
@server_options
@generation_options
@click.option("--system", type=TEXT, help="A system message to begin with.")
@click.option("--reasoning-effort", type=click.Choice(["low", "medium", "high"]), help="For models that know it.")
@click.option("--date", type=TEXT, metavar="YYYY-MM-DD", help="The date that the model is told. Default: today.")
@click.option("--thinking/--no-thinking", default=None, help="Show the reasoning. Default: at a terminal only.")
@click.option("--stats", is_flag=True, help="Say on stderr how fast each answer came.")
def chat(message: str | None, system: str | None, thinking: bool | None, stats: bool, **options: Any) -> None:
    """Talk with a model through its own chat template.

    With MESSAGE one answer is given ("-" reads the message from stdin). Without it you are asked for one message
    after another; where stdin is a pipe each of its lines is one. Reasoning (the analysis channel) is shown dimmed
    at a terminal and left out elsewhere: a pipe gets the answers alone.
    """
    with connect(options) as client:
        arguments = generation_arguments(options)
        show_thinking = is_terminal(sys.stdout) if thinking is None else thinking
        conversation = _Conversation(client, system, arguments, show_thinking, stats)
        if message is not None:
            conversation.answer(prompt_text(message))
        elif sys.stdin.isatty():
            client.list_models()  # that nobody is there is said before a message is written
            _talk(conversation)
        else:
            for line in _lines():
                conversation.answer(line)


class _Conversation:
    """The messages so far, and how answers are asked for and shown."""

    def __init__(
        self, client: Client, system: str | None, arguments: dict[str, Any], show_thinking: bool, stats: bool
    ) -> None:
        self._client = client
        self._beginning = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._beginning)
        self._arguments = arguments
        self._show_thinking = show_thinking
        self._stats = stats

    def reset(self) -> None:
        self._messages = list(self._beginning)

    def answer(self, text: str) -> None:
        """Ask for an answer and show it as it comes; a question without an answer is forgotten."""
        question = {"role": "user", "content": text}
        with self._client.generate([*self._messages, question], **self._arguments) as generation:
            printer = AnswerPrinter(self._show_thinking)
            try:
                for piece in generation:
                    printer.print(piece)
            finally:
                printer.end()
            result = generation.result
        output: Output = result.outputs[0]
        # Reasoning is left out of later turns, as gpt-oss is trained.
        self._messages += [question, {"role": "assistant", "content": output.content}]
        note_lengths(result, self._arguments.get("max_tokens"), self._stats)
        if self._stats:
            note(describe_speed(result))


def _talk(conversation: _Conversation) -> None:
    import readline  # noqa: F401  (line editing for input(); it changes the terminal, so only here)

    note(_COMMANDS_HELP)
    while True:
        try:
            text = as_utf8(input("> ")).strip()
        except EOFError:
            print()
            return
        except UnicodeError:
            note("that is not UTF-8")
            continue
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            conversation.reset()
            note("a new conversation")
        elif text.startswith("/"):
            note(_COMMANDS_HELP)
        elif text:
            try:
                conversation.answer(text)
            except KeyboardInterrupt:
                note("stopped")


def _lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise click.UsageError(f"line {number} on stdin is not UTF-8: {error}") from error
        if text.strip():
            yield text
