"""The frame of a server, tried over a real port: errors, health, reflection, tokens, drain."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mxgpt.v1 import executor_pb2, executor_pb2_grpc
from shared.channel import open_channel, target_uri
from shared.config import ClientConfig, ServerConfig
from shared.errors import Reason, ServiceError, Status, invalid_field
from shared.rpc_errors import DETAILS_KEY, from_rpc_error, status_code
from shared.server import OVERALL, Server, servicer_method
from tests.calls import uncounted_calls
from tests.stack import ROOT

SERVICE = "mxgpt.v1.ExecutorService"


class Servicer(executor_pb2_grpc.ExecutorServiceServicer):
    """Answers by what the request id says."""

    def __init__(self) -> None:
        self.calls = uncounted_calls()
        self.closed = asyncio.Event()

    @servicer_method
    async def Cancel(self, request: Any, context: Any) -> Any:
        if request.request_id == "field":
            raise invalid_field("request_id", "must not be 'field'")
        if request.request_id == "full":
            raise ServiceError(Reason.QUEUE_FULL, "come back later", retry_after=1.5, metadata={"waiting": "9"})
        if request.request_id == "bug":
            raise KeyError("secret detail")
        return executor_pb2.CancelResponse(executor_id="here")

    @servicer_method
    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            yield executor_pb2.GenerateResponse(delta=executor_pb2.Delta(text="a"))
            if request.request_id == "fails":
                raise ServiceError(Reason.DRAINING, "stopping")
            await asyncio.Event().wait()
        finally:
            self.closed.set()


def serving(test: Callable[[str, Server, Servicer], Awaitable[None]], **config: Any) -> None:
    async def main() -> None:
        server = Server(ServerConfig("127.0.0.1:0", **config), [SERVICE])
        servicer = Servicer()
        executor_pb2_grpc.add_ExecutorServiceServicer_to_server(servicer, server.grpc)
        address = await server.start()
        try:
            await test(address, server, servicer)
        finally:
            await server.stop()

    asyncio.run(main())


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def test_every_reason_has_a_grpc_status() -> None:
    assert {status_code(reason.status).value[0] for reason in Reason} <= {status.value for status in Status}


def test_errors_travel_with_their_details() -> None:
    async def test(address: str, server: Server, servicer: Servicer) -> None:
        async with open_channel(address) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            error = await error_of(stub.Cancel(executor_pb2.CancelRequest(request_id="full")))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            back = from_rpc_error(error, Reason.EXECUTOR_UNAVAILABLE)
            assert (back.reason, back.retry_after, back.metadata) == (Reason.QUEUE_FULL, 1.5, {"waiting": "9"})
            error = await error_of(stub.Cancel(executor_pb2.CancelRequest(request_id="field")))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            details = status_pb2.Status.FromString(dict(error.trailing_metadata())[DETAILS_KEY])
            bad_request = error_details_pb2.BadRequest()
            assert details.details[1].Unpack(bad_request)
            assert bad_request.field_violations[0].field == "request_id"

    serving(test)


def test_a_defect_is_internal_and_tells_no_secret() -> None:
    async def test(address: str, server: Server, servicer: Servicer) -> None:
        async with open_channel(address) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            error = await error_of(stub.Cancel(executor_pb2.CancelRequest(request_id="bug")))
            assert error.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in error.details()
            assert from_rpc_error(error, Reason.EXECUTOR_UNAVAILABLE).metadata["reference"] in error.details()

    serving(test)


def test_a_server_that_stops_counts_as_unreachable() -> None:
    """gRPC ends calls that come at that moment with CANCELLED, though nobody has cancelled them."""
    errors: list[grpc.aio.AioRpcError] = []

    async def test(address: str, server: Server, servicer: Servicer) -> None:
        async with open_channel(address) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            await stub.Cancel(executor_pb2.CancelRequest())
            calls = [stub.Cancel(executor_pb2.CancelRequest()) for _ in range(50)]
            await asyncio.sleep(0.001)
            await server.grpc.stop(grace=1.0)
            answers = await asyncio.gather(*calls, return_exceptions=True)
            errors.extend(answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError))

    deadline = time.monotonic() + 30
    while not any(error.code() is grpc.StatusCode.CANCELLED for error in errors) and time.monotonic() < deadline:
        serving(test)
    assert any(error.code() is grpc.StatusCode.CANCELLED for error in errors)
    reasons = {from_rpc_error(error, Reason.TOKENIZER_UNAVAILABLE).reason for error in errors}
    assert reasons == {Reason.TOKENIZER_UNAVAILABLE}


def test_an_error_in_mid_stream_and_a_cancelled_stream_close_the_generator() -> None:
    async def test(address: str, server: Server, servicer: Servicer) -> None:
        async with open_channel(address) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            call = stub.Generate(executor_pb2.GenerateRequest(request_id="fails"))
            assert (await call.read()).delta.text == "a"
            error = await error_of(call.read())
            assert from_rpc_error(error, Reason.EXECUTOR_UNAVAILABLE).reason is Reason.DRAINING
            servicer.closed.clear()
            call = stub.Generate(executor_pb2.GenerateRequest(request_id="hangs"))
            assert (await call.read()).delta.text == "a"
            call.cancel()
            await asyncio.wait_for(servicer.closed.wait(), 30)

    serving(test)


def test_health_reflection_and_drain() -> None:
    async def test(address: str, server: Server, servicer: Servicer) -> None:
        async with open_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            statuses = health_pb2.HealthCheckResponse
            check = health_pb2.HealthCheckRequest(service=OVERALL)
            assert (await health.Check(check)).status == statuses.NOT_SERVING
            await server.set_health(OVERALL, True)
            assert (await health.Check(check)).status == statuses.SERVING
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = reflection.ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            names = {service.name for service in (await call.read()).list_services_response.service}
            assert {SERVICE, "grpc.health.v1.Health"} <= names
            call.cancel()
            during_drain = []

            async def drain() -> None:
                during_drain.append((await health.Check(check)).status)

            await server.stop(drain)
            assert during_drain == [statuses.NOT_SERVING]

    serving(test)


def test_whoever_asks_for_health_is_told_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    async def ask(address: str, *options: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "shared.health", address, "--timeout", "30", *options),
            cwd=ROOT,
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await process.communicate()
        return process.returncode, said.decode()

    async def test(address: str, server: Server, servicer: Servicer) -> None:
        assert await ask(address) == (1, f"{address}: it answers NOT_SERVING\n")
        await server.set_health(OVERALL, True)
        assert await ask(address) == (0, "")
        for wrong, options in (
            (": NOT_FOUND\n", ("--service", "mxgpt.nothing")),
            ("no authority", ("--peer-tls-root", str(no_authority))),
        ):
            code, said = await ask(address, *options)
            assert (code, said.count("\n")) == (1, 1), said
            assert said.startswith(f"{address}: ")
            assert wrong in said
        gone = "127.0.0.1:1"
        code, said = await ask(gone)
        assert (code, said.count("\n")) == (1, 1), said
        assert said.startswith(f"{gone}: UNAVAILABLE: ")

    no_authority = tmp_path / "no authority"
    serving(test)


def test_without_a_token_nothing_answers_not_even_health(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("# keys\nfirst-key\nsecond-key\n")

    async def test(address: str, server: Server, servicer: Servicer) -> None:
        for token in (None, "wrong-key", "# keys"):
            async with open_channel(address, ClientConfig(token=token)) as channel:
                stub = executor_pb2_grpc.ExecutorServiceStub(channel)
                error = await error_of(stub.Cancel(executor_pb2.CancelRequest()))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                error = await error_of(stub.Generate(executor_pb2.GenerateRequest()).read())
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                health = health_pb2_grpc.HealthStub(channel)
                error = await error_of(health.Check(health_pb2.HealthCheckRequest()))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        async with open_channel(address, ClientConfig(token="second-key")) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            assert (await stub.Cancel(executor_pb2.CancelRequest())).executor_id == "here"

    serving(test, token_files=(tokens,))


def test_strangers_need_tls_or_an_explicit_flag() -> None:
    with pytest.raises(ValueError, match="without TLS"):
        ServerConfig("0.0.0.0:50051")
    with pytest.raises(ValueError, match="without TLS"):
        ServerConfig("example.org:50051")
    ServerConfig("0.0.0.0:50051", allow_insecure=True)
    for local in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/socket"):
        ServerConfig(local)


def test_targets_become_uris() -> None:
    assert target_uri("executor:50051") == "dns:///executor:50051"
    assert target_uri("localhost:1,127.0.0.1:2") == "ipv4:127.0.0.1:1,127.0.0.1:2"
    assert target_uri("unix:/run/x") == "unix:/run/x"
    assert target_uri("dns:///a:1") == "dns:///a:1"
