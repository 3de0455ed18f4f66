"""Channels to other services: every address balanced round-robin, kept alive, bounded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc

from shared.certificates import channel_credentials
from shared.config import MAX_MESSAGE_BYTES, ClientConfig
from shared.following_channel import FollowingChannel

Channel: TypeAlias = grpc.aio.Channel | FollowingChannel  # what asynchronous stubs are made for

_SERVICE_CONFIG = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # 60 s otherwise: a peer that hangs would be noticed after 90 s
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # the patience with one attempt, in spite of its name
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
)


def target_uri(target: str) -> str:
    """gRPC's URI for "host:port", for several of them with commas between, or for a URI as it is.

    Several addresses must be numeric, except "localhost".
    """
    if "," in target:
        addresses = [address.strip().replace("localhost", "127.0.0.1") for address in target.split(",")]
        scheme = "ipv6" if addresses[0].startswith("[") else "ipv4"
        return f"{scheme}:{','.join(addresses)}"
    if target.startswith(("unix:", "ipv4:", "ipv6:")) or ":///" in target:
        return target
    return f"dns:///{target}"


def open_channel(target: str, config: ClientConfig | None = None) -> Channel:
    """An asynchronous channel to `target` (see `target_uri`), with the TLS and token of `config`; it follows the files.

    Raises:
        OSError, ValueError: when a file of `config` can't be read or holds what it should not.
    """
    config = config or ClientConfig()
    options = [*CHANNEL_OPTIONS, *name_options(config)]
    uri = target_uri(target)
    token = config.token_source()
    kinds = (_UnaryUnaryToken, _UnaryStreamToken, _StreamStreamToken)
    interceptors = [kind(token) for kind in kinds] if token is not None else []
    if config.tls_root is None:
        return grpc.aio.insecure_channel(uri, options=options, interceptors=interceptors)

    def open_secure() -> grpc.aio.Channel:
        return grpc.aio.secure_channel(uri, channel_credentials(config), options=options, interceptors=interceptors)

    return FollowingChannel(config.tls_files, open_secure)


def name_options(config: ClientConfig) -> list[tuple[str, Any]]:
    """The channel options that say which name a server's certificate must have."""
    return [("grpc.ssl_target_name_override", config.tls_server_name)] if config.tls_server_name else []


def token_entry(token: str) -> tuple[str, str]:
    """The metadata that carries a bearer token."""
    return ("authorization", f"Bearer {token}")


class _BearerToken:
    """Adds the bearer token to each call of a channel.

    Call credentials would do so over TLS only, and can freeze the process: gRPC destroys them in a thread of its own
    that needs the interpreter's lock, which closing a channel holds while it waits for that thread (grpc/grpc#42247).
    One class for each kind of call: grpc.aio takes an interceptor for the first kind that it finds it good for.
    """

    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token

    async def _with_token(self, continuation: Any, details: Any, requests: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), token_entry(self._token()))
        return await continuation(details._replace(metadata=metadata), requests)


class _UnaryUnaryToken(_BearerToken, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._with_token(continuation, client_call_details, request)


class _UnaryStreamToken(_BearerToken, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._with_token(continuation, client_call_details, request)


class _StreamStreamToken(_BearerToken, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._with_token(continuation, client_call_details, request_iterator)
