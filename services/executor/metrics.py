"""What an executor counts and times: requests as OpenTelemetry's GenAI conventions name them, and the engine's state.

Nothing here runs for a token: histograms are fed once a request, an output or a step, and the engine is asked for
its state when a scrape comes. The conventions' boundaries of buckets are kept, with finer ones added below.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mxgpt.v1 import executor_pb2
from services.executor.engine_status import EngineStatus
from services.executor.request import Event, TokenDrawn
from shared.calls import OK, Call
from shared.logs import add_log_fields
from shared.manifest import Manifest
from shared.tracing import Span

PROVIDER = "mxgpt"  # gen_ai.provider.name

REQUEST_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
TOKEN_SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
BATCH_SEQUENCES = (0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256)

_LABELS = ["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model"]


class ExecutorMetrics:
    """The metrics of one executor's requests; `collect` adds the engine's."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._model = ""
        self._request_seconds = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From a Generate call's arrival to its end; error_type is the reason of a failure.",
            [*_LABELS, "error_type"],
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self._first_token_seconds = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From a Generate call's arrival to an output's first token.",
            _LABELS,
            buckets=FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self._token_seconds = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time of an output's tokens after its first.",
            _LABELS,
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self._queue_seconds = Histogram(
            "mxgpt_executor_queue_seconds",
            "From an output's arrival at the engine to the first step that ran its prompt.",
            buckets=FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self._outputs = Counter(
            "mxgpt_executor_outputs", "Outputs that have finished, by finish reason.", ["reason"], registry=registry
        )
        self._batch = Histogram(
            "mxgpt_executor_batch_sequences",
            "Sequences that drew a token in a step; steps that only read prompts draw none.",
            buckets=BATCH_SEQUENCES,
            registry=registry,
        )

    def serve_model(self, model: str) -> None:
        """Requests are for this model from now on."""
        self._model = model

    def on_step(self, events: Sequence[Event]) -> None:
        """One engine step that told something."""
        self._batch.observe(sum(type(event) is TokenDrawn for event in events))

    def on_output(self, call: Call, finished: Any, num_resumed: int, seconds_before: float) -> None:
        """An output of a call has finished.

        Args:
            finished: its mxgpt.v1.Finished.
            num_resumed: of its tokens, those that came with the request.
            seconds_before: from the call's arrival to the start of the output's timings.
        """
        labels = (_operation(call.request), PROVIDER, self._model)
        timings = finished.timings
        num_drawn = finished.usage.num_output_tokens - num_resumed
        self._outputs.labels(_reason(finished)).inc()
        self._queue_seconds.observe(timings.queue_seconds)
        if num_drawn > 0:
            self._first_token_seconds.labels(*labels).observe(seconds_before + timings.first_token_seconds)
        if num_drawn > 1:
            self._token_seconds.labels(*labels).observe(timings.decode_seconds / (num_drawn - 1))

    def on_call_ended(self, call: Call, reason: str, seconds: float) -> None:
        """A call of any method has ended."""
        if call.method != "Generate":
            return
        operation = _operation(call.request)
        error = "" if reason == OK else reason
        self._request_seconds.labels(operation, PROVIDER, self._model, error).observe(seconds)
        call.facts["gen_ai.operation.name"] = operation
        call.facts["gen_ai.provider.name"] = PROVIDER
        call.facts["gen_ai.request.model"] = self._model
        call.note = _note(call.facts)


class WatchedRequest:
    """One Generate call: its id in the logs, its outputs in metrics, its phases in its trace."""

    def __init__(self, call: Call, metrics: ExecutorMetrics, request_id: str, lease: Span) -> None:
        add_log_fields(request_id=request_id)
        call.span.set({"gen_ai.response.id": request_id})
        call.span.follows(lease)
        self._call = call
        self._metrics = metrics
        self._start_ns = 0
        self._seconds_before = 0.0

    def submitted(self) -> None:
        """The prompt is tokenized; the output's timings count from here."""
        self._start_ns = time.time_ns()
        self._seconds_before = time.monotonic() - self._call.start

    def finished(self, finished: Any, num_resumed: int) -> None:
        """An output has finished, with this mxgpt.v1.Finished."""
        self._metrics.on_output(self._call, finished, num_resumed, self._seconds_before)
        facts, usage, timings = self._call.facts, finished.usage, finished.timings
        facts["gen_ai.usage.input_tokens"] = usage.num_prompt_tokens
        facts["mxgpt.cached_tokens"] = usage.num_cached_tokens
        facts["gen_ai.usage.output_tokens"] = facts.get("gen_ai.usage.output_tokens", 0) + usage.num_output_tokens
        facts["gen_ai.response.finish_reasons"] = [*facts.get("gen_ai.response.finish_reasons", ()), _reason(finished)]
        queued = self._start_ns + int(timings.queue_seconds * 1e9)
        first = self._start_ns + int(timings.first_token_seconds * 1e9)
        last = first + int(timings.decode_seconds * 1e9)
        of_output = {"mxgpt.output": finished.index}
        self._call.span.phase("queue", self._start_ns, queued, of_output)
        if first > self._start_ns:  # unless it had ended before it began, being resumed
            self._call.span.phase("prefill", queued, first, of_output)
            self._call.span.phase("decode", first, last, of_output)


def engine_metrics(status: EngineStatus) -> Iterable[Metric]:
    """What the engine says of itself."""
    sequences = GaugeMetricFamily(
        "mxgpt_executor_sequences", "Sequences in the batch, and those that wait for admission.", labels=["state"]
    )
    sequences.add_metric(["running"], status.num_running)
    sequences.add_metric(["waiting"], status.num_waiting)
    blocks = GaugeMetricFamily(
        "mxgpt_executor_kv_blocks",
        "KV blocks of each group of layers: used, unused but kept for the prefix cache, and free.",
        labels=["group", "state"],
    )
    for group in status.blocks:
        blocks.add_metric([group.group, "used"], group.num_blocks - group.num_free)
        blocks.add_metric([group.group, "cached"], group.num_cached)
        blocks.add_metric([group.group, "free"], group.num_free - group.num_cached)
    prompt = CounterMetricFamily(
        "mxgpt_executor_prompt_tokens", "Prompt tokens: computed, or found in the prefix cache.", labels=["source"]
    )
    prompt.add_metric(["computed"], status.num_prompt_tokens)
    prompt.add_metric(["cached"], status.num_cached_tokens)
    return [
        sequences,
        blocks,
        prompt,
        CounterMetricFamily("mxgpt_executor_output_tokens", "Tokens drawn.", status.num_output_tokens),
        CounterMetricFamily("mxgpt_executor_steps", "Steps of the engine.", status.num_steps),
        CounterMetricFamily("mxgpt_executor_preemptions", "Sequences preempted.", status.num_preemptions),
    ]


def state_metrics(*, num_streams: int, leased: bool, draining: bool, text_breaks: int) -> Iterable[Metric]:
    """What the server process says of the executor."""
    return [
        GaugeMetricFamily("mxgpt_executor_streams", "Generate calls past their tokenization.", num_streams),
        GaugeMetricFamily("mxgpt_executor_leased", "1 while the loader's lease is held.", leased),
        GaugeMetricFamily("mxgpt_executor_draining", "1 while no new requests are taken.", draining),
        CounterMetricFamily(
            "mxgpt_executor_text_stream_breaks", "Times that the stream to a tokenizer broke.", text_breaks
        ),
    ]


def model_metrics(manifest: Manifest, executor_id: str, device: str, kv_bytes: int) -> Iterable[Metric]:
    """What is served, and the memory that it takes."""
    info = GaugeMetricFamily(
        "mxgpt_executor_model",
        "1 for the model served.",
        labels=["executor_id", "model", "digest", "architecture", "device"],
    )
    labels = [executor_id, manifest.model, manifest.digest, manifest.config.architecture, device]
    info.add_metric(labels, 1)
    memory = GaugeMetricFamily(
        "mxgpt_executor_memory_bytes",
        "Memory of the device: weights (mapped; one copy for all executors of a loader), KV blocks (this executor's).",
        labels=["kind", "device"],
    )
    memory.add_metric(["weights", device], sum(allocation.num_bytes for allocation in manifest.allocations))
    memory.add_metric(["kv", device], kv_bytes)
    return [info, memory]


def _operation(request: Any) -> str:
    return "chat" if request.WhichOneof("input") == "chat" else "text_completion"


def _reason(finished: Any) -> str:
    name: str = executor_pb2.FinishReason.Name(finished.reason)
    return name.removeprefix("FINISH_REASON_")


def _note(facts: Mapping[str, Any]) -> str:
    if "gen_ai.usage.input_tokens" not in facts:
        return ""
    return (
        f", {facts['gen_ai.usage.input_tokens']} prompt tokens ({facts['mxgpt.cached_tokens']} cached), "
        f"{facts['gen_ai.usage.output_tokens']} output tokens, {' '.join(facts['gen_ai.response.finish_reasons'])}"
    )
