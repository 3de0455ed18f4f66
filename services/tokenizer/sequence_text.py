"""The text of one growing sequence of ids, as segments; plain here, in Harmony's format in harmony.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from services.tokenizer.stop_strings import StopStrings
from services.tokenizer.text_stream import TextStream
from services.tokenizer.vocabulary import TokenTable, invalid_token_id


class Segment(NamedTuple):
    """Consecutive ids and their text."""

    num_ids: int
    text: str
    channel: str = ""
    recipient: str = ""


class SequenceText(Protocol):
    """Takes the ids of a sequence, releases its text."""

    @property
    def matched_stop(self) -> str | None:
        """The stop string that has ended the sequence, if one has."""
        ...

    def feed(self, token_ids: Sequence[int]) -> None:
        """Take the next ids; those after a stop string are ignored.

        Raises:
            ServiceError: TOKEN_ID_INVALID.
        """
        ...

    def finish(self) -> None:
        """Release whatever waits; after a stop string, nothing does."""
        ...

    def take(self) -> list[Segment]:
        """What has been released since the last call."""
        ...


class PlainStream:
    """The text of one growing sequence of ids in no format. Arguments as of TextStream and HarmonyStream."""

    def __init__(
        self,
        table: TokenTable,
        prompt_token_ids: Sequence[int],
        stop_strings: StopStrings | None,
        min_tokens: int,
        num_released: int,
    ) -> None:
        self._table = table
        self._stream = TextStream(stop_strings, min_tokens, sequence_begun(table, prompt_token_ids), num_released)

    @property
    def matched_stop(self) -> str | None:
        return self._stream.matched_stop

    def feed(self, token_ids: Sequence[int]) -> None:
        if self._stream.matched_stop is not None:
            return
        pieces, texts, push = self._table.pieces, self._table.texts, self._stream.push
        for token_id in token_ids:
            if token_id >= len(pieces):
                raise invalid_token_id(token_id, len(pieces))
            if push(pieces[token_id], texts[token_id]):
                return

    def finish(self) -> None:
        if self._stream.matched_stop is None:
            self._stream.flush()

    def take(self) -> list[Segment]:
        num_ids, text = self._stream.take()
        return [Segment(num_ids, text)] if num_ids else []


def sequence_begun(table: TokenTable, token_ids: Sequence[int]) -> bytes:
    """The bytes at the end of the ids' text that begin a character: at most three.

    Raises:
        ServiceError: TOKEN_ID_INVALID.
    """
    end = b""
    for token_id in reversed(token_ids):
        if token_id >= len(table.pieces):
            raise invalid_token_id(token_id, len(table.pieces))
        end = table.pieces[token_id] + end
        if len(end) >= 3:
            break
    stream = TextStream(None)
    stream.push(end[-3:], None)
    return stream.begun
