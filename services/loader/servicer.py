"""LoaderService: translates between the contract and the loader's parts, and does nothing else.

The streaming methods are coroutines that write, not generators: when a call ends, whatever ended it, the
cancellation arrives where they wait, and their `finally` runs at once. A lease must not outlive its stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import grpc

from mxgpt.v1 import loader_pb2, loader_pb2_grpc
from services.loader.adoption import Adoption
from services.loader.handover import Handover
from services.loader.leases import Leases
from services.loader.loaded_model import LoadedModel, is_resident
from services.loader.loading import Progress, Source, Stage, default_name, plan_model
from services.loader.loads import Loads
from services.loader.model_proto import model_to_proto, progress_to_proto
from services.loader.store import ModelStore
from services.loader.tokenizer_files import read_tokenizer
from shared.calls import Calls
from shared.errors import Reason, ServiceError, invalid_field
from shared.gpt_config import GPTConfig
from shared.layout import Plan
from shared.manifest import Manifest
from shared.manifest_proto import manifest_from_proto, manifest_to_proto
from shared.server import Server, servicer_method
from shared.tokenizer_data_proto import to_pieces
from shared.tracing import Span

PROGRESS_SECONDS = 0.1  # between two messages of a load
MAX_EXECUTOR_ID_CHARACTERS = 256

Context: TypeAlias = grpc.aio.ServicerContext


def loader_id() -> str:
    """This loader's id: its host and process."""
    return f"{socket.gethostname()}-{os.getpid()}"


class LoaderServicer(loader_pb2_grpc.LoaderServiceServicer):
    """Serves mxgpt.v1.LoaderService over one store of models."""

    def __init__(
        self,
        server: Server,
        calls: Calls,
        store: ModelStore,
        loads: Loads,
        leases: Leases,
        handover: Handover,
        awaited: Sequence[Source] = (),
    ) -> None:
        self.calls = calls
        self.adoption = Adoption(store, loads, leases, handover, awaited)
        self.has_ended_leases = False  # by stopping under them
        self._server = server
        self._store = store
        self._loads = loads
        self._leases = leases
        self._handover = handover
        self._id = loader_id()

    @servicer_method
    async def LoadModel(self, request: loader_pb2.LoadModelRequest, context: Context) -> None:
        self._refuse_if_draining()
        path = self._path(request.path)
        name = request.name or default_name(path)
        source = Source(path, name, tuple(request.aliases), tuple(request.sha256))
        async with self._loads.join(source) as load:
            sent = None
            while (model := await load.wait(PROGRESS_SECONDS)) is None:
                if load.progress != sent:
                    sent = load.progress
                    await context.write(progress_to_proto(sent))
        ready = progress_to_proto(Progress(Stage.READY, load.progress.bytes_total, load.progress.bytes_total))
        ready.model.CopyFrom(self._model(model))
        await context.write(ready)

    @servicer_method
    async def UnloadModel(
        self, request: loader_pb2.UnloadModelRequest, context: Context
    ) -> loader_pb2.UnloadModelResponse:
        if not request.model:
            raise invalid_field("model", "is empty; name the model to free")
        model = self._store.find(request.model)
        self._leases.require_none(model)
        self._store.remove(model)
        freed_bytes = model.resident_bytes
        model.free()
        return loader_pb2.UnloadModelResponse(freed_bytes=freed_bytes)

    @servicer_method
    async def ListModels(
        self, request: loader_pb2.ListModelsRequest, context: Context
    ) -> loader_pb2.ListModelsResponse:
        return loader_pb2.ListModelsResponse(models=[self._model(model) for model in self._store.models])

    @servicer_method
    async def GetModel(self, request: loader_pb2.GetModelRequest, context: Context) -> loader_pb2.GetModelResponse:
        if not request.model:
            raise invalid_field("model", "is empty; name a model")
        return loader_pb2.GetModelResponse(model=self._model(self._store.find(request.model)))

    @servicer_method
    async def EstimateMemory(
        self, request: loader_pb2.EstimateMemoryRequest, context: Context
    ) -> loader_pb2.EstimateMemoryResponse:
        config, planned = await self._planned(request)
        if request.context_length > config.context_length:
            raise invalid_field("context_length", f"is more than the model's {config.context_length}")
        memory = self._loads.options.memory
        estimate = memory.estimate(config, planned, request.context_length, request.num_sequences or 1)
        return loader_pb2.EstimateMemoryResponse(
            weight_bytes=estimate.weight_bytes,
            kv_bytes=estimate.kv_bytes,
            kv_bytes_per_token=estimate.kv_bytes_per_token,
            activation_bytes=estimate.activation_bytes,
        )

    @servicer_method
    async def GetStatus(self, request: loader_pb2.GetStatusRequest, context: Context) -> loader_pb2.GetStatusResponse:
        memory = self._loads.options.memory
        resident = [model.manifest.model for model in self._store.models if await is_resident(model, memory)]
        return loader_pb2.GetStatusResponse(
            loader_id=self._id,
            device=memory.device,
            driver_version=memory.driver_version,
            compute_capability=memory.compute_capability,
            resident_models=resident,
            used_bytes=memory.used_bytes(),
            resident_bytes=self._store.resident_bytes,
            free_bytes=memory.free_bytes(),
            models=[self._model(model) for model in self._store.models],
            num_leases=len(self._leases),
        )

    @servicer_method
    async def GetTokenizerData(self, request: loader_pb2.GetTokenizerDataRequest, context: Context) -> None:
        model = self._find(request.model)
        data = await asyncio.to_thread(read_tokenizer, model, self._loads.options)
        pieces = to_pieces(data)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            await context.write(piece)

    @servicer_method
    async def Attach(self, request: loader_pb2.AttachRequest, context: Context) -> None:
        self._refuse_if_draining()
        if not 1 <= len(request.executor_id) <= MAX_EXECUTOR_ID_CHARACTERS or not request.executor_id.isprintable():
            raise invalid_field("executor_id", f"wants 1 to {MAX_EXECUTOR_ID_CHARACTERS} printable characters")
        if request.HasField("held"):
            await self._attach_holder(request, context)
        else:
            await self._attach(request, context)
        self.has_ended_leases = True
        raise ServiceError(Reason.DRAINING, "the loader is stopping; your memory stays yours, attach to the next one")

    async def _attach(self, request: loader_pb2.AttachRequest, context: Context) -> None:
        """Lease a model to an executor that has nothing yet."""
        model = self._find(request.model)
        _require_accepted(model.manifest, request)
        with self._leases.hold(model, request.executor_id):
            ticket = self._handover.hand_out(model.descriptors, model.sizes)
            try:
                with self._traced(context):
                    await context.write(self._attached(model.manifest, ticket))
                await self._server.draining.wait()
            finally:
                self._handover.withdraw(ticket)

    async def _attach_holder(self, request: loader_pb2.AttachRequest, context: Context) -> None:
        """Lease a model to an executor that maps it already, taking its memory in if it isn't here."""
        held = manifest_from_proto(request.held, "held")
        _require_accepted(held, request)
        told = False

        async def announce(ticket: bytes) -> None:
            nonlocal told
            told = True
            await context.write(self._attached(held, ticket, adopt=True))

        model = await self.adoption.adopt(held, announce)
        with self._leases.hold(model, request.executor_id):
            if not told:
                await context.write(self._attached(model.manifest, b""))
            await self._server.draining.wait()

    def _traced(self, context: Context) -> contextlib.AbstractContextManager[Span]:
        """The span of the beginning of a lease: the lease itself lives on, and would be told when it is over."""
        name = "mxgpt.v1.LoaderService/Attach"
        return self.calls.tracing.serve(name, context.invocation_metadata(), starts_trace=False)

    def _attached(self, manifest: Manifest, ticket: bytes, *, adopt: bool = False) -> loader_pb2.AttachResponse:
        attached = loader_pb2.Attached(
            manifest=manifest_to_proto(manifest), socket_path=str(self._handover.path), ticket=ticket, adopt=adopt
        )
        return loader_pb2.AttachResponse(attached=attached)

    def _find(self, key: str) -> LoadedModel:
        """The model of a key; STARTING while it, or any if the key is empty, is still being loaded."""
        try:
            return self._store.find(key)
        except ServiceError:
            if self._loads.is_loading([key]) or self._may_come(key):
                raise ServiceError(Reason.STARTING, "the model is still being loaded", retry_after=1.0) from None
            raise

    async def _planned(self, request: loader_pb2.EstimateMemoryRequest) -> tuple[GPTConfig, Plan]:
        """The dimensions and the plan of a loaded model or of a file."""
        target = request.WhichOneof("target")
        if target is None:
            raise invalid_field("target", "name a model or a path")
        if target == "path":
            _, config, planned = await asyncio.to_thread(plan_model, self._path(request.path), self._loads.options)
            return config, planned
        model = self._find(request.model)
        return model.manifest.config, Plan(model.manifest.layout, model.sizes, model.manifest.tensors)

    def _may_come(self, key: str) -> bool:
        """Whether the model of a key, or any if it is empty, may be there soon, loaded at start or adopted."""
        expected = self.adoption.expected
        return key in expected or (not key and not self._store.models and bool(expected))

    def _path(self, path: str) -> Path:
        """A request's path, below the model root where there is one, made absolute."""
        if not path or "\0" in path:
            raise invalid_field("path", "is empty; give a GGUF file's" if not path else "holds a zero byte")
        return Path(os.path.abspath((self._loads.options.model_root or Path()) / path))

    def _model(self, model: LoadedModel) -> loader_pb2.Model:
        return model_to_proto(model, self._leases.holders(model))

    def _refuse_if_draining(self) -> None:
        if self._server.draining.is_set():
            raise ServiceError(Reason.DRAINING, "the loader is stopping")


def _require_accepted(manifest: Manifest, request: loader_pb2.AttachRequest) -> None:
    if manifest.layout not in request.layouts:
        accepted = ", ".join(request.layouts) or "none"
        why = f"model {manifest.model!r} lies as {manifest.layout!r}; the executor accepts {accepted}."
        raise ServiceError(Reason.LAYOUT_UNSUPPORTED, why)
