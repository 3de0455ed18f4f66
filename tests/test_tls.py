"""TLS, client certificates and tokens, from an executor's options to the client's."""

import asyncio
import time

import pytest

from mxgpt import AsyncClient, Client, MxgptError, RetryPolicy
from mxgpt.cli.main import run
from tests.stack import ROOT, Service

TLS = ROOT / "tests" / "tls"
ONCE = RetryPolicy(max_attempts=1)
TRUST = {"tls_root": TLS / "ca.pem"}
SHOW = {"tls_certificate": TLS / "client.pem", "tls_key": TLS / "client.key"}


@pytest.fixture(scope="module")
def executor(stack, tmp_path_factory):
    """An executor that wants a client's certificate and a token."""
    tokens = tmp_path_factory.mktemp("tls") / "tokens"
    tokens.write_text("# two of them\nfirst\nsecond\n")
    service = Service(
        "executor",
        *("--loader", stack.loader.address, "--tokenizer", stack.tokenizer.address),
        *("--tls-certificate", str(TLS / "server.pem"), "--tls-key", str(TLS / "server.key")),
        *("--tls-client-ca", str(TLS / "ca.pem"), "--token-file", str(tokens)),
    )
    service.target = f"localhost:{service.address.rpartition(':')[2]}"
    deadline = time.monotonic() + 30
    with Client(service.target, token="first", **TRUST, **SHOW) as client:
        while True:
            try:
                client.list_models()
                break
            except MxgptError:
                assert time.monotonic() < deadline, service.text
    yield service
    service.stop()


def test_both_clients_with_all_that_is_wanted(executor):
    with Client(executor.target, token="second", **TRUST, **SHOW) as client:
        text = client.complete("hello", max_tokens=5, temperature=0).text

    async def complete():
        async with AsyncClient(executor.target, token="first", **TRUST, **SHOW) as client:
            return (await client.complete("hello", max_tokens=5, temperature=0)).text

    assert asyncio.run(complete()) == text


def test_the_command_line_too(executor, tmp_path, capsys):
    (tmp_path / "token").write_text("first\n")
    options = ["--server", executor.target, "--token-file", str(tmp_path / "token"), "--tls-root", str(TLS / "ca.pem")]
    options += ["--tls-certificate", str(TLS / "client.pem"), "--tls-key", str(TLS / "client.key")]
    assert run(["models", *options]) == 0
    assert "demo-gpt-oss" in capsys.readouterr().out
    assert run(["models", *options[:-2]]) == 2, "half a certificate"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"token": "first"}, "EXECUTOR_UNAVAILABLE"),
        ({"token": "first", **TRUST}, "EXECUTOR_UNAVAILABLE"),
        ({"token": "first", **TRUST, **SHOW, "tls_server_name": "other.example"}, "EXECUTOR_UNAVAILABLE"),
        ({**TRUST, **SHOW}, "UNAUTHENTICATED"),
        ({"token": "third", **TRUST, **SHOW}, "UNAUTHENTICATED"),
    ],
    ids=["plain text", "no certificate", "another name", "no token", "wrong token"],
)
def test_nothing_less_will_do(executor, arguments, reason):
    with Client(executor.target, retry=ONCE, **arguments) as client, pytest.raises(MxgptError) as caught:
        client.complete("hello", max_tokens=5)
    assert caught.value.reason == reason


def test_the_name_may_be_told(executor):
    with Client(executor.target, token="first", **TRUST, **SHOW, tls_server_name="server.example") as client:
        assert client.list_models()
