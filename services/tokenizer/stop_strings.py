"""Finds stop strings in text that grows, and says how much of its end may still become one.

Baeza-Yates and Gonnet's shift-and: one integer says of which beginnings of stop strings the text so far ends in; a
character shifts it, and leaves the bits of where it may stand. What a stop string costs in memory are its characters,
and for each character of the text a mask as wide as the text has matched.
"""

from __future__ import annotations

from collections.abc import Sequence

NOTHING = 0
MIN_DEPTH = 64  # of masks, in characters: more than most texts match of a stop string that they do not end in
MAX_MASKS = 256  # kept at once; of 2 KiB each where a text has matched the most of 16 stop strings of 1,024 characters


class StopStrings:
    """A set of stop strings, for any number of texts; the caller keeps each text's state, which starts as NOTHING.

    Bit (length - 1) * number of stop strings + i of a state is set when the text so far ends in the first `length`
    characters of stop string i.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        assert all(stop_strings), "an empty stop string ends everything"
        self.first_characters = frozenset(text[0] for text in stop_strings)
        self._texts = tuple(dict.fromkeys(stop_strings))
        self._begin = (1 << len(self._texts)) - 1
        self._ends = sum(1 << self._bit(index, len(text)) for index, text in enumerate(self._texts))
        self._max_depth = max(map(len, self._texts))
        self._depth = min(MIN_DEPTH, self._max_depth)  # the masks know so many first characters of each stop string
        self._masks: dict[str, int] = {}

    def num_held(self, state: int) -> int:
        """The length of the longest end of the text that is a proper prefix of a stop string."""
        return -(-state.bit_length() // len(self._texts))

    def step(self, state: int, text: str, passes_over: bool = False) -> tuple[int, int, str]:
        """The state after more text, or where in it the first stop string ends, if one does.

        Returns:
            The state; the number of characters of `text` up to the end of the stop string; the stop string, the longest
            one if several end there. Empty when none ends, or when those that do are to be passed over.
        """
        self._deepen(self.num_held(state) + len(text))
        masks, begin, ends, num_texts = self._masks, self._begin, self._ends, len(self._texts)
        for index, character in enumerate(text):
            mask = masks.get(character)
            if mask is None:
                mask = self._add_mask(character)
            state = (state << num_texts | begin) & mask
            ended = state & ends
            if ended:
                if not passes_over:
                    return NOTHING, index + 1, self._texts[(ended.bit_length() - 1) % num_texts]
                state ^= ended
        return state, 0, ""

    def _bit(self, index: int, length: int) -> int:
        return (length - 1) * len(self._texts) + index

    def _deepen(self, depth: int) -> None:
        """Let the masks know so many first characters, as far as there are any."""
        if self._depth < min(depth, self._max_depth):
            self._depth = min(max(depth, 2 * self._depth), self._max_depth)
            self._masks.clear()

    def _add_mask(self, character: str) -> int:
        """The bits of the beginnings of stop strings that end in `character`."""
        bits = bytearray(self._depth * len(self._texts) // 8 + 1)
        for index, text in enumerate(self._texts):
            position = text.find(character, 0, self._depth)
            while position >= 0:
                bit = self._bit(index, position + 1)
                bits[bit // 8] |= 1 << bit % 8
                position = text.find(character, position + 1, self._depth)
        mask = int.from_bytes(bits, "little")
        if len(self._masks) == MAX_MASKS:
            self._masks.clear()
        self._masks[character] = mask
        return mask
