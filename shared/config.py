"""Configuration that every server shares: where it listens, who may call, how it stops."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from shared.keys import KeyRing, read_token
from shared.watched import Watched

F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path)

MAX_MESSAGE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ServerConfig:
    """Where a server listens and how it treats its callers.

    Raises:
        ValueError: for a listening address that strangers can reach without TLS, or half a TLS pair.
    """

    listen: str  # host:port; port 0 picks a free one
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # set: clients must show a certificate that this authority signed
    token_files: tuple[Path, ...] = ()  # key files, as in `shared.keys`; none: whoever reaches the server may call it
    allow_insecure: bool = False
    local_socket: Path | None = None  # Unix socket for this user's processes, without TLS: health checks, say
    drain_seconds: float = 30.0  # running streams may finish within it after SIGTERM
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_connection_age_seconds: float | None = None  # None: connections live as long as their clients want

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key come together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("--tls-client-ca needs --tls-certificate and --tls-key")
        if self.tls_certificate is None and not self.allow_insecure and self.is_exposed:
            raise ValueError(
                f"refusing to listen on {self.listen} without TLS: give --tls-certificate and --tls-key, "
                "or --allow-insecure inside a network that you trust"
            )

    @property
    def is_exposed(self) -> bool:
        """Whether other machines may reach the server."""
        return not is_local(self.listen)

    @property
    def knows_callers(self) -> bool:
        """Whether callers must show a key or a certificate."""
        return bool(self.token_files) or self.tls_client_ca is not None


@dataclass(frozen=True)
class ClientConfig:
    """How this process calls other services."""

    tls_root: Path | None = None  # authority that signs the servers' certificates; None: plain text
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_server_name: str | None = None  # name that their certificates must have; None: that of the address
    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None  # the token, read again when the file changes

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("a client's certificate and key come together")
        if self.token is not None and self.token_file is not None:
            raise ValueError("a token comes from one place")

    @property
    def tls_files(self) -> list[Path]:
        """The files that a channel with TLS is made from."""
        return [path for path in (self.tls_root, self.tls_certificate, self.tls_key) if path is not None]

    def token_source(self) -> Callable[[], str] | None:
        """What gives the token for a call; None where none is sent.

        Raises:
            OSError, ValueError: when the token file can't be read or holds none.
        """
        if self.token_file is not None:
            path = self.token_file
            return Watched([path], lambda: read_token(path)).get
        if self.token:
            token = self.token
            return lambda: token
        return None


def server_options(default_port: int) -> Callable[[F], F]:
    """The click options of `ServerConfig`, passed to the command as keyword arguments of the same names."""
    options = [
        click.option("--listen", default=f"127.0.0.1:{default_port}", show_default=True, help="Address to serve on."),
        click.option("--tls-certificate", type=_FILE, help="PEM chain to serve TLS with."),
        click.option("--tls-key", type=_FILE, help="PEM key of the certificate."),
        click.option("--tls-client-ca", type=_FILE, help="PEM authority; clients show a certificate that it signed."),
        click.option(
            "--token-file",
            "token_files",
            type=_FILE,
            multiple=True,
            help="Keys to accept, NAME: KEY a line. Repeatable.",
        ),
        click.option("--allow-insecure", is_flag=True, help="Listen beyond loopback without TLS."),
        click.option("--local-socket", type=_FILE, help="Unix socket to answer on as well, without TLS."),
        click.option(
            "--drain-seconds", default=30.0, show_default=True, help="Time that running calls get after SIGTERM."
        ),
    ]
    return _apply(options)


def client_options() -> Callable[[F], F]:
    """The click options of `ClientConfig` for a service that calls others, as `peer_*` keyword arguments."""
    options = [
        click.option("--peer-tls-root", type=_FILE, help="PEM authority of the services called."),
        click.option("--peer-tls-certificate", type=_FILE, help="PEM certificate to show them."),
        click.option("--peer-tls-key", type=_FILE, help="PEM key of that certificate."),
        click.option("--peer-tls-server-name", help="Name in their certificates, if not their addresses'."),
        click.option("--peer-token-file", type=_FILE, help="File with the bearer token to send."),
    ]
    return _apply(options)


def server_config(options: dict[str, Any], **overrides: Any) -> ServerConfig:
    """Take `server_options` out of a command's keyword arguments and make a `ServerConfig` of them.

    Raises:
        click.UsageError: when they don't fit together, or a key file holds what is no key.
    """
    names = (
        *("listen", "tls_certificate", "tls_key", "tls_client_ca", "token_files"),
        *("allow_insecure", "local_socket", "drain_seconds"),
    )
    try:
        config = ServerConfig(**{name: options.pop(name) for name in names}, **overrides)
        if config.token_files:
            KeyRing(config.token_files)  # a line that is no key is told at once
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    return config


def client_config(options: dict[str, Any]) -> ClientConfig:
    """Take `client_options` out of a command's keyword arguments and make a `ClientConfig` of them.

    Raises:
        click.UsageError: when they don't fit together or the token file can't be read.
    """
    try:
        config = ClientConfig(
            tls_root=options.pop("peer_tls_root"),
            tls_certificate=options.pop("peer_tls_certificate"),
            tls_key=options.pop("peer_tls_key"),
            tls_server_name=options.pop("peer_tls_server_name"),
            token_file=options.pop("peer_token_file"),
        )
        config.token_source()
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error
    return config


def _apply(options: list[Callable[[Any], Any]]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def is_local(listen: str) -> bool:
    """Whether only this machine can reach an address."""
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
