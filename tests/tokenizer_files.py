"""Small tokenizers for tests: byte-level BPEs trained on the spot, as tokenizer.json, GGUF file and TokenizerData."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from shared.ggml_type import GGMLType
from shared.tokenizer_data import CONTROL_TOKEN, NORMAL_TOKEN, USER_DEFINED_TOKEN, TokenizerData, end_of_generation_ids
from tests.conformance_strings import GROUPS
from tests.gguf_files import write_gguf

GPT_2, GPT_4O = "gpt-2", "gpt-4o"
NUM_TOKENS = 1500
SPECIAL_TOKENS = (
    *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>"),
    *("<|start|>", "<|end|>", "<|message|>", "<|call|>"),
)
USER_TOKENS = ("<think>", "</think>", "<obs 1>", "《工具》")

# What tokenizer.json files of o200k models hold, written out here so that a slip in ours shows.
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer that Hugging Face tokenizers trained, special and user-defined tokens last."""

    pre: str
    json: str  # tokenizer.json
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...]

    def id_of(self, text: str) -> int:
        return self.tokens.index(text)

    def data(self, **changes: Any) -> TokenizerData:
        """As if it came from a GGUF file."""
        fields: dict[str, Any] = {
            "model": "test",
            "aliases": ("alias",),
            "digest": "d" * 64,
            "kind": "gpt2",
            "pre": self.pre,
            "tokens": self.tokens,
            "token_types": self.token_types,
            "merges": self.merges,
            "tokenizer_json": b"",
            "bos_token_id": self.id_of("<|startoftext|>"),
            "eos_token_id": self.id_of("<|return|>"),
            "pad_token_id": self.id_of("<|endoftext|>"),
            "eog_token_ids": end_of_generation_ids({text.encode(): id for id, text in enumerate(self.tokens)}, ()),
            "chat_template": "",
            "context_length": 256,
            "add_bos_token": False,
        }
        return TokenizerData(**(fields | changes))

    def metadata(self, **changes: Any) -> dict[str, Any]:
        """As a GGUF file has it; a change to None leaves a key out, and "__" stands for a dot."""
        metadata: dict[str, Any] = {
            "general.architecture": "gpt2",
            "gpt2.context_length": 256,
            "gpt2.embedding_length": 32,
            "gpt2.feed_forward_length": 32,
            "gpt2.block_count": 1,
            "gpt2.attention.head_count": 2,
            "gpt2.attention.layer_norm_epsilon": 1e-5,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": list(self.tokens),
            "tokenizer.ggml.token_type": np.array(self.token_types, np.int32),
            "tokenizer.ggml.merges": list(self.merges),
            "tokenizer.ggml.bos_token_id": self.id_of("<|startoftext|>"),
            "tokenizer.ggml.eos_token_id": self.id_of("<|return|>"),
            "tokenizer.ggml.padding_token_id": self.id_of("<|endoftext|>"),
        }
        metadata |= {key.replace("__", "."): value for key, value in changes.items()}
        return {key: value for key, value in metadata.items() if value is not None}

    def write_gguf(self, path: Path, **changes: Any) -> Path:
        """A GGUF file with this vocabulary and a model of zeros, which llama.cpp loads."""
        hidden = 32
        shapes = {
            "token_embd.weight": (len(self.tokens), hidden),
            "position_embd.weight": (256, hidden),
            "output_norm.weight": (hidden,),
            "output_norm.bias": (hidden,),
        }
        for name, width in {
            "attn_qkv": 3 * hidden,
            "attn_output": hidden,
            "ffn_up": hidden,
            "ffn_down": hidden,
        }.items():
            shapes |= {f"blk.0.{name}.weight": (width, hidden), f"blk.0.{name}.bias": (width,)}
        for name in ("attn_norm", "ffn_norm"):
            shapes |= {f"blk.0.{name}.weight": (hidden,), f"blk.0.{name}.bias": (hidden,)}
        tensors = {name: (np.zeros(shape, np.float32), GGMLType.F32) for name, shape in shapes.items()}
        return write_gguf(path, self.metadata(**changes), tensors)


@cache
def trained_tokenizer(pre: str) -> TrainedTokenizer:
    """A byte-level BPE trained on text in many scripts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator([text for group in GROUPS for text in group] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in USER_TOKENS])
    written = json.loads(tokenizer.to_str())
    tokens = {token_id: text for text, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
    types = dict.fromkeys(SPECIAL_TOKENS, CONTROL_TOKEN) | dict.fromkeys(USER_TOKENS, USER_DEFINED_TOKEN)
    in_order = tuple(tokens[token_id] for token_id in range(len(tokens)))
    return TrainedTokenizer(
        pre=pre,
        json=tokenizer.to_str(),
        tokens=in_order,
        token_types=tuple(types.get(text, NORMAL_TOKEN) for text in in_order),
        merges=tuple(" ".join(pair) for pair in written["model"]["merges"]),
    )


def _pre_tokenizer(pre: str) -> Any:
    if pre == GPT_2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = pre_tokenizers.Split(Regex(O200K), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
