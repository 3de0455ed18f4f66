"""A manifest on the wire: `Manifest` as `mxgpt.v1.Manifest`, and back with every claim checked.

What `manifest_from_proto` returns can be mapped and viewed without a further look: planes lie inside their
allocations, whatever the message said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from mxgpt.v1 import loader_pb2
from shared.descriptors import MAX_DESCRIPTORS
from shared.errors import invalid_field
from shared.gpt_config import GPTConfig, RopeConfig
from shared.manifest import Allocation, Manifest, Plane, Tensor

MAX_NUM_TENSORS = 1 << 16
MAX_ALLOCATION_BYTES = 1 << 48
MAX_NUM_AXES = 4  # of a tensor
MAX_PLANE_AXES = 12  # layouts cut tensors into tiles, and tiles into the shares of lanes
DTYPES = frozenset(("float32", "float16", "uint8", "int8", "uint16", "int16", "uint32", "int32"))

_SHA256 = re.compile(r"[0-9a-f]{64}")


def manifest_to_proto(manifest: Manifest) -> loader_pb2.Manifest:
    """The message of a manifest."""
    return loader_pb2.Manifest(
        model=manifest.model,
        aliases=manifest.aliases,
        digest=manifest.digest,
        layout=manifest.layout,
        config=config_to_proto(manifest.config),
        allocations=[
            loader_pb2.Allocation(
                bytes=each.num_bytes,
                sha256=each.sha256,
                generation=each.generation,
                sha256_piece_bytes=each.sha256_piece_bytes,
            )
            for each in manifest.allocations
        ],
        tensors=[_tensor_to_proto(tensor) for tensor in manifest.tensors.values()],
        files=[loader_pb2.ModelFile(path=path, bytes=num_bytes) for path, num_bytes in manifest.files],
        eog_token_ids=manifest.eog_token_ids,
    )


def manifest_from_proto(message: loader_pb2.Manifest, field: str = "manifest") -> Manifest:
    """The manifest of a message; `field` is the message's own path, for errors.

    Raises:
        ServiceError: FIELD_INVALID, naming the field that is wrong; MODEL_INVALID or ARCHITECTURE_UNSUPPORTED
            where the model's dimensions are.
    """
    if not message.model:
        raise invalid_field(f"{field}.model", "is empty")
    _check_sha256(message.digest, f"{field}.digest")
    allocations = _allocations(message.allocations, field)
    config = config_from_proto(message.config)
    tensors = _tensors(message.tensors, allocations, field)
    _check_complete(tensors, config, field)
    return Manifest(
        model=message.model,
        aliases=tuple(message.aliases),
        digest=message.digest,
        layout=message.layout,
        config=config,
        allocations=allocations,
        tensors=tensors,
        files=tuple((each.path, each.bytes) for each in message.files),
        eog_token_ids=_eog_token_ids(message.eog_token_ids, config, field),
    )


def config_to_proto(config: GPTConfig) -> loader_pb2.ModelConfig:
    """The message of a model's dimensions."""
    return loader_pb2.ModelConfig(
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        ffn_size=config.ffn_size,
        norm_epsilon=config.norm_epsilon,
        tied_head=config.tied_head,
        num_experts=config.num_experts,
        num_experts_used=config.num_experts_used,
        sliding_window=config.sliding_window,
        rope=_rope_to_proto(config.rope) if config.rope is not None else None,
    )


def config_from_proto(message: loader_pb2.ModelConfig) -> GPTConfig:
    """A model's dimensions, which check themselves.

    Raises:
        ServiceError: MODEL_INVALID or ARCHITECTURE_UNSUPPORTED.
    """
    return GPTConfig(
        architecture=message.architecture,
        vocab_size=message.vocab_size,
        context_length=message.context_length,
        num_layers=message.num_layers,
        hidden_size=message.hidden_size,
        num_heads=message.num_heads,
        num_kv_heads=message.num_kv_heads,
        head_size=message.head_size,
        ffn_size=message.ffn_size,
        norm_epsilon=message.norm_epsilon,
        tied_head=message.tied_head,
        num_experts=message.num_experts,
        num_experts_used=message.num_experts_used,
        sliding_window=message.sliding_window,
        rope=_rope_from_proto(message.rope) if message.HasField("rope") else None,
    )


def _tensor_to_proto(tensor: Tensor) -> loader_pb2.Tensor:
    planes = [
        loader_pb2.Plane(
            role=plane.role,
            dtype=plane.dtype,
            allocation=plane.allocation,
            offset=plane.offset,
            shape=plane.shape,
            strides=plane.strides,
        )
        for plane in tensor.planes
    ]
    return loader_pb2.Tensor(name=tensor.name, type=tensor.type, shape=tensor.shape, planes=planes)


def _rope_to_proto(rope: RopeConfig) -> loader_pb2.RopeConfig:
    return loader_pb2.RopeConfig(
        theta=rope.theta,
        factor=rope.factor,
        original_context_length=rope.original_context_length,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        attention_factor=rope.attention_factor,
        extrapolation_factor=rope.extrapolation_factor,
    )


def _rope_from_proto(message: loader_pb2.RopeConfig) -> RopeConfig:
    return RopeConfig(
        theta=message.theta,
        factor=message.factor,
        original_context_length=message.original_context_length,
        beta_fast=message.beta_fast,
        beta_slow=message.beta_slow,
        attention_factor=message.attention_factor,
        extrapolation_factor=message.extrapolation_factor,
    )


def _allocations(messages: Sequence[loader_pb2.Allocation], field: str) -> tuple[Allocation, ...]:
    if not 1 <= len(messages) <= MAX_DESCRIPTORS:
        raise invalid_field(f"{field}.allocations", f"{len(messages)} of them; 1 to {MAX_DESCRIPTORS} are served")
    for index, each in enumerate(messages):
        path = f"{field}.allocations[{index}]"
        if not 1 <= each.bytes <= MAX_ALLOCATION_BYTES:
            raise invalid_field(f"{path}.bytes", f"is {each.bytes}, outside [1, {MAX_ALLOCATION_BYTES}]")
        _check_sha256(each.sha256, f"{path}.sha256")
    return tuple(Allocation(each.bytes, each.sha256, each.generation, each.sha256_piece_bytes) for each in messages)


def _tensors(messages: Sequence[loader_pb2.Tensor], allocations: Sequence[Allocation], field: str) -> dict[str, Tensor]:
    if not 1 <= len(messages) <= MAX_NUM_TENSORS:
        raise invalid_field(f"{field}.tensors", f"{len(messages)} of them; 1 to {MAX_NUM_TENSORS} are served")
    tensors: dict[str, Tensor] = {}
    for message in messages:
        path = f"{field}.tensors[{message.name!r:.80}]"
        if not message.name or message.name in tensors:
            raise invalid_field(path, "comes twice" if message.name else "has no name")
        if not 1 <= len(message.shape) <= MAX_NUM_AXES:
            raise invalid_field(f"{path}.shape", f"has {len(message.shape)} axes, outside [1, {MAX_NUM_AXES}]")
        planes = tuple(
            _plane(plane, allocations, f"{path}.planes[{index}]") for index, plane in enumerate(message.planes)
        )
        tensors[message.name] = Tensor(message.name, message.type, tuple(message.shape), planes)
    return tensors


def _check_complete(tensors: Mapping[str, Tensor], config: GPTConfig, field: str) -> None:
    """Refuse a manifest that lacks a tensor of its model, or has one of another shape."""
    for name, shape in config.expected_tensors().items():
        if name not in tensors:
            raise invalid_field(f"{field}.tensors", f"{name!r} is missing")
        if tensors[name].shape != shape or not tensors[name].planes:
            raise invalid_field(
                f"{field}.tensors", f"{name!r} has shape {tensors[name].shape}, not {shape}, or no plane"
            )


def _plane(message: loader_pb2.Plane, allocations: Sequence[Allocation], path: str) -> Plane:
    shape, strides = tuple(message.shape), tuple(message.strides)
    if message.dtype not in DTYPES:
        raise invalid_field(f"{path}.dtype", f"{message.dtype!r:.40} is not served")
    if message.allocation >= len(allocations):
        raise invalid_field(f"{path}.allocation", f"is {message.allocation}; there are {len(allocations)}")
    if not 1 <= len(shape) <= MAX_PLANE_AXES or len(strides) != len(shape) or 0 in shape:
        raise invalid_field(f"{path}.shape", f"{shape} with strides {strides} is no array")
    item_size = np.dtype(message.dtype).itemsize
    if message.offset % item_size or any(stride % item_size for stride in strides):
        raise invalid_field(f"{path}.strides", f"offset {message.offset} or strides {strides} break the alignment")
    plane = Plane(message.role, message.dtype, message.allocation, message.offset, shape, strides)
    _check_inside(plane, item_size, allocations[message.allocation].num_bytes, path)
    return plane


def _check_inside(plane: Plane, item_size: int, num_bytes: int, path: str) -> None:
    """Refuse an array that leaves its allocation, or whose elements overlap (it could claim any number of them)."""
    if max(plane.strides) > num_bytes:  # even along an axis of one element: NumPy takes no stride past 2^63
        raise invalid_field(f"{path}.strides", f"{plane.strides} leave the allocation of {num_bytes} bytes")
    span = item_size  # bytes from the first element to the end of the last, over the axes seen so far
    for count, stride in sorted(zip(plane.shape, plane.strides, strict=True), key=lambda axis: axis[1]):
        if count == 1:
            continue
        if stride < span:
            raise invalid_field(f"{path}.strides", f"{plane.strides} make elements of {plane.shape} overlap")
        span += (count - 1) * stride
    if plane.offset + span > num_bytes:
        raise invalid_field(f"{path}.offset", f"the plane ends at byte {plane.offset + span} of {num_bytes}")


def _eog_token_ids(ids: Sequence[int], config: GPTConfig, field: str) -> tuple[int, ...]:
    if list(ids) != sorted(set(ids)) or any(token_id >= config.vocab_size for token_id in ids):
        raise invalid_field(f"{field}.eog_token_ids", f"must ascend, each below {config.vocab_size}")
    return tuple(ids)


def _check_sha256(text: str, path: str) -> None:
    if _SHA256.fullmatch(text) is None:
        raise invalid_field(path, "is no SHA-256 in lower-case hexadecimal")
