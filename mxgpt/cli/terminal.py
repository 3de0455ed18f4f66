"""What a command writes: text as it comes, tables, colours only where a person looks."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Control characters but tab and newline.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def is_terminal(stream: TextIO) -> bool:
    """A person sees what goes there."""
    return stream.isatty()


def has_colours(stream: TextIO) -> bool:
    """A person sees it, in colours that they did not decline (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def dim(text: str, stream: TextIO) -> str:
    """Fainter, where `stream` shows colours."""
    return click.style(text, dim=True) if has_colours(stream) else text


def printable(text: str) -> str:
    """The text without what would command a terminal, for text that a file or a server brought."""
    return _CONTROL.sub("\ufffd", text)


def write(text: str, faint: bool = False) -> None:
    """Text of a model to stdout, at once; on a terminal without what would command it."""
    safe = printable(text) if is_terminal(sys.stdout) else text
    sys.stdout.write(dim(safe, sys.stdout) if faint else safe)
    sys.stdout.flush()


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON for stdout, with characters escaped where its encoding may lack them."""
    is_unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    return json.dumps(value, indent=indent, ensure_ascii=not is_unicode)


def note(text: str) -> None:
    """A remark for the person at the terminal, on stderr."""
    print(dim(text, sys.stderr), file=sys.stderr, flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]], align: str = "") -> None:
    """Aligned columns on stdout, nothing cut off; `align` has a letter for each column, "r" for numbers."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    align = align.ljust(len(header), "l")
    for number, row in enumerate([list(header), *cells]):
        fields = [c.rjust(w) if a == "r" else c.ljust(w) for c, w, a in zip(row, widths, align, strict=True)]
        line = "  ".join(fields).rstrip()
        print(click.style(line, bold=True) if number == 0 and has_colours(sys.stdout) else line)


def progress() -> Progress:
    """A progress bar on stderr; it draws nothing where nobody looks."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not is_terminal(sys.stderr),
        transient=True,
    )
