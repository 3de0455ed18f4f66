"""ExecutorService over gRPC: translates between the contract and the engine, and does nothing else."""

from __future__ import annotations

import asyncio
import functools
import itertools
import uuid
from collections.abc import Sequence
from typing import Any

import grpc

from mxgpt.v1 import executor_pb2, executor_pb2_grpc
from services.executor import validation
from services.executor.config import ExecutorConfig
from services.executor.content_log import ContentLog
from services.executor.engine_client import EngineClient
from services.executor.generation import Form, Generation, Origin
from services.executor.generations import Generations
from services.executor.metrics import ExecutorMetrics, WatchedRequest
from services.executor.request import Event, Request
from services.executor.text_pipe import TextPipe
from services.executor.tokenizer_client import TokenizerClient, Vocabulary
from services.executor.validation import Limits
from shared.calls import Calls, current_call
from shared.errors import Reason, ServiceError, Status
from shared.manifest import Manifest
from shared.server import Server, servicer_method
from shared.tracing import Span


class ExecutorServicer(executor_pb2_grpc.ExecutorServiceServicer):
    """Serves one model once `serve_model` has been called; until then calls are answered with why there is none."""

    def __init__(self, server: Server, calls: Calls, metrics: ExecutorMetrics, config: ExecutorConfig) -> None:
        self.calls = calls
        self.executor_id = config.name
        self.generations = Generations()
        self._metrics = metrics
        self._server = server
        self._device = config.device
        self._write_stall_seconds = config.write_stall_seconds
        self._log_content = config.telemetry.log_content
        self._engine_ids = itertools.count()
        self._num_calls = 0  # of Generate, those that are still being prepared included
        self._model: _Model | None = None
        self._lack = (Reason.STARTING, "it has not attached to the loader")

    def wait_for_loader(self, error: ServiceError) -> None:
        """Tell callers what keeps this executor from attaching to its model."""
        self._lack = (error.reason if error.status is Status.UNAVAILABLE else Reason.STARTING, error.message)

    def serve_model(
        self,
        manifest: Manifest,
        context_length: int,
        engine: EngineClient,
        tokenizer: TokenizerClient,
        pipe: TextPipe,
        lease: Span,
    ) -> None:
        """Begin to answer for a model whose engine runs, on weights that came in the span `lease`."""
        self._model = _Model(manifest, context_length, engine, tokenizer, pipe, lease, self.executor_id)
        self._metrics.serve_model(manifest.model)

    def on_events(self, events: Sequence[Event]) -> None:
        """Deliver one engine step."""
        assert self._model is not None
        self._metrics.on_step(events)
        self.generations.on_events(events)
        self._model.pipe.flush()

    async def drained(self) -> None:
        """Return when no call is running; cancelled, because the grace is over, end those that are with DRAINING."""
        try:
            while self._num_calls:
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            self.generations.fail_all(_draining())
            raise

    @servicer_method
    async def Generate(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        model = self._model_for(request.model)
        validation.check_frame(request, model.limits)
        if self._server.draining.is_set():
            raise _draining()
        self._num_calls += 1
        try:
            await self._generate(model, request, context)
        finally:
            self._num_calls -= 1

    @servicer_method
    async def Cancel(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        generation = self.generations.find(self._server.caller(context), request.request_id)
        if generation is None:
            raise ServiceError(
                Reason.REQUEST_NOT_FOUND,
                f"request_id: no request {request.request_id!r} runs on executor {self.executor_id}",
                field="request_id",
            )
        generation.fail(ServiceError(Reason.CANCELLED, "the request was cancelled by its id"))
        return executor_pb2.CancelResponse(executor_id=self.executor_id)

    @servicer_method
    async def ListModels(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        return executor_pb2.ExecutorServiceListModelsResponse(models=[self._model_for("").proto()])

    @servicer_method
    async def GetStatus(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        model = self._model_for("")
        status = await model.engine.status()
        return executor_pb2.ExecutorServiceGetStatusResponse(
            executor_id=self.executor_id,
            model=model.proto(),
            device=self._device,
            num_running=status.num_running,
            num_waiting=status.num_waiting,
            blocks=[
                executor_pb2.BlockUsage(
                    group=group.group,
                    block_size=group.block_size,
                    num_blocks=group.num_blocks,
                    num_free=group.num_free,
                    num_cached=group.num_cached,
                )
                for group in status.blocks
            ],
            num_steps=status.num_steps,
            num_prompt_tokens=status.num_prompt_tokens,
            num_cached_tokens=status.num_cached_tokens,
            num_output_tokens=status.num_output_tokens,
            num_preemptions=status.num_preemptions,
            draining=self._server.draining.is_set(),
        )

    async def _generate(self, model: _Model, request: Any, context: grpc.aio.ServicerContext) -> None:
        """Stream what the engine makes of a request; whatever ends it, the engine is rid of it afterwards."""
        generation = await self._prepare(model, request, self._server.caller(context))
        content_log = ContentLog(generation, request) if self._log_content else None
        try:
            self.generations.add(generation, takes_over=request.HasField("resume"))
            if not generation.nothing_to_run():
                model.engine.submit(generation.request)
            async for response in generation.responses():
                await self._write(context, response)
                if content_log is not None:
                    content_log.add(response)
        finally:
            if content_log is not None:
                content_log.close()
            self.generations.remove(generation)
            generation.close()
            model.cancel(generation.request.request_id, None)

    def _model_for(self, name: str) -> _Model:
        model = self._model
        if model is None:
            reason, why = self._lack
            raise ServiceError(reason, f"this executor has no model yet: {why}", retry_after=1.0)
        if name and name not in model.names:
            raise ServiceError(
                Reason.MODEL_NOT_FOUND,
                f"model: this executor serves {model.manifest.model!r}, not {name!r}",
                field="model",
            )
        return model

    async def _prepare(self, model: _Model, request: Any, caller: str) -> Generation:
        """Validate and tokenize; everything that may fail before the engine knows of the request."""
        request_id = request.request_id or uuid.uuid4().hex
        watched = WatchedRequest(current_call(), self._metrics, request_id, model.lease)
        limits = model.limits
        sampling = validation.sampling_from(request, limits)
        stop_strings = validation.stop_strings_from(request)
        content = request.output.content
        is_chat = request.WhichOneof("input") == "chat"
        text = content != executor_pb2.OUTPUT_CONTENT_TOKEN_IDS
        vocabulary: Vocabulary | None = None
        if text or stop_strings or is_chat:
            vocabulary = await model.tokenizer.vocabulary()
        harmony = is_chat and vocabulary is not None and vocabulary.harmony and not request.output.special_tokens
        form = Form(
            text=text,
            token_ids=content != executor_pb2.OUTPUT_CONTENT_TEXT,
            stop_strings=stop_strings,
            harmony=harmony,
            special_tokens=request.output.special_tokens,
        )
        prompt = await self._prompt(model, request)
        engine_request = Request(
            request_id=str(next(self._engine_ids)),
            prompt_token_ids=prompt,
            sampling=sampling,
            stopping=validation.stopping_from(request, len(prompt), limits),
            logprobs=_optional(request.output, "logprobs"),
            # A resumed stream has had its prompt's log-probabilities before.
            prompt_logprobs=None if request.HasField("resume") else _optional(request.output, "prompt_logprobs"),
            priority=request.priority,
            resumed=validation.resumed_from(request, len(prompt), sampling.num_outputs, limits),
        )

        watched.submitted()
        return Generation(
            engine_request,
            request_id,
            caller,
            model.origin,
            form,
            vocabulary,
            model.pipe,
            functools.partial(model.cancel, engine_request.request_id),
            watched.finished,
            self.generations.delta_interval,
        )

    async def _prompt(self, model: _Model, request: Any) -> tuple[int, ...]:
        limits = model.limits
        if request.HasField("resume"):
            return validation.check_prompt(request.resume.prompt_token_ids, limits, "resume.prompt_token_ids")
        kind = request.WhichOneof("input")
        if kind == "token_ids":
            return validation.check_prompt(request.token_ids.ids, limits, "token_ids")
        if kind == "text":
            return validation.check_prompt(await model.tokenizer.tokenize(request.text), limits, "text")
        return validation.check_prompt(await model.tokenizer.render_chat(request.chat), limits, "chat")

    async def _write(self, context: grpc.aio.ServicerContext, response: Any) -> None:
        try:
            async with asyncio.timeout(self._write_stall_seconds):
                await context.write(response)
        except TimeoutError as error:
            raise ServiceError(
                Reason.CLIENT_STALLED, f"the client read nothing for {self._write_stall_seconds:g} s"
            ) from error


class _Model:
    """The model served and the parts that serve it."""

    def __init__(
        self,
        manifest: Manifest,
        context_length: int,
        engine: EngineClient,
        tokenizer: TokenizerClient,
        pipe: TextPipe,
        lease: Span,
        executor_id: str,
    ) -> None:
        self.manifest = manifest
        self.lease = lease
        self.engine = engine
        self.tokenizer = tokenizer
        self.pipe = pipe
        self.names = {manifest.model, manifest.digest, *manifest.aliases}
        self.origin = Origin(executor_id, manifest.model, manifest.digest)
        self.limits = Limits(
            digest=manifest.digest,
            vocab_size=manifest.config.vocab_size,
            context_length=context_length,
            eog_token_ids=frozenset(manifest.eog_token_ids),
        )

    def cancel(self, engine_id: str, index: int | None) -> None:
        """Rid the engine of a request or of one output; of what has ended already, nothing comes of it."""
        if not self.engine.gone.is_set():
            self.engine.cancel(engine_id, index)

    def proto(self) -> Any:
        return executor_pb2.ServedModel(
            name=self.manifest.model,
            aliases=self.manifest.aliases,
            digest=self.manifest.digest,
            architecture=self.manifest.config.architecture,
            context_length=self.limits.context_length,
            vocab_size=self.limits.vocab_size,
        )


def _draining() -> ServiceError:
    return ServiceError(Reason.DRAINING, "this executor is stopping; another one can serve the request")


def _optional(message: Any, name: str) -> int | None:
    return getattr(message, name) if message.HasField(name) else None
