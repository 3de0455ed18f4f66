"""What a tokenizer needs of a model: vocabulary, merges, special ids, chat template; read from a GGUF file, checked.

The file is hostile input: whatever leaves this module is consistent (arrays have the vocabulary's length, special
ids lie in it, merges join two tokens to a third), so that whoever builds a tokenizer from it need not ask again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from shared.errors import Reason, ServiceError
from shared.gguf import GGUFFile, Metadata, StringArray

BPE_KIND = "gpt2"  # tokenizer.ggml.model of every byte-level BPE

NORMAL_TOKEN = 1  # tokenizer.ggml.token_type
UNKNOWN_TOKEN = 2
CONTROL_TOKEN = 3
USER_DEFINED_TOKEN = 4
UNUSED_TOKEN = 5
TOKEN_TYPES = range(7)

HARMONY_END = "<|end|>"
HARMONY_FINAL_TOKENS = ("<|return|>", "<|call|>")

# Spellings that end generation whatever the metadata says; files name one eos, and models have several.
END_OF_GENERATION_TEXTS = frozenset(
    (
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        HARMONY_END,
        *HARMONY_FINAL_TOKENS,
    )
)

MAX_NUM_TOKENS = 1 << 22
MAX_TOKENIZER_JSON_BYTES = 128 << 20  # gpt-oss's takes 28 MB
MAX_CHAT_TEMPLATE_BYTES = 1 << 20  # gpt-oss's takes 17 kB


@dataclass(frozen=True)
class TokenizerData:
    """A model's tokenizer as its file describes it, and the names that the model goes by."""

    model: str
    aliases: tuple[str, ...]
    digest: str
    kind: str  # tokenizer.ggml.model, such as "gpt2"
    pre: str  # tokenizer.ggml.pre, such as "gpt-4o"; empty where the file has none
    tokens: Sequence[str]  # by id, in the file's own byte-level alphabet
    token_types: Sequence[int]  # by id, of TOKEN_TYPES
    merges: Sequence[str]  # by rank, "left right"
    tokenizer_json: bytes  # empty where there is none
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    eog_token_ids: tuple[int, ...]  # ascending
    chat_template: str  # empty where there is none
    context_length: int
    add_bos_token: bool


def tokenizer_data_from_gguf(
    gguf: GGUFFile,
    *,
    model: str,
    digest: str,
    aliases: Sequence[str] = (),
    tokenizer_json: bytes = b"",
) -> TokenizerData:
    """A model's tokenizer from its file; the vocabulary stays in the file's header, decoded as it is asked for.

    Raises:
        ServiceError: MODEL_INVALID, naming file, offset and key.
    """
    metadata = gguf.metadata
    kind = metadata.get_str("tokenizer.ggml.model")
    tokens, ids = _tokens(metadata)
    eos_token_id = _special_id(metadata, "eos", len(tokens))
    architecture = metadata.get_str("general.architecture")
    return TokenizerData(
        model=model,
        aliases=tuple(aliases),
        digest=digest,
        kind=kind,
        pre=metadata.get_str("tokenizer.ggml.pre", ""),
        tokens=tokens,
        token_types=_token_types(metadata, len(tokens)),
        merges=_merges(metadata, ids) if kind == BPE_KIND else (),
        tokenizer_json=tokenizer_json,
        bos_token_id=_special_id(metadata, "bos", len(tokens)),
        eos_token_id=eos_token_id,
        pad_token_id=_special_id(metadata, "padding", len(tokens)),
        eog_token_ids=end_of_generation_ids(
            ids, (eos_token_id, _special_id(metadata, "eot", len(tokens)), _special_id(metadata, "eom", len(tokens)))
        ),
        chat_template=_chat_template(metadata),
        context_length=metadata.get_int(f"{architecture}.context_length", minimum=1, maximum=2**31 - 1),
        add_bos_token=metadata.get_bool("tokenizer.ggml.add_bos_token", False),
    )


def end_of_generation_ids(ids: Mapping[bytes, int], named_ids: Sequence[int | None]) -> tuple[int, ...]:
    """The ids that end generation, ascending: those named by the metadata and those of tokens spelled like one.

    In Harmony, that is, where both <|return|> and <|call|> are tokens, <|end|> ends a message and not the answer.
    """
    found = {text: ids[text.encode()] for text in END_OF_GENERATION_TEXTS if text.encode() in ids}
    ending = {token_id for token_id in (*named_ids, *found.values()) if token_id is not None}
    if all(text in found for text in HARMONY_FINAL_TOKENS):
        ending.discard(found.get(HARMONY_END, -1))
    return tuple(sorted(ending))


def read_tokenizer_json(path: str | Path) -> bytes:
    """The bytes of a tokenizer.json; MODEL_NOT_FOUND if it can't be read, MODEL_INVALID if it is too large."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_TOKENIZER_JSON_BYTES + 1)
    except OSError as error:
        raise ServiceError(Reason.MODEL_NOT_FOUND, f"{path}: can't be read: {error.strerror}.") from None
    if len(data) > MAX_TOKENIZER_JSON_BYTES:
        raise ServiceError(Reason.MODEL_INVALID, f"{path}: more than {MAX_TOKENIZER_JSON_BYTES} bytes.")
    return data


def _tokens(metadata: Metadata) -> tuple[StringArray, dict[bytes, int]]:
    """The vocabulary, and its ids by the tokens' bytes."""
    key = "tokenizer.ggml.tokens"
    tokens = metadata.get_strings(key)
    if not 1 <= len(tokens) <= MAX_NUM_TOKENS:
        raise metadata.invalid(key, f"has {len(tokens)} entries, outside [1, {MAX_NUM_TOKENS}]")
    contents = tokens.all_bytes()
    _check_utf8(metadata, key, contents)
    ids = dict(zip(contents, range(len(contents)), strict=True))
    if len(ids) != len(tokens):
        raise metadata.invalid(key, f"has {len(tokens) - len(ids)} tokens that repeat an earlier one")
    return tokens, ids


def _token_types(metadata: Metadata, num_tokens: int) -> Sequence[int]:
    key = "tokenizer.ggml.token_type"
    if key not in metadata:
        return (NORMAL_TOKEN,) * num_tokens
    types: list[int] = metadata.get_ints(key).tolist()
    if len(types) != num_tokens:
        raise metadata.invalid(key, f"has {len(types)} entries for {num_tokens} tokens")
    unknown = set(types).difference(TOKEN_TYPES)
    if unknown:
        raise metadata.invalid(key, f"holds {min(unknown)}, which is no token type")
    return types


def _merges(metadata: Metadata, ids: Mapping[bytes, int]) -> StringArray:
    """The merges, each of which joins two of the known tokens to a third."""
    key = "tokenizer.ggml.merges"
    merges = metadata.get_strings(key)
    contents = merges.all_bytes()
    _check_utf8(metadata, key, contents)
    if not _all_join(contents, ids):
        for rank, merge in enumerate(contents):
            left, _, right = merge.partition(b" ")
            if left not in ids or right not in ids or left + right not in ids or not left or not right:
                raise metadata.invalid(
                    key, f"entry {rank}, {merge.decode()!r:.100}, does not join two tokens to a third"
                )
    return merges


def _all_join(merges: Sequence[bytes], ids: Mapping[bytes, int]) -> bool:
    """Whether each merge joins two tokens without spaces to a third: calls in C alone, where a loop over half a million
    merges takes longer than reading the weights."""
    if not set(map(bytes.count, merges, repeat(b" "))) <= {1}:
        return False
    parts = set(b" ".join(merges).split(b" ")) if merges else set()
    is_known = ids.__contains__
    joined = map(bytes.replace, merges, repeat(b" "), repeat(b""))
    return b"" not in parts and all(map(is_known, parts)) and all(map(is_known, joined))


def _check_utf8(metadata: Metadata, key: str, contents: Sequence[bytes]) -> None:
    try:
        b"\0".join(contents).decode()
    except UnicodeDecodeError:
        for index, content in enumerate(contents):
            try:
                content.decode()
            except UnicodeDecodeError:
                raise metadata.invalid(key, f"entry {index} is not valid UTF-8") from None


def _special_id(metadata: Metadata, name: str, num_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    return metadata.get_int(key, minimum=0, maximum=num_tokens - 1) if key in metadata else None


def _chat_template(metadata: Metadata) -> str:
    key = "tokenizer.chat_template"
    template = metadata.get_str(key, "")
    if len(template.encode()) > MAX_CHAT_TEMPLATE_BYTES:
        raise metadata.invalid(key, f"takes more than {MAX_CHAT_TEMPLATE_BYTES} bytes")
    return template
