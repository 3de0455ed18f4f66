"""Parses Harmony, the message format of gpt-oss, over token ids, into text of channels and recipients.

A message is `<|start|>ROLE to=RECIPIENT<|channel|>CHANNEL to=RECIPIENT <|constrain|>TYPE<|message|>CONTENT` and one
of `<|end|>`, `<|return|>`, `<|call|>`; the recipient may stand in either place or be missing. Markers and headers
have no text. A header's ids wait for its `<|message|>`: what turns out to be no header is text of channel "",
so that nothing a model says is lost. Markers are known by id: text that spells one is text.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence

from services.tokenizer.harmony_markers import Marker
from services.tokenizer.sequence_text import Segment, sequence_begun
from services.tokenizer.stop_strings import StopStrings
from services.tokenizer.text_stream import TextStream
from services.tokenizer.vocabulary import TokenTable, invalid_token_id

MAX_HEADER_IDS = 256


class _State(enum.Enum):
    CONTENT = enum.auto()
    ROLE = enum.auto()
    CHANNEL = enum.auto()
    CONSTRAIN = enum.auto()
    BETWEEN = enum.auto()  # after a message, before the next one's <|start|>


# What each part of a header may be, beginnings included. None holds a line break.
_RECIPIENT = r"(?: (?:t|to|to=\S*)?)?"
_HEADER_PARTS = {
    _State.ROLE: re.compile(rf"[\w.:-]{{0,64}}{_RECIPIENT} ?"),
    _State.CHANNEL: re.compile(r" ?[\w.-]{0,64}(?: \S*){0,3}"),
    _State.CONSTRAIN: re.compile(r" ?\S{0,64} ?"),
}


class HarmonyStream:
    """The text of one growing sequence of ids in Harmony's format.

    Args:
        table: token ids to bytes and text.
        markers: Harmony's special tokens by id.
        prompt_token_ids: the prompt; its last message decides where the sequence begins: in a header, in a
            message's content, or between messages.
        stop_strings, min_tokens, num_released: see TextStream. A stop string matches inside one message's content.
    """

    def __init__(
        self,
        table: TokenTable,
        markers: Mapping[int, Marker],
        prompt_token_ids: Sequence[int],
        stop_strings: StopStrings | None,
        min_tokens: int,
        num_released: int,
    ) -> None:
        self._table = table
        self._markers = markers
        self._state = _State.CONTENT
        self._header_ids: list[int] = []  # that wait for their <|message|>
        self._header_texts = dict.fromkeys(_HEADER_PARTS, "")
        self._given_role = ""  # by the prompt, which leaves only a recipient to be added
        self._channel = ""
        self._recipient = ""
        self._segments: list[Segment] = []
        self._stream = TextStream(None)
        begun = self._read_prompt(prompt_token_ids)
        self._stream = TextStream(stop_strings, min_tokens, begun, num_released)

    @property
    def matched_stop(self) -> str | None:
        return self._stream.matched_stop

    def feed(self, token_ids: Sequence[int]) -> None:
        """Take the next ids; those after a stop string are ignored.

        Raises:
            ServiceError: TOKEN_ID_INVALID.
        """
        markers = self._markers
        for token_id in token_ids:
            if self._stream.matched_stop is not None:
                return
            if token_id >= len(self._table.pieces):
                raise invalid_token_id(token_id, len(self._table.pieces))
            marker = markers.get(token_id)
            if marker is not None:
                self._take_marker(token_id, marker)
            elif self._state in _HEADER_PARTS:
                self._take_header_id(token_id)
            else:
                self._take_content_id(token_id)

    def finish(self) -> None:
        """Release whatever waits. A header that was cut short has no text."""
        if self._stream.matched_stop is not None:
            return
        if self._header_ids:
            self._enter("", "")
            self._stream.pass_over(len(self._header_ids))
            self._header_ids.clear()
        else:
            self._stream.flush()

    def take(self) -> list[Segment]:
        """What has been released since the last call."""
        self._close_segment()
        segments, self._segments = self._segments, []
        return segments

    def _read_prompt(self, token_ids: Sequence[int]) -> bytes:
        """Enter the state that the prompt ends in; the bytes of a character that it begins and does not end."""
        start_id = next(token_id for token_id, marker in self._markers.items() if marker is Marker.START)
        starts = [index for index, token_id in enumerate(token_ids) if token_id == start_id]
        if not starts:
            return sequence_begun(self._table, token_ids)
        self.feed(token_ids[starts[-1] :])
        self.take()
        self._header_ids.clear()
        self._given_role = self._header_texts[_State.ROLE].partition(" ")[0]
        return self._stream.begun if self._state is _State.CONTENT else b""

    def _take_marker(self, token_id: int, marker: Marker) -> None:
        if marker is Marker.START:
            self._end_content()
            self._begin_header(token_id, _State.ROLE)
        elif marker is Marker.CHANNEL:
            if self._state is _State.ROLE:
                self._header_ids.append(token_id)
                self._state = _State.CHANNEL
            else:  # a message that lacks its <|start|>, or a second channel
                self._end_content()
                self._begin_header(token_id, _State.CHANNEL)
        elif marker is Marker.MESSAGE and self._state in _HEADER_PARTS:
            self._end_header(token_id)
        elif marker is Marker.CONSTRAIN and self._state in _HEADER_PARTS:
            self._header_ids.append(token_id)
            self._state = _State.CONSTRAIN
        elif marker in (Marker.MESSAGE, Marker.CONSTRAIN):
            self._take_content_id(token_id)
        else:  # <|end|>, <|return|>, <|call|>
            self._end_content()
            if self._stream.matched_stop is None:
                self._stream.pass_over(1)
            self._state = _State.BETWEEN

    def _take_content_id(self, token_id: int) -> None:
        if self._state is _State.BETWEEN:
            self._enter("", "")
        is_marker = token_id in self._markers
        self._stream.push(
            b"" if is_marker else self._table.pieces[token_id], "" if is_marker else self._table.texts[token_id]
        )

    def _take_header_id(self, token_id: int) -> None:
        self._header_ids.append(token_id)
        text = self._header_texts[self._state] + self._table.pieces[token_id].decode("utf-8", "replace")
        self._header_texts[self._state] = text
        is_header = _HEADER_PARTS[self._state].fullmatch(text) is not None
        if self._given_role and self._state is _State.ROLE:
            is_header = is_header and text.partition(" ")[0] == self._given_role
        if not is_header or len(self._header_ids) > MAX_HEADER_IDS:
            self._treat_header_as_text()

    def _begin_header(self, token_id: int, state: _State) -> None:
        self._header_ids.append(token_id)
        self._header_texts = dict.fromkeys(_HEADER_PARTS, "")
        self._given_role = ""
        self._state = state

    def _end_header(self, token_id: int) -> None:
        role = self._header_texts[_State.ROLE].split()
        channel = self._header_texts[_State.CHANNEL].split()
        recipients = [word[3:] for word in (*channel, *role) if word.startswith("to=")]
        name = channel[0] if channel and not channel[0].startswith("to=") else ""
        self._enter(name, recipients[0] if recipients else "")
        self._stream.pass_over(len(self._header_ids) + 1)
        self._header_ids.clear()

    def _treat_header_as_text(self) -> None:
        """Make what has waited as a header content of channel ""."""
        token_ids, self._header_ids = self._header_ids, []
        self._enter("", "")
        for token_id in token_ids:
            self._take_content_id(token_id)
            if self._stream.matched_stop is not None:
                return

    def _end_content(self) -> None:
        """Release all that waits: the content so far, or what began like a header and is none."""
        if self._state in _HEADER_PARTS:
            self._treat_header_as_text()
        if self._stream.matched_stop is None:
            self._stream.flush()

    def _enter(self, channel: str, recipient: str) -> None:
        self._close_segment()
        self._channel, self._recipient = channel, recipient
        self._state = _State.CONTENT

    def _close_segment(self) -> None:
        num_ids, text = self._stream.take()
        if num_ids:
            self._segments.append(Segment(num_ids, text, self._channel, self._recipient))
