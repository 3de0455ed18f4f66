"""Where weights come from: pins, the SHA-256 of each file, and files that change after they were loaded."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mxgpt.v1 import loader_pb2
from services.loader import provenance
from services.tokenizer.store import FileStore
from shared.errors import Reason, ServiceError, Status
from shared.ggml_type import GGMLType
from shared.pins import Pins
from tests.gguf_files import write_gguf
from tests.loader_harness import asynchronous, attached, num_memfds, refusal, running_loader, until, write_gpt2
from tests.stack import ROOT
from tests.tokenizer_files import GPT_2, trained_tokenizer


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_pins(directory: Path, *files: Path, **wrong: str) -> Pins:
    """A list of these files, and of names with the hashes given."""
    lines = [f"{sha256(file)}  {os.path.relpath(file, directory)}" for file in files]
    lines += [f"{pin} *{name}.gguf" for name, pin in wrong.items()]
    path = directory / "SHA256SUMS"
    path.write_text("\n".join(["# from the publisher", *lines, ""]))
    return Pins.read(path)


class TestPins:
    def test_a_list_of_sha256sum(self, tmp_path: Path) -> None:
        (tmp_path / "models").mkdir()
        names = ["a.gguf", "models/with blank.gguf"]
        for name in names:
            (tmp_path / name).write_text(name)
        (tmp_path / "link.gguf").symlink_to(tmp_path / "a.gguf")
        made = subprocess.run(["sha256sum", *names], cwd=tmp_path, capture_output=True, text=True, check=True)
        (tmp_path / "SHA256SUMS").write_text(made.stdout)
        pins = Pins.read(tmp_path / "SHA256SUMS")
        files = [tmp_path / name for name in (*names, "link.gguf", "models/../a.gguf")]
        assert pins.of(files) == tuple(sha256(file) for file in files)
        with pytest.raises(ServiceError, match="not on the list of pins") as raised:
            pins.of([tmp_path / "b.gguf"])
        assert (raised.value.reason, raised.value.status) == (Reason.MODEL_CHANGED, Status.DATA_LOSS)

    @pytest.mark.parametrize(
        "line", ["abc  a.gguf", "0" * 64, "0" * 64 + " a.gguf", "0" * 65 + "  a", "1" * 64 + "  ./same.gguf"]
    )
    def test_a_line_that_is_none(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "SHA256SUMS"
        path.write_text(f"{'0' * 64}  same.gguf\n\n{line}\n")
        with pytest.raises(ValueError, match="line 3"):
            Pins.read(path)


@asynchronous
async def test_a_loader_with_pins_loads_only_what_is_on_the_list(tmp_path: Path) -> None:
    listed = write_gpt2(tmp_path / "listed.gguf")
    other = write_gpt2(tmp_path / "other.gguf", seed=1)
    wrong = write_gpt2(tmp_path / "wrong.gguf", seed=2)
    pins = write_pins(tmp_path, listed, wrong=sha256(other))
    async with running_loader(tmp_path, listed, pins=pins) as running:
        (model,) = (await running.stub.ListModels(loader_pb2.ListModelsRequest())).models
        assert [file.sha256 for file in model.files] == [sha256(listed)], "known at once, since it was checked"
        num_before = num_memfds()
        for path, pin, words in (
            (other, [], "not on the list of pins"),
            (other, [sha256(other)], "not on the list of pins"),
            (wrong, [], f"has SHA-256 {sha256(wrong)}, not {sha256(other)} as pinned"),
            (wrong, [sha256(wrong)], "the SHA-256 asked for is not the one pinned"),
        ):
            request = loader_pb2.LoadModelRequest(path=str(path), sha256=pin)
            error = await refusal(running.stub.LoadModel(request))
            assert (error.reason, error.status) == (Reason.MODEL_CHANGED, Status.DATA_LOSS)
            assert words in error.message
        assert num_memfds() == num_before
        assert await running.load(listed, sha256=[sha256(listed)]) == model


@asynchronous
async def test_a_tokenizer_json_beside_the_model_is_pinned_too(tmp_path: Path) -> None:
    model, beside = write_gpt2(tmp_path / "model.gguf"), tmp_path / "tokenizer.json"
    beside.write_text("{}")
    async with running_loader(tmp_path, model, pins=write_pins(tmp_path, model, beside)) as running:
        request = loader_pb2.GetTokenizerDataRequest()
        assert [piece async for piece in running.stub.GetTokenizerData(request)][-1].tokenizer_json == b"{}"
        beside.write_text("[]")
        error = await refusal(running.stub.GetTokenizerData(request))
        assert (error.reason, error.metadata["file"]) == (Reason.MODEL_CHANGED, str(beside))
    async with running_loader(tmp_path, model, pins=write_pins(tmp_path, model)) as running:
        assert "not on the list" in (await refusal(running.stub.GetTokenizerData(request))).message


def test_a_tokenizer_of_a_file_keeps_to_its_pins(tmp_path: Path) -> None:
    trained = trained_tokenizer(GPT_2)
    model, beside = trained.write_gguf(tmp_path / "model.gguf"), tmp_path / "tokenizer.json"
    beside.write_text(trained.json)
    FileStore.read(model, pins=write_pins(tmp_path, model, beside))
    for files in ([model], [beside]):
        with pytest.raises(ServiceError, match="not on the list") as raised:
            FileStore.read(model, pins=write_pins(tmp_path, *files))
        assert raised.value.reason is Reason.MODEL_CHANGED
    pins = write_pins(tmp_path, model, beside)
    beside.write_text(trained.json + " ")
    with pytest.raises(ServiceError, match=f"{beside}: the file has SHA-256"):
        FileStore.read(model, pins=pins)


@asynchronous
async def test_every_shard_is_pinned(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]
    for index, path in enumerate(paths):
        keys = {"split.no": np.uint16(index), "split.count": np.uint16(2), "split.tensors.count": np.int32(2)}
        write_gguf(path, keys, {f"t{index}": (np.ones((1, 32), np.float32), GGMLType.F32)})
    pins = write_pins(tmp_path, paths[0])
    with pytest.raises(ServiceError, match="00002-of-00002"):
        pins.of(paths)
    assert write_pins(tmp_path, *paths).of(paths) == tuple(map(sha256, paths))


@pytest.mark.parametrize(
    ("pin", "why"), [("0" * 64, "not " + "0" * 64 + " as pinned"), ("none", "line 2 is no SHA-256")]
)
def test_a_loader_that_starts_with_a_wrong_pin_fails(tmp_path: Path, pin: str, why: str) -> None:
    model = write_gpt2(tmp_path / "model.gguf")
    (tmp_path / "SHA256SUMS").write_text(f"# none\n{pin}  model.gguf\n")
    options = ["--socket", str(tmp_path / "loader.sock"), "--model", str(model), "--pins", str(tmp_path / "SHA256SUMS")]
    command = [sys.executable, "-m", "services.loader", "--listen", "127.0.0.1:0", *options]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert process.returncode != 0
    assert why in process.stdout + process.stderr


def test_mxgpt_serve_hands_its_pins_to_the_loader(tmp_path: Path, demo_gpt2: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {demo_gpt2}\n")
    command = [sys.executable, "-m", "mxgpt", "serve", "--model", str(demo_gpt2), "--pins", "SHA256SUMS"]
    ports = ["--port", "0", "--tokenizer-port", "0", "--loader-port", "0"]
    process = subprocess.run([*command, *ports], cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)
    assert process.returncode == 1
    assert f"not {'0' * 64} as pinned" in process.stdout + process.stderr


@asynchronous
async def test_plain_hashes_come_after_loading_and_hold_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_hash = threading.Event()
    real = provenance.plain_sha256

    def slow(path: Path, stop: threading.Event) -> str:
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == 19
        assert may_hash.wait(60)
        return real(path, stop)

    monkeypatch.setattr(provenance, "plain_sha256", slow)
    monkeypatch.setattr(provenance, "WATCH_SECONDS", 0.02)
    first, second = write_gpt2(tmp_path / "first.gguf"), write_gpt2(tmp_path / "second.gguf", seed=1)
    async with running_loader(tmp_path, first) as running:
        model = await running.load(second)
        assert [file.sha256 for file in model.files] == [""]
        async with attached(running.address, model="second"):
            assert await running.num_leases() == 1
        may_hash.set()

        async def known() -> bool:
            models = (await running.stub.ListModels(loader_pb2.ListModelsRequest())).models
            return [file.sha256 for model in models for file in model.files] == [sha256(first), sha256(second)]

        await until(known, 60.0)
    assert os.getpriority(os.PRIO_PROCESS, 0) < 19, "the thread's priority alone was lowered"


@pytest.mark.parametrize("change", ["written", "replaced", "removed"])
@asynchronous
async def test_a_file_that_changes_after_loading_is_noticed_and_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    monkeypatch.setattr(provenance, "WATCH_SECONDS", 0.02)
    path, kept = write_gpt2(tmp_path / "model.gguf"), write_gpt2(tmp_path / "kept.gguf", seed=1)
    async with running_loader(tmp_path, path, kept) as running:
        loaded = {model.name: model for model in await _models(running)}
        assert not any(model.file_changed for model in loaded.values())
        if change == "written":
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\1")
        elif change == "replaced":
            write_gpt2(tmp_path / "new.gguf", seed=2).replace(path)
        else:
            path.unlink()

        async def noticed() -> bool:
            return any(model.file_changed for model in await _models(running))

        await until(noticed)
        changed = {model.name for model in await _models(running) if model.file_changed}
        assert changed == {"model"}

        def warnings() -> list[str]:
            return [record.message for record in caplog.records if record.levelname == "WARNING"]

        await until(lambda: bool(warnings()))  # comes from another thread, after the mark
        assert len(warnings()) == 1
        assert str(path) in warnings()[0]
        async with attached(running.address, model="model") as client:
            assert client.attachment.manifest.digest == loaded["model"].digest, "what is served is what was loaded"


@asynchronous
async def test_a_loader_stops_in_the_middle_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashing = threading.Event()
    real = provenance.plain_sha256

    def endless(path: Path, stop: threading.Event) -> str:
        hashing.set()
        while True:
            real(path, stop)

    monkeypatch.setattr(provenance, "plain_sha256", endless)
    monkeypatch.setattr(provenance, "WATCH_SECONDS", 0.02)
    async with running_loader(tmp_path, write_gpt2(tmp_path / "model.gguf")) as running:
        (model,) = running.loader.store.models
        await until(hashing.is_set)
    assert model.file_sha256 == ()
    assert not model.is_file_changed


async def _models(running: object) -> list[loader_pb2.Model]:
    return list((await running.stub.ListModels(loader_pb2.ListModelsRequest())).models)  # type: ignore[attr-defined]
