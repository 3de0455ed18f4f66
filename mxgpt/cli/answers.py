"""How an answer is shown while it comes."""

from __future__ import annotations

from mxgpt.cli.terminal import write
from mxgpt.results import Piece


class AnswerPrinter:
    """Pieces on stdout: answers plain, reasoning and calls of tools dimmed, each channel on lines of its own."""

    def __init__(self, show_thinking: bool) -> None:
        self._show_thinking = show_thinking
        self._place = ("", "")
        self._at_line_start = True

    def print(self, piece: Piece) -> None:
        is_answer = piece.channel in ("", "final") and not piece.recipient
        if not piece.text or not (is_answer or self._show_thinking or piece.recipient):
            return
        if (piece.channel, piece.recipient) != self._place:
            self.end()
            self._place = (piece.channel, piece.recipient)
            if piece.recipient:
                write(f"to {piece.recipient}: ", faint=True)
        write(piece.text, faint=not is_answer)
        self._at_line_start = piece.text.endswith("\n")

    def end(self) -> None:
        """End the line."""
        if not self._at_line_start:
            write("\n")
            self._at_line_start = True
