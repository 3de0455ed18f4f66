"""The loader's parts on their own: names, leases, free memory, configuration, digests and pins."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import NoReturn

import pytest

from services.loader import tokenizer_check
from services.loader.config import LoaderConfig
from services.loader.host_memory import free_bytes
from services.loader.leases import Leases
from services.loader.loaded_model import LoadedModel
from services.loader.loading import LoadOptions, Progress, Source, Stage, default_name, load_model
from services.loader.store import ModelStore
from services.loader.tokenizer_check import TokenizerChecks
from shared.config import ServerConfig
from shared.digest import PIECE_BYTES, READ_BYTES, StoppedError, digest_of
from shared.errors import Reason, ServiceError
from shared.gguf import read_gguf
from shared.manifest import Allocation, Manifest
from shared.phases import Phases
from tests.gguf_files import write_gguf
from tests.loader_harness import num_memfds, write_gpt2
from tests.stack import Service
from tests.tiny_models import TINY_GPT2, WIDE_GPT2, write_model


def model_of(name: str, *aliases: str, digest: str = "d") -> LoadedModel:
    manifest = Manifest(name, aliases, digest, "layout", TINY_GPT2, (Allocation(7, "", 1),), {}, (), ())
    return LoadedModel(manifest, (), None)


def reason_of(action: object) -> Reason:
    with pytest.raises(ServiceError) as caught:
        action()
    return caught.value.reason


def test_a_store_finds_models_by_name_alias_and_digest() -> None:
    store = ModelStore()
    assert reason_of(lambda: store.find("")) is Reason.MODEL_NOT_FOUND
    b, a = model_of("b", "x", "y", digest="1"), model_of("a", digest="2")
    store.add(b)
    assert store.find("") is b
    store.add(a)
    assert store.models == [a, b]
    assert store.resident_bytes == 14
    assert [store.find(key) for key in ("b", "x", "y", "1")] == [b] * 4
    for key in ("", "z", "3"):
        assert reason_of(lambda key=key: store.find(key)) is Reason.MODEL_NOT_FOUND
    for names in (("b",), ("c", "y"), ("x",)):
        assert reason_of(lambda names=names: store.add(model_of(*names))) is Reason.MODEL_NAME_IN_USE
    store.require_free(("x", "c"), instead_of=b)
    store.remove(b)
    assert store.models == [a]
    store.add(model_of("y"))


def test_leases_are_counted_one_by_one() -> None:
    leases, model = Leases(), model_of("m")
    with leases.hold(model, "e"):
        with leases.hold(model, "e"), leases.hold(model_of("other"), "f"):
            assert (len(leases), leases.holders(model)) == (3, ("e", "e"))
        assert leases.holders(model) == ("e",)
        assert reason_of(lambda: leases.require_none(model)) is Reason.MODEL_IN_USE
    leases.require_none(model)
    assert len(leases) == 0


def host(directory: Path, available_kib: int, cgroup: str) -> Path:
    proc = directory / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 999 kB\nMemAvailable: {available_kib} kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    return proc


def group(directory: Path, names: tuple[str, str, str], limit: int | str, usage: int, file_pages: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[0]).write_text(f"{limit}\n")
    (directory / names[1]).write_text(f"{usage}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{names[2]} {file_pages}\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_free_memory_is_what_the_host_and_every_group_leave(tmp_path: Path) -> None:
    proc, groups = host(tmp_path, 1000, "0::/a/b\n"), tmp_path / "cgroup"
    assert free_bytes(proc, groups) == 1000 * 1024
    group(groups / "a" / "b", V2, "max", 500, 0)
    group(groups / "a", V2, 10_000, 4_000, 1_000)
    assert free_bytes(proc, groups) == 7_000
    group(groups / "a" / "b", V2, 1_000, 900, 50)
    assert free_bytes(proc, groups) == 150
    group(groups / "a" / "b", V2, 1_000, 1_900, 50)
    assert free_bytes(proc, groups) == 0


def test_free_memory_in_groups_of_version_1(tmp_path: Path) -> None:
    proc = host(tmp_path, 1000, "9:name=systemd:/\n4:cpu,memory:/docker/x\n0::/\n")
    groups = tmp_path / "cgroup"
    group(groups / "memory", V1, 5_000, 1_000, 0)  # as seen in a container: the path is the host's
    assert free_bytes(proc, groups) == 4_000


def test_free_memory_of_this_host() -> None:
    assert 0 < free_bytes() < 1 << 50


def test_a_configuration_is_refused_at_the_door(tmp_path: Path) -> None:
    config = LoaderConfig(ServerConfig("127.0.0.1:0"), tmp_path / "s")
    for change, why in (
        ({"socket": tmp_path / ("x" * 108)}, "--socket"),
        ({"model_root": tmp_path / "none"}, "--model-root"),
        ({"float32_budget": -1}, "--float32-budget"),
        ({"adoption_seconds": -1.0}, "--adoption-seconds"),
        ({"num_threads": 0}, "threads"),
    ):
        with pytest.raises(ValueError, match=why):
            replace(config, **change)


def test_names_of_files() -> None:
    assert default_name(Path("/a/gpt-oss-20b.gguf")) == "gpt-oss-20b"
    assert default_name(Path("gpt-oss-120b-00001-of-00003.gguf")) == "gpt-oss-120b"
    assert default_name(Path("plain")) == "plain"


def test_a_digest_is_over_pieces_of_each_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {"general.architecture": "gpt2"})
    data = path.read_bytes() + os.urandom(READ_BYTES + 2 * PIECE_BYTES + 5)
    path.write_bytes(data)
    file = read_gguf(path)
    pieces = [hashlib.sha256(data[start : start + PIECE_BYTES]).digest() for start in range(0, len(data), PIECE_BYTES)]
    assert digest_of(file, (), 3, Event()) == hashlib.sha256(b"".join(pieces)).hexdigest()
    plain = hashlib.sha256(data).hexdigest()
    assert digest_of(file, (plain,), 3, Event()) == digest_of(file, (), 1, Event())
    assert reason_of(lambda: digest_of(file, ("0" * 64,), 3, Event())) is Reason.MODEL_CHANGED
    stop = Event()
    stop.set()
    with pytest.raises(StoppedError):
        digest_of(file, (), 3, stop)
    path.write_bytes(data[:-1])
    assert reason_of(lambda: digest_of(file, (), 3, Event())) is Reason.MODEL_CHANGED
    path.unlink()
    assert reason_of(lambda: digest_of(file, (), 3, Event())) is Reason.MODEL_CHANGED


def test_allocations_get_numbers_that_were_never_used_and_checksums_of_what_they_hold(tmp_path: Path) -> None:
    path = write_gpt2(tmp_path / "m.gguf")
    numbers = itertools.count(100)
    reports: dict[str, list[Progress]] = {"m": [], "n": []}
    models = [
        load_model(Source(path, name), LoadOptions(num_threads=2), numbers, reports[name].append, Event())
        for name in reports
    ]
    generations = [generation for model in models for generation in model.generations]
    assert generations == sorted(set(generations))
    for model in models:
        for descriptor, allocation in zip(model.descriptors, model.manifest.allocations, strict=True):
            content = os.pread(descriptor, allocation.num_bytes + 1, 0)
            assert len(content) == allocation.num_bytes
            assert hashlib.sha256(content).hexdigest() == allocation.sha256
        model.free()
    assert num_memfds() == 0
    for of_a_load in reports.values():  # how many there are is up to the order in which the threads place their pieces
        assert [stage for stage, _ in itertools.groupby(now.stage for now in of_a_load)] == [
            Stage.PARSE,
            Stage.WEIGHTS,
            Stage.SEAL,
        ]
        done = [now.bytes_done for now in of_a_load]
        assert done == sorted(done)
        assert done[-1] == of_a_load[-1].bytes_total > 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--model", "/nowhere/x.gguf"], "MODEL_NOT_FOUND"),
        (["--socket", "/proc/x/y.sock"], "can't serve"),
        (["--float32-budget-mib", "-1"], "--float32-budget"),
    ],
)
def test_a_loader_that_cannot_start_says_why_and_fails(tmp_path: Path, options: list[str], why: str) -> None:
    command = [sys.executable, "-m", "services.loader", "--listen", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, "--socket", str(tmp_path / "s"), *options], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode != 0
    assert why in done.stderr
    assert not (tmp_path / "s").exists()


def test_a_loader_told_to_stop_while_it_loads_ends_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "faults"))
    monkeypatch.setenv("MXGPT_FAULT", "slow load")
    config = replace(WIDE_GPT2, num_layers=12, ffn_size=2048)
    path = write_gpt2(tmp_path / "large.gguf", config)
    loader = Service("loader", "--socket", str(tmp_path / "s"), "--model", str(path), "--threads", "1")
    assert loader.address
    assert loader.stop() == 0
    loader.joined()
    assert "large is not loaded" in loader.text
    assert "loaded" not in loader.text.replace("not loaded", "")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("min_file_bytes", "keeps_ready"),
    [(0, False), (0, True), (1 << 40, False)],
    ids=["in a process", "in one that waits", "on the spot"],
)
def test_a_tokenizer_is_checked_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, min_file_bytes: int, keeps_ready: bool
) -> None:
    monkeypatch.setattr(tokenizer_check, "MIN_FILE_BYTES", min_file_bytes)
    checks = TokenizerChecks(keeps_ready)
    checks.make_ready()

    def check(path: Path) -> tuple[int, ...]:
        with checks.begin(path) as checking:
            return checking.eog_token_ids(read_gguf(path))

    path = write_gpt2(tmp_path / "m.gguf")
    assert check(path) == (WIDE_GPT2.vocab_size - 1,)
    path.write_bytes(path.read_bytes().replace(b"t 1", b"t 2", 1))
    with pytest.raises(ServiceError, match=r"entry 0, 't 2', does not join") as caught:
        check(path)
    assert caught.value.reason is Reason.MODEL_INVALID
    assert check(write_model(tmp_path / "none.gguf", WIDE_GPT2)) == ()
    before = num_memfds()
    options = LoadOptions(tokenizer_checks=checks)
    assert reason_of(lambda: load_model(Source(path, "m"), options, itertools.count(1), lambda _: None, Event())) is (
        Reason.MODEL_INVALID
    )
    assert num_memfds() == before
    checks.close()


def test_processes_that_check_end_with_their_file_or_with_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_check, "MIN_FILE_BYTES", 0)
    path = write_gpt2(tmp_path / "m.gguf")
    checks = TokenizerChecks(keeps_ready=True)
    checks.make_ready()
    (first,) = checks._waiting
    first.send_signal(signal.SIGSTOP)
    with checks.begin(path):  # nobody waits for what it finds
        assert first.poll() is None
        (second,) = checks._waiting  # ready when this load ends
    assert first.returncode is not None
    assert second.poll() is None
    second.kill()
    second.wait()
    with checks.begin(path) as check:
        assert check.eog_token_ids(read_gguf(path)) == (WIDE_GPT2.vocab_size - 1,)
    (third,) = checks._waiting
    assert third.stdin is not None
    third.stdin.close()  # as when the loader is killed
    assert third.wait(100) == 0
    checks.make_ready()
    checks.close()
    assert not checks._waiting


def test_a_load_goes_on_though_no_process_can_be_started_for_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokenizer_check, "MIN_FILE_BYTES", 0)
    path = write_gpt2(tmp_path / "m.gguf")
    checks = TokenizerChecks(keeps_ready=True)
    checks.make_ready()

    def refuse() -> NoReturn:
        raise BlockingIOError("too many processes")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_check, "_start", refuse)
        with checks.begin(path) as check:
            assert check.eog_token_ids(read_gguf(path)) == (WIDE_GPT2.vocab_size - 1,)
    assert "no process waits to check the next tokenizer: too many processes" in caplog.text
    with checks.begin(path) as check:  # it has none waiting, and starts one
        assert check.eog_token_ids(read_gguf(path)) == (WIDE_GPT2.vocab_size - 1,)
    checks.close()


def test_phases_are_told_in_order() -> None:
    phases = Phases(since_start=True)
    for name in ("imports", "context", "imports"):
        phases.lap(name)
    assert list(phases.seconds) == ["imports", "context"]
    assert 0 < phases.seconds["imports"] < 3600
    assert re.fullmatch(r"imports \d+ ms, context \d+ ms", str(phases))
