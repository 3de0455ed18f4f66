"""Finds stop strings in text that grows, and says how much of its end may still become one.

An Aho-Corasick automaton: one step for each character, whatever the number of stop strings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

ROOT = 0


class StopStrings:
    """The automaton of a set of stop strings; the caller keeps the state, which starts at ROOT.

    `held[state]` is the length of the longest end of the text so far that is a proper prefix of a stop string,
    `matched[state]` the longest stop string that ends right here, or None.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        assert all(stop_strings), "an empty stop string ends everything"
        self.first_characters = frozenset(text[0] for text in stop_strings)
        self.held: list[int] = [0]
        self.matched: list[str | None] = [None]
        self._children: list[dict[str, int]] = [{}]
        self._fallbacks: list[int] = [ROOT]
        for text in stop_strings:
            self._add(text)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        children, fallbacks = self._children, self._fallbacks
        while True:
            child = children[state].get(character)
            if child is not None:
                return child
            if state == ROOT:
                return ROOT
            state = fallbacks[state]

    def _add(self, text: str) -> None:
        state = ROOT
        for depth, character in enumerate(text, start=1):
            child = self._children[state].get(character)
            if child is None:
                child = len(self._children)
                self._children[state][character] = child
                self._children.append({})
                self._fallbacks.append(ROOT)
                self.held.append(depth)
                self.matched.append(None)
            state = child
        self.matched[state] = text

    def _link(self) -> None:
        """Point each state at that of its longest proper suffix, breadth first, so that shorter ones are done."""
        waiting = deque(self._children[ROOT].values())
        while waiting:
            state = waiting.popleft()
            fallback = self._fallbacks[state]
            if not self._children[state]:
                self.held[state] = self.held[fallback]  # a whole stop string that begins no longer one
            if self.matched[state] is None:
                self.matched[state] = self.matched[fallback]
            for character, child in self._children[state].items():
                self._fallbacks[child] = self.step(fallback, character) if state != ROOT else ROOT
                waiting.append(child)
