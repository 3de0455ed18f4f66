"""TokenizerService: translates between the contract and the tokenizers, streams and templates behind it.

What takes long runs in threads: streams that wait meanwhile hold up the engines' text. Most of it holds the interpreter
lock, which a thread gives up between steps of Python but not within one: steps are kept short.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from mxgpt.v1 import executor_pb2, tokenizer_pb2, tokenizer_pb2_grpc
from services.tokenizer.backends import Tokenizer
from services.tokenizer.chat import CONTENT_KEYS, template_variables, today
from services.tokenizer.detokenizer import Detokenizer
from services.tokenizer.encoders import SHORT_CHARS
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
INLINE_CHARS = SHORT_CHARS  # a text so short is encoded at once, in about what a thread's turn may take
INLINE_IDS = 4096  # so few are decoded at once: 0.2 to 0.8 ms
INLINE_STREAM_BYTES = 4096  # a message so small is handled at once: one id of some 500 sequences, 2.5 ms
NUM_STREAM_THREADS = 2  # streams have their own, which long texts of others don't fill
NUM_IDS_ADDED = 1 << 16  # to a message in one step: 3 ms

T = TypeVar("T")


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Serves the tokenizers of `store`; templates run in `templates`."""

    def __init__(self, store: TokenizerStore, templates: TemplatePool, calls: Calls, metrics: TokenizerMetrics) -> None:
        self.calls = calls
        self._metrics = metrics
        self._store = store
        self._templates = templates
        self._stream_threads = ThreadPoolExecutor(NUM_STREAM_THREADS, "stream")
        self._decode_thread = ThreadPoolExecutor(1, "decode")  # more would only leave the event loop fewer turns

    @servicer_method
    async def Tokenize(self, request: tokenizer_pb2.TokenizeRequest, context: Any) -> tokenizer_pb2.TokenizeResponse:
        tokenizer = await self._store.find(request.model)
        num_bytes = len(request.text.encode())
        if num_bytes > MAX_TEXT_BYTES:
            raise invalid_field("text", f"has {num_bytes} bytes, and may have {MAX_TEXT_BYTES}")
        response = await _compute(len(request.text) <= INLINE_CHARS, partial(_encoded, tokenizer, request))
        self._metrics.encoded.inc(len(response.token_ids))
        return response

    @servicer_method
    async def Detokenize(
        self, request: tokenizer_pb2.DetokenizeRequest, context: Any
    ) -> tokenizer_pb2.DetokenizeResponse:
        tokenizer = await self._store.find(request.model)
        if len(request.token_ids) > MAX_TOKEN_IDS:
            raise invalid_field("token_ids", f"has {len(request.token_ids)} ids, and may have {MAX_TOKEN_IDS}")
        is_short = len(request.token_ids) <= INLINE_IDS
        response = await _compute(is_short, partial(_decoded, tokenizer, request), self._decode_thread)
        self._metrics.decoded.inc(len(request.token_ids))
        return response

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
        response = await asyncio.to_thread(_encoded_chat, tokenizer, rendered, chat.mark)
        self._metrics.encoded.inc(len(response.token_ids))
        return response

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
                is_short = request.ByteSize() <= INLINE_STREAM_BYTES
                answer = await _compute(is_short, partial(detokenizer.handle, request), self._stream_threads)
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

    return await _compute(num_bytes <= INLINE_CHARS, prepare)


def _encoded(tokenizer: Tokenizer, request: tokenizer_pb2.TokenizeRequest) -> tokenizer_pb2.TokenizeResponse:
    ids = tokenizer.encode(request.text, parse_special=request.parse_special, add_special=request.add_special)
    response = tokenizer_pb2.TokenizeResponse()
    _add_ids(response, ids)
    return response


def _encoded_chat(tokenizer: Tokenizer, rendered: str, mark: str | None) -> tokenizer_pb2.RenderChatResponse:
    text, ids = encode_rendered(tokenizer, rendered, mark)
    response = tokenizer_pb2.RenderChatResponse(text=text, harmony=bool(tokenizer.vocabulary.harmony_markers))
    _add_ids(response, ids)
    return response


def _decoded(tokenizer: Tokenizer, request: tokenizer_pb2.DetokenizeRequest) -> tokenizer_pb2.DetokenizeResponse:
    text = tokenizer.decode(request.token_ids, special_tokens=request.special_tokens)
    if len(text.encode()) > MAX_DECODED_BYTES:
        raise invalid_field("token_ids", f"decode to more than {MAX_DECODED_BYTES} bytes; decode them in parts")
    return tokenizer_pb2.DetokenizeResponse(text=text)


def _add_ids(
    response: tokenizer_pb2.TokenizeResponse | tokenizer_pb2.RenderChatResponse, token_ids: Sequence[int]
) -> None:
    for start in range(0, len(token_ids), NUM_IDS_ADDED):
        response.token_ids.extend(token_ids[start : start + NUM_IDS_ADDED])


async def _compute(is_short: bool, work: Callable[[], T], threads: Executor | None = None) -> T:
    """Do what takes no time to speak of at once, and all else off the event loop."""
    return work() if is_short else await asyncio.get_running_loop().run_in_executor(threads, work)
