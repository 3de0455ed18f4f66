"""TLS, client certificates and keys on all three services, among themselves and towards clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mxgpt import AsyncClient, Client, MxgptError, RetryPolicy
from mxgpt.cli.main import run
from mxgpt.v1 import executor_pb2, loader_pb2, loader_pb2_grpc
from shared.channel import open_channel
from shared.config import ClientConfig
from shared.descriptors import REFUSED, close_all, receive_descriptors
from shared.errors import Reason, ServiceError
from shared.rpc_errors import from_rpc_error
from tests.stack import ROOT, START_SECONDS, Service, until
from tests.test_loader_handover import present

TLS = ROOT / "tests" / "tls"
ONCE = RetryPolicy(max_attempts=1)
TRUST = {"tls_root": TLS / "ca.pem"}
SHOW = {"tls_certificate": TLS / "client.pem", "tls_key": TLS / "client.key"}
SERVICES = ("loader", "tokenizer", "executor")
KEYS = """
clients: client-key
clients: client-other-key
peers: peers-key role=service
ops: ops-key role=admin
"""
OPS = ClientConfig(**TRUST, **SHOW, token="ops-key")


class Guarded:
    """The three services, each wanting a certificate and a key of whoever calls, the others included."""

    def __init__(self, directory: Path) -> None:
        for name in ("server.pem", "server.key", "ca.pem"):
            shutil.copy(TLS / name, directory / name)
        (directory / "keys").write_text(KEYS)
        (directory / "peers").write_text("peers-key\n")
        self.directory = directory
        self.socket = directory / "own" / "loader.sock"
        self.local_socket = directory / "executor.sock"
        door = [
            *("--tls-certificate", str(directory / "server.pem"), "--tls-key", str(directory / "server.key")),
            *("--tls-client-ca", str(directory / "ca.pem"), "--token-file", str(directory / "keys")),
            *("--log-level", "DEBUG"),
        ]
        peers = [
            *("--peer-tls-root", str(TLS / "ca.pem"), "--peer-token-file", str(directory / "peers")),
            *("--peer-tls-certificate", str(TLS / "peer.pem"), "--peer-tls-key", str(TLS / "peer.key")),
            *("--peer-tls-server-name", "server.example"),
        ]
        model = str(ROOT / "models" / "demo-gpt-oss.gguf")
        self.services = {"loader": Service("loader", "--socket", str(self.socket), "--model", model, *door)}
        peers += ["--loader", self.services["loader"].address]
        self.services["tokenizer"] = Service("tokenizer", *door, *peers)
        peers += ["--tokenizer", self.services["tokenizer"].address, "--local-socket", str(self.local_socket)]
        self.services["executor"] = Service("executor", *door, *peers)

    def target(self, name: str) -> str:
        """A service's address, by the name in its certificate."""
        return f"localhost:{self.services[name].address.rpartition(':')[2]}"

    def stop(self) -> None:
        for service in reversed(self.services.values()):
            service.stop()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = Guarded(tmp_path_factory.mktemp("tls"))
    try:
        deadline = time.monotonic() + START_SECONDS
        while (error := check(made.target("executor"), OPS)) is not None:
            assert time.monotonic() < deadline, made.services["executor"].text
            assert error.reason is not Reason.PERMISSION_DENIED
            time.sleep(0.05)
        yield made
    finally:
        made.stop()


def client(guarded: Guarded, **arguments: Any) -> Client:
    return Client(guarded.target("executor"), **{"token": "client-key", **TRUST, **SHOW, **arguments})


def check(target: str, config: ClientConfig) -> ServiceError | None:
    """What a health check's call ends with; None for SERVING. STARTING stands for NOT_SERVING."""

    async def call() -> ServiceError | None:
        async with open_channel(target, config) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
            except grpc.aio.AioRpcError as error:
                return from_rpc_error(error, Reason.EXECUTOR_UNAVAILABLE)
            healthy = answer.status == health_pb2.HealthCheckResponse.SERVING
            return None if healthy else ServiceError(Reason.STARTING, "not serving")

    return asyncio.run(call())


def test_both_clients_with_all_that_is_wanted(guarded: Guarded) -> None:
    with client(guarded, token="client-other-key") as blocking:
        text = blocking.complete("hello", max_tokens=5, temperature=0).text

    async def complete() -> str:
        async with AsyncClient(guarded.target("executor"), token="client-key", **TRUST, **SHOW) as asynchronous:
            return (await asynchronous.complete("hello", max_tokens=5, temperature=0)).text

    assert asyncio.run(complete()) == text


def test_the_command_line_too(
    guarded: Guarded, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("clients: client-key\n")
    options = ["--server", guarded.target("executor"), "--token-file", str(tmp_path / "token")]
    options += ["--tls-root", str(TLS / "ca.pem")]
    options += ["--tls-certificate", str(TLS / "client.pem"), "--tls-key", str(TLS / "client.key")]
    assert run(["models", *options]) == 0
    assert "demo-gpt-oss" in capsys.readouterr().out
    assert run(["models", *options[:-2]]) == 2, "half a certificate"
    monkeypatch.setenv("MXGPT_TOKEN", "client-key")
    monkeypatch.setenv("MXGPT_CA", str(TLS / "ca.pem"))
    assert run(["models", *options[:2], *options[-4:]]) == 0
    with Client(guarded.target("executor"), **SHOW) as blocking:
        assert blocking.list_models()
    nameless = Client(guarded.target("executor"), token=None, **SHOW, retry=ONCE)
    with nameless, pytest.raises(MxgptError, match="bearer token"):
        nameless.list_models()


def test_commands_that_take_a_server_besides_a_model_show_it_the_same(
    guarded: Guarded, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("What is 12 + 30?\n")
    monkeypatch.setenv("MXGPT_TOKEN", "client-key")
    monkeypatch.setenv("MXGPT_CA", str(TLS / "ca.pem"))
    certificate = ["--tls-certificate", str(TLS / "client.pem"), "--tls-key", str(TLS / "client.key")]
    servers = ["--server", guarded.target("executor"), "--tokenizer", guarded.target("tokenizer")]
    assert run(["perplexity", str(tmp_path / "text"), *servers, *certificate]) == 0
    assert run(["evaluate", *servers[:2], *certificate, "--tasks", "2", "--minimum", "0"]) == 0
    # Services that serve for the while have no door, whatever the environment says.
    model = str(ROOT / "models" / "demo-gpt2.gguf")
    assert run(["perplexity", model, str(tmp_path / "text")]) == 0
    assert run(["evaluate", model, "--tasks", "2", "--minimum", "0"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"tls_root": None, "tls_certificate": None, "tls_key": None}, "EXECUTOR_UNAVAILABLE"),
        ({"tls_certificate": None, "tls_key": None}, "EXECUTOR_UNAVAILABLE"),
        (
            {"tls_certificate": TLS / "other-client.pem", "tls_key": TLS / "other-client.key"},
            "EXECUTOR_UNAVAILABLE",
        ),
        ({"tls_root": TLS / "other-ca.pem"}, "EXECUTOR_UNAVAILABLE"),
        ({"tls_server_name": "other.example"}, "EXECUTOR_UNAVAILABLE"),
        ({"token": None}, "UNAUTHENTICATED"),
        ({"token": "no-key"}, "UNAUTHENTICATED"),
    ],
    ids=[
        "plain text",
        "no certificate",
        "a strange certificate",
        "a strange server",
        "another name",
        "no key",
        "a wrong key",
    ],
)
@pytest.mark.parametrize("name", SERVICES)
def test_nothing_less_will_do(guarded: Guarded, name: str, arguments: dict[str, Any], reason: str) -> None:
    assert check(guarded.target(name), OPS) is None
    error = check(guarded.target(name), replace(OPS, **arguments))
    assert error is not None
    assert error.reason.name == reason


def test_the_name_may_be_told(guarded: Guarded) -> None:
    with client(guarded, tls_server_name="server.example") as named:
        assert named.list_models()


def test_who_may_only_generate_has_no_business_with_the_loader(guarded: Guarded) -> None:
    """Nor has a service with what decides over models; and what is refused does not happen."""
    calls = {
        "LoadModel": loader_pb2.LoadModelRequest(path=str(ROOT / "models" / "demo-gpt2.gguf")),
        "UnloadModel": loader_pb2.UnloadModelRequest(model="demo-gpt-oss"),
        "EstimateMemory": loader_pb2.EstimateMemoryRequest(path="/etc/passwd"),
        "ListModels": loader_pb2.ListModelsRequest(),
        "GetModel": loader_pb2.GetModelRequest(model="demo-gpt-oss"),
        "GetStatus": loader_pb2.GetStatusRequest(),
        "GetTokenizerData": loader_pb2.GetTokenizerDataRequest(),
        "Attach": loader_pb2.AttachRequest(executor_id="mine", layouts=["cpu.f32.v1"]),
    }
    assert set(calls) == {method.name for method in loader_pb2.DESCRIPTOR.services_by_name["LoaderService"].methods}

    async def outcomes(token: str) -> dict[str, str]:
        found = {}
        async with open_channel(guarded.target("loader"), replace(OPS, token=token)) as channel:
            stub: Any = loader_pb2_grpc.LoaderServiceStub(channel)
            for name, request in calls.items():
                call = getattr(stub, name)(request, timeout=20)
                try:
                    await (call.read() if isinstance(call, grpc.aio.UnaryStreamCall) else call)
                    found[name] = "open"
                    call.cancel()
                except grpc.aio.AioRpcError as error:
                    found[name] = from_rpc_error(error, Reason.LOADER_UNAVAILABLE).reason.name
        return found

    async def models() -> list[str]:
        async with open_channel(guarded.target("loader"), OPS) as channel:
            stub: Any = loader_pb2_grpc.LoaderServiceStub(channel)
            return [model.name for model in (await stub.ListModels(loader_pb2.ListModelsRequest())).models]

    assert asyncio.run(outcomes("client-key")) == dict.fromkeys(calls, "PERMISSION_DENIED")
    deciding = dict.fromkeys(["LoadModel", "UnloadModel", "EstimateMemory"], "PERMISSION_DENIED")
    assert asyncio.run(outcomes("peers-key")) == dict.fromkeys(calls, "open") | deciding
    assert asyncio.run(models()) == ["demo-gpt-oss"]


def test_nor_has_a_service_with_generating(guarded: Guarded) -> None:
    with client(guarded, token="peers-key", retry=ONCE) as peer, pytest.raises(MxgptError) as caught:
        peer.complete("hello", max_tokens=5)
    assert caught.value.reason == "PERMISSION_DENIED"


def test_a_ticket_works_once_and_for_nobody_else(guarded: Guarded) -> None:
    """Over the loader's own socket: a second use, a made-up ticket, and a process of another user."""

    async def attach() -> None:
        async with open_channel(guarded.target("loader"), replace(OPS, token="peers-key")) as channel:
            stub: Any = loader_pb2_grpc.LoaderServiceStub(channel)
            call = stub.Attach(loader_pb2.AttachRequest(executor_id="mine", layouts=["cpu.f32.v1"]))
            attached = (await call.read()).attached
            assert await asyncio.to_thread(answer, bytes(len(attached.ticket))) == REFUSED
            if os.getuid() == 0:
                assert await stranger(attached.ticket) in ("PermissionError", repr(REFUSED))
            await asyncio.to_thread(fetch, attached)
            assert await asyncio.to_thread(answer, attached.ticket) == REFUSED
            call.cancel()

    def answer(ticket: bytes) -> bytes:
        connection, given = present(guarded.socket, ticket)
        connection.close()
        return given

    def fetch(attached: Any) -> None:
        sizes = [allocation.bytes for allocation in attached.manifest.allocations]
        connection, _ = present(guarded.socket, attached.ticket)
        with connection:
            close_all(receive_descriptors(connection, sizes, 30))

    async def stranger(ticket: bytes) -> str:
        code = (
            "import os, socket, sys\n"
            "os.setgroups([]); os.setgid(12345); os.setuid(12345)\n"
            "connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)\n"
            "try:\n"
            "    connection.connect(sys.argv[1])\n"
            "    connection.sendall(bytes.fromhex(sys.argv[2]))\n"
            "    print(connection.recv(1))\n"
            "except PermissionError as error:\n"
            "    print(type(error).__name__)\n"
        )
        command = [sys.executable, "-c", code, str(guarded.socket), ticket.hex()]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        return output.decode().strip()

    asyncio.run(attach())


def test_a_request_is_its_callers_alone(guarded: Guarded) -> None:
    """Its id is of no use to another key, neither for cancelling it nor for taking it over."""
    (guarded.directory / "keys").write_text(KEYS + "rivals: rival-key\n")
    with client(guarded) as mine, client(guarded, token="rival-key", retry=ONCE) as rival:
        generation = mine.generate("hello", max_tokens=200, ignore_eos=True, seed=1, request_id="mine")
        next(generation)
        with pytest.raises(MxgptError) as caught:
            rival.cancel("mine")
        assert caught.value.reason == "REQUEST_NOT_FOUND"
        assert rival.complete("hello", max_tokens=3, request_id="mine").outputs
        resume = executor_pb2.Resume(
            digest=rival.list_models()[0].digest, prompt_token_ids=generation.result.prompt_token_ids, seed=1
        )
        taking_over = executor_pb2.GenerateRequest(request_id="mine", resume=resume)
        taking_over.stopping.max_tokens = 3
        assert list(rival._stub.Generate(taking_over, metadata=rival._connection.metadata))
        for _ in generation:
            pass
        assert len(generation.result.outputs[0].token_ids) == 200
        assert generation.result.num_resumes == 0

        generation = mine.generate("hello", max_tokens=200, ignore_eos=True, request_id="mine")
        next(generation)
        mine.cancel("mine")
        with pytest.raises(MxgptError, match="cancelled"):
            list(generation)


def test_a_service_that_is_turned_away_does_not_blame_its_caller(guarded: Guarded) -> None:
    """The executor's own key is taken out of the files; the client's is as good as ever."""
    without = "\n".join(line for line in KEYS.splitlines() if not line.startswith("peers:"))
    with client(guarded, retry=ONCE) as mine:
        try:
            (guarded.directory / "keys").write_text(without + "\n")
            with pytest.raises(MxgptError, match="turns this service away") as caught:
                mine.complete("hello", max_tokens=5)
            assert caught.value.reason == "TOKENIZER_UNAVAILABLE"
        finally:
            (guarded.directory / "keys").write_text(KEYS)
        assert mine.complete("hello", max_tokens=5).outputs


def test_a_key_with_all_its_calls_running_waits_for_one_to_end(guarded: Guarded) -> None:
    (guarded.directory / "keys").write_text(KEYS + "frugal: frugal-key max_calls=1\n")
    with client(guarded, token="frugal-key", retry=ONCE) as hasty, client(guarded, token="frugal-key") as patient:
        generation = hasty.generate("hello", max_tokens=1500, ignore_eos=True)
        next(generation)
        with pytest.raises(MxgptError, match="frugal has 1 of 1 calls running") as caught:
            hasty.complete("hello", max_tokens=2)
        assert (caught.value.reason, caught.value.retry_after) == ("KEY_LIMIT_REACHED", 1.0)
        assert hasty.list_models(), "asking is not counted"
        waiting = patient.generate("hello", max_tokens=2)
        timer = threading.Timer(0.5, generation.close)  # gives the call back while the patient one waits
        timer.start()
        assert list(waiting)
        timer.join()


def test_health_is_told_on_the_local_socket_without_a_certificate(guarded: Guarded) -> None:
    target = f"unix:{guarded.local_socket}"
    assert check(target, ClientConfig(token="peers-key")) is None
    error = check(target, ClientConfig())
    assert error is not None
    assert error.reason is Reason.UNAUTHENTICATED
    assert guarded.local_socket.stat().st_mode & 0o777 == 0o600


def test_certificates_and_authorities_are_exchanged_under_running_services(guarded: Guarded) -> None:
    """A stream that runs goes on; who connects anew meets the new certificate and the new authority."""
    directory = guarded.directory
    other = {"tls_certificate": TLS / "other-client.pem", "tls_key": TLS / "other-client.key"}

    def exchange(certificate: str, authority: str) -> None:
        for suffix in ("pem", "key"):  # for a moment the key is not the certificate's
            shutil.copy(TLS / f"{certificate}.{suffix}", directory / f"aside.{suffix}")
            os.replace(directory / f"aside.{suffix}", directory / f"server.{suffix}")
            for name in SERVICES:
                with contextlib.suppress(OSError):
                    served_by(guarded.target(name))
        shutil.copy(TLS / f"{authority}.pem", directory / "ca.pem")

    assert {served_by(guarded.target(name)) for name in SERVICES} == {pem(TLS / "server.pem")}
    with client(guarded) as before:
        generation = before.generate("hello", max_tokens=300, ignore_eos=True, seed=1)
        next(generation)
        try:
            exchange("server-next", "other-ca")
            for name in SERVICES:
                assert served_by(guarded.target(name)) == pem(TLS / "server-next.pem")
                assert check(guarded.target(name), replace(OPS, **other)) is None
                assert check(guarded.target(name), OPS) is not None
            for _ in generation:
                pass
            assert generation.result.num_resumes == 0
            assert before.complete("hello", max_tokens=2).outputs, "its connection stays"
        finally:
            exchange("server", "ca")
    for name in SERVICES:
        assert check(guarded.target(name), OPS) is None
        assert check(guarded.target(name), replace(OPS, **other)) is not None
        until(lambda name=name: "key values mismatch" in guarded.services[name].text)  # it was told, and lived through


def served_by(target: str) -> str:
    """The certificate that a server shows."""
    host, _, port = target.rpartition(":")
    context = ssl._create_unverified_context()
    with socket.create_connection((host, int(port)), 20) as plain, context.wrap_socket(plain) as connection:
        certificate = connection.getpeercert(binary_form=True)
    assert certificate is not None
    return ssl.DER_cert_to_PEM_cert(certificate)


def pem(path: Path) -> str:
    return ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(path.read_text()))


@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--listen", "0.0.0.0:0"], "refusing to listen on 0.0.0.0:0 without TLS"),
        (["--listen", "[::]:0", "--token-file", "KEYS"], "without TLS"),
        (["--tls-certificate", "CERTIFICATE"], "come together"),
        (["--tls-client-ca", "CERTIFICATE"], "--tls-client-ca needs"),
        (["--token-file", "CERTIFICATE"], "server.pem, line 1: "),
        (["--token-file", "/nowhere/keys"], "No such file"),
        (["--tls-certificate", "CERTIFICATE", "--tls-key", "KEYS"], "can't do TLS with"),
        (["--tls-certificate", "CERTIFICATE", "--tls-key", "/nowhere/key"], "can't do TLS with"),
    ],
)
def test_a_door_that_would_not_close_is_not_opened(name: str, options: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEYS)
    names = {"KEYS": str(tmp_path / "keys"), "CERTIFICATE": str(TLS / "server.pem")}
    service = Service(name, *(names.get(option, option) for option in options))
    assert service.process.wait(60) in (1, 2)
    service.joined()
    assert said in service.text
    assert "Traceback" not in service.text
    assert "BEGIN" not in service.text, "a line that is no key is not shown"


def test_a_loader_beyond_loopback_wants_to_know_its_callers(tmp_path: Path) -> None:
    certificate = ["--tls-certificate", str(TLS / "server.pem"), "--tls-key", str(TLS / "server.key")]
    options = ["--listen", "0.0.0.0:0", "--socket", str(tmp_path / "socket"), *certificate]
    service = Service("loader", *options)
    assert service.process.wait(60) == 2
    service.joined()
    assert "refusing to load models for whoever reaches" in service.text
    for more in (["--tls-client-ca", str(TLS / "ca.pem")], ["--allow-insecure"]):
        service = Service("loader", *options, *more)
        assert service.address
        assert service.stop() == 0
