"""Loaded models on the wire."""

from __future__ import annotations

from collections.abc import Sequence

from mxgpt.v1 import loader_pb2
from services.loader.loaded_model import LoadedModel
from services.loader.loading import Progress
from shared.manifest_proto import config_to_proto


def model_to_proto(model: LoadedModel, holders: Sequence[str]) -> loader_pb2.Model:
    """The message of a model, leased by `holders`."""
    manifest = model.manifest
    return loader_pb2.Model(
        name=manifest.model,
        aliases=manifest.aliases,
        digest=manifest.digest,
        config=config_to_proto(manifest.config),
        files=_files_to_proto(model),
        resident_bytes=model.resident_bytes,
        layout=manifest.layout,
        tensor_types=model.tensor_types,
        holders=holders,
        file_changed=model.is_file_changed,
    )


def _files_to_proto(model: LoadedModel) -> list[loader_pb2.ModelFile]:
    files = [loader_pb2.ModelFile(path=path, bytes=num_bytes) for path, num_bytes in model.manifest.files]
    for file, sha256 in zip(files, model.file_sha256, strict=False):
        file.sha256 = sha256
    return files


def progress_to_proto(progress: Progress) -> loader_pb2.LoadModelResponse:
    """The message of a load's progress."""
    return loader_pb2.LoadModelResponse(
        stage=progress.stage.value,  # type: ignore[arg-type]  # the enum's values are the contract's
        bytes_done=progress.bytes_done,
        bytes_total=progress.bytes_total,
    )
