"""Leases: executors share one memory, can't change it, and lose their lease the moment they die."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mxgpt.v1 import loader_pb2
from services.executor.loader_client import LoaderClient
from services.executor.weights import Weights
from shared.errors import Reason, ServiceError
from shared.gguf import read_gguf
from shared.layout import BLOCKS_LAYOUT, FLOAT32_LAYOUT, LAYOUTS, plane_array
from tests.loader_harness import (
    asynchronous,
    attached,
    mapped_weights,
    num_memfds,
    refusal,
    running_loader,
    until,
    write_gpt2,
    write_gpt_oss,
)
from tests.tiny_models import WIDE_GPT2

ATTACHED_PROCESS = """
import asyncio, sys
from services.executor.loader_client import LoaderClient
from shared.layout import LAYOUTS

async def main():
    client = LoaderClient(sys.argv[1])
    attachment = await client.attach("", LAYOUTS, sys.argv[2])
    views = attachment.map()
    print("attached", sum(int(view[0]) for view in views), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def start_attached(address: str, executor_id: str) -> asyncio.subprocess.Process:
    """A process that holds a lease and maps the memory."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ATTACHED_PROCESS, address, executor_id, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert (await asyncio.wait_for(process.stdout.readline(), 60)).startswith(b"attached")
    return process


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt_oss(tmp_path_factory.mktemp("models") / "small-gpt-oss.gguf")


@pytest.mark.parametrize("budget", [1 << 30, 0])
@asynchronous
async def test_attached_weights_are_those_of_the_file(tmp_path: Path, gpt_oss: Path, budget: int) -> None:
    async with running_loader(tmp_path, gpt_oss, float32_budget=budget) as running, attached(running.address) as client:
        manifest = client.attachment.manifest
        assert manifest.layout == (FLOAT32_LAYOUT if budget else BLOCKS_LAYOUT)
        shared = client.attachment.map()
        own = Weights.from_gguf(read_gguf(gpt_oss), manifest.config, budget)
        for tensor in own._tensors.values():
            for mine, theirs in zip(tensor.planes, manifest.tensors[tensor.name].planes, strict=True):
                expected = plane_array(mine, own._buffers[mine.allocation])
                np.testing.assert_array_equal(plane_array(theirs, shared[theirs.allocation]), expected)


@asynchronous
async def test_two_executors_share_one_memory_and_neither_can_write(tmp_path: Path, gpt_oss: Path) -> None:
    async with (
        running_loader(tmp_path, gpt_oss) as running,
        attached(running.address, "one") as one,
        attached(running.address, "two") as two,
    ):
        first, second = one.attachment, two.attachment
        assert first.manifest == second.manifest
        for mine, theirs in zip(first.descriptors, second.descriptors, strict=True):
            assert mine != theirs
            assert os.fstat(mine).st_ino == os.fstat(theirs).st_ino
            with pytest.raises(PermissionError):
                os.pwrite(mine, b"x", 0)
        view = first.map()[0]
        with pytest.raises(TypeError):
            view[0] = 1
        array = np.frombuffer(view, np.uint8)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        assert await running.num_leases() == 2
        model = (await running.stub.GetModel(loader_pb2.GetModelRequest(model="small-gpt-oss"))).model
        assert list(model.holders) == ["one", "two"]
        error = await refusal(running.stub.UnloadModel(loader_pb2.UnloadModelRequest(model="small-gpt-oss")))
        assert error.reason is Reason.MODEL_IN_USE
        assert "one, two" in error.message


@asynchronous
async def test_a_killed_process_loses_its_lease_at_once(tmp_path: Path, gpt_oss: Path) -> None:
    async with running_loader(tmp_path, gpt_oss) as running:
        processes = [await start_attached(running.address, f"executor-{i}") for i in range(2)]
        assert len(running.loader.leases) == 2
        processes[0].kill()
        # A few milliseconds, where nothing else runs; by pings that are not answered it would be noticed after 40 s.
        await until(lambda: len(running.loader.leases) == 1, 20)
        assert running.loader.leases.holders(running.loader.store.find("")) == ("executor-1",)
        processes[1].kill()
        await until(lambda: not running.loader.leases)
        await asyncio.gather(*(process.wait() for process in processes))
        await running.stub.UnloadModel(loader_pb2.UnloadModelRequest(model="small-gpt-oss"))
        assert num_memfds() == 0


@asynchronous
async def test_memory_outlives_the_lease_and_ends_with_its_last_user(tmp_path: Path) -> None:
    path = write_gpt2(tmp_path / "model.gguf")
    mapped_before = mapped_weights()
    async with running_loader(tmp_path, path) as running, attached(running.address) as client:
        assert client.attachment is not None
        view = client.attachment.map()[0]
        before = bytes(view[:1000])
        await client.close()
        await until(lambda: not running.loader.leases)
        await running.stub.UnloadModel(loader_pb2.UnloadModelRequest(model="model"))
        assert bytes(view[:1000]) == before
        assert mapped_weights() - mapped_before
        del view
        assert not mapped_weights() - mapped_before


@asynchronous
async def test_attaching_in_vain_leaves_nothing(tmp_path: Path, gpt_oss: Path) -> None:
    async with running_loader(tmp_path, gpt_oss) as running:
        for model, layouts, reason in (
            ("unknown", LAYOUTS, Reason.MODEL_NOT_FOUND),
            ("", ("cuda.v1",), Reason.LAYOUT_UNSUPPORTED),
        ):
            client = LoaderClient(running.address)
            with pytest.raises(ServiceError) as caught:
                await client.attach(model, layouts, "executor")
            assert caught.value.reason is reason
            assert not client.attached.is_set()
            await client.close()
        open_before = num_memfds()
        running.loader._handover.path.unlink()
        client = LoaderClient(running.address)
        with pytest.raises(ServiceError, match=r"loader\.sock") as caught:
            await client.attach("", LAYOUTS, "executor")
        assert caught.value.reason is Reason.LOADER_UNAVAILABLE
        await until(lambda: not running.loader.leases)
        await client.close()
        assert num_memfds() == open_before
    client = LoaderClient(running.address)
    with pytest.raises(ServiceError) as caught:
        await client.attach("", LAYOUTS, "executor")
    assert caught.value.reason is Reason.LOADER_UNAVAILABLE
    await client.close()


@asynchronous
async def test_a_refused_ticket_says_so(tmp_path: Path, gpt_oss: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_loader(tmp_path, gpt_oss) as running:
        monkeypatch.setattr(running.loader._handover, "_allowed_uids", frozenset())
        client = LoaderClient(running.address)
        with pytest.raises(ServiceError, match="--allow-uid") as caught:
            await client.attach("", LAYOUTS, "executor")
        assert caught.value.reason is Reason.TICKET_INVALID
        await client.close()


@asynchronous
async def test_unsealed_memory_is_not_mapped(tmp_path: Path, gpt_oss: Path) -> None:
    async with running_loader(tmp_path, gpt_oss) as running:
        model = running.loader.store.find("")
        descriptors = model.descriptors
        unsealed = os.memfd_create("mxgpt-weights-unsealed", os.MFD_ALLOW_SEALING)
        os.ftruncate(unsealed, model.sizes[0])
        model.descriptors = (unsealed, *descriptors[1:])
        client = LoaderClient(running.address)
        with pytest.raises(ServiceError, match="not sealed"):
            await client.attach("", LAYOUTS, "executor")
        await client.close()
        os.close(unsealed)
        model.descriptors = descriptors


@asynchronous
async def test_many_allocations_pass_in_several_messages(tmp_path: Path) -> None:
    path = write_gpt2(
        tmp_path / "deep.gguf",
        dataclasses.replace(
            WIDE_GPT2, num_layers=70, hidden_size=32, num_heads=4, num_kv_heads=4, head_size=8, ffn_size=32
        ),
    )
    async with running_loader(tmp_path, path) as running, attached(running.address) as client:
        assert len(client.attachment.map()) == 71
