"""Haiku from a grammar of our own, every word's syllables counted by hand: five, seven, five."""

from __future__ import annotations

import random
import re

SYLLABLES = (5, 7, 5)

# By part of speech (n, a, v, p: noun, adjective, verb, place) and number of syllables; a word stands in one list only.
_SLOTS = {
    "n1": "moon rain snow wind leaf stone frog pond star cloud bird sea pine dew mist stream hill moss crane reed",
    "n2": "river mountain blossom sparrow garden winter autumn morning meadow water lantern shadow cricket",
    "a1": "cold old pale soft bright still dark small deep white",
    "a2": "silent quiet golden frozen lonely empty gentle distant hidden silver",
    "v1": "falls waits sleeps sings drifts glows fades turns rests shines",
    "v2": "whispers wanders glitters listens lingers trembles returns awakes",
    "p2": "under beside over",
}
WORDS_BY_SLOT = {slot: tuple(words.split()) for slot, words in _SLOTS.items()}
FUNCTION_WORDS = {"the": 1, "and": 1, "in": 1, "alone": 2, "again": 2, "once": 1}
TOPICS = (*WORDS_BY_SLOT["n1"], *WORDS_BY_SLOT["n2"])

# Each pattern's slots and words add up to its line's syllables; is_haiku counts them again.
OPENINGS = {1: ("the a1 TOPIC v2", "the a2 TOPIC v1"), 2: ("the a1 TOPIC v1",)}
MIDDLES = ("the n1 v1 p2 the n1", "a2 n1 and a2 n1", "a1 n2 and a1 n2", "the n1 v2 in the n1", "the n2 v1 in the n1")
CLOSINGS = ("alone in the n1", "the n2 v2", "a2 n1 a1 n1", "once again the n1", "p2 the a1 n1")

_NUM_SYLLABLES = FUNCTION_WORDS | {word: int(slot[1]) for slot, words in WORDS_BY_SLOT.items() for word in words}


def haiku(rng: random.Random, topic: str) -> str:
    """Three lines; the first is about the topic, one of `TOPICS`."""
    opening = rng.choice(OPENINGS[_NUM_SYLLABLES[topic]]).replace("TOPIC", topic)
    lines = (_fill(rng, pattern) for pattern in (opening, rng.choice(MIDDLES), rng.choice(CLOSINGS)))
    return "{},\n{},\n{}.".format(*lines)


def is_haiku(text: str) -> bool:
    """Whether the text is three lines of five, seven and five syllables, every word one that the grammar knows."""
    return tuple(num_syllables(line) for line in text.split("\n")) == SYLLABLES


def num_syllables(line: str) -> int:
    """The syllables of a line; 0 if it holds a word that the grammar does not know."""
    counts = [_NUM_SYLLABLES.get(word, 0) for word in re.findall(r"[^\s,.]+", line)]
    return sum(counts) if all(counts) else 0


def _fill(rng: random.Random, pattern: str) -> str:
    return " ".join(rng.choice(WORDS_BY_SLOT[part]) if part in WORDS_BY_SLOT else part for part in pattern.split())
