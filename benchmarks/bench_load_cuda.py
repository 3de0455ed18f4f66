"""gpt-oss-20b into a GPU's memory, and executors over it: how fast, beside what limits it, and in how much memory.

python -m benchmarks.bench_load_cuda [--folder /tmp] [--layers 24]

Writes a file of gpt-oss-20b's full size with random weights (12.1 GB) into the folder, unless it is there, and starts
a loader, a tokenizer and two executors. Each figure stands beside the limit that was measured in the same run: the
link from page-locked memory to the GPU, and a plain sequential read of the same file where it comes from the disk.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.gpt_oss_file import GPT_OSS_20B, write_file
from mxgpt.child import Child
from mxgpt.v1 import executor_pb2, executor_pb2_grpc, loader_pb2, loader_pb2_grpc
from services.loader.cuda.stream import Stream, pin
from shared.cuda_estimate import CONTEXT_BYTES, MAX_BATCH_TOKENS, MAX_RUNNING, workspace_bytes
from shared.cuda_memory import CudaDevice
from shared.digest import READ_BYTES
from shared.gpt_config import GPTConfig

NUM_THREADS = min(16, os.cpu_count() or 1)
LINK_BYTES = 256 << 20
KV_MIB = 4096  # of an executor
SAMPLE_SECONDS = 0.01
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where the file is written")
    parser.add_argument("--layers", type=int, default=24, help="of the model, for a quick look")
    arguments = parser.parse_args()
    config = replace(GPT_OSS_20B, num_layers=arguments.layers)
    path = arguments.folder / f"gpt-oss-20b-{arguments.layers}-layers.gguf"
    if not path.exists():
        start = time.perf_counter()
        num_bytes = write_file(path, config)
        print(f"wrote {path}, {num_bytes:,} bytes, in {time.perf_counter() - start:.1f} s")
    print(f"link, page-locked memory to the GPU: {measure_link():.1f} GB/s")
    print(f"page cache to memory, {NUM_THREADS} threads: {read_by_threads(path):.1f} GB/s")
    asyncio.run(Bench(path, config).run())


class Bench:
    """The services over one file, as processes of their own."""

    def __init__(self, path: Path, config: GPTConfig) -> None:
        self._path = path
        self._own_bytes = workspace_bytes(config, MAX_BATCH_TOKENS, MAX_RUNNING) + CONTEXT_BYTES + (KV_MIB << 20)
        self._size = path.stat().st_size
        self._log: list[str] = []

    async def run(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--socket", f"{folder}/loader.sock", "--device", "cuda:0", "--threads", str(NUM_THREADS)]
            async with self._child("loader", options) as (loader, address):
                channel = grpc.aio.insecure_channel(address)
                stub: Any = loader_pb2_grpc.LoaderServiceStub(channel)
                await self._load(stub, loader)
                await self._executors(stub, address)
                await channel.close()

    async def _load(self, stub: Any, loader: Child) -> None:
        alone = await used_bytes(stub)
        for _ in range(3):
            seconds, host_bytes = await self._timed_load(stub, loader)
            print(
                f"page cache to ready: {seconds:.2f} s, {self._size / seconds / 1e9:.1f} GB/s; "
                f"anonymous memory of the loader {host_bytes / 2**20:.0f} MiB at most, beside its page-locked buffers"
            )
            self._print_phases("weights are in memory")
            await stub.UnloadModel(loader_pb2.UnloadModelRequest(model="m"))
        cached = drop_from_cache(self._path)
        rate = read_in_order(self._path)
        print(f"disk, in order: {rate:.2f} GB/s ({cached:.0%} of the file was still cached)")
        cached = drop_from_cache(self._path)
        seconds, _ = await self._timed_load(stub, loader)
        loaded = self._size / seconds / 1e9
        print(
            f"disk to ready: {seconds:.2f} s, {loaded:.2f} GB/s, {loaded / rate:.0%} of it ({cached:.0%} still cached)"
        )
        self._print_phases("weights are in memory")
        status = await stub.GetStatus(loader_pb2.GetStatusRequest())
        print(
            f"VRAM: loader alone {alone / GIB:.2f} GiB, with the model {status.used_bytes / GIB:.2f}; "
            f"planes {status.resident_bytes / GIB:.2f}, resident: {', '.join(status.resident_models)}"
        )

    async def _executors(self, stub: Any, loader: str) -> None:
        async with self._child("tokenizer", ["--loader", loader]) as (_, tokenizer):
            options = [
                "--loader",
                loader,
                "--tokenizer",
                tokenizer,
                "--device",
                "cuda:0",
                "--kv-memory-mib",
                str(KV_MIB),
            ]
            async with self._child("executor", options) as (_, address):
                await first_token(address)  # kernels are compiled, the tokenizer is built
            before = await used_bytes(stub)
            async with contextlib.AsyncExitStack() as stack:
                for number in (1, 2):
                    self._log.clear()
                    start = time.perf_counter()
                    _, address = await stack.enter_async_context(self._child("executor", options))
                    await first_token(address)
                    print(f"executor {number}: first token {time.perf_counter() - start:.2f} s after its start")
                    self._print_phases("has started", "serving m")
                    after = await used_bytes(stub)
                    grown = (after - before) / GIB
                    print(f"    VRAM grew by {grown:.2f} GiB; {self._own_bytes / GIB:.2f} expected, without weights")
                    before = after

    async def _timed_load(self, stub: Any, loader: Child) -> tuple[float, int]:
        """Seconds from the call to the model's being ready, and the most anonymous memory that the loader had."""
        self._log.clear()
        watch = asyncio.create_task(watch_memory(loader))
        start = time.perf_counter()
        call = stub.LoadModel(loader_pb2.LoadModelRequest(path=str(self._path), name="m"))
        messages = [message async for message in call]
        seconds = time.perf_counter() - start
        watch.cancel()
        assert messages[-1].HasField("model")
        return seconds, max(await asyncio.gather(watch))

    @contextlib.asynccontextmanager
    async def _child(self, name: str, options: list[str]) -> AsyncIterator[tuple[Child, str]]:
        child = Child(name, name, "127.0.0.1:0", options, lambda _, line: self._log.append(line))
        await child.start()
        listening = asyncio.create_task(child.address())
        ended = asyncio.create_task(child.wait())
        try:
            await asyncio.wait([listening, ended], return_when=asyncio.FIRST_COMPLETED)
            assert listening.done(), "\n".join(self._log)
            yield child, listening.result()
        finally:
            ended.cancel()
            await child.stop(10.0)

    def _print_phases(self, *marks: str) -> None:
        for line in self._log:
            if any(mark in line for mark in marks):
                print(f"    {line}")


async def watch_memory(child: Child) -> int:
    """The most anonymous memory that a process has until this is cancelled."""
    most = 0
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            most = max(most, anonymous_bytes(child.process_id))
            await asyncio.sleep(SAMPLE_SECONDS)
    return most


def anonymous_bytes(process_id: int) -> int:
    status = Path(f"/proc/{process_id}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


async def used_bytes(stub: Any) -> int:
    """Of the GPU's memory, by all processes."""
    return int((await stub.GetStatus(loader_pb2.GetStatusRequest())).used_bytes)


async def first_token(address: str) -> None:
    """Wait for an executor that serves, and for a token of it."""
    request = executor_pb2.GenerateRequest(
        token_ids=executor_pb2.TokenIds(ids=[1, 2, 3, 4]), stopping=executor_pb2.Stopping(max_tokens=1)
    )
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = executor_pb2_grpc.ExecutorServiceStub(channel)
        while True:
            try:
                async for _ in stub.Generate(request, wait_for_ready=True):
                    return
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            await asyncio.sleep(0.005)


def measure_link() -> float:
    """GB a second, in copies as large as a load's."""
    device = CudaDevice(0)
    with Stream(device) as stream:
        buffer, address = pin(device, LINK_BYTES), stream.allocate(LINK_BYTES)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            for offset in range(0, LINK_BYTES, READ_BYTES):
                stream.upload(address + offset, buffer[offset : offset + READ_BYTES])
            stream.synchronize()
            times.append(time.perf_counter() - start)
    return LINK_BYTES / statistics.median(times) / 1e9


def read_by_threads(path: Path) -> float:
    """GB a second of a whole file that is in the page cache, by all threads."""
    buffers = [np.zeros(READ_BYTES, np.uint8) for _ in range(NUM_THREADS)]
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(NUM_THREADS) as pool:

        def read(thread: int) -> None:
            for offset in range(thread * READ_BYTES, size, NUM_THREADS * READ_BYTES):
                os.preadv(file.fileno(), [buffers[thread].data], offset)

        start = time.perf_counter()
        list(pool.map(read, range(NUM_THREADS)))
        return size / (time.perf_counter() - start) / 1e9


def read_in_order(path: Path) -> float:
    """GB a second of a plain sequential read."""
    buffer = bytearray(8 << 20)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(buffer):
            pass
    return path.stat().st_size / (time.perf_counter() - start) / 1e9


def drop_from_cache(path: Path) -> float:
    """Make the kernel forget a file's pages; the share that it keeps all the same."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mapped(file.fileno()) as (address, num_bytes):
            resident = (ctypes.c_ubyte * -(-num_bytes // mmap.PAGESIZE))()
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), resident):
                raise OSError(ctypes.get_errno(), "mincore")
            return float((np.frombuffer(resident, np.uint8) & 1).mean())


@contextlib.contextmanager
def mapped(descriptor: int) -> Iterator[tuple[int, int]]:
    """Where a file is mapped, and in how many bytes."""
    with mmap.mmap(descriptor, 0) as mapping:
        view = (ctypes.c_ubyte * len(mapping)).from_buffer(mapping)
        yield ctypes.addressof(view), len(mapping)
        del view


if __name__ == "__main__":
    main()
