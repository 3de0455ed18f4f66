"""Clients that read slowly, not at all, or only ping: they cost nobody else anything, and end with a status."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mxgpt.v1 import executor_pb2, executor_pb2_grpc
from services.executor.config import ExecutorConfig
from services.executor.engine_spawn import EngineProcess, start_engine
from services.executor.executor import Executor
from shared.channel import CHANNEL_OPTIONS
from shared.config import ClientConfig, ServerConfig
from shared.errors import Reason, Status
from shared.health import is_healthy
from tests.calls import chat, collect, error_of, greedy
from tests.stack import Stack, engine_of, free_ports, running, until

PROMPT = "Write a haiku about the sea."
SMALL_WINDOWS = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384)]  # what is not read waits there
STALL_SECONDS = 3.0  # more than a busy machine keeps a client that does read
MANY_BYTES = chat(  # more than a connection's buffers hold
    PROMPT, sampling=greedy(), stopping={"max_tokens": 1000, "ignore_eos": True}, output={"logprobs": 20}
)


@pytest.fixture(scope="module")
def impatient(demo_gpt_oss: Path) -> Iterator[Stack]:
    options = ["--write-stall-seconds", str(STALL_SECONDS), "--drain-seconds", "2"]
    with running(demo_gpt_oss, executor_options=options) as stack:
        yield stack


def stub_of(channel: grpc.Channel) -> Any:
    return executor_pb2_grpc.ExecutorServiceStub(channel)


def num_output_tokens(stub: Any) -> int:
    status = stub.GetStatus(executor_pb2.ExecutorServiceGetStatusRequest(), timeout=10)
    return int(status.num_output_tokens)


def is_idle(stub: Any) -> bool:
    status = stub.GetStatus(executor_pb2.ExecutorServiceGetStatusRequest(), timeout=10)
    return not status.num_running and all(group.num_free == group.num_blocks for group in status.blocks)


def ends_of(stack: Stack, reason: str) -> list[str]:
    """The executor's lines about streams that ended for this reason."""
    return [line for line in stack.executor.log if "Generate ended" in line and reason in line]


def test_a_client_that_stops_reading_is_given_up_and_others_read_on(impatient: Stack) -> None:
    with (
        grpc.insecure_channel(impatient.address, SMALL_WINDOWS) as slow_channel,
        grpc.insecure_channel(impatient.address) as channel,
    ):
        stub = stub_of(channel)
        quiet = collect(stub.Generate(MANY_BYTES, timeout=60))
        stalled = [stub_of(slow_channel).Generate(MANY_BYTES) for _ in range(3)]
        firsts = [next(iter(call)) for call in stalled]
        assert collect(stub.Generate(MANY_BYTES, timeout=60)).token_ids() == quiet.token_ids()
        until(lambda: is_idle(stub), 60)  # although nobody has read on
        until(lambda: len(ends_of(impatient, "CLIENT_STALLED")) == 3)
        for first, call in zip(firsts, stalled, strict=True):
            received = [first]
            error = error_of(_kept(call, received))
            assert (error.reason, error.status) == (Reason.CLIENT_STALLED, Status.DEADLINE_EXCEEDED)
            token_ids = [token_id for response in received for token_id in response.delta.token_ids]
            assert token_ids == quiet.token_ids()[: len(token_ids)]
            assert len(token_ids) < 1000


def test_a_stream_is_cancelled_at_once_whether_it_is_read_or_not(stack: Stack) -> None:
    with (
        grpc.insecure_channel(stack.address, SMALL_WINDOWS) as slow_channel,
        grpc.insecure_channel(stack.address) as channel,
    ):
        request = executor_pb2.GenerateRequest()
        request.CopyFrom(MANY_BYTES)
        request.request_id, request.sampling.n, request.stopping.max_tokens = "unread", 4, 1900
        num_before = num_output_tokens(stub_of(channel))
        call = stub_of(slow_channel).Generate(request)
        next(iter(call))
        time.sleep(0.5)  # what connections hold is full, and a write waits
        stub = stub_of(channel)
        stub.Cancel(executor_pb2.CancelRequest(request_id="unread"), timeout=10)
        until(lambda: is_idle(stub), 30)  # a stall would take 60 s to show
        assert num_output_tokens(stub) - num_before < 4 * 1900
        call.cancel()


def test_a_client_that_never_reads_does_not_hold_up_a_drain(demo_gpt_oss: Path) -> None:
    options = ["--write-stall-seconds", "60", "--drain-seconds", "1"]
    with (
        running(demo_gpt_oss, executor_options=options) as stack,
        grpc.insecure_channel(stack.address, SMALL_WINDOWS) as channel,
    ):
        call = stub_of(channel).Generate(MANY_BYTES)
        next(iter(call))
        assert stack.executor.stop() == 0  # which gives it a third of the stall


def test_no_task_stays_behind(stack: Stack) -> None:
    """An executor in this very process: after calls that end in every way, its loop runs what it ran before."""

    async def main(engine: EngineProcess) -> None:
        address = f"127.0.0.1:{free_ports(1)[0]}"
        config = ExecutorConfig(ServerConfig(address), ClientConfig(), stack.loader.address, stack.tokenizer.address)
        running = asyncio.create_task(Executor(config, engine).run())
        while not await is_healthy(address, ClientConfig(), "", 10.0):
            await asyncio.sleep(0.05)
        async with grpc.aio.insecure_channel(address) as channel:
            await end_in_every_way(stub_of(channel))
        await asyncio.sleep(1.0)
        num_tasks = len(asyncio.all_tasks())
        async with grpc.aio.insecure_channel(address) as channel:
            await asyncio.gather(*(end_in_every_way(stub_of(channel)) for _ in range(8)))
        async with asyncio.timeout(30):  # what a call leaves for the loop to do takes a busy machine its time
            while len(asyncio.all_tasks()) > num_tasks:
                await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running == 0

    with start_engine("cpu", 1, "INFO", "text") as engine:
        asyncio.run(main(engine))


async def end_in_every_way(stub: Any) -> None:
    """Streams that are read, cancelled, too late, refused."""
    short = chat(PROMPT, sampling=greedy(), stopping={"max_tokens": 20})
    assert [response async for response in stub.Generate(short)]
    endless = chat(PROMPT, sampling=greedy(), stopping={"ignore_eos": True})
    cancelled = stub.Generate(endless)
    await cancelled.read()
    cancelled.cancel()
    with pytest.raises(grpc.aio.AioRpcError):
        await _read_all(stub.Generate(endless, timeout=0.2))
    with pytest.raises(grpc.aio.AioRpcError):
        await _read_all(stub.Generate(chat(PROMPT, sampling={"top_p": 7.0})))


@pytest.mark.slow
def test_a_long_quiet_stream_outlives_its_keepalive_pings(demo_gpt_oss: Path) -> None:
    """Pings every 11 s, as close as servers allow, while nothing comes for 40 s; then the stream goes on."""
    options = [*((name, value) for name, value in CHANNEL_OPTIONS if name != "grpc.keepalive_time_ms")]
    options.append(("grpc.keepalive_time_ms", 11_000))
    request = chat(PROMPT, sampling=greedy(), stopping={"max_tokens": 600, "ignore_eos": True})
    with running(demo_gpt_oss) as stack, grpc.insecure_channel(stack.address, options) as channel:
        quiet = collect(stub_of(channel).Generate(request, timeout=60))
        call = stub_of(channel).Generate(request, timeout=120)
        first = next(iter(call))
        engine = engine_of(stack.executor)
        os.kill(engine, signal.SIGSTOP)
        time.sleep(40)
        os.kill(engine, signal.SIGCONT)
        assert collect([first, *call]).token_ids() == quiet.token_ids()


def _kept(call: Any, received: list[Any]) -> Iterator[Any]:
    """A call's responses, each added to `received` too."""
    for response in call:
        received.append(response)
        yield response


async def _read_all(call: Any) -> None:
    async for _ in call:
        pass
