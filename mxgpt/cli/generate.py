"""`mxgpt generate`: continue a text."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import click

from mxgpt.cli.options import TEXT, connect, generation_arguments, generation_options, prompt_text, server_options
from mxgpt.cli.remarks import describe_speed, note_lengths
from mxgpt.cli.terminal import json_text, note, write
from mxgpt.client import Client, Generation
from mxgpt.options import Prompt
from mxgpt.results import Piece, Result

_NUM_LOGPROBS = click.IntRange(0, 20)


@click.command(
    epilog="""\b
Examples:
  mxgpt generate "1, 2, 3, 4," --max-tokens 64 --temperature 0
  echo "10, 11, 12, 13," | mxgpt generate - --stop " 21" --temperature 0 > counted.txt
  mxgpt generate --token-ids "16 11 220 17 11 220 18 11" --max-tokens 6 --json --logprobs 5
  mxgpt generate "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1 --n 3

\b
The demo models are trained on small tasks in conversations (mxgpt chat). Of plain texts they continue little
but counting; the last example wants another model.
"""
)
@click.argument("prompt", required=False, type=TEXT)
@server_options
@generation_options
@click.option("--n", type=click.IntRange(1, 16), help="Number of outputs; they are shown one after another.")
@click.option("--token-ids", is_flag=True, help="The prompt is token ids, with blanks or commas between.")
@click.option("--special-tokens", is_flag=True, help="Spell special tokens out in the text.")
@click.option("--logprobs", type=_NUM_LOGPROBS, help="With --json: log-probabilities of this many likely tokens.")
@click.option("--prompt-logprobs", type=_NUM_LOGPROBS, help="With --json: the same for the prompt.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each piece, and one for the result.")
@click.option("--stats", is_flag=True, help="Say on stderr how fast it went.")
def generate(prompt: str | None, token_ids: bool, as_json: bool, stats: bool, **options: Any) -> None:
    """Continue PROMPT, plain text that no chat template touches, and stream what follows to stdout.

    Without PROMPT, or with "-", the prompt is read from stdin, less its last newline. Text is written as it comes;
    the last line is ended. Ctrl-C stops the generation on the server, too.
    """
    for name in ("logprobs", "prompt_logprobs"):
        if options[name] is not None and not as_json:
            raise click.UsageError(f"--{name.replace('_', '-')} goes with --json")
    text = prompt_text(prompt)
    with connect(options) as client:
        arguments = generation_arguments(options)
        wanted: Prompt = _token_ids(text) if token_ids else text
        result = _stream(client, wanted, arguments, as_json)
    note_lengths(result, arguments.get("max_tokens"), stats)
    if stats:
        note(describe_speed(result))


def _stream(client: Client, prompt: Prompt, arguments: dict[str, Any], as_json: bool) -> Result:
    with client.generate(prompt, **arguments) as generation:
        if as_json:
            _write_json(generation)
        elif arguments.get("n", 1) == 1:
            _write_text(generation)
        else:
            _write_outputs(generation)
        return generation.result


def _write_text(generation: Generation) -> None:
    last = "\n"
    for piece in generation:
        write(piece.text)
        last = piece.text[-1:] or last
    if last != "\n":
        write("\n")


def _write_outputs(generation: Generation) -> None:
    """Outputs one after another, for interleaved nobody could read them."""
    for _ in generation:
        pass
    for output in generation.result.outputs:
        write(f"--- output {output.index}\n{output.text.removesuffix(chr(10))}\n")


def _write_json(generation: Generation) -> None:
    for piece in generation:
        _write_line(_piece_fields(piece))
    result = generation.result
    fields = dataclasses.asdict(result)
    fields["outputs"] = [
        {
            "index": output.index,
            "text": output.text,
            "finish_reason": output.finish_reason,
            "matched_stop": output.matched_stop,
            "usage": dataclasses.asdict(output.usage) if output.usage else None,
            "timings": dataclasses.asdict(output.timings) if output.timings else None,
        }
        for output in result.outputs
    ]
    _write_line({"result": fields})


def _piece_fields(piece: Piece) -> dict[str, Any]:
    """Fields that say something."""
    fields = dataclasses.asdict(piece)
    return {name: value for name, value in fields.items() if value not in ("", ()) or name == "text"}


def _write_line(fields: dict[str, Any]) -> None:
    sys.stdout.write(json_text(fields) + "\n")
    sys.stdout.flush()


def _token_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise click.UsageError(f"--token-ids: {error}") from error
