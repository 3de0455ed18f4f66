"""Adoption: loaders die and come back, the weights stay where they are."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mxgpt.v1 import loader_pb2, loader_pb2_grpc
from services.executor import loader_client
from services.executor.loader_client import LoaderClient
from services.loader.config import LoaderConfig
from services.loader.main import Loader
from shared.channel import open_channel
from shared.config import ServerConfig
from shared.descriptors import create_memory
from shared.digest import digest_of
from shared.errors import Reason
from shared.layout import LAYOUTS
from shared.manifest_proto import manifest_to_proto
from shared.pins import Pins
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
async def orphaned(directory: Path, model: Path, **fields: Any) -> AsyncIterator[LoaderClient]:
    """A client whose loader has ended, and which follows to whatever loader its channel is pointed to.

    `fields` are those of the request that the model was loaded with.
    """
    async with running_loader(directory) as running:
        await running.load(model, **fields)
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


async def hand_over(attached: loader_pb2.Attached, client: LoaderClient) -> None:
    """Bring what the client holds, as asked."""
    assert attached.adopt
    assert client.attachment is not None
    copies = [os.dup(descriptor) for descriptor in client.attachment.descriptors]
    await asyncio.to_thread(loader_client._bring, attached, copies, client.attachment.sizes)


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
            await until(lambda: num_memfds(again.process.pid) == len(views))
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
            patch.setattr(os, "dup", dup_once_exhausted)
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
        again = Service("loader", "--listen", address, "--adoption-seconds", "60", *options)
        try:
            await asyncio.to_thread(again.wait_healthy)
            await until(survivor.attached.is_set)
            async with attached(address, "newcomer") as newcomer:
                assert inodes(newcomer) == inodes(survivor)
            await survivor.close()
            async with open_channel(address) as channel:
                await until(lambda: has_no_lease(channel))
        finally:
            assert again.stop() == 0
    again.joined()
    assert "adopted" in again.text
    assert "loaded" not in again.text
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
async def test_tokenizer_data_of_a_model_adopted_without_its_file_wants_that(tmp_path: Path, model: Path) -> None:
    async with orphaned(tmp_path, model) as client, running_loader(tmp_path) as running:
        kept = model.read_bytes()
        model.unlink()
        call = await bring(running, client)
        await until(lambda: len(running.loader.leases) == 1)
        request = loader_pb2.GetTokenizerDataRequest()
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
        await until(lambda: bool(running.loader.store.models))
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
        monkeypatch.setattr("services.loader.adoption.ARRIVAL_SECONDS", 60)
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


@asynchronous
async def test_an_alias_takes_no_name_that_was_to_be_loaded(tmp_path: Path, model: Path) -> None:
    """The loader is told to load prod.gguf; an executor holds other weights, which somebody had called "prod" too."""
    prod = write_gpt2(tmp_path / "prod.gguf", seed=3)
    async with orphaned(tmp_path, model, aliases=["prod"]) as client:
        config = LoaderConfig(ServerConfig("127.0.0.1:0"), tmp_path / "loader.sock", (prod,), num_threads=2)
        loader = Loader(config)
        address = await loader.start()
        try:
            async with open_channel(address) as channel:
                stub = loader_pb2_grpc.LoaderServiceStub(channel)
                error = await refusal(stub.Attach(attach_request(client)))
                assert (error.reason, "'prod'" in error.message) == (Reason.MODEL_NAME_IN_USE, True)
                assert await loader.load_at_start()
                async with attached(address, model="prod") as newcomer:
                    assert newcomer.attachment.manifest.files[0][0] == str(prod)
        finally:
            await loader.stop()


@asynchronous
async def test_an_alias_may_have_the_name_of_the_same_file(tmp_path: Path, model: Path) -> None:
    async with orphaned(tmp_path, model, name="other", aliases=["model"]) as client:
        loader = Loader(LoaderConfig(ServerConfig("127.0.0.1:0"), tmp_path / "loader.sock", (model,), num_threads=2))
        address = await loader.start()
        try:
            async with open_channel(address) as channel:
                running = Running(loader, address, channel)
                call = await bring(running, client)
                await until(lambda: len(loader.leases) == 1)
                assert await loader.load_at_start()
                async with attached(address, model="model") as newcomer:
                    assert inodes(newcomer) == inodes(client)
                call.cancel()
        finally:
            await loader.stop()


@asynchronous
async def test_a_name_that_was_to_be_loaded_and_stands_for_another_model_is_a_failure(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_gpt2(tmp_path / "other.gguf", seed=3)
    loader = Loader(LoaderConfig(ServerConfig("127.0.0.1:0"), tmp_path / "loader.sock", (model,), num_threads=2))
    address = await loader.start()
    try:
        async with open_channel(address) as channel:
            await Running(loader, address, channel).load(other, name="other", aliases=["model"])
        assert not await loader.load_at_start()
        assert "can't load" in caplog.text
        assert "MODEL_NAME_IN_USE" in caplog.text
    finally:
        await loader.stop()


def pins_for(directory: Path, *files: Path) -> Pins:
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file}\n" for file in files]
    (directory / "SHA256SUMS").write_text("".join(lines))
    return Pins.read(directory / "SHA256SUMS")


@asynchronous
async def test_with_pins_only_memory_of_pinned_files_is_adopted(tmp_path: Path, model: Path) -> None:
    other = write_gpt2(tmp_path / "other.gguf", seed=3)
    async with orphaned(tmp_path, model) as client:
        async with running_loader(tmp_path, pins=pins_for(tmp_path, other)) as running:
            error = await refusal(running.stub.Attach(attach_request(client)))
            assert error.reason is Reason.MODEL_CHANGED
            assert "not on the list of pins" in error.message
            lie = attach_request(client)
            lie.held.files[0].path = str(other)
            error = await refusal(running.stub.Attach(lie))
            assert error.reason is Reason.MODEL_CHANGED
            assert not running.loader.store.models
        async with running_loader(tmp_path, pins=pins_for(tmp_path, model)) as running:
            lie = attach_request(client)
            lie.held.layout = "cpu.blocks.v1"
            assert (await refusal(running.stub.Attach(lie))).field == "held.layout"
            call = await bring(running, client)
            await until(lambda: len(running.loader.leases) == 1)
            call.cancel()
        pins = pins_for(tmp_path, model)
        model.rename(tmp_path / "gone.gguf")
        async with running_loader(tmp_path, pins=pins) as running:
            assert (await refusal(running.stub.Attach(attach_request(client)))).reason is Reason.MODEL_NOT_FOUND
        shutil.copy(other, model)
        async with running_loader(tmp_path, pins=pins) as running:
            error = await refusal(running.stub.Attach(attach_request(client)))
            assert (error.reason, "as pinned" in error.message) == (Reason.MODEL_CHANGED, True)


@asynchronous
async def test_what_is_said_of_files_that_are_there_must_be_true(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_hashed = 0

    def counted(*arguments: Any) -> str:
        nonlocal num_hashed
        num_hashed += 1
        return digest_of(*arguments)

    monkeypatch.setattr("services.loader.claims.digest_of", counted)
    async with orphaned(tmp_path, model) as client, running_loader(tmp_path, model_root=tmp_path) as running:
        for field, reason, change in (
            ("", Reason.MODEL_CHANGED, lambda held: setattr(held, "digest", "0" * 64)),
            ("held.config", Reason.FIELD_INVALID, lambda held: setattr(held.config, "norm_epsilon", 1e-3)),
            ("held.tensors", Reason.FIELD_INVALID, exchange_planes),
            ("path", Reason.FIELD_INVALID, lambda held: setattr(held.files[0], "path", "/elsewhere/model.gguf")),
        ):
            lie = attach_request(client)
            change(lie.held)
            error = await refusal(running.stub.Attach(lie))
            assert (error.reason, error.field or "") == (reason, field)
        assert num_hashed == 1, "who is refused comes back: once is enough while the file stays"
        write_gpt2(model, seed=3)
        for _ in range(3):
            assert (await refusal(running.stub.Attach(attach_request(client)))).reason is Reason.MODEL_CHANGED
        assert num_hashed == 2


def exchange_planes(held: loader_pb2.Manifest) -> None:
    """Let two tensors of one shape lie where the other does."""
    by_name = {tensor.name: tensor for tensor in held.tensors}
    first, second = by_name["blk.0.attn_norm.weight"].planes[0], by_name["blk.0.ffn_norm.weight"].planes[0]
    first.offset, second.offset = second.offset, first.offset


@asynchronous
async def test_names_are_names(tmp_path: Path, model: Path) -> None:
    async with orphaned(tmp_path, model) as client, running_loader(tmp_path) as running:
        for field, change in (
            ("held.model", lambda held: setattr(held, "model", "a\nb")),
            ("held.aliases[1]", lambda held: held.aliases.extend(["b", "x" * 257])),
            ("held.aliases", lambda held: held.aliases.extend(["model"])),
            ("held.files", lambda held: held.ClearField("files")),
            ("held.files", lambda held: setattr(held.files[0], "path", "relative.gguf")),
            ("held.files", lambda held: setattr(held.files[0], "path", "/zero\0byte.gguf")),
        ):
            wrong = attach_request(client)
            change(wrong.held)
            error = await refusal(running.stub.Attach(wrong))
            assert (error.reason, error.field) == (Reason.FIELD_INVALID, field)


@asynchronous
async def test_a_copy_gives_way_only_to_the_same_contents(tmp_path: Path, model: Path) -> None:
    """Memory of other weights that goes by the digest of a model here: under its name it stays its holder's own."""
    other = write_gpt2(tmp_path / "other.gguf", seed=3)
    async with orphaned(tmp_path, other) as client, running_loader(tmp_path) as running:
        loaded = await running.load(model)
        lie = attach_request(client)
        lie.held.digest = loaded.digest
        lie.held.files[0].path = str(tmp_path / "gone.gguf")
        assert (await refusal(running.stub.Attach(lie))).field == "held.digest"
        lie.held.model = "model"
        call = running.stub.Attach(lie)
        assert not (await call.read()).attached.adopt
        async with attached(running.address) as newcomer:
            assert inodes(newcomer) != inodes(client)
        call.cancel()


@asynchronous
async def test_who_is_asked_for_memory_and_does_not_bring_it_holds_up_nobody(tmp_path: Path, model: Path) -> None:
    other = write_gpt2(tmp_path / "other.gguf", seed=3)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    async with (
        orphaned(tmp_path / "a", model) as client,
        orphaned(tmp_path / "b", other) as of_other,
        running_loader(tmp_path) as running,
    ):
        late = running.stub.Attach(attach_request(client))
        asked = (await late.read()).attached
        call_of_other = await bring(running, of_other)
        call = await bring(running, client)
        await until(lambda: len(running.loader.leases) == 2)
        before = num_memfds()
        await hand_over(asked, client)
        await until(lambda: len(running.loader.leases) == 3)
        assert num_memfds() == before, "it is here already"
        for each in (late, call, call_of_other):
            each.cancel()


@asynchronous
async def test_memory_that_comes_when_its_name_is_taken_is_refused(tmp_path: Path, model: Path) -> None:
    other = write_gpt2(tmp_path / "other.gguf", seed=3)
    async with orphaned(tmp_path, model) as client, running_loader(tmp_path) as running:
        late = running.stub.Attach(attach_request(client))
        asked = (await late.read()).attached
        await running.load(other, name="model")
        before = num_memfds()
        await hand_over(asked, client)
        assert (await refusal(late)).reason is Reason.MODEL_NAME_IN_USE
        assert num_memfds() == before


@asynchronous
async def test_a_start_waits_no_longer_for_memory_that_does_not_come(tmp_path: Path, model: Path) -> None:
    options = ("--socket", str(tmp_path / "loader.sock"), "--model", str(model))
    loader = Service("loader", *options)
    loader.wait_healthy()
    async with attached(loader.address, "frozen") as client:
        request = attach_request(client)
    loader.kill()
    again = Service("loader", "--adoption-seconds", "5", *options)
    try:
        async with open_channel(again.address) as channel:
            call = loader_pb2_grpc.LoaderServiceStub(channel).Attach(request)
            assert (await call.read()).attached.adopt
            await asyncio.to_thread(again.wait_healthy)
            await until(lambda: "loaded model" in again.text)
            call.cancel()
    finally:
        again.kill()


@asynchronous
async def test_descriptors_that_come_as_their_call_is_cancelled_are_closed(tmp_path: Path, model: Path) -> None:
    async with orphaned(tmp_path, model) as client, running_loader(tmp_path) as running:
        arrivals, take_back = [], running.loader._handover.take_back

        def noted(sizes: list[int]) -> Any:
            ticket, arrival = take_back(sizes)
            arrivals.append(arrival)
            return ticket, arrival

        running.loader._handover.take_back = noted
        announced = asyncio.Event()

        async def announce(ticket: bytes) -> None:
            announced.set()

        before = num_memfds()
        held = client.attachment.manifest
        adopting = asyncio.create_task(running.loader._servicer.adoption.adopt(held, announce))
        await announced.wait()
        await asyncio.sleep(0)
        arrivals[0].set_result(tuple(os.dup(descriptor) for descriptor in client.attachment.descriptors))
        adopting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adopting
        assert num_memfds() == before
        assert not running.loader._servicer.adoption.expected
