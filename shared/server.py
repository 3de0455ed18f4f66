"""The frame of a gRPC server: health, reflection, TLS, bearer tokens, errors, drain.

A service brings a servicer whose methods are wrapped in `servicer_method`; the frame does what is the same
for all three. The event loop never computes: servicers hand long work to threads or processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import inspect
import logging
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared.config import ServerConfig
from shared.errors import Reason, ServiceError
from shared.rpc_errors import DETAILS_KEY, error_details, status_code

log = logging.getLogger(__name__)

OVERALL = ""  # health name of the server as a whole


def servicer_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a `ServiceError` of an async method or async generator into its status, anything else into INTERNAL.

    The servicer's `calls` (shared.calls.Calls) watch over each call.

    A generator's responses are written from here, so that it is closed, and its `finally` run, as soon as the
    client cancels, and not when the garbage collector finds it.
    """

    @functools.wraps(method)
    async def answer(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            with self.calls.watch(method.__name__, request, context):
                if not inspect.isasyncgenfunction(method):
                    return await method(self, request, context)
                async with contextlib.aclosing(method(self, request, context)) as responses:
                    async for response in responses:
                        await context.write(response)
        except Exception as error:
            await _abort(context, method.__qualname__, error)

    return answer


def internal_error(where: str) -> ServiceError:
    """An INTERNAL error with a reference, under which the exception being handled is logged."""
    reference = uuid.uuid4().hex[:12]
    log.exception("%s failed, reference %s", where, reference)
    return ServiceError(
        Reason.INTERNAL,
        f"internal error, reference {reference}; the server's log has the details",
        metadata={"reference": reference},
    )


class Server:
    """A grpc.aio server with health, reflection and an orderly end.

    `serve` runs it until SIGTERM or SIGINT: health turns to NOT_SERVING, `drain` is awaited (at most
    `drain_seconds`), and only then do the transport and, after `serve` returns, the caller's own parts stop.
    """

    def __init__(self, config: ServerConfig, service_names: Sequence[str]) -> None:
        self.config = config
        self.draining = asyncio.Event()
        self._health = health.aio.HealthServicer()
        interceptors = [_TokenCheck(config.token_file)] if config.token_file else []
        self.grpc = grpc.aio.server(options=_server_options(config), interceptors=interceptors)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        names = [*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self.grpc)

    async def start(self) -> str:
        """Listen, not yet healthy; returns the address with the port in use.

        Raises:
            RuntimeError: when the address is taken or can't be bound.
            OSError: when a TLS file can't be read.
        """
        await self.set_health(OVERALL, False)
        if self.config.tls_certificate is not None:
            port = self.grpc.add_secure_port(self.config.listen, _server_credentials(self.config))
        else:
            port = self.grpc.add_insecure_port(self.config.listen)
        await self.grpc.start()
        if self.config.listen.startswith("unix:"):
            return self.config.listen
        return f"{self.config.listen.rpartition(':')[0]}:{port}"

    async def set_health(self, name: str, serving: bool) -> None:
        """Set what grpc.health.v1 answers for `name`; while draining the server as a whole stays NOT_SERVING."""
        if name == OVERALL and self.draining.is_set():
            serving = False
        status = health_pb2.HealthCheckResponse.ServingStatus
        await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def serve(self, drain: Callable[[], Awaitable[None]] | None = None) -> None:
        """Serve until a signal, then drain and stop."""
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        await stopped.wait()
        await self.stop(drain)

    async def stop(self, drain: Callable[[], Awaitable[None]] | None = None) -> None:
        """Drain, then close every call that is left."""
        self.draining.set()
        await self.set_health(OVERALL, False)
        if drain is not None:
            try:
                await asyncio.wait_for(drain(), self.config.drain_seconds)
            except TimeoutError:
                log.warning("calls were still running after %.0f s of draining", self.config.drain_seconds)
        await self.grpc.stop(grace=1.0)


def run(main: Awaitable[None]) -> None:
    """Run a service's main coroutine; logging must be set up before."""

    async def runner() -> None:
        await main

    asyncio.run(runner())


async def _abort(context: grpc.aio.ServicerContext, where: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    service_error = error if isinstance(error, ServiceError) else internal_error(where)
    await context.abort(
        status_code(service_error.status),
        service_error.message,
        trailing_metadata=((DETAILS_KEY, error_details(service_error)),),
    )


def _server_options(config: ServerConfig) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
    if config.max_connection_age_seconds is not None:
        options.append(("grpc.max_connection_age_ms", int(config.max_connection_age_seconds * 1000)))
    return options


def _server_credentials(config: ServerConfig) -> grpc.ServerCredentials:
    assert config.tls_certificate is not None
    assert config.tls_key is not None
    client_ca = config.tls_client_ca.read_bytes() if config.tls_client_ca else None
    return grpc.ssl_server_credentials(
        [(config.tls_key.read_bytes(), config.tls_certificate.read_bytes())],
        root_certificates=client_ca,
        require_client_auth=client_ca is not None,
    )


class _TokenCheck(grpc.aio.ServerInterceptor):
    """Denies calls without one of the bearer tokens; health and reflection are no exception.

    It swaps in a handler that denies, rather than wrapping the real one, so that streams pass untouched.
    """

    def __init__(self, token_file: Path) -> None:
        lines = token_file.read_text().splitlines()
        self._tokens = [line.strip().encode() for line in lines if line.strip() and not line.startswith("#")]
        if not self._tokens:
            raise ValueError(f"{token_file} holds no token")

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if handler is None or self._is_allowed(details):
            return handler
        return _denying_handler(handler)

    def _is_allowed(self, details: grpc.HandlerCallDetails) -> bool:
        metadata = dict(details.invocation_metadata or ())
        scheme, _, given = str(metadata.get("authorization", "")).partition(" ")
        matches = [hmac.compare_digest(given.encode(), token) for token in self._tokens]
        return scheme.lower() == "bearer" and any(matches)


def _denying_handler(handler: Any) -> Any:
    error = ServiceError(Reason.UNAUTHENTICATED, "this server wants a bearer token in the authorization metadata")

    async def deny(_request: Any, context: grpc.aio.ServicerContext) -> Any:
        await _abort(context, "authentication", error)

    async def deny_stream(_request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        await _abort(context, "authentication", error)
        yield  # makes this an async generator; never reached

    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makers[handler.request_streaming, handler.response_streaming]
    return make(
        deny_stream if handler.response_streaming else deny,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
