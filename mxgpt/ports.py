"""Whether a port can be listened on, found out before anything is started that would need it."""

from __future__ import annotations

import errno
import socket
from typing import NamedTuple


class Port(NamedTuple):
    """Where a service is to listen, and the option that says so."""

    host: str
    number: int
    option: str


def why_taken(port: Port) -> str | None:
    """Why nothing can listen there, and what to do; None if something can."""
    try:
        _bind(port.host, port.number)
    except OSError as error:
        where = f"{port.host}:{port.number} ({port.option})"
        if error.errno != errno.EADDRINUSE:
            return f"can't listen on {where}: {error.strerror}"
        return f"{where} is in use, perhaps by another `mxgpt serve`; give another port, or --port 0 for free ones"
    return None


def _bind(host: str, number: int) -> None:
    family, type_, protocol, _, address = socket.getaddrinfo(host.strip("[]"), number, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, type_, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: connections that ended don't count
        probe.bind(address)
