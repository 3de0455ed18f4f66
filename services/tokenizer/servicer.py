"""TokenizerService: translates between the contract and the tokenizers, streams and templates behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from mxgpt.v1 import executor_pb2, tokenizer_pb2, tokenizer_pb2_grpc
from services.tokenizer.backends import Tokenizer
from services.tokenizer.chat import CONTENT_KEYS, template_variables, today
from services.tokenizer.detokenizer import Detokenizer
from services.tokenizer.guard import GuardedChat, encode_rendered, guard
from services.tokenizer.metrics import TokenizerMetrics
from services.tokenizer.store import TokenizerStore
from services.tokenizer.template_pool import TemplatePool
from shared.calls import Calls
from shared.errors import Reason, ServiceError, invalid_field
from shared.server import servicer_method

MAX_TEXT_BYTES = 2 << 20  # of a text to encode; 131,072 tokens of English are about 0.6 MB
MAX_CHAT_BYTES = 2 * MAX_TEXT_BYTES  # of a conversation, of which a template may leave out a part
MAX_TOKEN_IDS = 1 << 20  # to decode at once
MAX_DECODED_BYTES = 15 << 20  # must fit a message
INLINE_CHARS = 4096  # a text so short is encoded at once: a millisecond, about what a thread's turn may take


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Serves the tokenizers of `store`; templates run in `templates`."""

    def __init__(self, store: TokenizerStore, templates: TemplatePool, calls: Calls, metrics: TokenizerMetrics) -> None:
        self.calls = calls
        self._metrics = metrics
        self._store = store
        self._templates = templates

    @servicer_method
    async def Tokenize(self, request: tokenizer_pb2.TokenizeRequest, context: Any) -> tokenizer_pb2.TokenizeResponse:
        tokenizer = await self._store.find(request.model)
        num_bytes = len(request.text.encode())
        if num_bytes > MAX_TEXT_BYTES:
            raise invalid_field("text", f"has {num_bytes} bytes, and may have {MAX_TEXT_BYTES}")
        ids = await _encode(tokenizer, request.text, request.parse_special, request.add_special)
        self._metrics.encoded.inc(len(ids))
        return tokenizer_pb2.TokenizeResponse(token_ids=ids)

    @servicer_method
    async def Detokenize(
        self, request: tokenizer_pb2.DetokenizeRequest, context: Any
    ) -> tokenizer_pb2.DetokenizeResponse:
        tokenizer = await self._store.find(request.model)
        if len(request.token_ids) > MAX_TOKEN_IDS:
            raise invalid_field("token_ids", f"has {len(request.token_ids)} ids, and may have {MAX_TOKEN_IDS}")
        text = tokenizer.decode(request.token_ids, special_tokens=request.special_tokens)
        if len(text.encode()) > MAX_DECODED_BYTES:
            raise invalid_field("token_ids", f"decode to more than {MAX_DECODED_BYTES} bytes; decode them in parts")
        self._metrics.decoded.inc(len(request.token_ids))
        return tokenizer_pb2.DetokenizeResponse(text=text)

    @servicer_method
    async def RenderChat(
        self, request: tokenizer_pb2.RenderChatRequest, context: Any
    ) -> tokenizer_pb2.RenderChatResponse:
        tokenizer = await self._store.find(request.model)
        template = tokenizer.data.chat_template
        if not template:
            why = f"{tokenizer.data.model} brings no chat template; send a text or token ids instead."
            raise ServiceError(Reason.CHAT_TEMPLATE_MISSING, why)
        chat = await _guarded(tokenizer, request.chat)
        rendered = await self._templates.render(template, chat.variables, today(request.chat))
        if len(rendered.encode()) > MAX_TEXT_BYTES:
            why = f"The conversation takes more than {MAX_TEXT_BYTES} bytes once rendered."
            raise ServiceError(Reason.CHAT_TEMPLATE_FAILED, why)
        text, ids = await asyncio.to_thread(encode_rendered, tokenizer, rendered, chat.mark)
        self._metrics.encoded.inc(len(ids))
        harmony = bool(tokenizer.vocabulary.harmony_markers)
        return tokenizer_pb2.RenderChatResponse(text=text, token_ids=ids, harmony=harmony)

    @servicer_method
    async def DetokenizeStream(
        self, requests: AsyncIterator[tokenizer_pb2.DetokenizeStreamRequest], context: Any
    ) -> AsyncIterator[tokenizer_pb2.DetokenizeStreamResponse]:
        detokenizer = None
        with self._metrics.stream() as watched:
            async for request in requests:
                if detokenizer is None:
                    tokenizer = await self._store.find(request.model)
                    detokenizer = Detokenizer(tokenizer.vocabulary)
                answer = detokenizer.handle(request)
                watched.count(request, detokenizer.num_sequences)
                yield answer

    @servicer_method
    async def GetInfo(self, request: tokenizer_pb2.GetInfoRequest, context: Any) -> tokenizer_pb2.GetInfoResponse:
        tokenizer = await self._store.find(request.model)
        data, vocabulary = tokenizer.data, tokenizer.vocabulary
        return tokenizer_pb2.GetInfoResponse(
            model=data.model,
            digest=data.digest,
            backend=tokenizer.backend,
            vocab_size=vocabulary.size,
            bos_token_id=data.bos_token_id,
            eos_token_id=data.eos_token_id,
            pad_token_id=data.pad_token_id,
            eog_token_ids=data.eog_token_ids,
            special_tokens=[
                tokenizer_pb2.SpecialToken(token_id=token_id, text=text)
                for token_id, text in vocabulary.special_texts.items()
            ],
            context_length=data.context_length,
            has_chat_template=bool(data.chat_template),
            harmony=bool(vocabulary.harmony_markers),
        )


async def _guarded(tokenizer: Tokenizer, chat: executor_pb2.Chat) -> GuardedChat:
    """A conversation for the template; off the event loop where it is long."""
    num_bytes = chat.ByteSize()
    if num_bytes > MAX_CHAT_BYTES:
        raise invalid_field("chat", f"has {num_bytes} bytes, and may have {MAX_CHAT_BYTES}")

    def prepare() -> GuardedChat:
        return guard(tokenizer, template_variables(tokenizer, chat), CONTENT_KEYS)

    return prepare() if num_bytes <= INLINE_CHARS else await asyncio.to_thread(prepare)


async def _encode(tokenizer: Tokenizer, text: str, parse_special: bool, add_special: bool) -> list[int]:
    """Encode, off the event loop where it takes long (the encoder lets go of the interpreter lock)."""
    if len(text) <= INLINE_CHARS:
        return tokenizer.encode(text, parse_special=parse_special, add_special=add_special)
    return await asyncio.to_thread(tokenizer.encode, text, parse_special=parse_special, add_special=add_special)
