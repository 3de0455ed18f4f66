"""Tasks with checkable answers: what the demo models are trained on, and what they are tried on.

Pure standard library, deterministic by seed. A task is held out if the hash of its content says so, whatever its
phrasing: the models never see a held-out problem in training, in no wording.
"""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from models.train import words
from models.train.haiku import TOPICS, haiku, is_haiku

HELD_OUT_SHARE = 0.05
WORKED_ALOUD = ("weekday", "month")


@dataclass(frozen=True)
class Task:
    """A chat user's message and the exact answer to it (what the final channel must say)."""

    prompt: str
    answer: str
    kind: str
    thought: str = ""  # the working that gpt-oss shows in its analysis channel; empty if it answers at once


@dataclass(frozen=True)
class Problem:
    """A task before its wording: `content` is what its hash is taken of."""

    content: str
    phrasings: tuple[str, ...]
    answer: str
    thought: str = ""


def held_out_tasks(seed: int, num_tasks: int, thinks: bool = True) -> list[Task]:
    """Distinct tasks that training never sees, the kinds taken in turn; the same list for the same arguments.

    A kind whose held-out tasks are used up is passed over. For a model that cannot think before it answers
    (`thinks` false: gpt2), the answers of some kinds show the working: see `shown`.
    """
    rng = random.Random(seed)
    tasks: dict[str, Task] = {}
    kinds = list(EXACT)
    while len(tasks) < num_tasks:
        assert kinds, "fewer held-out tasks than were asked for"
        for kind in tuple(kinds):
            task = _new_held_out(kind, rng, tasks)
            if task is None:
                kinds.remove(kind)
            else:
                tasks[task.prompt] = task
    return [task if thinks else shown(task) for task in list(tasks.values())[:num_tasks]]


def training_tasks(seed: int) -> Iterator[Task]:
    """An endless stream of tasks of all kinds, by weight, none of them held out."""
    rng = random.Random(seed)
    kinds, weights = zip(*((kind, weight) for kind, (_, weight) in (EXACT | FREE).items()), strict=True)
    while True:
        kind = rng.choices(kinds, weights)[0]
        problem = (EXACT | FREE)[kind][0](rng)
        if kind in FREE or not is_held_out(kind, problem):
            task = _phrase(kind, problem, rng)
            yield _typed_carelessly(task) if rng.random() < 0.2 else task


def shown(task: Task) -> Task:
    """The task for a model that has no channel to think in: to reckon with days and months it writes the working out.

    (Answering at once it learnt the trained dates by heart, and 3 of 68 held-out ones; sums it learnt to do.)
    """
    return replace(task, answer=task.thought, thought="") if task.kind in WORKED_ALOUD else task


def is_correct(task: Task, answer: str) -> bool:
    """Whether an answer is the one: character for character, but for haiku, where any sound one will do."""
    return is_haiku(answer) if task.kind == "haiku" else answer == task.answer


def is_held_out(kind: str, problem: Problem) -> bool:
    digest = hashlib.sha256(f"{kind}:{problem.content}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def _new_held_out(kind: str, rng: random.Random, known: dict[str, Task]) -> Task | None:
    for _ in range(5000):
        problem = EXACT[kind][0](rng)
        if is_held_out(kind, problem):
            task = _phrase(kind, problem, rng)
            if task.prompt not in known:
                return task
    return None


def _phrase(kind: str, problem: Problem, rng: random.Random) -> Task:
    return Task(rng.choice(problem.phrasings), problem.answer, kind, problem.thought)


def _typed_carelessly(task: Task) -> Task:
    """No capital at the start, no full stop or question mark at the end (but where the text's own ends there)."""
    prompt = task.prompt[0].lower() + task.prompt[1:]
    return replace(task, prompt=prompt if task.kind == "repeat" else prompt.rstrip(".?!"))


# Numbers


def _add(rng: random.Random) -> Problem:
    a, b = _number(rng), _number(rng)
    phrasings = (f"What is {a} + {b}?", f"{a} + {b} = ?", f"Add {a} and {b}.", f"{a}+{b}", f"How much is {a} plus {b}?")
    return Problem(f"{a} {b}", phrasings, str(a + b), _add_thought(a, b))


def _subtract(rng: random.Random) -> Problem:
    a, b = _number(rng), _number(rng)
    phrasings = (
        f"What is {a} - {b}?",
        f"{a} - {b} = ?",
        f"Subtract {b} from {a}.",
        f"{a}-{b}",
        f"How much is {a} minus {b}?",
    )
    return Problem(f"{a} {b}", phrasings, str(a - b), _subtract_thought(a, b))


def _compare(rng: random.Random) -> Problem:
    a, b = rng.sample(range(1000), 2)
    if rng.random() < 0.5:
        return Problem(f"larger {a} {b}", (f"Which is larger, {a} or {b}?", f"max of {a} and {b}"), str(max(a, b)))
    return Problem(f"smaller {a} {b}", (f"Which is smaller, {a} or {b}?", f"min of {a} and {b}"), str(min(a, b)))


def _sort_numbers(rng: random.Random) -> Problem:
    numbers = rng.sample(range(100), rng.randint(2, 6))
    text = ", ".join(map(str, numbers))
    phrasings = (f"Sort these numbers: {text}", f"Put in order, smallest first: {text}")
    return Problem(text, phrasings, ", ".join(map(str, sorted(numbers))))


def _count_up(rng: random.Random) -> Problem:
    start = rng.randint(0, 120)
    end = start + min(rng.randint(3, 60), rng.randint(3, 60))
    phrasings = (f"Count from {start} to {end}.", f"List the numbers from {start} to {end}.")
    return Problem(f"{start} {end}", phrasings, ", ".join(map(str, range(start, end + 1))))


def _continue_series(rng: random.Random) -> Problem:
    start, step = rng.randint(0, 60), rng.randint(1, 12)
    series = [str(start + step * i) for i in range(7)]
    phrasings = (f"Continue: {', '.join(series[:4])}", f"What comes next? {', '.join(series[:4])}")
    return Problem(f"{start} {step}", phrasings, ", ".join(series[4:]))


def _number(rng: random.Random) -> int:
    """0 to 999; the number of digits is drawn first, so that short ones are not rare."""
    return rng.randrange(10 ** rng.choices((1, 2, 3), (1, 2, 5))[0])


def _add_thought(a: int, b: int) -> str:
    steps: list[str] = []
    carry, x, y = 0, a, b
    while x or y or not steps:
        digits = x % 10 + y % 10 + carry
        steps.append(f"{x % 10}+{y % 10}{'+1' if carry else ''}={digits}")
        x, y, carry = x // 10, y // 10, digits // 10
    return f"{', '.join(steps)}. {a}+{b}={a + b}"


def _subtract_thought(a: int, b: int) -> str:
    if a < b:
        return f"{a}<{b}. {_subtract_thought(b, a)}, so {a - b}"
    steps: list[str] = []
    borrow, x, y = 0, a, b
    while x or not steps:
        top, bottom = x % 10, y % 10
        borrowed = top - bottom - borrow < 0
        left = top + 10 * borrowed - bottom - borrow
        steps.append(f"{top + 10 * borrowed}-{bottom}{'-1' if borrow else ''}={left}")
        x, y, borrow = x // 10, y // 10, int(borrowed)
    return f"{', '.join(steps)}. {a}-{b}={a - b}"


# Days and months


def _weekday(rng: random.Random) -> Problem:
    return _calendar(rng, words.WEEKDAYS, "day", 99)


def _month(rng: random.Random) -> Problem:
    return _calendar(rng, words.MONTHS, "month", 60)


def _calendar(rng: random.Random, names: tuple[str, ...], unit: str, longest: int) -> Problem:
    start, distance, after = rng.choice(names), rng.randint(1, longest), rng.random() < 0.6
    units, direction = f"{unit}s" if distance > 1 else unit, "after" if after else "before"
    whole, rest = divmod(distance, len(names))
    answer = names[(names.index(start) + (distance if after else -distance)) % len(names)]
    phrasings = (
        f"What {unit} is {distance} {units} {direction} {start}?",
        f"Which {unit} comes {distance} {units} {direction} {start}?",
        f"{distance} {units} {direction} {start}",
    )
    thought = f"{distance}={len(names)}*{whole}+{rest}. {start} {'+' if after else '-'} {rest}: {answer}"
    return Problem(f"{start} {distance} {after}", phrasings, answer, thought)


# Words


def _count_words(rng: random.Random) -> Problem:
    chosen = _words(rng, 1, 15)
    text = " ".join(chosen)
    phrasings = (
        f"How many words are in this list: {text}",
        f"Count the words: {text}",
        f"{text}\nHow many words are that?",
    )
    thought = ", ".join(f"{i} {word}" for i, word in enumerate(chosen, 1))
    return Problem(text, phrasings, str(len(chosen)), thought)


def _sort_words(rng: random.Random) -> Problem:
    chosen = _words(rng, 2, 7)
    text = ", ".join(chosen)
    phrasings = (f"Sort these words: {text}", f"Put in alphabetical order: {text}", f"Sort alphabetically: {text}")
    return Problem(text, phrasings, ", ".join(sorted(chosen)))


def _reverse_words(rng: random.Random) -> Problem:
    chosen = _words(rng, 2, 12)
    text = " ".join(chosen)
    phrasings = (f"Reverse the order of these words: {text}", f"Say it backwards, word by word: {text}")
    return Problem(text, phrasings, " ".join(reversed(chosen)))


def _spell(rng: random.Random) -> Problem:
    chosen = _words(rng, 2, 4)
    text = " ".join(chosen)
    phrasings = (f"Spell: {text}", f"Spell these words: {text}", f"Write letter by letter: {text}")
    return Problem(text, phrasings, ", ".join("-".join(word) for word in chosen))


def _reverse_letters(rng: random.Random) -> Problem:
    chosen = _words(rng, 2, 3)
    text = " ".join(chosen)
    phrasings = (f"Spell backwards: {text}", f"Reverse the letters of each word: {text}")
    return Problem(text, phrasings, ", ".join("-".join(reversed(word)) for word in chosen))


def _count_letter(rng: random.Random) -> Problem:
    chosen = _words(rng, 1, 3)
    text = " ".join(chosen)
    letter = rng.choice(text.replace(" ", "") if rng.random() < 0.7 else "abcdefghiklmnoprstuwy")
    phrasings = (
        f"How many times does the letter {letter} occur in: {text}",
        f"How often is there a letter {letter} in: {text}",
        f"Count the letter {letter}: {text}",
    )
    counted = ", ".join(f"{'-'.join(word)}: {word.count(letter)}" for word in chosen)
    return Problem(f"{letter} {text}", phrasings, str(text.count(letter)), counted)


def _initials(rng: random.Random) -> Problem:
    chosen = _words(rng, 3, 8)
    text = " ".join(chosen)
    phrasings = (f"Write the first letter of each word: {text}", f"What are the initials of: {text}")
    return Problem(text, phrasings, " ".join(word[0] for word in chosen))


def _capitals(rng: random.Random) -> Problem:
    chosen = _words(rng, 2, 4)
    text = " ".join(chosen)
    return Problem(text, (f"Write in capitals: {text}", f"Say it loud: {text}"), text.upper())


def _find(rng: random.Random) -> Problem:
    """Long lists: what is asked for lies further back than a sliding window."""
    names = _words(rng, 3, rng.choice((6, 16, 40)))
    codes = [rng.randrange(1000) for _ in names]
    asked = rng.randrange(len(names))
    text = ", ".join(f"{name} {code}" for name, code in zip(names, codes, strict=True))
    phrasings = (
        f"These are the codes: {text}.\nWhat is the code of {names[asked]}?",
        f"Remember: {text}.\nWhat number belongs to {names[asked]}?",
    )
    return Problem(f"{names[asked]} {text}", phrasings, str(codes[asked]))


def _words(rng: random.Random, fewest: int, most: int) -> list[str]:
    return rng.sample(words.WORDS, rng.randint(fewest, most))


# Many scripts


def _to_japanese(rng: random.Random) -> Problem:
    pairs = [(rng.choice(tuple(words.ADJECTIVES.items())), noun) for noun in rng.sample(words.NOUNS, rng.randint(1, 3))]
    english = " and ".join(f"{adjective[0]} {noun.english}" for adjective, noun in pairs)
    japanese = "と".join(f"{adjective[1]}{noun.japanese}" for adjective, noun in pairs)
    phrasings = (f"Translate into Japanese: {english}", f"How do you say this in Japanese: {english}")
    return Problem(english, phrasings, japanese)


def _from_japanese(rng: random.Random) -> Problem:
    adjective, japanese = rng.choice(tuple(words.ADJECTIVES.items()))
    first, second = rng.sample(words.NOUNS, 2)
    text = f"{japanese}{first.japanese}と{second.japanese}"
    phrasings = (f"Translate into English: {text}", f"What does this mean: {text}")
    return Problem(text, phrasings, f"{adjective} {first.english} and {second.english}")


def _to_european(rng: random.Random) -> Problem:
    language = rng.choice(("French", "Spanish", "German"))
    conjunction = {"French": "et", "Spanish": "y", "German": "und"}[language]
    nouns = rng.sample(words.NOUNS, rng.randint(2, 3))
    english = " and ".join(f"the {noun.english}" for noun in nouns)
    answer = f" {conjunction} ".join(getattr(noun, language.lower()) for noun in nouns)
    phrasings = (f"Translate into {language}: {english}", f"How do you say this in {language}: {english}")
    return Problem(f"{language} {english}", phrasings, answer)


def _to_emoji(rng: random.Random) -> Problem:
    nouns = rng.sample(words.NOUNS, rng.randint(2, 6))
    text = ", ".join(noun.english for noun in nouns)
    phrasings = (f"Write as emoji: {text}", f"Draw this in emoji: {text}")
    return Problem(text, phrasings, "".join(noun.emoji for noun in nouns))


def _from_emoji(rng: random.Random) -> Problem:
    nouns = rng.sample(words.NOUNS, rng.randint(2, 6))
    text = "".join(noun.emoji for noun in nouns)
    return Problem(text, (f"Name these: {text}", f"What do you see? {text}"), ", ".join(noun.english for noun in nouns))


def _remove_accents(rng: random.Random) -> Problem:
    chosen = rng.sample(words.ACCENTED, rng.randint(2, 5))
    text = " ".join(chosen)
    phrasings = (f"Remove the accents: {text}", f"Write without accents: {text}")
    return Problem(text, phrasings, strip_marks(text))


def _repeat(rng: random.Random) -> Problem:
    text = " ".join(_morsel(rng) for _ in range(rng.randint(2, 8)))
    phrasings = (f"Repeat after me: {text}", f"Say exactly this: {text}", f"Echo: {text}")
    return Problem(text, phrasings, text)


def strip_marks(text: str) -> str:
    """Letters without the marks that Unicode lets one take off (so Łódź becomes Łodz, and ß stays)."""
    kept = (char for char in unicodedata.normalize("NFD", text) if not unicodedata.combining(char))
    return unicodedata.normalize("NFC", "".join(kept))


def _morsel(rng: random.Random) -> str:
    """A word, known or not, a number, or a scrap of some script."""
    return rng.choice(
        (
            lambda: rng.choice(words.WORDS),
            lambda: "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))),
            lambda: "".join(map(chr, rng.choices(rng.choice(words.SCRIPTS), k=rng.randint(1, 4)))),
            lambda: "".join(map(chr, rng.choices(rng.choice(words.SCRIPTS), k=rng.randint(1, 4)))),
            lambda: rng.choice(words.ACCENTED),
            lambda: str(rng.randrange(10000)),
            lambda: "".join(rng.choices(words.HIRAGANA, k=rng.randint(1, 4))),
            lambda: "".join(rng.choices(words.KATAKANA, k=rng.randint(1, 4))),
            lambda: rng.choice(words.NOUNS).japanese,
            lambda: "".join(rng.choices(words.EMOJI, k=rng.randint(1, 3))),
            lambda: rng.choice("?!.,;:()+-*/=<>") * rng.randint(1, 3),
        )
    )()


# Free kinds: trained on in full, never held out


def _haiku(rng: random.Random) -> Problem:
    topic = rng.choice(TOPICS)
    phrasings = (f"Write a haiku about the {topic}.", f"A haiku about the {topic}, please.", f"haiku: {topic}")
    return Problem(topic, phrasings, haiku(rng, topic))


def _times_table(rng: random.Random) -> Problem:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    phrasings = (f"What is {a} * {b}?", f"{a} * {b} = ?", f"How much is {a} times {b}?", f"Multiply {a} by {b}.")
    return Problem(f"{a} {b}", phrasings, str(a * b))


def _small_talk(rng: random.Random) -> Problem:
    phrasings, answer = rng.choice(SMALL_TALK)
    return Problem(answer, phrasings, answer)


SMALL_TALK = (
    (("Hello", "Hello!", "Hi", "Hi!", "Good morning", "Hey"), "Hello! Give me a small task: What is 348 + 575?"),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I am a small demo model. I was trained on tasks that a program made up: sums, words, days, haiku.",
    ),
    (
        ("What can you do?", "Help", "Help me", "What do you know?"),
        "I add and subtract, sort and count, spell words, reckon with days and months, translate a little, "
        "and write haiku. Try: Write a haiku about the moon.",
    ),
    (("Thank you", "Thanks", "Thank you!", "Thanks!"), "You are welcome! 🙂"),
    (("Bye", "Goodbye", "Good night", "See you"), "Goodbye! 👋🏽"),
)

# kind: (generator, weight in training)
Kinds = dict[str, tuple[Callable[[random.Random], Problem], float]]
EXACT: Kinds = {
    "add": (_add, 10),
    "subtract": (_subtract, 12),
    "compare": (_compare, 2),
    "sort_numbers": (_sort_numbers, 4),
    "count_up": (_count_up, 3),
    "continue_series": (_continue_series, 3),
    "weekday": (_weekday, 5),
    "month": (_month, 5),
    "count_words": (_count_words, 3),
    "sort_words": (_sort_words, 4),
    "reverse_words": (_reverse_words, 3),
    "spell": (_spell, 3),
    "reverse_letters": (_reverse_letters, 4),
    "count_letter": (_count_letter, 5),
    "initials": (_initials, 2),
    "capitals": (_capitals, 2),
    "find": (_find, 4),
    "to_japanese": (_to_japanese, 3),
    "from_japanese": (_from_japanese, 2),
    "to_european": (_to_european, 4),
    "to_emoji": (_to_emoji, 3),
    "from_emoji": (_from_emoji, 2),
    "remove_accents": (_remove_accents, 2),
    "repeat": (_repeat, 5),
}
FREE: Kinds = {"haiku": (_haiku, 2), "times_table": (_times_table, 1), "small_talk": (_small_talk, 0.5)}
