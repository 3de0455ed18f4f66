"""One executor: attach to the loader, start the engine, serve; keep the lease and the tokenizer in view."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable

import grpc
from prometheus_client import ProcessCollector
from prometheus_client.core import Metric

from mxgpt.v1 import executor_pb2, executor_pb2_grpc, tokenizer_pb2_grpc
from services.executor.config import ExecutorConfig
from services.executor.engine_client import EngineClient, engine_gone
from services.executor.engine_spawn import EngineProcess
from services.executor.loader_client import Attachment, LoaderClient
from services.executor.metrics import ExecutorMetrics, engine_metrics, model_metrics, state_metrics
from services.executor.servicer import ExecutorServicer
from services.executor.text_pipe import TextPipe
from services.executor.tokenizer_client import TokenizerClient
from shared.channel import open_channel
from shared.errors import Reason, ServiceError, Status
from shared.phases import Phases
from shared.server import OVERALL, Server
from shared.telemetry import Telemetry
from shared.tracing import NO_SPAN, Span

log = logging.getLogger(__name__)

TOKENIZER_HEALTH = "mxgpt.tokenizer"  # health names of an executor's peers
LOADER_HEALTH = "mxgpt.loader"
STATE_SECONDS = 5.0  # at most between two looks at the tokenizer's channel


def serve(config: ExecutorConfig, process: EngineProcess) -> int:
    """Serve until a signal or until the engine's process ends; returns the exit code."""

    async def run() -> int:
        return await Executor(config, process).run()

    try:
        return asyncio.run(run())
    except (OSError, RuntimeError) as error:
        log.error("can't serve: %s", error)
        return 1


class Executor:
    """One executor and everything that it owns, from start to stop.

    Args:
        process: the engine's, just started; the executor ends it when it stops.
    """

    def __init__(self, config: ExecutorConfig, process: EngineProcess) -> None:
        self._config = config
        name = executor_pb2.DESCRIPTOR.services_by_name["ExecutorService"].full_name
        self._telemetry = Telemetry(config.telemetry, "executor", name, config.name)
        self._server = Server(config.server, [name], self._telemetry.calls.denied)
        self._metrics = ExecutorMetrics(self._telemetry.registry)
        self._telemetry.calls.on_ended = self._metrics.on_call_ended
        self._servicer = ExecutorServicer(self._server, self._telemetry.calls, self._metrics, config)
        executor_pb2_grpc.add_ExecutorServiceServicer_to_server(self._servicer, self._server.grpc)
        self._engine = EngineClient(process, self._servicer.on_events)
        self._loader = LoaderClient(config.loader, config.peers)
        self._tokenizer_channel = open_channel(config.tokenizer, config.peers)
        self._pipe: TextPipe | None = None
        self._lease: Span = NO_SPAN
        self._of_model: list[Metric] = []  # metrics that do not change

    async def run(self) -> int:
        """Serve until a signal or until the engine's process ends; returns the exit code.

        Raises:
            RuntimeError: when an address can't be bound; OSError when that of metrics can't.
        """
        with self._telemetry.serving(self._config.server, self._collect):
            return await self._run()

    async def _run(self) -> int:
        address = await self._server.start()
        for peer in (LOADER_HEALTH, TOKENIZER_HEALTH):
            await self._server.set_health(peer, False)
        log.info("listening on %s", address)
        print(f"executor listening on {address}", flush=True)
        bring_up = asyncio.create_task(self._bring_up())
        serving = asyncio.create_task(self._server.serve(self._servicer.drained))
        engine_gone = asyncio.create_task(self._engine.gone.wait())
        await asyncio.wait([serving, engine_gone, _failure_of(bring_up)], return_when=asyncio.FIRST_COMPLETED)
        failed = not serving.done()
        if failed:
            await self._report_failure(bring_up)
            serving.cancel()
        bring_up.cancel()
        await self._stop()
        engine_gone.cancel()
        return 1 if failed else 0

    async def _bring_up(self) -> None:
        """Attach, start the engine, serve, and keep in touch with tokenizer and loader; ends only where that fails."""
        phases = Phases(since_start=True)
        phases.lap("interpreter and imports")
        attaching = asyncio.create_task(self._attach())
        try:
            await self._engine.prepared()  # what its device lacks is told at once, loader or not
        except BaseException:
            attaching.cancel()
            raise
        phases.lap("device")
        attachment = await attaching
        phases.lap("attach")
        manifest = attachment.manifest
        engine_config = self._config.engine_config(manifest.config)
        warning = self._config.context_warning(manifest.config, engine_config)
        if warning is not None:
            log.warning("%s", warning)
        await self._engine.start(manifest, attachment.descriptors, engine_config)
        phases.lap("engine")
        tokenizer = TokenizerClient(self._tokenizer_channel, manifest.digest, self._telemetry.calls)
        pipe = self._pipe = TextPipe(tokenizer_pb2_grpc.TokenizerServiceStub(self._tokenizer_channel), manifest.digest)
        self._servicer.serve_model(manifest, engine_config.max_context, self._engine, tokenizer, pipe, self._lease)
        kv_bytes = self._config.kv_bytes(manifest.config, engine_config)
        self._of_model += model_metrics(manifest, self._config.name, self._config.device, kv_bytes)
        ProcessCollector("mxgpt_executor_engine", lambda: self._engine.process_id, registry=self._telemetry.registry)
        log.info(
            "serving %s (%s) with %d KV blocks; %s",
            manifest.model, manifest.digest, sum(engine_config.num_blocks.values()), phases,
        )  # fmt: skip
        await asyncio.gather(pipe.run(), self._watch_engine(), self._watch_loader(), self._watch_tokenizer(tokenizer))

    async def _attach(self) -> Attachment:
        """Attach as soon as the loader is there and has the model; any service may start first."""
        config = self._config
        delay, last_message = 0.05, ""
        while True:
            try:
                with self._telemetry.calls.peer("LoaderService", "Attach", starts_trace=True) as peer:
                    self._lease = peer.span
                    return await self._loader.attach(config.model, config.layouts, config.name, peer.metadata)
            except ServiceError as error:
                if error.status is not Status.UNAVAILABLE and error.reason is not Reason.MODEL_NOT_FOUND:
                    raise
                self._servicer.wait_for_loader(error)
                if error.message != last_message:
                    log.info("waiting for the loader: %s", error.message)
                    last_message = error.message
            await asyncio.sleep(delay)
            delay = min(2 * delay, 1.0)

    async def _collect(self) -> Iterable[Metric]:
        """The metrics that are read when a scrape comes."""
        state = state_metrics(
            num_streams=len(self._servicer.generations),
            leased=self._loader.attached.is_set(),
            draining=self._server.draining.is_set(),
            text_breaks=self._pipe.num_breaks if self._pipe is not None else 0,
        )
        status = await self._engine.last_status()
        return [*state, *self._of_model, *(engine_metrics(status) if status is not None else ())]

    async def _watch_engine(self) -> None:
        """Ask the engine, which answers after each step, whether it still runs.

        Raises:
            ServiceError: EXECUTOR_UNAVAILABLE when it does not answer in time.
        """
        seconds = self._config.step_seconds
        while not self._engine.gone.is_set():
            try:
                async with asyncio.timeout(seconds):
                    await self._engine.status()
            except TimeoutError:
                why = f"the engine has not ended its step for {seconds:g} s (--step-seconds)"
                raise ServiceError(Reason.EXECUTOR_UNAVAILABLE, why) from None
            except ServiceError:
                return  # it has ended, as whoever waits for that sees
            await asyncio.sleep(seconds / 4)

    async def _watch_loader(self) -> None:
        while True:
            await self._server.set_health(LOADER_HEALTH, self._loader.attached.is_set())
            await self._loader.changed.wait()
            self._loader.changed.clear()

    async def _watch_tokenizer(self, tokenizer: TokenizerClient) -> None:
        """Become healthy once a tokenizer has described the model's vocabulary; then tell whether any is there."""
        last_message = ""
        while True:
            try:
                await tokenizer.vocabulary()
                break
            except ServiceError as error:
                if error.message != last_message:
                    log.info("waiting for the tokenizer: %s", error.message)
                    last_message = error.message
                await asyncio.sleep(0.2)
        await self._server.set_health(OVERALL, True)
        while True:
            state = self._tokenizer_channel.get_state(try_to_connect=True)
            await self._server.set_health(TOKENIZER_HEALTH, state is grpc.ChannelConnectivity.READY)
            with contextlib.suppress(TimeoutError):  # then look again: other certificates open another channel
                await asyncio.wait_for(self._tokenizer_channel.wait_for_state_change(state), STATE_SECONDS)

    async def _report_failure(self, bring_up: asyncio.Task[None]) -> None:
        await self._server.set_health(OVERALL, False)
        error = bring_up.exception() if bring_up.done() and not bring_up.cancelled() else None
        if isinstance(error, ServiceError):
            log.error("can't serve: %s (%s)", error.message, error.reason.name)
        elif error is not None:
            log.error("can't serve", exc_info=error)
        else:
            log.error("the engine process has ended")
        self._servicer.generations.fail_all(engine_gone())

    async def _stop(self) -> None:
        await self._engine.stop()
        await self._loader.close()
        await self._tokenizer_channel.close()
        await self._server.grpc.stop(grace=0.2)


async def _wait_for_failure(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])
    if task.cancelled() or task.exception() is None:
        await asyncio.Event().wait()


def _failure_of(task: asyncio.Task[None]) -> asyncio.Task[None]:
    return asyncio.create_task(_wait_for_failure(task))
