"""Clients for load tests: plain gRPC calls without retries, polite and rude, and how each of them ended."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from grpc_status import rpc_status

from models.train.tasks import held_out_tasks
from mxgpt.v1 import executor_pb2, executor_pb2_grpc

T = TypeVar("T")

READS, CANCELS, STALLS, SHORT = "reads", "cancels", "stops reading", "short deadline"
KINDS = {READS: 0.5, CANCELS: 0.3, STALLS: 0.1, SHORT: 0.1}  # shares of a round
SHORT_DEADLINE = 0.05  # seconds
LONGEST_ROUND = 600.0  # seconds


@dataclass
class Stream:
    """One call and how it went."""

    kind: str
    outcomes: list[str] = field(default_factory=list)  # must be one in the end
    first_token: float = 0.0  # seconds since the call
    gaps: list[float] = field(default_factory=list)  # seconds between messages with text


class Clients:
    """Plain clients of one executor.

    A client that stops reading does so until nobody else reads, the engine is idle, and `stall_seconds` have passed;
    then it sees how its stream ended.

    Args:
        address: of the executor.
        seed: of everything that is random about them.
    """

    def __init__(self, address: str, seed: int, stall_seconds: float = 0.0) -> None:
        # Own connections with small windows, so that what is not read soon waits at the server.
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 16384),
        ]
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(16)]
        self._stubs: list[Any] = [executor_pb2_grpc.ExecutorServiceStub(channel) for channel in self._channels]
        self._random = random.Random(seed)
        self._prompts = [task.prompt for task in held_out_tasks(seed, 200)]
        self._stall_seconds = stall_seconds
        self._num_open: Counter[str] = Counter()  # streams, by kind
        self.max_open = 0  # streams at once
        self._read_on = asyncio.Event()  # for those that have stopped

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def status(self) -> Any:
        """What the executor's engine is doing."""
        return await self._stubs[0].GetStatus(executor_pb2.ExecutorServiceGetStatusRequest())

    async def until_idle(self, seconds: float = 30.0) -> Any:
        """The executor's status once it has nothing left to do; how it is after `seconds` if it has."""
        deadline = time.monotonic() + seconds
        while True:
            status = await self.status()
            if (status.num_running == status.num_waiting == 0) or time.monotonic() > deadline:
                return status
            await asyncio.sleep(0.05)

    async def mixed(self, num_clients: int, seconds: float) -> list[Stream]:
        """Clients that come at random within `seconds`, and go on for as long: streams of every kind, all ended.

        From the last one's coming to the first one's going, each has a stream open.
        """
        streams = await self._all([self._client(seconds) for _ in range(num_clients)], seconds)
        return list(itertools.chain(*streams))

    async def _client(self, seconds: float) -> list[Stream]:
        await asyncio.sleep(self._random.random() * seconds)
        end = time.monotonic() + seconds
        streams: list[Stream] = []
        while not streams or time.monotonic() < end:
            (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
            streams.append(await self.call(kind))
        return streams

    async def at_once(self, kinds: list[str], num_tokens: int | None = None) -> list[Stream]:
        """Streams that all come at once, of `num_tokens` each, or of any length; all of them ended."""
        return await self._all([self.call(kind, num_tokens) for kind in kinds])

    async def _all(self, work: Sequence[Coroutine[Any, Any, T]], seconds: float = 0.0) -> list[T]:
        """Results of work that lasts for at least `seconds`, those that stop reading included."""
        self._read_on.clear()
        waking = asyncio.create_task(self._wake_when_quiet(seconds))
        try:
            return await asyncio.wait_for(asyncio.gather(*work), LONGEST_ROUND)
        finally:
            waking.cancel()

    async def _wake_when_quiet(self, seconds: float) -> None:
        await asyncio.sleep(2 * seconds)  # all have come
        while self._num_open.total() > self._num_open[STALLS]:
            await asyncio.sleep(0.1)
        await self.until_idle(LONGEST_ROUND)
        await asyncio.sleep(self._stall_seconds)
        self._read_on.set()

    async def call(self, kind: str, num_tokens: int | None = None) -> Stream:
        """One stream."""
        stream = Stream(kind)
        call = self._random.choice(self._stubs).Generate(
            self._request(kind, num_tokens), timeout=SHORT_DEADLINE if kind == SHORT else None
        )
        patience = self._random.uniform(0.05, 2.0)
        cancelling = asyncio.get_running_loop().call_later(patience, call.cancel) if kind == CANCELS else None
        self._num_open[kind] += 1
        self.max_open = max(self.max_open, self._num_open.total())
        try:
            await self._read(call, stream)
        except grpc.aio.AioRpcError as error:
            # Of a stream that has finished, the client's own deadline may come before its status does.
            is_too_late = kind == SHORT and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if not (stream.outcomes and is_too_late):
                stream.outcomes.append(error.code().name + _detail(error))
        except asyncio.CancelledError:
            if not stream.outcomes:  # else it was cancelled too late, likewise
                stream.outcomes.append("CANCELLED")
        self._num_open[kind] -= 1
        if cancelling is not None:
            cancelling.cancel()
        return stream

    async def seconds_to_free(self, num_beside: int) -> tuple[float, int]:
        """Cancel a stream that runs beside others; seconds and steps until its blocks are free."""
        call, *beside = calls = [self._stubs[0].Generate(self._request(READS, 2000)) for _ in range(1 + num_beside)]
        for each in calls:
            for _ in range(4):
                await each.read()
        before = await self.status()
        assert before.num_running == len(calls)
        begin = time.monotonic()
        call.cancel()
        while (status := await self.status()).num_running == len(calls):
            pass
        seconds = time.monotonic() - begin
        for each in beside:
            each.cancel()
        await self.until_idle()
        return seconds, status.num_steps - before.num_steps

    def _request(self, kind: str, num_tokens: int | None) -> Any:
        content = " ".join(self._random.choices(self._prompts, k=self._random.choice([1, 1, 1, 4, 12])))
        stalls = kind == STALLS  # log-probabilities, to have more than transport's own buffers hold
        max_tokens = num_tokens or (600 if stalls else self._random.choice([8, 32, 64, 128]))
        return executor_pb2.GenerateRequest(
            chat=executor_pb2.Chat(messages=[executor_pb2.ChatMessage(role="user", content=content)]),
            sampling=executor_pb2.Sampling(temperature=1.0, seed=self._random.getrandbits(32)),
            stopping=executor_pb2.Stopping(max_tokens=max_tokens, ignore_eos=stalls or num_tokens is not None),
            output=executor_pb2.Output(logprobs=20) if stalls else None,
        )

    async def _read(self, call: Any, stream: Stream) -> None:
        last = start = time.monotonic()
        while True:
            response = await call.read()
            if response is grpc.aio.EOF:
                return
            event = response.WhichOneof("event")
            if event == "finished":
                stream.outcomes.append(executor_pb2.FinishReason.Name(response.finished.reason))
            elif event == "delta":
                now = time.monotonic()
                if stream.first_token:
                    stream.gaps.append(now - last)
                else:
                    stream.first_token = now - start
                    if stream.kind == STALLS:
                        await self._read_on.wait()
                last = now


def _detail(error: grpc.aio.AioRpcError) -> str:
    """Whether an error says when to try again."""
    with contextlib.suppress(ValueError):
        status = rpc_status.from_call(error)
        if status is not None:
            names = [detail.type_url.rpartition(".")[2] for detail in status.details]
            return " with RetryInfo" if "RetryInfo" in names else ""
    return ""
