"""The executor's unary calls to the tokenizer: prompts to token ids, and facts about the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from mxgpt.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from shared.calls import Calls
from shared.channel import Channel
from shared.errors import Reason, ServiceError
from shared.rpc_errors import from_peer_error

START_TOKEN = "<|start|>"  # begins a Harmony message
CALL_TOKEN = "<|call|>"  # ends one that calls a tool
MAX_BEGUN_IDS = 16  # of a prompt's end that may belong to a character begun, which has three bytes


@dataclass(frozen=True)
class Vocabulary:
    """What the executor needs to know of the tokenizer."""

    special_texts: dict[int, str]  # special token id -> spelling
    harmony: bool

    def unfinished(self, prompt: tuple[int, ...], harmony: bool) -> tuple[int, ...]:
        """The end of a prompt that decides how what follows is read: a character begun, a Harmony message begun."""
        if harmony:
            for index in reversed(range(len(prompt))):
                if self.special_texts.get(prompt[index]) == START_TOKEN:
                    return prompt[index:]
        return prompt[-MAX_BEGUN_IDS:]

    def is_tool_call(self, token_id: int) -> bool:
        """Whether `token_id` ends a Harmony message that calls a tool."""
        return self.harmony and self.special_texts.get(token_id) == CALL_TOKEN


class TokenizerClient:
    """Asks whichever tokenizer replica the channel balances to; `model` is the digest of the model served."""

    def __init__(self, channel: Channel, model: str, calls: Calls, timeout_seconds: float = 20.0) -> None:
        self.stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        self.model = model
        self._calls = calls
        self._timeout_seconds = timeout_seconds
        self._vocabulary: Vocabulary | None = None

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text, with what the model wants before it.

        Raises:
            ServiceError: TOKENIZER_UNAVAILABLE, or what the tokenizer answered.
        """
        request = tokenizer_pb2.TokenizeRequest(model=self.model, text=text, add_special=True)
        return list((await self._call("Tokenize", request)).token_ids)

    async def render_chat(self, chat: Any) -> list[int]:
        """Token ids of a conversation in the model's own template.

        Raises:
            ServiceError: TOKENIZER_UNAVAILABLE, or what the tokenizer answered.
        """
        request = tokenizer_pb2.RenderChatRequest(model=self.model, chat=chat)
        return list((await self._call("RenderChat", request)).token_ids)

    async def vocabulary(self) -> Vocabulary:
        """Facts about the vocabulary, asked for once.

        Raises:
            ServiceError: TOKENIZER_UNAVAILABLE, or what the tokenizer answered.
        """
        if self._vocabulary is None:
            info = await self._call("GetInfo", tokenizer_pb2.GetInfoRequest(model=self.model))
            self._vocabulary = Vocabulary({token.token_id: token.text for token in info.special_tokens}, info.harmony)
        return self._vocabulary

    async def _call(self, method: str, request: Any) -> Any:
        with self._calls.peer("TokenizerService", method) as peer:
            try:
                call = getattr(self.stub, method)
                return await call(request, timeout=self._timeout_seconds, metadata=peer.metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise ServiceError(Reason.TOKENIZER_UNAVAILABLE, "the tokenizer did not answer in time") from error
                raise from_peer_error(error, Reason.TOKENIZER_UNAVAILABLE) from error
