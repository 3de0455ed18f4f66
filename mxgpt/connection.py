"""How a client reaches its servers: addresses, TLS, token."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from shared.certificates import channel_credentials
from shared.channel import CHANNEL_OPTIONS, Channel, name_options, open_channel, target_uri, token_entry
from shared.config import ClientConfig
from shared.following_channel import FollowingChannel

DEFAULT_TARGET = "localhost:50051"


@dataclass(frozen=True)
class Connection:
    """Where the executors are and what they want to see. Token and authority come from the environment if not given.

    Args:
        target: "host:port"; several with commas between, balanced round-robin; or a gRPC URI. One host name is
            resolved again whenever a connection is lost, names in a list once.
        token: bearer token; MXGPT_TOKEN by default, None for none.
        tls_root: PEM authority that signed the servers' certificates; MXGPT_CA by default, None for plain text.
        tls_certificate, tls_key: PEM certificate and key to show, where servers ask for one. Files are read again for
            the first call after a change.
        tls_server_name: name that the certificate must have, where it is not the target's host.

    Raises:
        ValueError: for half a certificate, or names in a list that can't be resolved.
    """

    target: str = DEFAULT_TARGET
    token: str | None = field(default_factory=lambda: os.environ.get("MXGPT_TOKEN") or None, repr=False)
    tls_root: str | Path | None = field(default_factory=lambda: os.environ.get("MXGPT_CA") or None)
    tls_certificate: str | Path | None = None
    tls_key: str | Path | None = None
    tls_server_name: str | None = None

    def open(self) -> grpc.Channel | FollowingChannel:
        """A channel for blocking calls.

        Raises:
            OSError: when a TLS file can't be read, or holds what it should not.
        """
        config, uri = self._config(), target_uri(self._numeric_target())
        options = [*CHANNEL_OPTIONS, *name_options(config)]
        if config.tls_root is None:
            return grpc.insecure_channel(uri, options=options)
        return FollowingChannel(
            config.tls_files, lambda: grpc.secure_channel(uri, channel_credentials(config), options=options)
        )

    def open_async(self) -> Channel:
        """A channel for calls from asyncio; see `open`."""
        return open_channel(self._numeric_target(), self._config())

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return (token_entry(self.token),) if self.token else ()

    def _config(self) -> ClientConfig:
        """The token is left out: it travels as metadata, with TLS and without."""
        return ClientConfig(
            Path(self.tls_root) if self.tls_root else None,
            Path(self.tls_certificate) if self.tls_certificate else None,
            Path(self.tls_key) if self.tls_key else None,
            self.tls_server_name,
        )

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
