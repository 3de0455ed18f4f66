"""What each token id is: its bytes, its text where those are whole characters, and whether it is special.

Bytes of ids joined and decoded as UTF-8, invalid bytes as U+FFFD, are the text of the ids: that is the one
definition of decoding here, for whole answers and for streams. Special tokens have no bytes unless spelled out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from services.tokenizer.harmony_markers import Marker
from services.tokenizer.special_texts import SpecialTexts
from shared.errors import Reason, ServiceError

# How GPT-2 spells the 256 bytes: printable Latin-1 as itself, the others from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
BYTE_OF_CHARACTER: Mapping[str, int] = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + index): byte for index, byte in enumerate(_OTHERS)
}

NUM_JOINED = 1 << 16  # pieces at once: the 2^20 of a long text, all at once, took three times as long


@dataclass(frozen=True)
class TokenTable:
    """Token ids to bytes and text; both lists are as long as the vocabulary."""

    pieces: Sequence[bytes]
    texts: Sequence[str | None]  # None: not whole characters

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids.

        Raises:
            ServiceError: TOKEN_ID_INVALID.
        """
        pieces = self.pieces
        parts = []
        try:
            for start in range(0, len(token_ids), NUM_JOINED):
                parts.append(b"".join([pieces[token_id] for token_id in token_ids[start : start + NUM_JOINED]]))
            return b"".join(parts).decode("utf-8", "replace")
        except IndexError:
            raise invalid_token_id(max(token_ids), len(pieces)) from None


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens by id."""

    plain: TokenTable  # special tokens have no bytes
    spelled: TokenTable  # special tokens are spelled out
    special_texts: Mapping[int, str]  # by id, ascending

    @property
    def size(self) -> int:
        return len(self.plain.pieces)

    def table(self, special_tokens: bool) -> TokenTable:
        return self.spelled if special_tokens else self.plain

    @cached_property
    def special_ids(self) -> Mapping[str, int]:
        """The special tokens' ids by spelling."""
        return {text: token_id for token_id, text in self.special_texts.items()}

    @cached_property
    def special_spellings(self) -> SpecialTexts | None:
        """Finds the spellings of special tokens that a mark can break, of two characters or more; None without any."""
        texts = [text for text in self.special_ids if len(text) > 1]
        return SpecialTexts(texts) if texts else None

    @cached_property
    def harmony_markers(self) -> Mapping[int, Marker]:
        """The special tokens of Harmony by id; empty where one of them is missing."""
        spellings = {marker.value: marker for marker in Marker}
        found = {token_id: spellings[text] for token_id, text in self.special_texts.items() if text in spellings}
        return found if len(found) == len(spellings) else {}


def make_vocabulary(
    num_tokens: int,
    byte_level_texts: Mapping[int, str],
    literal_texts: Mapping[int, str],
    special_texts: Mapping[int, str],
) -> Vocabulary:
    """A vocabulary from three disjoint sets of tokens by id; an id in none of them has no bytes.

    Args:
        num_tokens: one more than the largest id.
        byte_level_texts: spelled in GPT-2's alphabet of bytes.
        literal_texts: spelled as they are.
        special_texts: spelled as they are, and special.
    """
    pieces = [b""] * num_tokens
    for token_id, text in byte_level_texts.items():
        pieces[token_id] = byte_level_bytes(text)
    for token_id, text in literal_texts.items():
        pieces[token_id] = text.encode()
    plain = _table(pieces)
    for token_id, text in special_texts.items():
        pieces[token_id] = text.encode()
    spelled = TokenTable(tuple(pieces), _with_texts(plain.texts, special_texts))
    return Vocabulary(plain, spelled, dict(sorted(special_texts.items())))


def byte_level_bytes(text: str) -> bytes:
    """The bytes that a token spells; one with a character outside the alphabet stands for itself."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in text])
    except KeyError:
        return text.encode()


def invalid_token_id(token_id: int, num_tokens: int) -> ServiceError:
    """The error for an id outside the vocabulary."""
    return ServiceError(Reason.TOKEN_ID_INVALID, f"Token id {token_id} is outside the vocabulary of {num_tokens}.")


def _table(pieces: Sequence[bytes]) -> TokenTable:
    return TokenTable(tuple(pieces), tuple(_whole_text(piece) for piece in pieces))


def _whole_text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _with_texts(texts: Sequence[str | None], replaced: Mapping[int, str]) -> Sequence[str | None]:
    changed = list(texts)
    for token_id, text in replaced.items():
        changed[token_id] = text
    return tuple(changed)
