"""What the commands say where client and server disagree about TLS: what is amiss, and the option that mends it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest

from mxgpt.cli.doorstep import trouble_at
from mxgpt.connection import Connection
from tests.scripted_executor import ScriptedExecutor, serve
from tests.stack import ROOT

TLS = ROOT / "tests" / "tls"
ROOT_OPTION = ["--tls-root", str(TLS / "ca.pem")]
CERTIFICATE = ["--tls-certificate", str(TLS / "client.pem"), "--tls-key", str(TLS / "client.key")]
STRANGE = ["--tls-certificate", str(TLS / "other-client.pem"), "--tls-key", str(TLS / "other-client.key")]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    """An executor without TLS, with it, and one that wants certificates of its clients, by their addresses' names."""
    pair = ((TLS / "server.key").read_bytes(), (TLS / "server.pem").read_bytes())
    authority = (TLS / "ca.pem").read_bytes()
    kinds = {
        "plain": None,
        "tls": grpc.ssl_server_credentials([pair]),
        "mutual": grpc.ssl_server_credentials([pair], authority, require_client_auth=True),
    }
    running = {name: serve(ScriptedExecutor(), credentials=credentials) for name, credentials in kinds.items()}
    yield {name: f"localhost:{address.rpartition(':')[2]}" for name, (_, address) in running.items()}
    for server, _ in running.values():
        server.stop(None)


def models(target: str, options: list[str]) -> subprocess.CompletedProcess[str]:
    """`mxgpt models`, as a process: what gRPC itself writes goes past Python's stderr."""
    environment = {name: value for name, value in os.environ.items() if name not in ("GRPC_VERBOSITY", "MXGPT_CA")}
    command = [sys.executable, "-m", "mxgpt", "models", "--server", target, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, text=True)


@pytest.mark.parametrize(
    ("server", "options", "hint"),
    [
        ("tls", [], "wants TLS: give the authority of its certificate with --tls-root"),
        ("mutual", [], "wants TLS: give the authority of its certificate with --tls-root"),
        ("plain", ROOT_OPTION, "does not speak TLS (WRONG_VERSION_NUMBER): leave --tls-root and MXGPT_CA away"),
        ("tls", ["--tls-root", str(TLS / "other-ca.pem")], "a certificate that --tls-root does not vouch for"),
        (
            "tls",
            [*ROOT_OPTION, "--tls-server-name", "other.example"],
            "has a certificate for another name than other.example: give --tls-server-name",
        ),
        ("mutual", ROOT_OPTION, "it may want a certificate of yours, --tls-certificate and --tls-key"),
        ("mutual", [*ROOT_OPTION, *STRANGE], "it may not know the authority of the certificate"),
    ],
)
def test_one_line_says_what_is_amiss(servers: dict[str, str], server: str, options: list[str], hint: str) -> None:
    done = models(servers[server], options)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"mxgpt: no answer (EXECUTOR_UNAVAILABLE): {servers[server]} ")
    assert hint in done.stderr
    assert done.stderr.count("\n") == 1, "none of gRPC's own"


def test_what_fits_is_served(servers: dict[str, str]) -> None:
    for server, options in (("plain", []), ("tls", ROOT_OPTION), ("mutual", [*ROOT_OPTION, *CERTIFICATE])):
        assert models(servers[server], options).returncode == 0


def test_the_server_at_fault_is_named(servers: dict[str, str]) -> None:
    trouble = trouble_at(Connection(f"127.0.0.1:1,{servers['plain']},{servers['tls']}", tls_root=None))
    assert trouble is not None
    assert trouble.startswith(f"{servers['tls']} wants TLS")


@pytest.mark.parametrize(
    "target",
    [
        *("127.0.0.1:1", "localhost", "dns:///localhost:1", "unix:/no.sock", "[::1]:1"),
        *("localhost:99999", "a..b:1", f"{'a' * 70}:1"),
    ],
)
def test_no_trouble_is_made_up(target: str) -> None:
    assert trouble_at(Connection(target, tls_root=None)) is None
    assert trouble_at(Connection(target, tls_root=TLS / "ca.pem")) is None


def test_nothing_is_amiss_where_tls_is_not(servers: dict[str, str]) -> None:
    assert trouble_at(Connection(servers["plain"], tls_root=None)) is None
    certificate = {"tls_certificate": TLS / "client.pem", "tls_key": TLS / "client.key"}
    for server in ("tls", "mutual"):
        assert trouble_at(Connection(servers[server], tls_root=TLS / "ca.pem", **certificate)) is None
