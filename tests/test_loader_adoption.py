"""Adoption: loaders die and come back, the weights stay where they are."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from mxgpt.v1 import loader_pb2, loader_pb2_grpc
from services.executor import loader_client
from services.executor.loader_client import LoaderClient
from shared.channel import open_channel
from shared.descriptors import create_memory
from shared.errors import Reason
from shared.layout import LAYOUTS
from shared.manifest_proto import manifest_to_proto
from tests.loader_harness import (
    Running,
    asynchronous,
    attached,
    num_memfds,
    refusal,
    rest_of,
    running_loader,
    until,
    write_gpt2,
)
from tests.stack import Service


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_client, "MIN_BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(loader_client, "MAX_BACKOFF_SECONDS", 0.1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gpt2(tmp_path / "model.gguf")


@contextlib.asynccontextmanager
async def orphaned(directory: Path, model: Path) -> AsyncIterator[LoaderClient]:
    """A client whose loader has ended, and which follows to whatever loader its channel is pointed to."""
    async with running_loader(directory, model) as running:
        client = LoaderClient(running.address)
        await client.attach("", LAYOUTS, "survivor")
    await until(lambda: not client.attached.is_set())
    try:
        yield client
    finally:
        await client.close()


def attach_request(client: LoaderClient) -> loader_pb2.AttachRequest:
    assert client.attachment is not None
    held = manifest_to_proto(client.attachment.manifest)
    return loader_pb2.AttachRequest(executor_id="survivor", layouts=LAYOUTS, held=held)


async def bring(running: Running, client: LoaderClient, descriptors: tuple[int, ...] | None = None):
    """Attach to another loader with what the client holds, handing over `descriptors`; the open call."""
    assert client.attachment is not None
    call = running.stub.Attach(attach_request(client))
    first = await call.read()
    assert first.attached.adopt
    copies = [os.dup(descriptor) for descriptor in descriptors or client.attachment.descriptors]
    await asyncio.to_thread(loader_client._bring, first.attached, copies, client.attachment.sizes)
    return call


async def has_no_lease(channel: grpc.aio.Channel) -> bool:
    stub = loader_pb2_grpc.LoaderServiceStub(channel)
    return (await stub.GetStatus(loader_pb2.GetStatusRequest())).num_leases == 0


def inodes(client: LoaderClient) -> list[int]:
    assert client.attachment is not None
    return [os.fstat(descriptor).st_ino for descriptor in client.attachment.descriptors]


@asynchronous
async def test_a_killed_loader_finds_its_memory_again(tmp_path: Path, model: Path) -> None:
    """kill -9; the executor serves on, the next loader reads no file, and a second executor shares the old memory."""
    socket = str(tmp_path / "loader.sock")
    loader = Service("loader", "--socket", socket, "--model", str(model))
    address = loader.address
    loader.wait_healthy()
    async with attached(address, "survivor") as survivor:
        assert survivor.attachment is not None
        views = survivor.attachment.map()
        before = bytes(views[0])
        loader.kill()
        await until(lambda: not survivor.attached.is_set())
        assert bytes(views[0]) == before
        model.rename(tmp_path / "gone.gguf")
        again = Service("loader", "--socket", socket, "--listen", address)
        try:
            await until(survivor.attached.is_set)
            await until(lambda: "adopted" in again.text)
            async with attached(again.address, "newcomer", "model") as newcomer:
                assert newcomer.attachment is not None
                assert inodes(newcomer) == inodes(survivor)
                assert newcomer.attachment.manifest == survivor.attachment.manifest
                assert bytes(newcomer.attachment.map()[0]) == before
            await survivor.close()
            assert num_memfds(again.process.pid) == len(views)
        finally:
            assert again.stop() == 0


@asynchronous
async def test_an_executor_without_a_descriptor_to_spare_tries_again(tmp_path: Path, model: Path) -> None:
    socket = str(tmp_path / "loader.sock")
    loader = Service("loader", "--socket", socket, "--model", str(model))
    loader.wait_healthy()
    async with attached(loader.address, "survivor") as survivor:
        loader.kill()
        await until(lambda: not survivor.attached.is_set())
        model.rename(tmp_path / "gone.gguf")
        failed: list[int] = []
        dup = os.dup

        def dup_once_exhausted(descriptor: int) -> int:
            if not failed:
                failed.append(descriptor)
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return dup(descriptor)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loader_client.os, "dup", dup_once_exhausted)
            again = Service("loader", "--socket", socket, "--listen", loader.address)
            try:
                await until(survivor.attached.is_set)
                assert failed
            finally:
                again.stop()


@asynchronous
async def test_a_loader_that_preloads_waits_for_the_memory_of_the_one_before(tmp_path: Path, model: Path) -> None:
    options = ("--socket", str(tmp_path / "loader.sock"), "--model", str(model))
    loader = Service("loader", *options)
    address = loader.address
    loader.wait_healthy()
    async with attached(address, "survivor") as survivor:
        assert loader.stop() == 0, "an orderly end under leases leaves the socket as a sign, too"
        again = Service("loader", "--listen", address, *options)
        try:
            await asyncio.to_thread(again.wait_healthy)
            await until(survivor.attached.is_set)
            async with attached(address, "newcomer") as newcomer:
                assert inodes(newcomer) == inodes(survivor)
            assert "adopted" in again.text
            assert "loaded" not in again.text
            await survivor.close()
            async with open_channel(address) as channel:
                await until(lambda: has_no_lease(channel))
        finally:
            assert again.stop() == 0
    assert not (tmp_path / "loader.sock").exists(), "nobody can bring memory: the next start need not wait"


@asynchronous
async def test_adopted_memory_serves_everything_a_loaded_one_does(tmp_path: Path, model: Path) -> None:
    async with orphaned(tmp_path, model) as client, running_loader(tmp_path) as running:
        call = await bring(running, client)
        await until(lambda: len(running.loader.leases) == 1)
        described = (await running.stub.GetModel(loader_pb2.GetModelRequest(model="model"))).model
        assert list(described.holders) == ["survivor"]
        pieces = await rest_of(running.stub.GetTokenizerData(loader_pb2.GetTokenizerDataRequest()))
        assert pieces[0].header.digest == described.digest
        assert (await running.load(model)).digest == described.digest, "the same files: no second copy"
        assert num_memfds() == 2 * len(client.attachment.descriptors)
        call.cancel()
        await until(lambda: not running.loader.leases)
        await running.stub.UnloadModel(loader_pb2.UnloadModelRequest(model="model"))
        assert num_memfds() == len(client.attachment.descriptors)


@asynchronous
async def test_tokenizer_data_of_an_adopted_model_wants_the_file_it_came_from(tmp_path: Path, model: Path) -> None:
    async with orphaned(tmp_path, model) as client, running_loader(tmp_path) as running:
        call = await bring(running, client)
        await until(lambda: len(running.loader.leases) == 1)
        request = loader_pb2.GetTokenizerDataRequest()
        kept = model.read_bytes()
        model.unlink()
        assert (await refusal(running.stub.GetTokenizerData(request))).reason is Reason.MODEL_NOT_FOUND
        write_gpt2(model, seed=7)
        error = await refusal(running.stub.GetTokenizerData(request))
        assert error.reason is Reason.MODEL_CHANGED
        error = await refusal(running.stub.LoadModel(loader_pb2.LoadModelRequest(path=str(model))))
        assert error.reason is Reason.MODEL_NAME_IN_USE
        model.write_bytes(kept)
        assert await rest_of(running.stub.GetTokenizerData(request))
        call.cancel()


@asynchronous
async def test_two_holders_bring_the_memory_once(tmp_path: Path, model: Path) -> None:
    async with orphaned(tmp_path, model) as client, running_loader(tmp_path) as running:
        call = await bring(running, client)
        second = running.stub.Attach(attach_request(client))
        first = (await second.read()).attached
        assert not first.adopt
        assert first.ticket == b""
        await until(lambda: len(running.loader.leases) == 2)
        assert num_memfds() == 2 * len(client.attachment.descriptors)
        call.cancel()
        second.cancel()


@asynchronous
async def test_memory_that_is_not_what_was_said_is_refused(tmp_path: Path, model: Path) -> None:
    async with orphaned(tmp_path, model) as client, running_loader(tmp_path) as running:
        descriptors, sizes = client.attachment.descriptors, client.attachment.sizes
        before = num_memfds()
        unsealed = create_memory("unsealed", sizes[0])
        for wrong, why in (((unsealed, *descriptors[1:]), "not sealed"), (descriptors[::-1], "bytes, not|SHA-256")):
            error = await refusal(await bring(running, client, wrong))
            assert error.reason is Reason.FIELD_INVALID
            assert error.field.startswith("held.allocations[")
            assert any(part in error.message for part in why.split("|"))
        lie = attach_request(client)
        lie.held.allocations[1].sha256 = "0" * 64
        call = running.stub.Attach(lie)
        first = (await call.read()).attached
        copies = [os.dup(descriptor) for descriptor in descriptors]
        await asyncio.to_thread(loader_client._bring, first, copies, sizes)
        assert "SHA-256" in (await refusal(call)).message
        os.close(unsealed)
        assert num_memfds() == before
        assert not running.loader.store.models


@asynchronous
async def test_memory_that_never_comes_is_not_waited_for(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.loader.adoption.ARRIVAL_SECONDS", 0.2)
    async with orphaned(tmp_path, model) as client, running_loader(tmp_path) as running:
        error = await refusal(running.stub.Attach(attach_request(client)))
        assert (error.reason, error.field) == (Reason.FIELD_INVALID, "held")
        gone = running.stub.Attach(attach_request(client))
        await gone.read()
        gone.cancel()
        call = await bring(running, client)  # whoever left does not stand in the way
        await until(lambda: len(running.loader.leases) == 1)
        call.cancel()


@asynchronous
async def test_a_name_keeps_its_weights(tmp_path: Path, model: Path) -> None:
    """Held memory of other weights is refused; a copy is dropped for held memory, unless somebody leases it."""
    other = tmp_path / "other" / "model.gguf"
    other.parent.mkdir()
    write_gpt2(other, seed=5)
    async with orphaned(tmp_path, model) as client, running_loader(tmp_path) as running:
        await running.load(other)
        error = await refusal(running.stub.Attach(attach_request(client)))
        assert error.reason is Reason.MODEL_NAME_IN_USE
        await running.stub.UnloadModel(loader_pb2.UnloadModelRequest(model="model"))
        await running.load(model, aliases=["alias"])
        async with attached(running.address) as newcomer:
            assert inodes(newcomer) != inodes(client)
            call = running.stub.Attach(attach_request(client))
            assert not (await call.read()).attached.adopt
            call.cancel()
        await until(lambda: not running.loader.leases)
        call = await bring(running, client)
        await until(lambda: len(running.loader.leases) == 1)
        async with attached(running.address, model="alias") as newcomer:
            assert inodes(newcomer) == inodes(client)
        call.cancel()


@asynchronous
async def test_a_file_replaced_between_two_loaders_wins(tmp_path: Path, model: Path) -> None:
    """The loader was told to serve the file: the old weights stay with the executors that still map them."""
    async with orphaned(tmp_path, model) as client:
        shutil.copy(write_gpt2(tmp_path / "new.gguf", seed=3), model)
        async with running_loader(tmp_path, model, adoption_seconds=0.1) as running:
            error = await refusal(running.stub.Attach(attach_request(client)))
            assert error.reason is Reason.MODEL_NAME_IN_USE
            async with attached(running.address) as newcomer:
                assert newcomer.attachment.manifest.digest != client.attachment.manifest.digest
