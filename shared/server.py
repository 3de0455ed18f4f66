"""The frame of a gRPC server: health, reflection, TLS, bearer tokens, errors, drain.

A service brings a servicer whose methods are wrapped in `servicer_method`; the frame does what is the same
for all three. The event loop never computes: servicers hand long work to threads or processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import signal
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared.access import AccessCheck, bearer_token
from shared.certificates import server_credentials
from shared.config import ServerConfig
from shared.errors import Reason, ServiceError
from shared.keys import KeyRing
from shared.rpc_errors import abort

log = logging.getLogger(__name__)

OVERALL = ""  # health name of the server as a whole
MAX_STREAMS_PER_CONNECTION = 1024  # further calls wait at their client


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
        except grpc.aio.AbortError:
            raise
        except ServiceError as error:
            await abort(context, error)
        except Exception:
            await abort(context, internal_error(method.__qualname__))

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

    `on_denied` is told the method and the reason of each call that no servicer sees, being refused at the door.

    `serve` runs it until SIGTERM or SIGINT: health turns to NOT_SERVING, `drain` is awaited (at most
    `drain_seconds`), and only then do the transport and, after `serve` returns, the caller's own parts stop.

    Raises:
        OSError, ValueError: when a key file can't be read or holds what is no key.
    """

    def __init__(
        self,
        config: ServerConfig,
        service_names: Sequence[str],
        on_denied: Callable[[str, Reason], None] = lambda _method, _reason: None,
    ) -> None:
        self.config = config
        self.draining = asyncio.Event()
        self._health = health.aio.HealthServicer()
        self._keys = KeyRing(config.token_files) if config.token_files else None
        interceptors = [AccessCheck(self._keys, on_denied)] if self._keys else []
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
            port = self.grpc.add_secure_port(self.config.listen, server_credentials(self.config))
        else:
            port = self.grpc.add_insecure_port(self.config.listen)
        if self.config.local_socket is not None:
            self.grpc.add_insecure_port(f"unix:{self.config.local_socket}")
            self.config.local_socket.chmod(0o600)
        await self.grpc.start()
        if self.config.listen.startswith("unix:"):
            return self.config.listen
        return f"{self.config.listen.rpartition(':')[0]}:{port}"

    def caller(self, context: grpc.aio.ServicerContext) -> str:
        """Who makes a call: the name of their key, else the name in their certificate; empty where none was asked."""
        if self._keys is not None:
            return self._keys.find(bearer_token(context.invocation_metadata())).name
        names = context.auth_context().get("x509_common_name", ())
        return names[0].decode(errors="replace") if names else ""

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


def _server_options(config: ServerConfig) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
    ]
    if config.max_connection_age_seconds is not None:
        options.append(("grpc.max_connection_age_ms", int(config.max_connection_age_seconds * 1000)))
    return options
