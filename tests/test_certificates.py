"""Certificates that are exchanged under a server and under a channel, in one process."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from mxgpt import Client
from mxgpt.v1 import executor_pb2, executor_pb2_grpc
from shared.certificates import server_credentials
from shared.channel import open_channel
from shared.config import ClientConfig, ServerConfig
from shared.server import Server
from tests.stack import ROOT
from tests.test_access import Executor

TLS = ROOT / "tests" / "tls"


def put(source: str, directory: Path, name: str, suffixes: tuple[str, ...] = ("pem", "key")) -> None:
    """Put a certificate and its key in place, each written aside and renamed."""
    for suffix in suffixes:
        shutil.copy(TLS / f"{source}.{suffix}", directory / "aside")
        os.replace(directory / "aside", directory / f"{name}.{suffix}")


def test_a_channel_shows_the_certificate_of_now_and_its_calls_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server tells a caller without a key by the name in its certificate."""
    put("client", tmp_path, "own")

    async def main() -> None:
        server = Server(
            ServerConfig("localhost:0", TLS / "server.pem", TLS / "server.key", TLS / "ca.pem"),
            ["mxgpt.v1.ExecutorService"],
        )
        executor_pb2_grpc.add_ExecutorServiceServicer_to_server(Executor(server), server.grpc)
        address = await server.start()
        config = ClientConfig(TLS / "ca.pem", tmp_path / "own.pem", tmp_path / "own.key")
        async with open_channel(address, config) as channel:
            stub: Any = executor_pb2_grpc.ExecutorServiceStub(channel)

            async def name() -> str:
                return str((await stub.Cancel(executor_pb2.CancelRequest(), timeout=60)).executor_id)

            assert await name() == "client.example"
            running = stub.Generate(executor_pb2.GenerateRequest())
            assert (await running.read()).delta.text == "a"

            put("peer", tmp_path, "own", ("pem",))  # for a moment, half of it
            assert await name() == "client.example"
            assert "key values mismatch" in caplog.text
            put("peer", tmp_path, "own", ("key",))
            assert await name() == "peer.example"

            gc.collect()
            await asyncio.sleep(0.1)
            assert not running.done(), "it runs on, on a channel that nobody else holds"
            running.cancel()
        await server.stop()

    with caplog.at_level(logging.INFO):
        asyncio.run(main())


def test_a_blocking_client_does_so_too(tmp_path: Path) -> None:
    put("client", tmp_path, "own")

    async def main() -> None:
        server = Server(
            ServerConfig("localhost:0", TLS / "server.pem", TLS / "server.key", TLS / "ca.pem"),
            ["mxgpt.v1.ExecutorService"],
        )
        executor_pb2_grpc.add_ExecutorServiceServicer_to_server(Executor(server), server.grpc)
        await asyncio.to_thread(call, await server.start())
        await server.stop()

    def call(address: str) -> None:
        files = {"tls_certificate": tmp_path / "own.pem", "tls_key": tmp_path / "own.key"}
        with Client(address, tls_root=TLS / "ca.pem", **files) as client:
            assert client.cancel("any") == "client.example"
            running = client._stub.Generate(executor_pb2.GenerateRequest())
            assert next(running).delta.text == "a"
            put("peer", tmp_path, "own")
            assert client.cancel("any") == "peer.example"
            gc.collect()
            time.sleep(0.1)
            assert running.is_active(), "it runs on"
            running.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("broken", ["pem", "key"])
def test_what_is_no_certificate_is_named(tmp_path: Path, broken: str) -> None:
    put("server", tmp_path, "own")
    (tmp_path / f"own.{broken}").write_text("-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
    with pytest.raises(OSError, match=r"can't do TLS with .*own\.pem"):
        server_credentials(ServerConfig("localhost:0", tmp_path / "own.pem", tmp_path / "own.key"))
    with pytest.raises(OSError, match=r"can't do TLS with .*own\.pem"):
        open_channel("localhost:1", ClientConfig(TLS / "ca.pem", tmp_path / "own.pem", tmp_path / "own.key"))


def test_a_key_with_a_password_asks_nobody(tmp_path: Path) -> None:
    """A service that waited for a password at a terminal would look as if it hung."""
    key = tmp_path / "own.key"
    command = f"openssl ec -in {TLS / 'server.key'} -aes256 -passout pass:secret -out {key} 2>/dev/null"
    assert os.system(command) == 0
    with pytest.raises(OSError, match="can't do TLS"):
        server_credentials(ServerConfig("localhost:0", TLS / "server.pem", key))
