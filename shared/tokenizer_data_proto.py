"""A model's tokenizer on the wire: `TokenizerData` as the messages of `LoaderService.GetTokenizerData`, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mxgpt.v1.loader_pb2 import GetTokenizerDataResponse, MergePiece, TokenizerHeader, TokenPiece
from shared.errors import Reason, ServiceError
from shared.tokenizer_data import TokenizerData

STRINGS_PER_PIECE = 8192  # of tokens or merges: about 100 kB
BYTES_PER_PIECE = 1 << 20


def to_pieces(data: TokenizerData) -> Iterator[GetTokenizerDataResponse]:
    """The header, then tokens, merges and tokenizer.json, in pieces that fit a message."""
    header = TokenizerHeader(
        model=data.model,
        aliases=data.aliases,
        digest=data.digest,
        kind=data.kind,
        pre=data.pre,
        num_tokens=len(data.tokens),
        num_merges=len(data.merges),
        num_tokenizer_json_bytes=len(data.tokenizer_json),
        bos_token_id=data.bos_token_id,
        eos_token_id=data.eos_token_id,
        pad_token_id=data.pad_token_id,
        eog_token_ids=data.eog_token_ids,
        chat_template=data.chat_template,
        context_length=data.context_length,
        add_bos_token=data.add_bos_token,
    )
    yield GetTokenizerDataResponse(header=header)
    for rows in _slices(len(data.tokens), STRINGS_PER_PIECE):
        yield GetTokenizerDataResponse(tokens=TokenPiece(texts=data.tokens[rows], types=data.token_types[rows]))
    for rows in _slices(len(data.merges), STRINGS_PER_PIECE):
        yield GetTokenizerDataResponse(merges=MergePiece(merges=data.merges[rows]))
    for rows in _slices(len(data.tokenizer_json), BYTES_PER_PIECE):
        yield GetTokenizerDataResponse(tokenizer_json=data.tokenizer_json[rows])


def from_pieces(pieces: Sequence[GetTokenizerDataResponse]) -> TokenizerData:
    """The tokenizer that a loader's stream carried.

    Raises:
        ServiceError: LOADER_UNAVAILABLE when pieces are missing.
    """
    header = pieces[0].header if pieces else TokenizerHeader()
    tokens: list[str] = []
    token_types: list[int] = []
    merges: list[str] = []
    tokenizer_json = bytearray()
    for piece in pieces:
        tokens.extend(piece.tokens.texts)
        token_types.extend(piece.tokens.types)
        merges.extend(piece.merges.merges)
        tokenizer_json += piece.tokenizer_json
    found = (len(tokens), len(token_types), len(merges), len(tokenizer_json))
    expected = (header.num_tokens, header.num_tokens, header.num_merges, header.num_tokenizer_json_bytes)
    if found != expected or not tokens:
        raise ServiceError(Reason.LOADER_UNAVAILABLE, "The loader's stream of tokenizer data was cut short.")
    return TokenizerData(
        model=header.model,
        aliases=tuple(header.aliases),
        digest=header.digest,
        kind=header.kind,
        pre=header.pre,
        tokens=tokens,
        token_types=token_types,
        merges=merges,
        tokenizer_json=bytes(tokenizer_json),
        bos_token_id=header.bos_token_id if header.HasField("bos_token_id") else None,
        eos_token_id=header.eos_token_id if header.HasField("eos_token_id") else None,
        pad_token_id=header.pad_token_id if header.HasField("pad_token_id") else None,
        eog_token_ids=tuple(header.eog_token_ids),
        chat_template=header.chat_template,
        context_length=header.context_length,
        add_bos_token=header.add_bos_token,
    )


def _slices(count: int, step: int) -> Iterator[slice]:
    for start in range(0, count, step):
        yield slice(start, start + step)
