"""Byte-level BPE for both models, trained on the tasks' own text.

No merge ever holds a digit, and none joins the bytes of a character beyond Latin: digits are single tokens, and
Japanese and emoji come as one to four tokens a character, so that streamed text has something to put together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.train.chats import HARMONY, PLAIN, Example, training_examples

NUM_TOKENS = 1024
TRAINING_EXAMPLES = 60_000

# The pre-tokenizer that the metadata names ("gpt-4o"), as OpenAI's tiktoken publishes it for o200k.
GPT_4O_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


@dataclass(frozen=True)
class ChatFormat:
    """What a model's tokenizer is made for."""

    name: str
    pre: str  # tokenizer.ggml.pre
    special_tokens: tuple[str, ...]  # at the end of the vocabulary, in this order
    bos: str
    eos: str
    pad: str


FORMATS = {
    HARMONY: ChatFormat(
        HARMONY,
        "gpt-4o",
        (
            "<|startoftext|>",
            "<|endoftext|>",
            "<|return|>",
            "<|constrain|>",
            "<|channel|>",
            "<|start|>",
            "<|end|>",
            "<|message|>",
            "<|call|>",
        ),
        bos="<|startoftext|>",
        eos="<|return|>",
        pad="<|endoftext|>",
    ),
    PLAIN: ChatFormat(
        PLAIN, "gpt-2", ("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>", pad="<|endoftext|>"
    ),
}


def train_tokenizer(chat_format: ChatFormat, seed: int = 0) -> Tokenizer:
    """NUM_TOKENS tokens: 256 bytes, merges, then the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\x00-\x{24F}\x{1E00}-\x{1EFF}]+"), "removed"),  # all but Latin
            pre_tokenizers.Digits(individual_digits=True),
            *_splitters(chat_format.pre),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS - len(chat_format.special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=2,
    )
    examples = islice(training_examples(chat_format.name, seed), TRAINING_EXAMPLES)
    tokenizer.train_from_iterator(_plain_text(examples, chat_format.special_tokens), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in chat_format.special_tokens]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_splitters(chat_format.pre))
    tokenizer.decoder = decoders.ByteLevel()
    assert tokenizer.get_vocab_size() == NUM_TOKENS
    return tokenizer


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None, f"no token {token!r}"
    return token_id


def _splitters(pre: str) -> list[pre_tokenizers.PreTokenizer]:
    if pre == "gpt-2":
        return [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    return [
        pre_tokenizers.Split(Regex(GPT_4O_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _plain_text(examples: Iterator[Example], special_tokens: tuple[str, ...]) -> Iterator[str]:
    """The examples' text, cut where special tokens stand."""
    for example in examples:
        text = example.prompt + example.completion
        for token in special_tokens:
            text = text.replace(token, "\x00")
        yield from filter(None, text.split("\x00"))
