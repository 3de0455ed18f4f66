"""LoaderService over a real port: loads, names, status, tokenizer data, and every error with its reason."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import threading
import time
from pathlib import Path

import grpc
import pytest

from mxgpt.inspect_file import inspect_file
from mxgpt.v1 import loader_pb2
from services.loader import cpu_memory, provenance
from services.loader import loads as loads_module
from services.loader.cpu_memory import CpuMemory
from services.loader.cuda.memory import CudaMemory
from services.loader.loaded_model import is_resident
from services.loader.loading import Progress, Stage
from shared import cuda_layout
from shared.digest import StoppedError
from shared.errors import Reason
from shared.layout import BLOCKS_LAYOUT, FLOAT32_LAYOUT, LAYOUTS
from shared.tokenizer_data_proto import from_pieces
from tests.loader_harness import (
    asynchronous,
    attached,
    is_open,
    mapped_weights,
    num_memfds,
    refusal,
    rest_of,
    running_loader,
    until,
    write_gpt2,
    write_gpt_oss,
)
from tests.tiny_models import WIDE_GPT2, WIDE_GPT_OSS, write_model


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("models") / "small-gpt2.gguf")


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt_oss(tmp_path_factory.mktemp("models") / "small-gpt-oss.gguf")


@pytest.fixture(autouse=True)
def _no_hashes_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are compared as a whole here, so they must not come to know more in the middle of a test."""
    monkeypatch.setattr(provenance, "WATCH_SECONDS", 3600)


def digest_of(path: Path) -> str:
    data = path.read_bytes()
    pieces = [hashlib.sha256(data[start : start + 16384]).digest() for start in range(0, len(data), 16384)]
    return hashlib.sha256(b"".join(pieces)).hexdigest()


@asynchronous
async def test_a_model_is_loaded_described_and_freed(tmp_path: Path, gpt_oss: Path) -> None:
    async with running_loader(tmp_path) as running:
        messages = await running.load_messages(gpt_oss, aliases=["small", "oss"])
        assert [message.stage for message in messages] == sorted(message.stage for message in messages)
        assert messages[-1].stage == loader_pb2.LOAD_STAGE_READY
        assert not any(message.HasField("model") for message in messages[:-1])
        model = messages[-1].model
        assert (model.name, list(model.aliases)) == ("small-gpt-oss", ["small", "oss"])
        assert model.digest == digest_of(gpt_oss)
        assert model.layout == FLOAT32_LAYOUT
        assert [(file.path, file.bytes) for file in model.files] == [(str(gpt_oss), gpt_oss.stat().st_size)]
        assert model.tensor_types["MXFP4"] == 3 * WIDE_GPT_OSS.num_layers
        assert sum(model.tensor_types.values()) == len(WIDE_GPT_OSS.expected_tensors())
        assert model.config.sliding_window == WIDE_GPT_OSS.sliding_window
        assert model.config.rope.factor == WIDE_GPT_OSS.rope.factor
        status = await running.stub.GetStatus(loader_pb2.GetStatusRequest())
        assert (status.device, status.resident_bytes, status.num_leases) == ("cpu", model.resident_bytes, 0)
        assert (list(status.resident_models), status.used_bytes) == (["small-gpt-oss"], 0)
        assert status.free_bytes > 0
        for key in ("small-gpt-oss", "oss", model.digest):
            assert (await running.stub.GetModel(loader_pb2.GetModelRequest(model=key))).model == model
        assert list((await running.stub.ListModels(loader_pb2.ListModelsRequest())).models) == [model]
        freed = await running.stub.UnloadModel(loader_pb2.UnloadModelRequest(model="small"))
        assert freed.freed_bytes == model.resident_bytes
        assert num_memfds() == 0
        error = await refusal(running.stub.GetModel(loader_pb2.GetModelRequest(model="small-gpt-oss")))
        assert error.reason is Reason.MODEL_NOT_FOUND


@asynchronous
async def test_loading_again_answers_at_once_and_only_for_the_same_files(tmp_path: Path) -> None:
    path = write_gpt2(tmp_path / "model.gguf")
    other = write_gpt2(tmp_path / "other.gguf", seed=1)
    async with running_loader(tmp_path) as running:
        first = await running.load(path, aliases=["a"])
        messages = await running.load_messages(path)
        assert (len(messages), messages[0].model) == (1, first)
        pin = hashlib.sha256(path.read_bytes()).hexdigest()
        assert await running.load(path, sha256=[pin]) == first
        for fields, reason in (
            ({"path": path, "sha256": ["0" * 64]}, Reason.MODEL_CHANGED),
            ({"path": path, "aliases": ["b"]}, Reason.FIELD_INVALID),
            ({"path": other, "name": "model"}, Reason.MODEL_NAME_IN_USE),
            ({"path": other, "name": "a"}, Reason.MODEL_NAME_IN_USE),
            ({"path": other, "aliases": ["a"]}, Reason.MODEL_NAME_IN_USE),
        ):
            fields["path"] = str(fields["path"])
            error = await refusal(running.stub.LoadModel(loader_pb2.LoadModelRequest(**fields)))
            assert error.reason is reason, error.message
        os.utime(path, ns=(1, 1))
        error = await refusal(running.stub.LoadModel(loader_pb2.LoadModelRequest(path=str(path))))
        assert error.reason is Reason.MODEL_NAME_IN_USE
        await running.load(other)
        error = await refusal(running.stub.Attach(loader_pb2.AttachRequest(executor_id="e", layouts=LAYOUTS)))
        assert error.reason is Reason.MODEL_NOT_FOUND, "with two models one must be named"


@asynchronous
async def test_a_model_too_large_for_float32_keeps_its_blocks(tmp_path: Path, gpt2: Path) -> None:
    async with running_loader(tmp_path, float32_budget=1000) as running:
        model = await running.load(gpt2)
        assert model.layout == BLOCKS_LAYOUT
        request = loader_pb2.AttachRequest(executor_id="e", layouts=[FLOAT32_LAYOUT])
        assert (await refusal(running.stub.Attach(request))).reason is Reason.LAYOUT_UNSUPPORTED


@asynchronous
async def test_tokenizer_data_comes_whole(tmp_path: Path) -> None:
    path = write_gpt2(tmp_path / "model.gguf", dataclasses.replace(WIDE_GPT2, vocab_size=20_000))
    (tmp_path / "tokenizer.json").write_bytes(b"{}" * 1_000_000)
    async with running_loader(tmp_path, path) as running:
        call = running.stub.GetTokenizerData(loader_pb2.GetTokenizerDataRequest())
        pieces = [piece async for piece in call]
        data = from_pieces(pieces)
        assert [piece.WhichOneof("piece") for piece in pieces].count("tokens") == 3
        assert (len(data.tokens), data.tokens[-1], data.eog_token_ids) == (20_000, "<|endoftext|>", (19_999,))
        assert data.tokenizer_json == b"{}" * 1_000_000
        assert data.digest == digest_of(path)
        async with attached(running.address) as client:
            assert client.attachment.manifest.eog_token_ids == (19_999,)


@asynchronous
async def test_a_model_without_a_tokenizer_loads_and_says_so(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", WIDE_GPT2)
    async with running_loader(tmp_path, path) as running:
        error = await refusal(running.stub.GetTokenizerData(loader_pb2.GetTokenizerDataRequest()))
        assert error.reason is Reason.MODEL_INVALID
        assert "tokenizer.ggml.model" in error.message


@asynchronous
async def test_every_refusal_of_a_load_has_its_reason(tmp_path: Path, gpt2: Path) -> None:
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(os.urandom(5000))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gpt2.read_bytes()[:-1000])
    unknown = write_model(tmp_path / "unknown.gguf", WIDE_GPT2, metadata={"tokenizer.ggml.model": "gpt2"})
    version = tmp_path / "version.gguf"
    version.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + gpt2.read_bytes()[8:])
    os.mkfifo(tmp_path / "pipe.gguf")
    cases = [
        ({"path": ""}, Reason.FIELD_INVALID),
        ({"path": "a\0b"}, Reason.FIELD_INVALID),
        ({"path": str(tmp_path / "none.gguf")}, Reason.MODEL_NOT_FOUND),
        ({"path": "b/" * 3000 + "x.gguf"}, Reason.MODEL_NOT_FOUND),  # longer than a path may be
        ({"path": str(tmp_path)}, Reason.MODEL_INVALID),
        ({"path": str(tmp_path / "pipe.gguf")}, Reason.MODEL_INVALID),
        ({"path": str(garbage)}, Reason.MODEL_INVALID),
        ({"path": str(cut)}, Reason.MODEL_INVALID),
        ({"path": str(unknown)}, Reason.MODEL_INVALID),
        ({"path": str(version)}, Reason.FILE_VERSION_UNSUPPORTED),
        ({"path": str(gpt2), "name": "a\nb"}, Reason.FIELD_INVALID),
        ({"path": str(gpt2), "name": "x" * 257}, Reason.FIELD_INVALID),
        ({"path": str(gpt2), "name": "x", "aliases": ["x"]}, Reason.FIELD_INVALID),
        ({"path": str(gpt2), "sha256": ["abc"]}, Reason.FIELD_INVALID),
        ({"path": str(gpt2), "sha256": ["0" * 64, "0" * 64]}, Reason.FIELD_INVALID),
        ({"path": str(gpt2), "sha256": ["0" * 64]}, Reason.MODEL_CHANGED),
    ]
    async with running_loader(tmp_path) as running:
        for fields, reason in cases:
            error = await refusal(running.stub.LoadModel(loader_pb2.LoadModelRequest(**fields)))
            assert error.reason is reason, (fields, error.message)
            assert num_memfds() == 0
        assert not running.loader.store.models


@asynchronous
async def test_other_requests_that_name_no_model_are_refused(tmp_path: Path, gpt2: Path) -> None:
    async with running_loader(tmp_path, gpt2) as running:
        stub = running.stub
        attach = loader_pb2.AttachRequest
        for call, reason in (
            (stub.GetModel(loader_pb2.GetModelRequest()), Reason.FIELD_INVALID),
            (stub.GetModel(loader_pb2.GetModelRequest(model="x")), Reason.MODEL_NOT_FOUND),
            (stub.UnloadModel(loader_pb2.UnloadModelRequest()), Reason.FIELD_INVALID),
            (stub.UnloadModel(loader_pb2.UnloadModelRequest(model="x")), Reason.MODEL_NOT_FOUND),
            (stub.GetTokenizerData(loader_pb2.GetTokenizerDataRequest(model="x")), Reason.MODEL_NOT_FOUND),
            (stub.Attach(attach(model="x", executor_id="e", layouts=LAYOUTS)), Reason.MODEL_NOT_FOUND),
            (stub.Attach(attach(layouts=LAYOUTS)), Reason.FIELD_INVALID),
            (stub.Attach(attach(executor_id="e", layouts=["cuda.v1"])), Reason.LAYOUT_UNSUPPORTED),
            (stub.Attach(attach(executor_id="e", layouts=LAYOUTS, held=loader_pb2.Manifest())), Reason.FIELD_INVALID),
        ):
            assert (await refusal(call)).reason is reason


@asynchronous
async def test_models_lie_below_the_root(tmp_path: Path, gpt2: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    inside = write_gpt2(root / "inside.gguf")
    (root / "link.gguf").symlink_to(gpt2)
    (root / "fine.gguf").symlink_to(inside)
    async with running_loader(tmp_path, model_root=root) as running:
        for path in (str(gpt2), "../root2/x.gguf", "link.gguf", "/etc/passwd", str(root / ".." / "loader.sock")):
            error = await refusal(running.stub.LoadModel(loader_pb2.LoadModelRequest(path=path)))
            assert (error.reason, error.field) == (Reason.FIELD_INVALID, "path")
        assert (await running.load(Path("inside.gguf"))).name == "inside"
        assert (await running.load(Path("fine.gguf"))).name == "fine"


@asynchronous
async def test_memory_that_is_not_there_is_not_taken(
    tmp_path: Path, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.loader.host_memory.free_bytes", lambda: 1000)
    async with running_loader(tmp_path) as running:
        error = await refusal(running.stub.LoadModel(loader_pb2.LoadModelRequest(path=str(gpt2))))
        assert error.reason is Reason.MEMORY_EXHAUSTED
        assert error.metadata["free_bytes"] == "1000"
        assert int(error.metadata["needed_bytes"]) > 1000


@asynchronous
async def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gpt2(tmp_path / "model.gguf")
    real_fill = cpu_memory.fill

    def fill_then_touch(*arguments: object) -> None:
        real_fill(*arguments)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(cpu_memory, "fill", fill_then_touch)
    async with running_loader(tmp_path) as running:
        error = await refusal(running.stub.LoadModel(loader_pb2.LoadModelRequest(path=str(path))))
        assert error.reason is Reason.MODEL_CHANGED
        assert num_memfds() == 0


@asynchronous
async def test_loads_of_one_model_join_and_the_last_to_leave_stops_it(
    tmp_path: Path, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_loads = 0
    load_model = loads_module.load_model
    goes_on, stops = threading.Event(), threading.Event()  # what lets a load end, or end because it was stopped

    def held_load(source, options, generations, report, stop):
        nonlocal num_loads
        num_loads += 1
        report(Progress(Stage.WEIGHTS, 1, 2))
        while not (goes_on.is_set() or (stop.is_set() and stops.is_set())):
            time.sleep(0.01)
        return load_model(source, options, generations, report, stop) if not stop.is_set() else _stopped()

    monkeypatch.setattr(loads_module, "load_model", held_load)
    request = loader_pb2.LoadModelRequest(path=str(gpt2))
    async with running_loader(tmp_path) as running:
        first, second = running.stub.LoadModel(request), running.stub.LoadModel(request)
        await asyncio.gather(first.read(), second.read())
        other_name = running.stub.LoadModel(loader_pb2.LoadModelRequest(path=str(gpt2), name="x", aliases=[gpt2.stem]))
        assert (await refusal(other_name)).reason is Reason.MODEL_NAME_IN_USE
        load = running.loader._loads._loads[gpt2.stem]
        first.cancel()
        await until(lambda: load.num_waiting == 1)
        goes_on.set()
        messages = await rest_of(second)
        assert messages[-1].model.name == gpt2.stem
        assert num_loads == 1
        await running.stub.UnloadModel(loader_pb2.UnloadModelRequest(model=gpt2.stem))
        goes_on.clear()
        third = running.stub.LoadModel(request)
        await third.read()
        third.cancel()
        await until(running.loader._loads._loads[gpt2.stem].stop.is_set)
        fourth = running.stub.LoadModel(request)  # the third is given up, but its thread still runs
        asyncio.get_running_loop().call_later(0.2, stops.set)
        asyncio.get_running_loop().call_later(0.2, goes_on.set)
        assert (await rest_of(fourth))[-1].model.name == gpt2.stem
        assert num_loads == 3


def _stopped() -> None:
    raise StoppedError


@asynchronous
async def test_a_load_cancelled_half_way_leaves_nothing(
    tmp_path: Path, gpt_oss: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_fill = cpu_memory.fill
    num_filled = 0
    goes_on = threading.Event()

    def slow_fill(plan, file, index, buffer, report):
        nonlocal num_filled

        def count(num_bytes: int) -> None:
            nonlocal num_filled
            num_filled += 1
            if num_filled > 5:
                goes_on.wait(60)
            report(num_bytes)

        real_fill(plan, file, index, buffer, count)

    async with running_loader(tmp_path) as running:
        loads = running.loader._loads
        monkeypatch.setattr(cpu_memory, "fill", slow_fill)
        mapped_before = mapped_weights()
        call = running.stub.LoadModel(loader_pb2.LoadModelRequest(path=str(gpt_oss)))
        await until(lambda: num_filled > 5)
        assert num_memfds() > 0
        stop = loads._loads["small-gpt-oss"].stop
        call.cancel()
        await until(stop.is_set)
        goes_on.set()
        await until(lambda: not loads.is_loading(["small-gpt-oss"]))
        assert num_memfds() == 0
        assert not is_open(gpt_oss)
        assert not mapped_weights() - mapped_before
        assert (await running.load(gpt_oss)).name == "small-gpt-oss"


@asynchronous
async def test_weights_that_are_not_finite_name_their_tensor_and_leave_nothing(tmp_path: Path) -> None:
    path = write_gpt2(tmp_path / "model.gguf")
    data = bytearray(path.read_bytes())
    data[-2:] = b"\xff\xff"
    data[-4:-2] = b"\xff\x7f"  # a float32 NaN
    path.write_bytes(data)
    mapped_before = mapped_weights()
    async with running_loader(tmp_path) as running:
        error = await refusal(running.stub.LoadModel(loader_pb2.LoadModelRequest(path=str(path))))
        assert error.reason is Reason.MODEL_INVALID
        assert "not finite" in error.message
        assert num_memfds() == 0
        assert not mapped_weights() - mapped_before


@asynchronous
async def test_a_model_that_is_still_loading_can_be_waited_for(
    tmp_path: Path, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model = loads_module.load_model
    goes_on = threading.Event()

    def held_load(*arguments):
        goes_on.wait(60)
        return load_model(*arguments)

    monkeypatch.setattr(loads_module, "load_model", held_load)
    async with running_loader(tmp_path) as running:
        call = running.stub.LoadModel(loader_pb2.LoadModelRequest(path=str(gpt2)))
        await call.read()
        attach = loader_pb2.AttachRequest(executor_id="e", layouts=LAYOUTS, model=gpt2.stem)
        error = await refusal(running.stub.Attach(attach))
        assert error.reason is Reason.STARTING
        assert error.retry_after is not None
        goes_on.set()
        assert (await rest_of(call))[-1].model.name == gpt2.stem
        async with attached(running.address, model=gpt2.stem):
            pass


@asynchronous
async def test_memory_is_estimated_for_models_and_files_alike(tmp_path: Path, gpt_oss: Path) -> None:
    async with running_loader(tmp_path) as running:
        estimate = running.stub.EstimateMemory
        request = loader_pb2.EstimateMemoryRequest
        of_file = await estimate(request(path=str(gpt_oss)))
        model = await running.load(gpt_oss)
        assert of_file == await estimate(request(model=model.name))
        assert of_file.weight_bytes == model.resident_bytes
        assert of_file.activation_bytes > 0
        two = await estimate(request(model=model.digest, num_sequences=2, context_length=model.config.context_length))
        assert two.kv_bytes == 2 * of_file.kv_bytes
        short = await estimate(request(model=model.name, context_length=64))
        assert short.kv_bytes < of_file.kv_bytes
        for wrong, reason in (
            (request(), Reason.FIELD_INVALID),
            (request(path=""), Reason.FIELD_INVALID),
            (request(model="unknown"), Reason.MODEL_NOT_FOUND),
            (request(path=str(tmp_path / "none.gguf")), Reason.MODEL_NOT_FOUND),
            (request(model=model.name, context_length=model.config.context_length + 1), Reason.FIELD_INVALID),
        ):
            assert (await refusal(estimate(wrong))).reason is reason


@asynchronous
async def test_a_loader_for_a_gpu_estimates_what_a_gpu_takes(
    tmp_path: Path, gpt_oss: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `mxgpt inspect` does: allocations of 2 MiB at least, KV in halves, an executor's workspace."""
    monkeypatch.setattr(CpuMemory, "plan", lambda self, file, config: cuda_layout.plan(file, config))
    monkeypatch.setattr(CpuMemory, "estimate", CudaMemory.estimate)
    async with running_loader(tmp_path) as running:
        request = loader_pb2.EstimateMemoryRequest(path=str(gpt_oss), context_length=64, num_sequences=3)
        answer = await running.stub.EstimateMemory(request)
    inspected = inspect_file(gpt_oss, context=64, num_sequences=3).cuda_memory
    assert inspected is not None
    estimate = inspected.estimate
    assert answer.weight_bytes == estimate.weight_bytes
    assert answer.kv_bytes_per_token == estimate.kv_bytes_per_token
    assert answer.activation_bytes == estimate.workspace_bytes
    totals = {number: total for _, number, total in inspected.totals}
    assert estimate.total(answer.kv_bytes) == totals[3]


@asynchronous
async def test_a_status_that_is_given_up_leaves_no_descriptors_open(tmp_path: Path, gpt2: Path) -> None:
    """The call ends while all threads are taken; the model can be freed, and is not found any more then."""
    async with running_loader(tmp_path, gpt2) as running:
        before, release = num_memfds(), threading.Event()
        loop = asyncio.get_running_loop()
        busy = [loop.run_in_executor(None, release.wait) for _ in range(64)]
        try:
            with pytest.raises(grpc.aio.AioRpcError):
                await running.stub.GetStatus(loader_pb2.GetStatusRequest(), timeout=0.2)
            (model,) = running.loader.store.models
            looking = asyncio.create_task(is_resident(model, CpuMemory()))
            await asyncio.sleep(0)
            assert num_memfds() == before
            await running.stub.UnloadModel(loader_pb2.UnloadModelRequest(model=model.names[0]))
            assert num_memfds() == 0
        finally:
            release.set()
        await asyncio.gather(*busy)
        assert not await looking
        assert num_memfds() == 0
