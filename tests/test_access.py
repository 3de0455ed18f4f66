"""The door of a server, tried over a real port: keys, roles, limits, sizes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mxgpt.v1 import executor_pb2, executor_pb2_grpc, loader_pb2, loader_pb2_grpc
from shared.channel import open_channel
from shared.config import ClientConfig, ServerConfig
from shared.errors import Reason, ServiceError
from shared.rpc_errors import MAX_MESSAGE_BYTES, from_rpc_error
from shared.server import OVERALL, Server, servicer_method
from tests.calls import uncounted_calls

KEYS = """
alice: alice-key
bob: bob-key max_calls=2
bob: bob-other-key max_calls=2
peers: peers-key role=service
ops: ops-key role=admin
probe: probe-key role=health
old: old-key expires=2020-01-01T00:00:00Z
"""


class Executor(executor_pb2_grpc.ExecutorServiceServicer):
    """Streams that last until they are cancelled, and calls that tell who made them."""

    def __init__(self, server: Server) -> None:
        self.calls = uncounted_calls()
        self.server = server
        self.num_parsed = 0

    @servicer_method
    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.num_parsed += 1
        yield executor_pb2.GenerateResponse(delta=executor_pb2.Delta(text="a"))
        if request.request_id == "fails":
            raise KeyError("a defect")
        await asyncio.Event().wait()

    @servicer_method
    async def Cancel(self, request: Any, context: Any) -> Any:
        return executor_pb2.CancelResponse(executor_id=self.server.caller(context))

    @servicer_method
    async def GetStatus(self, request: Any, context: Any) -> Any:
        raise ServiceError(Reason.MODEL_NOT_FOUND, "no model " + "ü" * 100_000)


class Loader(loader_pb2_grpc.LoaderServiceServicer):
    """Answers where it is asked, which is what roles are about."""

    def __init__(self) -> None:
        self.calls = uncounted_calls()

    @servicer_method
    async def ListModels(self, request: Any, context: Any) -> Any:
        return loader_pb2.ListModelsResponse()

    @servicer_method
    async def UnloadModel(self, request: Any, context: Any) -> Any:
        return loader_pb2.UnloadModelResponse(freed_bytes=1)


class Caller:
    """Calls with one key."""

    def __init__(self, address: str, token: str | None) -> None:
        self.channel = open_channel(address, ClientConfig(token=token))
        self.executor: Any = executor_pb2_grpc.ExecutorServiceStub(self.channel)
        self.loader: Any = loader_pb2_grpc.LoaderServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)
        self.reflection: Any = reflection_pb2_grpc.ServerReflectionStub(self.channel)

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def stream(self, request_id: str = "") -> Any:
        """A Generate call whose first message has come."""
        call = self.executor.Generate(executor_pb2.GenerateRequest(request_id=request_id))
        assert (await call.read()).delta.text == "a"
        return call


def guarded(test: Callable[[str, Executor], Awaitable[None]], tmp_path: Path, keys: str | None = KEYS) -> None:
    """Run a test against a server that has the keys."""

    async def main() -> None:
        paths = []
        if keys is not None:
            (tmp_path / "keys").write_text(keys)
            paths = [tmp_path / "keys"]
        server = Server(ServerConfig("127.0.0.1:0", token_files=tuple(paths)), ["mxgpt.v1.ExecutorService"])
        executor = Executor(server)
        executor_pb2_grpc.add_ExecutorServiceServicer_to_server(executor, server.grpc)
        loader_pb2_grpc.add_LoaderServiceServicer_to_server(Loader(), server.grpc)
        address = await server.start()
        await server.set_health(OVERALL, True)
        try:
            await asyncio.wait_for(test(address, executor), 60)
        finally:
            await server.stop()

    asyncio.run(main())


async def error_of(call: Awaitable[Any]) -> ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value, Reason.EXECUTOR_UNAVAILABLE)


def test_no_key_a_wrong_one_and_an_old_one_open_nothing(tmp_path: Path) -> None:
    async def test(address: str, executor: Executor) -> None:
        for token in (None, "alice", "alice-key2", "alice:", "old-key"):
            async with Caller(address, token) as caller:
                for call in (
                    caller.executor.Cancel(executor_pb2.CancelRequest()),
                    caller.executor.Generate(executor_pb2.GenerateRequest()).read(),
                    caller.loader.ListModels(loader_pb2.ListModelsRequest()),
                    caller.health.Check(health_pb2.HealthCheckRequest()),
                    caller.health.Watch(health_pb2.HealthCheckRequest()).read(),
                    caller.reflection.ServerReflectionInfo().read(),
                ):
                    error = await error_of(call)
                    assert error.reason is Reason.UNAUTHENTICATED
                    assert ("expired on 2020-01-01" in error.message) == (token == "old-key")
        assert executor.num_parsed == 0

    guarded(test, tmp_path)


def test_what_a_stranger_sends_is_not_parsed(tmp_path: Path) -> None:
    """No message of the contract, and no error about that: nobody has looked."""

    async def test(address: str, executor: Executor) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            error = await error_of(channel.unary_unary("/mxgpt.v1.ExecutorService/Cancel")(b"\xff" * 1000))
            assert error.reason is Reason.UNAUTHENTICATED
            entry = (("authorization", "Bearer alice-key"),)
            error = await error_of(channel.unary_unary("/mxgpt.v1.ExecutorService/Cancel")(b"\xff", metadata=entry))
            assert error.reason is Reason.EXECUTOR_UNAVAILABLE, "gRPC's own INTERNAL, without a reason of ours"
            error = await error_of(channel.unary_unary("/mxgpt.v1.Nothing/Here")(b""))
            assert "UNIMPLEMENTED" in error.message

    guarded(test, tmp_path)


@pytest.mark.parametrize(
    "header", ["alice-key", "Basic alice-key", "Bearer", "Bearer  alice-key", "Bearer alice-key x"]
)
def test_the_header_must_be_a_bearers(tmp_path: Path, header: str) -> None:
    async def test(address: str, executor: Executor) -> None:
        async with Caller(address, None) as caller:
            call = caller.executor.Cancel(executor_pb2.CancelRequest(), metadata=(("authorization", header),))
            assert (await error_of(call)).reason is Reason.UNAUTHENTICATED
            call = caller.executor.Cancel(
                executor_pb2.CancelRequest(), metadata=(("authorization", "bearer alice-key"),)
            )
            assert (await call).executor_id == "alice"

    guarded(test, tmp_path)


@pytest.mark.parametrize(
    ("token", "opens_executor", "opens_listing", "opens_unloading"),
    [
        ("alice-key", True, False, False),
        ("peers-key", False, True, False),
        ("ops-key", True, True, True),
        ("probe-key", False, False, False),
    ],
)
def test_a_role_opens_its_methods_and_no_others(
    tmp_path: Path, token: str, opens_executor: bool, opens_listing: bool, opens_unloading: bool
) -> None:
    async def test(address: str, executor: Executor) -> None:
        async with Caller(address, token) as caller:
            for call, opens in (
                (caller.executor.Cancel(executor_pb2.CancelRequest()), opens_executor),
                (caller.executor.Generate(executor_pb2.GenerateRequest()).read(), opens_executor),
                (caller.loader.ListModels(loader_pb2.ListModelsRequest()), opens_listing),
                (caller.loader.UnloadModel(loader_pb2.UnloadModelRequest()), opens_unloading),
            ):
                if opens:
                    await call
                else:
                    assert (await error_of(call)).reason is Reason.PERMISSION_DENIED

    guarded(test, tmp_path)


@pytest.mark.parametrize(("keys", "token"), [(None, None), (KEYS, "alice-key"), (KEYS, "probe-key")])
def test_health_and_reflection_work_with_keys_and_without(tmp_path: Path, keys: str | None, token: str | None) -> None:
    async def test(address: str, executor: Executor) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        async with Caller(address, token) as caller:
            assert (await caller.health.Check(health_pb2.HealthCheckRequest())).status == serving
            watch = caller.health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == serving
            await executor.server.set_health(OVERALL, False)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
            call = caller.reflection.ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            names = {service.name for service in (await call.read()).list_services_response.service}
            assert "mxgpt.v1.ExecutorService" in names
            call.cancel()

    guarded(test, tmp_path, keys)


def test_a_limit_is_reached_and_given_back_however_a_call_ends(tmp_path: Path) -> None:
    async def when_free(caller: Caller, request_id: str = "") -> Any:
        """A stream, as soon as the calls that were ended are over at the server, too."""
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    return await caller.stream(request_id)
                await asyncio.sleep(0.01)

    async def test(address: str, executor: Executor) -> None:
        bob, bob_again, alice = (Caller(address, token) for token in ("bob-key", "bob-other-key", "alice-key"))
        async with bob, bob_again, alice:
            for ending in ("cancelled", "failed", "cancelled"):
                running = [await when_free(bob), await when_free(bob_again, "fails" if ending == "failed" else "")]
                if ending == "failed":
                    with pytest.raises(grpc.aio.AioRpcError, match="INTERNAL"):
                        await running.pop().read()
                    running.append(await when_free(bob))
                for caller in (bob, bob_again):
                    error = await error_of(caller.executor.Generate(executor_pb2.GenerateRequest()).read())
                    assert (error.reason, error.retry_after) == (Reason.KEY_LIMIT_REACHED, 1.0)
                    assert "bob has 2 of 2 calls" in error.message
                cancelled = await bob.executor.Cancel(executor_pb2.CancelRequest())
                assert cancelled.executor_id == "bob", "cancelling is always possible"
                await bob.health.Check(health_pb2.HealthCheckRequest())
                alices = [await alice.stream() for _ in range(3)]  # another's limit is not hers
                for call in (*running, *alices):
                    call.cancel()

    guarded(test, tmp_path)


def test_a_key_taken_out_of_the_file_is_refused_at_once(tmp_path: Path) -> None:
    async def test(address: str, executor: Executor) -> None:
        async with Caller(address, "alice-key") as alice, Caller(address, "alice-new-key") as renewed:
            running = await alice.stream()
            assert (await error_of(renewed.executor.Cancel(executor_pb2.CancelRequest()))).reason is (
                Reason.UNAUTHENTICATED
            )
            (tmp_path / "keys").write_text("alice: alice-new-key\n")
            assert (await renewed.executor.Cancel(executor_pb2.CancelRequest())).executor_id == "alice"
            assert (await error_of(alice.executor.Cancel(executor_pb2.CancelRequest()))).reason is (
                Reason.UNAUTHENTICATED
            )
            assert not running.done(), "what runs may end"
            running.cancel()

    guarded(test, tmp_path)


def test_a_client_follows_its_token_file(tmp_path: Path) -> None:
    async def test(address: str, executor: Executor) -> None:
        path = tmp_path / "token"
        path.write_text("alice-key\n")
        async with open_channel(address, ClientConfig(token_file=path)) as channel:
            stub: Any = executor_pb2_grpc.ExecutorServiceStub(channel)
            assert (await stub.Cancel(executor_pb2.CancelRequest())).executor_id == "alice"
            path.write_text("ops: ops-key\n")
            assert (await stub.Cancel(executor_pb2.CancelRequest())).executor_id == "ops"

    guarded(test, tmp_path)


def test_a_message_too_large_is_refused_and_hurts_nobody(tmp_path: Path) -> None:
    async def test(address: str, executor: Executor) -> None:
        no_bound = [("grpc.max_send_message_length", -1)]
        entry = (("authorization", "Bearer alice-key"),)
        async with grpc.aio.insecure_channel(address, options=no_bound) as channel:
            stub: Any = executor_pb2_grpc.ExecutorServiceStub(channel)
            for request in (
                stub.Generate(executor_pb2.GenerateRequest(text="x" * (17 << 20)), metadata=entry).read(),
                stub.Cancel(executor_pb2.CancelRequest(request_id="x" * (17 << 20)), metadata=entry),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await request
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert executor.num_parsed == 0
            assert (await stub.Cancel(executor_pb2.CancelRequest(), metadata=entry)).executor_id == "alice"
            many = (*entry, *((f"header-{number}", "x" * 1000) for number in range(100)))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Cancel(executor_pb2.CancelRequest(), metadata=many)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    guarded(test, tmp_path)


def test_an_error_that_quotes_too_much_is_cut_and_arrives(tmp_path: Path) -> None:
    async def test(address: str, executor: Executor) -> None:
        async with Caller(address, "alice-key") as caller:
            error = await error_of(caller.executor.GetStatus(executor_pb2.ExecutorServiceGetStatusRequest()))
            assert error.reason is Reason.MODEL_NOT_FOUND
            assert MAX_MESSAGE_BYTES - 8 < len(error.message.encode()) <= MAX_MESSAGE_BYTES
            assert error.message.endswith("ü...")

    guarded(test, tmp_path)
