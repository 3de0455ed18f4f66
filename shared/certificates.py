"""TLS credentials from files: a server's follow theirs, and a client's are checked before they are used."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import grpc

from shared.config import ClientConfig, ServerConfig
from shared.watched import Watched


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials:
    """Credentials that follow the files of `config`; connections that are open keep what they began with.

    A certificate whose key has not been replaced yet, or a file that is half written, changes nothing.

    Raises:
        OSError: when a file can't be read, or holds no certificate, or another key than the certificate's.
    """
    assert config.tls_certificate is not None
    assert config.tls_key is not None
    paths = [config.tls_certificate, config.tls_key, *([config.tls_client_ca] if config.tls_client_ca else [])]
    files = Watched(paths, lambda: _read(config))
    given = files.get()

    def changed() -> Any:
        """Asked by gRPC before each handshake, in a thread of its own; None: as before."""
        nonlocal given
        current = files.get()
        if current is given:
            return None
        given = current
        return current

    return grpc.dynamic_ssl_server_credentials(given, changed, require_client_authentication=bool(config.tls_client_ca))


def channel_credentials(config: ClientConfig) -> grpc.ChannelCredentials:
    """TLS credentials of a channel, as the files of `config` are now.

    Raises:
        OSError: as for `server_credentials`.
    """
    assert config.tls_root is not None
    check_files(config.tls_certificate, config.tls_key, config.tls_root)
    return grpc.ssl_channel_credentials(
        root_certificates=config.tls_root.read_bytes(),
        private_key=config.tls_key.read_bytes() if config.tls_key else None,
        certificate_chain=config.tls_certificate.read_bytes() if config.tls_certificate else None,
    )


def _read(config: ServerConfig) -> Any:
    assert config.tls_certificate is not None
    assert config.tls_key is not None
    check_files(config.tls_certificate, config.tls_key, config.tls_client_ca)
    return grpc.ssl_server_certificate_configuration(
        [(config.tls_key.read_bytes(), config.tls_certificate.read_bytes())],
        root_certificates=config.tls_client_ca.read_bytes() if config.tls_client_ca else None,
    )


def check_files(certificate: Path | None, key: Path | None, authority: Path | None) -> None:
    """Find out with OpenSSL what gRPC would only hint at in its own log.

    Raises:
        OSError: when a file can't be read, or holds no certificate, or another key than the certificate's.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, key, password=b"")  # b"": ask nobody
        if authority is not None:
            context.load_verify_locations(authority)
    except (ssl.SSLError, FileNotFoundError, PermissionError) as error:
        names = ", ".join(str(path) for path in (certificate, key, authority) if path)
        raise OSError(f"can't do TLS with {names}: {error.strerror or error}") from error
