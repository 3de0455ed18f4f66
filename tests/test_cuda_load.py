"""Loading into a real GPU's memory: what lies there is what the host would have put there, or nothing is left of it."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event

import gguf
import numpy as np
import pytest

from services.loader.cuda.memory import CudaMemory
from services.loader.loaded_model import LoadedModel
from services.loader.loading import LoadOptions, Progress, Source, Stage, load_model
from shared.cuda_layout import fill, is_tiled, plan
from shared.cuda_memory import CudaDevice, check, create_shared, import_readonly
from shared.descriptors import close_all, create_memory
from shared.digest import PIECE_BYTES, StoppedError, digest_of
from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf
from shared.gpt_config import GPTConfig
from shared.manifest import Allocation
from tests.cuda_device import open_device
from tests.loader_harness import tokenizer_metadata
from tests.tiny_models import (
    TINY_GPT2,
    TINY_GPT_OSS,
    WIDE_GPT2,
    WIDE_GPT_OSS,
    add_value,
    model_metadata,
    random_tensor,
    write_model,
)
from tests.weights import random_blocks

# Some pieces long, so that bytes come out of order and tensors lie across pieces.
LARGE = replace(WIDE_GPT_OSS, vocab_size=30_011, num_layers=3)


@pytest.fixture(scope="module")
def memory() -> CudaMemory:
    open_device().close()
    return CudaMemory(0, num_threads=3)


@pytest.mark.parametrize("type", list(GGMLType), ids=lambda type: type.name)
@pytest.mark.parametrize("config", [WIDE_GPT_OSS, WIDE_GPT2], ids=["gpt-oss", "gpt2"])
def test_every_type_is_placed(tmp_path: Path, memory: CudaMemory, config: GPTConfig, type: GGMLType) -> None:
    check_load(tmp_path, memory, config, lambda name: type if is_tiled(name) else GGMLType.F32)


@pytest.mark.parametrize("config", [TINY_GPT_OSS, TINY_GPT2], ids=["gpt-oss", "gpt2"])
@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.F16, GGMLType.BF16], ids=lambda type: type.name)
def test_odd_sizes(tmp_path: Path, memory: CudaMemory, config: GPTConfig, type: GGMLType) -> None:
    check_load(tmp_path, memory, config, lambda name: type if is_tiled(name) else GGMLType.F32)


@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.Q8_0, GGMLType.MXFP4], ids=lambda type: type.name)
def test_files_of_many_pieces(tmp_path: Path, memory: CudaMemory, type: GGMLType) -> None:
    check_load(tmp_path, memory, LARGE, lambda name: type if is_tiled(name) else GGMLType.F32)


def test_shards(tmp_path: Path, memory: CudaMemory) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", LARGE.architecture, split_max_tensors=20)
    for key, value in (model_metadata(LARGE) | tokenizer_metadata(LARGE.vocab_size)).items():
        add_value(writer, key, value)
    for name, shape in LARGE.expected_tensors().items():
        writer.add_tensor(name, random_tensor(np.random.default_rng(0), name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first, *others = sorted(tmp_path.glob("*.gguf"))
    assert len(others) >= 2
    check_file(first, memory, LARGE)


def test_gate_and_up_of_different_families(tmp_path: Path, memory: CudaMemory) -> None:
    types = {"ffn_gate_exps.weight": GGMLType.MXFP4, "ffn_up_exps.weight": GGMLType.Q5_K}
    check_load(tmp_path, memory, WIDE_GPT_OSS, lambda name: types.get(name.split(".", 2)[-1], GGMLType.F32))


def test_a_weight_that_is_not_finite_is_refused_as_on_the_cpu(tmp_path: Path, memory: CudaMemory) -> None:
    path = write(tmp_path, WIDE_GPT_OSS, lambda name: GGMLType.MXFP4 if name.endswith("exps.weight") else GGMLType.F32)
    info = read_gguf(path).tensors["blk.1.ffn_up_exps.weight"]
    content = bytearray(path.read_bytes())
    content[info.offset + 77 * 17] = 0xFF
    path.write_bytes(content)
    refused, on_cpu = (reason(path, LoadOptions(memory=each)) for each in (memory, LoadOptions().memory))
    assert refused == on_cpu
    assert refused[0] is Reason.MODEL_INVALID
    assert f"byte {info.offset + 77 * 17}:" in refused[1]


def test_a_weight_past_the_range_of_half_is_refused(tmp_path: Path, memory: CudaMemory) -> None:
    path = write(tmp_path, TINY_GPT2, lambda name: GGMLType.F32)
    info = read_gguf(path).tensors["blk.1.ffn_up.weight"]
    content = bytearray(path.read_bytes())
    content[info.offset + 12 : info.offset + 16] = np.float32(70000).tobytes()
    path.write_bytes(content)
    assert "'blk.1.ffn_up.weight' holds 70000;" in reason(path, LoadOptions(memory=memory))[1]


def test_what_is_given_up_or_refused_leaves_nothing(tmp_path: Path, memory: CudaMemory) -> None:
    path = write(tmp_path, LARGE, lambda name: GGMLType.F32)
    load(path, memory).free()  # what the first load makes for good: modules
    free, descriptors = memory.free_bytes(), len(os.listdir("/proc/self/fd"))
    stop = Event()

    def report(progress: Progress) -> None:
        if progress.bytes_done > progress.bytes_total // 3 > 0:
            stop.set()

    with pytest.raises(StoppedError):
        load_model(Source(path, "m"), LoadOptions(memory=memory), itertools.count(1), report, stop)
    assert reason(path, LoadOptions(memory=memory), ("0" * 64,))[0] is Reason.MODEL_CHANGED
    assert memory.free_bytes() == free
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, memory: CudaMemory) -> None:
    """As if a MiB were free; others stay as they are."""
    path = write(tmp_path, TINY_GPT_OSS, lambda name: GGMLType.F32)
    model = load(path, memory)
    small = CudaMemory(0)
    small.free_bytes = lambda: 1 << 20  # type: ignore[method-assign]
    with pytest.raises(ServiceError) as caught:
        load(path, small)
    assert caught.value.reason is Reason.VRAM_EXHAUSTED
    assert caught.value.metadata["free_bytes"] == str(1 << 20)
    assert int(caught.value.metadata["needed_bytes"]) > model.resident_bytes
    memory.verify(model.descriptors[0], model.manifest.allocations[0], Event())
    model.free()


def test_memory_is_verified_on_the_gpu(tmp_path: Path, memory: CudaMemory) -> None:
    model = load(write(tmp_path, WIDE_GPT_OSS, lambda name: GGMLType.F32), memory)
    for descriptor, allocation in zip(model.descriptors, model.manifest.allocations, strict=True):
        memory.verify(descriptor, allocation, Event())
        assert memory.is_resident(descriptor, allocation)
        with pytest.raises(ValueError, match="SHA-256"):
            memory.verify(descriptor, replace(allocation, sha256="0" * 64), Event())
        with pytest.raises(ValueError, match="pieces"):
            memory.verify(descriptor, replace(allocation, sha256_piece_bytes=0), Event())
        larger = replace(allocation, num_bytes=allocation.num_bytes + (64 << 20))
        assert not memory.is_resident(descriptor, larger)
    sealed = create_memory("none", 4096)
    with pytest.raises(ValueError, match="no memory of"):
        memory.verify(sealed, Allocation(4096, "0" * 64, 1, PIECE_BYTES), Event())
    assert not memory.is_resident(sealed, Allocation(4096, "0" * 64, 1, PIECE_BYTES))
    os.close(sealed)
    model.free()


WRITER = """
import sys
from shared.cuda_memory import CudaDevice, check, import_readonly
device = CudaDevice(0)
mapping = import_readonly(device, int(sys.argv[1]), 1 << 20)
check(device.api.cuMemsetD8(mapping.address, 1, 1 << 20))
check(device.api.cuCtxSynchronize())
"""


def test_who_writes_through_the_mapping_faults_alone(memory: CudaMemory) -> None:
    device = CudaDevice(0)
    descriptor, mapping = create_shared(device, 1 << 20)
    check(device.api.cuMemsetD8(mapping.address, 7, 1 << 20))
    reader = import_readonly(device, descriptor, 1 << 20)
    result = subprocess.run(
        [sys.executable, "-c", WRITER, str(descriptor)],
        pass_fds=[descriptor],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "CUDA_ERROR" in result.stderr, result.stderr
    for address in (mapping.address, reader.address):
        assert set(read_back(device, address, 1 << 20)) == {7}
    reader.unmap()
    mapping.unmap()
    close_all([descriptor])


def check_load(tmp_path: Path, memory: CudaMemory, config: GPTConfig, type_of: Callable[[str], GGMLType]) -> None:
    """Random blocks, compared with what the host's `fill` makes of them, bit for bit, and with SHA-256 of hashlib."""
    check_file(write(tmp_path, config, type_of), memory, config)


def check_file(path: Path, memory: CudaMemory, config: GPTConfig) -> None:
    file = read_gguf(path)
    planned = plan(file, config)
    device = CudaDevice(0)
    model = load(path, memory)
    assert model.manifest.digest == digest_of(file, (), 2, Event())
    for index, allocation in enumerate(model.manifest.allocations):
        expected = bytearray(allocation.num_bytes)
        fill(planned, file, index, memoryview(expected))
        mapping = import_readonly(device, model.descriptors[index], allocation.num_bytes)
        assert read_back(device, mapping.address, allocation.num_bytes) == bytes(expected), f"allocation {index}"
        mapping.unmap()
        starts = range(0, len(expected), PIECE_BYTES)
        pieces = [hashlib.sha256(expected[start : start + PIECE_BYTES]).digest() for start in starts]
        assert allocation.sha256 == hashlib.sha256(b"".join(pieces)).hexdigest()
        assert allocation.sha256_piece_bytes == PIECE_BYTES
    model.free()


def write(tmp_path: Path, config: GPTConfig, type_of: Callable[[str], GGMLType]) -> Path:
    path = write_model(tmp_path / "model.gguf", config, type_of, metadata=tokenizer_metadata(config.vocab_size))
    random_blocks(path)
    return path


def load(path: Path, memory: CudaMemory) -> LoadedModel:
    seen: list[Progress] = []
    model = load_model(Source(path, "m"), LoadOptions(memory=memory), itertools.count(1), seen.append, Event())
    assert seen[-1] == Progress(Stage.SEAL, seen[-1].bytes_total, seen[-1].bytes_total)
    return model


def reason(path: Path, options: LoadOptions, pins: tuple[str, ...] = ()) -> tuple[Reason, str]:
    with pytest.raises(ServiceError) as caught:
        load_model(Source(path, "m", sha256=pins), options, itertools.count(1), lambda _: None, Event())
    return caught.value.reason, caught.value.message


def read_back(device: CudaDevice, address: int, num_bytes: int) -> bytes:
    out = np.empty(num_bytes, np.uint8)
    device.use()
    check(device.api.cuMemcpyDtoH(out.ctypes.data, address, num_bytes))
    return out.tobytes()
