"""Turns the bytes of token ids into text as they come: whole characters, up to a stop string, at id borders.

What has been released is, after every id, the decoding of the first so many ids, all at once. An id waits while
the text so far ends inside a character, or in the beginning of a stop string that reaches into the id's text.
"""

from __future__ import annotations

import codecs
from collections import deque
from dataclasses import dataclass, field

from services.tokenizer.stop_strings import NOTHING, StopStrings


@dataclass(slots=True)
class _Group:
    """Ids that are released together: only after the last of them does the text end between characters."""

    num_ids: int = 0
    num_chars: int = 0
    texts: list[str] = field(default_factory=list)
    is_open: bool = False  # the text ends inside a character even after the last of them


class TextStream:
    """The text of one growing sequence of ids.

    Args:
        stop_strings: what ends the sequence, if anything does.
        min_tokens: stop strings that end within the first so many ids are passed over.
        begun: the bytes of a character that the prompt begins and does not end. If the first byte of the
            sequence continues it, the whole character is the sequence's; else these bytes are dropped.
        num_released: the first so many ids were released before: nothing is released for them.
    """

    def __init__(
        self, stop_strings: StopStrings | None, min_tokens: int = 0, begun: bytes = b"", num_released: int = 0
    ) -> None:
        self.matched_stop: str | None = None  # once set, the sequence is over
        self._stops = stop_strings
        self._stop_state = NOTHING
        self._num_held = 0  # characters at the end of the text that begin a stop string
        self._min_tokens = min_tokens
        self._begun = begun
        self._num_to_skip = num_released
        self._num_ids = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_open = False  # the decoder holds bytes that begin a character
        self._waiting: deque[_Group] = deque()
        self._num_waiting_chars = 0
        self._num_ready_ids = 0
        self._ready_texts: list[str] = []

    @property
    def begun(self) -> bytes:
        """The bytes at the end that begin a character."""
        return self._begun or self._decoder.getstate()[0]

    def push(self, piece: bytes, text: str | None) -> bool:
        """Take the next id: its bytes, and their text if they are whole characters; True if it completes a stop."""
        self._num_ids += 1
        if text is None or self._is_open or self._begun:
            text = self._decode(piece)
        stops = self._stops
        if (
            stops is not None
            and (self._num_held or not stops.first_characters.isdisjoint(text))
            and self._finds_stop(1, text)
        ):
            return True
        if self._waiting or self._is_open or self._num_held:
            self._wait(1, text)
            self._release_waiting()
        else:
            self._release(1, text)
        return False

    def pass_over(self, num_ids: int) -> None:
        """Take ids that have no text and end no text; nothing may be waiting."""
        assert not self._waiting
        self._num_ids += num_ids
        self._release(num_ids, "")

    def flush(self) -> bool:
        """Release whatever waits, an unfinished character as U+FFFD; True if that completes a stop.

        The next id begins a text of its own: no character and no stop string reaches across.
        """
        self._begun = b""
        if self._is_open:
            text = self._decoder.decode(b"", True)
            self._is_open = False
            if self._stops is not None and self._finds_stop(0, text):
                return True
            self._wait(0, text)
        self._stop_state = NOTHING
        self._num_held = 0
        self._release_waiting()
        return False

    def take(self) -> tuple[int, str]:
        """The number of ids released since the last call, and their text."""
        released = self._num_ready_ids, "".join(self._ready_texts)
        self._num_ready_ids = 0
        self._ready_texts.clear()
        return released

    def _decode(self, piece: bytes) -> str:
        """The characters that `piece` completes; `_is_open` tells whether it begins another."""
        if self._begun and piece:
            piece = self._begun + piece if _continues(self._begun, piece) else piece
            self._begun = b""
        text = self._decoder.decode(piece)
        self._is_open = bool(self._decoder.getstate()[0])
        return text

    def _finds_stop(self, num_ids: int, text: str) -> bool:
        """Look for the end of a stop string in the newest text; where there is one, release what precedes it."""
        stops = self._stops
        assert stops is not None
        passes_over = self._num_ids <= self._min_tokens
        self._stop_state, num_chars, stop = stops.step(self._stop_state, text, passes_over)
        if stop:
            num_chars += self._num_waiting_chars - len(stop)
            self._wait(num_ids, text)
            self._release_cut(num_chars)
            self.matched_stop = stop
            return True
        self._num_held = stops.num_held(self._stop_state)
        return False

    def _wait(self, num_ids: int, text: str) -> None:
        if not (self._waiting and self._waiting[-1].is_open):
            self._waiting.append(_Group())
        group = self._waiting[-1]
        group.num_ids += num_ids
        group.num_chars += len(text)
        group.texts.append(text)
        group.is_open = self._is_open
        self._num_waiting_chars += len(text)

    def _release_waiting(self) -> None:
        """Release what waits, except for the ids whose text overlaps the characters held."""
        waiting, num_held = self._waiting, self._num_held
        while waiting and not waiting[0].is_open and self._num_waiting_chars - waiting[0].num_chars >= num_held:
            group = waiting.popleft()
            self._num_waiting_chars -= group.num_chars
            self._release(group.num_ids, "".join(group.texts))

    def _release_cut(self, num_chars: int) -> None:
        """Release all ids that wait, with the first `num_chars` characters of their text."""
        while self._waiting:
            group = self._waiting.popleft()
            text = "".join(group.texts)[:num_chars]
            num_chars -= len(text)
            self._release(group.num_ids, text)
        self._num_waiting_chars = 0

    def _release(self, num_ids: int, text: str) -> None:
        if self._num_to_skip:
            # Ids are released in whole groups; the text of one belongs to its last id.
            num_skipped = min(self._num_to_skip, num_ids)
            self._num_to_skip -= num_skipped
            num_ids -= num_skipped
            if not num_ids:
                return
        self._num_ready_ids += num_ids
        if text:
            self._ready_texts.append(text)


def _continues(begun: bytes, piece: bytes) -> bool:
    """Whether the first byte of `piece` goes on with the character begun."""
    try:
        (begun + piece[:1]).decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True
