"""Why a server that is there can't be talked to: what a connection of our own finds at its door.

gRPC tells the last failure of all addresses that a name has, "Connection refused" of one that nobody uses included, and
"Socket closed" where plain text met TLS.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator

from mxgpt.connection import Connection

_SECONDS = 2.0  # for each step of a connection
_NO_CONNECTION = (OSError, ValueError, OverflowError)  # ValueError: of a name, OverflowError: of a port
_WRONG_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH


def trouble_at(connection: Connection) -> str | None:
    """What is wrong between the connection's TLS and one of its servers, and what to do; None for nothing.

    Servers in one of gRPC's own URIs are not looked at.
    """
    for host, port in _addresses(connection.target):
        with contextlib.suppress(*_NO_CONNECTION), socket.create_connection((host, port), _SECONDS) as plain:
            trouble = _trouble_with_tls(connection, plain, host) if connection.tls_root else _trouble_without(plain)
            if trouble is not None:
                return f"{host}:{port} {trouble}"
    return None


def _addresses(target: str) -> Iterator[tuple[str, int]]:
    for address in target.split(","):
        host, _, port = address.strip().rpartition(":")
        if host and port.isdecimal() and "/" not in host:
            yield host.strip("[]"), int(port)


def _trouble_without(plain: socket.socket) -> str | None:
    """Whether a server that was spoken to in plain text speaks TLS."""
    context = _context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        context.wrap_socket(plain).close()
    except OSError:
        return None
    return "wants TLS: give the authority of its certificate with --tls-root"


def _trouble_with_tls(connection: Connection, plain: socket.socket, host: str) -> str | None:
    context = _context()
    context.load_verify_locations(connection.tls_root)
    if connection.tls_certificate is not None:
        context.load_cert_chain(connection.tls_certificate, connection.tls_key)
    name = connection.tls_server_name or host
    try:
        with context.wrap_socket(plain, server_hostname=name) as secure:
            if secure.recv(1):  # the first byte of HTTP/2, which a client whose certificate is no good never sees
                return None
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _WRONG_NAME:
            return f"has a certificate for another name than {name}: give --tls-server-name"
        return f"has a certificate that --tls-root does not vouch for ({error.verify_message})"
    except (ssl.SSLEOFError, ConnectionError):
        pass
    except ssl.SSLError as error:
        if "ALERT" not in (error.reason or ""):
            return f"does not speak TLS ({error.reason}): leave --tls-root and MXGPT_CA away"
    if connection.tls_certificate is None:
        return "hangs up: it may want a certificate of yours, --tls-certificate and --tls-key"
    return "hangs up: it may not know the authority of the certificate that --tls-certificate shows"


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    return context
