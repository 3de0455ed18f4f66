"""A loader in this process, on a port of its own, for tests; and what they look at."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from mxgpt.v1 import loader_pb2, loader_pb2_grpc
from services.executor.loader_client import LoaderClient
from services.loader.config import LoaderConfig
from services.loader.main import Loader
from shared.channel import open_channel
from shared.config import ServerConfig
from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gpt_config import GPTConfig, is_matrix
from shared.layout import LAYOUTS
from shared.rpc_errors import from_rpc_error
from tests.tiny_models import WIDE_GPT2, WIDE_GPT_OSS, write_model


def write_gpt2(path: Path, config: GPTConfig = WIDE_GPT2, seed: int = 0) -> Path:
    """A small gpt2 file whose matrices are Q8_0, with a tokenizer."""
    return write_model(path, config, _q8_0, seed, tokenizer_metadata(config.vocab_size))


def write_gpt_oss(path: Path, config: GPTConfig = WIDE_GPT_OSS, seed: int = 0) -> Path:
    """A small gpt-oss file with MXFP4 experts, with a tokenizer."""
    return write_model(path, config, _mxfp4_experts, seed, tokenizer_metadata(config.vocab_size))


def tokenizer_metadata(vocab_size: int) -> dict[str, object]:
    """The keys of a vocabulary with one merge; its last token ends generation."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["t", "1", "t1", *(f"x{index}" for index in range(vocab_size - 4)), "<|endoftext|>"],
        "tokenizer.ggml.token_type": [1] * (vocab_size - 1) + [3],
        "tokenizer.ggml.eos_token_id": vocab_size - 1,
        "tokenizer.ggml.merges": ["t 1"],
        "tokenizer.chat_template": "{{ messages }}",
    }


def _q8_0(name: str) -> GGMLType:
    return GGMLType.Q8_0 if is_matrix(name) else GGMLType.F32


def _mxfp4_experts(name: str) -> GGMLType:
    return GGMLType.MXFP4 if name.endswith("_exps.weight") else _q8_0(name)


class Running:
    """A loader that runs, and a stub to call it."""

    def __init__(self, loader: Loader, address: str, channel: grpc.aio.Channel) -> None:
        self.loader = loader
        self.address = address
        self.stub = loader_pb2_grpc.LoaderServiceStub(channel)

    async def load(self, path: Path, **fields: Any) -> loader_pb2.Model:
        """Load a model; the last message's."""
        return (await self.load_messages(path, **fields))[-1].model

    async def load_messages(self, path: Path, **fields: Any) -> list[loader_pb2.LoadModelResponse]:
        call = self.stub.LoadModel(loader_pb2.LoadModelRequest(path=str(path), **fields))
        return [message async for message in call]

    async def num_leases(self) -> int:
        return (await self.stub.GetStatus(loader_pb2.GetStatusRequest())).num_leases


async def rest_of(call: Any) -> list[Any]:
    """The messages that a stream still has."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def refusal(call: Any) -> ServiceError:
    """The error that a call, unary or a stream, ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (rest_of(call) if hasattr(call, "read") else call)
    error = from_rpc_error(caught.value, Reason.LOADER_UNAVAILABLE)
    assert error.status.value == caught.value.code().value[0]
    return error


def asynchronous(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test that is a coroutine function."""

    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        asyncio.run(test(*arguments, **fixtures))

    return run


@contextlib.asynccontextmanager
async def running_loader(directory: Path, *models: Path, **options: Any) -> AsyncIterator[Running]:
    """A loader that has loaded `models`; its socket lies in `directory`."""
    config = LoaderConfig(ServerConfig("127.0.0.1:0"), directory / "loader.sock", models, num_threads=2, **options)
    loader = Loader(config)
    address = await loader.start()
    try:
        assert await loader.load_at_start()
        async with open_channel(address) as channel:
            await channel.channel_ready()  # a server of an earlier test may have had this port: gRPC remembers
            yield Running(loader, address, channel)
    finally:
        await loader.stop()


@contextlib.asynccontextmanager
async def attached(address: str, executor_id: str = "executor", model: str = "") -> AsyncIterator[LoaderClient]:
    """An executor's client that holds a lease; its attachment is `client.attachment`."""
    client = LoaderClient(address)
    try:
        await client.attach(model, LAYOUTS, executor_id)
        yield client
    finally:
        await client.close()


async def until(condition: Callable[[], Awaitable[bool] | bool], seconds: float = 60.0) -> float:
    """Wait for a condition; returns the seconds that it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        holds = condition()
        if not isinstance(holds, bool):
            holds = await holds
        if holds:
            return loop.time() - began
        assert loop.time() - began < seconds, "what was waited for did not happen"
        await asyncio.sleep(0.002)


def is_open(path: Path) -> bool:
    """Whether this process has a file open."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if descriptor.readlink() == path:
                return True
    return False


def mapped_weights() -> set[str]:
    """Inodes of the weights that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "mxgpt-weights" in line}


def num_memfds(process_id: int | str = "self") -> int:
    """Descriptors of weights that a process has open."""
    directory = f"/proc/{process_id}/fd"
    links = []
    for name in os.listdir(directory):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"{directory}/{name}"))
    return sum("memfd:mxgpt-weights" in link for link in links)
