"""The services under many clients, rude ones among them: does every stream end once, and does everything come back?

python -m benchmarks.bench_load [--streams 500] [--rounds 3]

Over the gpt-oss demo model on the CPU, plain gRPC calls without retries arrive at random. Of them 30 % are cancelled
at random, 10 % stop reading after their first message, 10 % have a deadline that is too short; the rest read to the
end. Prompts and lengths are mixed. After each round the executor must be as idle as at the start: no sequence, every
KV block free or in the prefix cache, the same number of open descriptors. At last more requests come at once than the
queue holds. Exits with 1 if anything of this is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_status import rpc_status

from models.train.tasks import held_out_tasks
from mxgpt.bundled import find_model
from mxgpt.cli.terminal import note, print_table
from mxgpt.serve import ServeConfig, Supervisor
from mxgpt.v1 import executor_pb2, executor_pb2_grpc

ARRIVAL_SECONDS = 5.0  # over which a round's streams begin
STALL_SECONDS = 5.0  # after which the server gives a reader up
MAX_WAITING = 512
KINDS = {"reads": 0.5, "cancels": 0.3, "stops reading": 0.1, "short deadline": 0.1}
LONGEST_ROUND = 180.0  # seconds


@dataclass
class Stream:
    """One call and how it went."""

    kind: str
    outcomes: list[str] = field(default_factory=list)  # must be one in the end
    first_token: float = 0.0  # seconds since the call
    gaps: list[float] = field(default_factory=list)  # seconds between messages with text


class Callers:
    """Plain clients of one executor."""

    def __init__(self, address: str, seed: int) -> None:
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

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def status(self) -> Any:
        return await self._stubs[0].GetStatus(executor_pb2.ExecutorServiceGetStatusRequest())

    async def round(self, num_streams: int) -> list[Stream]:
        """Streams that arrive over `ARRIVAL_SECONDS`, all of them ended."""
        kinds = self._random.choices(list(KINDS), list(KINDS.values()), k=num_streams)
        calls = [self._call(kind, self._random.random() * ARRIVAL_SECONDS) for kind in kinds]
        return await asyncio.wait_for(asyncio.gather(*calls), LONGEST_ROUND)

    async def flood(self, num_streams: int) -> list[Stream]:
        """Streams that all come at once."""
        return await asyncio.wait_for(
            asyncio.gather(*(self._call("reads", 0.0) for _ in range(num_streams))), LONGEST_ROUND
        )

    def _request(self, kind: str) -> Any:
        content = " ".join(self._random.choices(self._prompts, k=self._random.choice([1, 1, 1, 4, 12])))
        stalls = kind == "stops reading"  # log-probabilities, to have more than transport's own buffers hold
        return executor_pb2.GenerateRequest(
            chat=executor_pb2.Chat(messages=[executor_pb2.ChatMessage(role="user", content=content)]),
            sampling=executor_pb2.Sampling(temperature=1.0, seed=self._random.getrandbits(32)),
            stopping=executor_pb2.Stopping(
                max_tokens=600 if stalls else self._random.choice([8, 32, 64, 128]), ignore_eos=stalls
            ),
            output=executor_pb2.Output(logprobs=20) if stalls else None,
        )

    async def _call(self, kind: str, delay: float) -> Stream:
        stream = Stream(kind)
        request = self._request(kind)
        patience = self._random.uniform(0.05, 2.0)
        stub = self._random.choice(self._stubs)
        await asyncio.sleep(delay)
        call = stub.Generate(request, timeout=0.05 if kind == "short deadline" else None)
        cancelling = asyncio.get_running_loop().call_later(patience, call.cancel) if kind == "cancels" else None
        try:
            await self._read(call, stream)
        except grpc.aio.AioRpcError as error:
            stream.outcomes.append(error.code().name + _detail(error))
        except asyncio.CancelledError:
            stream.outcomes.append("CANCELLED")
        if cancelling is not None:
            cancelling.cancel()
        return stream

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
                    if stream.kind == "stops reading":
                        await asyncio.sleep(3 * STALL_SECONDS)  # and then sees how it ended
                last = now


def _detail(error: grpc.aio.AioRpcError) -> str:
    """The reason that an error carries, and whether it says when to try again."""
    with contextlib.suppress(ValueError):
        status = rpc_status.from_call(error)
        if status is not None:
            names = [detail.type_url.rpartition(".")[2] for detail in status.details]
            return " with RetryInfo" if "RetryInfo" in names else ""
    return ""


def services() -> dict[str, int]:
    """Process ids of the services below this process, by name; the engine is one of them."""
    found: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            for word in words:
                if word.startswith("services.") and _is_below(int(entry.name), os.getpid()):
                    found[word.removeprefix("services.").removeprefix("executor.")] = int(entry.name)
    return found


def _is_below(process_id: int, ancestor: int) -> bool:
    while process_id > 1:
        if process_id == ancestor:
            return True
        process_id = int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def resources(process_ids: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Open descriptors, and resident MB without shared pages, of each service."""
    found = {}
    for name, process_id in process_ids.items():
        folder = Path(f"/proc/{process_id}")
        lines = (line.split(":") for line in (folder / "status").read_text().splitlines())
        anonymous = next(int(value.split()[0]) for key, value in lines if key == "RssAnon")
        found[name] = (len(list((folder / "fd").iterdir())), anonymous // 1024)
    return found


def percentiles(values: Sequence[float]) -> list[str]:
    """p50, p90, p99 and the largest, in milliseconds."""
    return [f"{1000 * value:.0f}" for value in (*np.percentile(values, [50, 90, 99]), max(values))]


async def until_idle(callers: Callers) -> Any:
    """The executor's status once it has nothing left to do; how it is after 30 s if it has."""
    deadline = time.monotonic() + 30
    while True:
        status = await callers.status()
        if (status.num_running == status.num_waiting == 0) or time.monotonic() > deadline:
            return status
        await asyncio.sleep(0.05)


async def measure(num_streams: int, num_rounds: int) -> list[str]:
    """Run it all and print it; what is not as it should be."""
    wrong: list[str] = []
    options = ("--write-stall-seconds", str(STALL_SECONDS), "--max-waiting", str(MAX_WAITING))
    async with Supervisor(ServeConfig(find_model(), drain_seconds=1.0, executor_options=options)) as supervisor:
        before, rows = None, []
        for number in range(num_rounds):
            callers = Callers(supervisor.address, number)
            start = time.monotonic()
            streams = await callers.round(num_streams)
            seconds = time.monotonic() - start
            status = await until_idle(callers)
            await callers.close()
            await asyncio.sleep(1.0)
            now = resources(services())
            wrong += check_streams(streams) + check_idle(status)
            firsts = [stream.first_token for stream in streams if stream.first_token]
            gaps = [gap for stream in streams if stream.kind != "stops reading" for gap in stream.gaps]
            rows.append([str(number + 1), f"{seconds:.1f}", *percentiles(firsts), *percentiles(gaps)])
            print_outcomes(streams)
            held = "; ".join(f"{name} {fds}, {megabytes}" for name, (fds, megabytes) in sorted(now.items()))
            print(f"  open descriptors, private MB: {held}")
            if not any("DEADLINE_EXCEEDED" in stream.outcomes for stream in streams if stream.kind == "stops reading"):
                wrong.append("no client that stopped reading was given up")
            if before is not None:
                wrong += [
                    f"{name}: {before[name][0]} open descriptors, then {fds}"
                    for name, (fds, _) in now.items()
                    if fds > before[name][0] + 2
                ]
            before = now
        names = ["p50", "p90", "p99", "max"]
        print_table(["round", "seconds", *(f"first {n}" for n in names), *(f"gap {n}" for n in names)], rows)
        callers = Callers(supervisor.address, num_rounds)
        flood = await callers.flood(MAX_WAITING + 300)
        status = await until_idle(callers)
        await callers.close()
        print(f"{len(flood)} at once:")
        print_outcomes(flood)
        wrong += check_streams(flood) + check_idle(status)
        if not any("RESOURCE_EXHAUSTED with RetryInfo" in stream.outcomes for stream in flood):
            wrong.append("the queue refused nobody with RetryInfo")
    return wrong


def check_streams(streams: Sequence[Stream]) -> list[str]:
    """Streams that did not end exactly once."""
    return [f"a stream that {s.kind} ended in {s.outcomes}" for s in streams if len(s.outcomes) != 1]


def check_idle(status: Any) -> list[str]:
    """What an executor without work still holds."""
    held = [
        f"{usage.group}: {usage.num_blocks - usage.num_free} KV blocks are lost"
        for usage in status.blocks  # of which those in the prefix cache count as free
        if usage.num_free < usage.num_blocks
    ]
    if status.num_running or status.num_waiting:
        held.append(f"{status.num_running} sequences run and {status.num_waiting} wait")
    return held


def print_outcomes(streams: Sequence[Stream]) -> None:
    """How the streams of each kind ended."""
    for kind in KINDS:
        counts = Counter(outcome for stream in streams if stream.kind == kind for outcome in stream.outcomes)
        if counts:
            print(f"  {kind}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))


def main() -> int:
    """Returns 0 if everything is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    note(f"{os.cpu_count()} cores; {arguments.streams} streams over {ARRIVAL_SECONDS:.0f} s, {arguments.rounds} rounds")
    wrong = asyncio.run(measure(arguments.streams, arguments.rounds))
    for each in sorted(set(wrong)):
        print(f"WRONG: {each} ({wrong.count(each)} times)")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
