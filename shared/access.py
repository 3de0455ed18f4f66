"""Who may call what: bearer tokens against a server's keys, before a call reaches its method.

Handlers are swapped, never wrapped where it would matter: a call that is denied gets a handler that says so, health
and reflection keep their own (their streams do not survive a wrapper), and a counted call's coroutine runs in another.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc

from shared.errors import Reason, ServiceError
from shared.keys import Key, KeyRing, is_common
from shared.rpc_errors import abort

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0  # when a key may have calls left again

# Methods that only ask or cancel: not counted, so that who has used up their calls can still end one.
_UNCOUNTED = frozenset({"Cancel", "GetInfo", "GetModel", "GetStatus", "ListModels"})

_MAKERS = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


class AccessCheck(grpc.aio.ServerInterceptor):
    """Lets through the calls whose key opens their method, as many at once as the key may have."""

    def __init__(self, keys: KeyRing, on_denied: Callable[[str, Reason], None]) -> None:
        self._keys = keys
        self._on_denied = on_denied
        self._num_running: Counter[str] = Counter()  # counted calls by the key's name

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        method = details.method
        try:
            key = self._keys.find(bearer_token(details.invocation_metadata))
            if not key.role.allows(method):
                why = f"a key with the role {key.role.name.lower()} may not call {method}"
                raise ServiceError(Reason.PERMISSION_DENIED, why)
        except ServiceError as error:
            self._on_denied(method, error.reason)
            return _denying_handler(handler, method, error)
        if key.max_calls is None or is_common(method) or method.rpartition("/")[2] in _UNCOUNTED:
            return handler
        return self._counting_handler(handler, method, key)

    def _counting_handler(self, handler: Any, full_name: str, key: Key) -> Any:
        """`handler`, whose method must be a coroutine (as `servicer_method` makes them), counted as a call of `key`."""
        attribute, make = _MAKERS[handler.request_streaming, handler.response_streaming]
        method = getattr(handler, attribute)

        async def counted(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                with self._one_more(key):
                    return await method(request, context)
            except ServiceError as error:
                self._on_denied(full_name, error.reason)
                await abort(context, error)

        return make(counted, handler.request_deserializer, handler.response_serializer)

    @contextlib.contextmanager
    def _one_more(self, key: Key) -> Iterator[None]:
        """Count a call for as long as it runs.

        Raises:
            ServiceError: KEY_LIMIT_REACHED.
        """
        assert key.max_calls is not None
        if self._num_running[key.name] >= key.max_calls:
            why = f"{key.name} has {key.max_calls} of {key.max_calls} calls running here; wait until one has ended"
            raise ServiceError(Reason.KEY_LIMIT_REACHED, why, retry_after=RETRY_SECONDS)
        self._num_running[key.name] += 1
        try:
            yield
        finally:
            self._num_running[key.name] -= 1
            if not self._num_running[key.name]:
                del self._num_running[key.name]


def bearer_token(metadata: Any) -> str:
    """The token in a call's metadata; empty for none."""
    scheme, _, token = str(dict(metadata or ()).get("authorization", "")).partition(" ")
    return token if scheme.lower() == "bearer" else ""


def _denying_handler(handler: Any, method: str, error: ServiceError) -> Any:
    async def deny(_request: Any, context: grpc.aio.ServicerContext) -> Any:
        log.debug("refused %s from %s: %s", method, context.peer(), error.message)
        await abort(context, error)

    async def deny_stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        await deny(request, context)
        yield  # makes this an async generator; never reached

    _, make = _MAKERS[handler.request_streaming, handler.response_streaming]
    # Without a deserializer: what a stranger sends is not even parsed.
    return make(
        deny_stream if handler.response_streaming else deny, None, response_serializer=handler.response_serializer
    )
