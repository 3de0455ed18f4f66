"""Manifests on the wire: they come back as they were, and no claim that could crash an executor gets through."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from mxgpt.v1 import loader_pb2
from shared import cuda_layout, layout
from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import GGUFFile, read_gguf
from shared.gpt_config import GPTConfig, is_matrix
from shared.layout import Plan, plane_array
from shared.manifest import Allocation, Manifest
from shared.manifest_proto import manifest_from_proto, manifest_to_proto
from tests.loader_harness import write_gpt2, write_gpt_oss
from tests.tiny_models import WIDE_GPT_OSS, write_model


def manifest_of(path: Path, plan: Callable[[GGUFFile, GPTConfig], Plan] = layout.plan) -> Manifest:
    file = read_gguf(path)
    config = GPTConfig.from_gguf(file)
    planned = plan(file, config)
    allocations = tuple(Allocation(size, f"{i:064x}", 2**63 + i) for i, size in enumerate(planned.allocation_sizes))
    files = ((str(path), path.stat().st_size),)
    return Manifest("m", ("a",), "0" * 64, planned.layout, config, allocations, dict(planned.tensors), files, (3, 9))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return manifest_of(write_gpt_oss(tmp_path_factory.mktemp("models") / "m.gguf"))


def test_a_manifest_comes_back_as_it_was(manifest: Manifest, tmp_path: Path) -> None:
    for each in (manifest, manifest_of(write_gpt2(tmp_path / "m.gguf"))):
        message = loader_pb2.Manifest.FromString(manifest_to_proto(each).SerializeToString())
        assert manifest_from_proto(message) == each


@pytest.mark.parametrize("type_", list(cuda_layout.FAMILIES), ids=lambda type_: type_.name)
def test_the_layout_of_gpus_comes_back_too(tmp_path: Path, type_: GGMLType) -> None:
    path = write_model(tmp_path / "m.gguf", WIDE_GPT_OSS, lambda name: type_ if is_matrix(name) else GGMLType.F32)
    each = manifest_of(path, cuda_layout.plan)
    message = loader_pb2.Manifest.FromString(manifest_to_proto(each).SerializeToString())
    assert manifest_from_proto(message) == each


def first_plane(message: loader_pb2.Manifest) -> loader_pb2.Plane:
    return message.tensors[0].planes[0]


def overlap(message: loader_pb2.Manifest) -> None:
    plane = first_plane(message)
    plane.shape[:] = [1 << 20, 1 << 20, 1 << 20, 1 << 20]
    plane.strides[:] = [4, 4, 4, 4]


def broadcast(message: loader_pb2.Manifest) -> None:
    plane = first_plane(message)
    plane.shape[:] = [1 << 62]
    plane.strides[:] = [0]


WRONG: dict[str, Callable[[loader_pb2.Manifest], object]] = {
    "model": lambda message: message.ClearField("model"),
    "digest": lambda message: setattr(message, "digest", "0" * 63 + "G"),
    "allocations": lambda message: message.ClearField("allocations"),
    "allocations[0].bytes": lambda message: setattr(message.allocations[0], "bytes", 0),
    "allocations[1].bytes": lambda message: setattr(message.allocations[1], "bytes", 1 << 60),
    "allocations[2].sha256": lambda message: setattr(message.allocations[2], "sha256", ""),
    "tensors": lambda message: message.ClearField("tensors"),
    "comes twice": lambda message: message.tensors.append(message.tensors[0]),
    "no name": lambda message: setattr(message.tensors[0], "name", ""),
    "shape": lambda message: first_plane(message).shape.append(1),
    "no array": lambda message: first_plane(message).shape.__setitem__(0, 0),
    "has 0 axes": lambda message: message.tensors[0].ClearField("shape"),
    "dtype": lambda message: setattr(first_plane(message), "dtype", "object"),
    "allocation": lambda message: setattr(first_plane(message), "allocation", len(message.allocations)),
    "alignment": lambda message: setattr(first_plane(message), "offset", first_plane(message).offset + 1),
    "ends at byte": lambda message: setattr(first_plane(message), "offset", 1 << 40),
    "overlap": overlap,
    "make elements": broadcast,
    "eog_token_ids": lambda message: message.eog_token_ids.append(9),
    "below": lambda message: message.eog_token_ids.append(message.config.vocab_size),
    "is missing": lambda message: message.tensors.pop(),
    "has shape": lambda message: message.tensors[0].shape.__setitem__(0, 5),
}


@pytest.mark.parametrize("named", WRONG)
def test_every_wrong_claim_is_named(manifest: Manifest, named: str) -> None:
    message = manifest_to_proto(manifest)
    WRONG[named](message)
    with pytest.raises(ServiceError) as caught:
        manifest_from_proto(message)
    assert caught.value.reason is Reason.FIELD_INVALID
    assert named in caught.value.message


def test_dimensions_check_themselves(manifest: Manifest) -> None:
    message = manifest_to_proto(manifest)
    message.config.num_kv_heads = 3
    with pytest.raises(ServiceError) as caught:
        manifest_from_proto(message)
    assert caught.value.reason is Reason.MODEL_INVALID
    message.config.architecture = "llama"
    with pytest.raises(ServiceError) as caught:
        manifest_from_proto(message)
    assert caught.value.reason is Reason.ARCHITECTURE_UNSUPPORTED


def test_whatever_is_accepted_can_be_viewed(manifest: Manifest) -> None:
    """Planes with random numbers: either refused, or every one of their elements lies in its allocation."""
    chance = random.Random(5)
    size = manifest.allocations[0].num_bytes
    message = manifest_to_proto(manifest)
    tensor = message.tensors[-1]
    num_accepted = 0
    for _ in range(1000):
        plane = tensor.planes[0]
        axes = chance.randint(1, 3)
        plane.dtype = chance.choice(["float32", "uint8", "float16"])
        plane.allocation = 0
        plane.offset = chance.choice([0, 4, 400, size // 2, size - 4, size - 1, size])
        plane.shape[:] = [chance.choice([1, 2, 3, 8, 33]) for _ in range(axes)]
        plane.strides[:] = [chance.choice([0, 1, 4, 8, 32, 132, 4224, size // 32, 1 << 63]) for _ in range(axes)]
        try:
            accepted = manifest_from_proto(message)
        except ServiceError:
            continue
        num_accepted += 1
        array = plane_array(accepted.tensors[tensor.name].planes[0], memoryview(bytes(size)))
        assert array.sum() == 0
        assert array.nbytes <= size
    assert 50 < num_accepted < 950
