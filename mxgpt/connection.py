"""How a client reaches its servers: addresses, TLS, token."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from shared.channel import CHANNEL_OPTIONS, channel_credentials, open_channel, target_uri
from shared.config import ClientConfig

DEFAULT_TARGET = "localhost:50051"


@dataclass(frozen=True)
class Connection:
    """Where the executors are and what they want to see.

    Args:
        target: "host:port"; several with commas between, balanced round-robin; or a gRPC URI. One host name is
            resolved again whenever a connection is lost, names in a list once.
        token: bearer token.
        tls_root: PEM authority that signed the servers' certificates; None for plain text.
        tls_certificate, tls_key: PEM certificate and key to show, where servers ask for one.
        tls_server_name: name that the certificate must have, where it is not the target's host.

    Raises:
        ValueError: for half a certificate, or names in a list that can't be resolved.
    """

    target: str = DEFAULT_TARGET
    token: str | None = None
    tls_root: str | Path | None = None
    tls_certificate: str | Path | None = None
    tls_key: str | Path | None = None
    tls_server_name: str | None = None

    def open(self) -> grpc.Channel:
        """A channel for blocking calls.

        Raises:
            OSError: when a TLS file can't be read.
        """
        config, uri = self._config(), target_uri(self._numeric_target())
        options = [*CHANNEL_OPTIONS, *self._name_option()]
        if config.tls_root is None:
            return grpc.insecure_channel(uri, options=options)
        return grpc.secure_channel(uri, channel_credentials(config), options=options)

    def open_async(self) -> grpc.aio.Channel:
        """A channel for calls from asyncio; see `open`."""
        return open_channel(self._numeric_target(), self._config(), self._name_option())

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def _config(self) -> ClientConfig:
        """The token is left out: it travels as metadata, with TLS and without."""
        return ClientConfig(
            Path(self.tls_root) if self.tls_root else None,
            Path(self.tls_certificate) if self.tls_certificate else None,
            Path(self.tls_key) if self.tls_key else None,
        )

    def _name_option(self) -> list[tuple[str, Any]]:
        return [("grpc.ssl_target_name_override", self.tls_server_name)] if self.tls_server_name else []

    def _numeric_target(self) -> str:
        if "," not in self.target or ":///" in self.target or self.target.startswith(("ipv4:", "ipv6:")):
            return self.target
        return ",".join(_resolve(address.strip()) for address in self.target.split(","))


def _resolve(address: str) -> str:
    host, _, port = address.rpartition(":")
    if host.startswith("["):
        return address
    try:
        return f"{socket.gethostbyname(host)}:{int(port)}"
    except (OSError, ValueError) as error:
        raise ValueError(f"can't find the server {address!r}: {error}") from error
