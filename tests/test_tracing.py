"""Traces of real services: the spans of one request join over client, executor, tokenizer and, where asked, loader."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mxgpt import AsyncClient, Client, MxgptError
from mxgpt.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from shared.otel import OTelTracing, open_exporter
from shared.telemetry_config import TelemetryConfig
from tests.stack import ROOT, Stack, running, until

Span = dict[str, Any]  # a span as the file exporter writes it


class Traced:
    """A stack whose spans go to a file, and this process's to memory."""

    def __init__(self, stack: Stack, path: Path, ours: InMemorySpanExporter) -> None:
        self.stack = stack
        self._path = path
        self._ours = ours

    def spans(self) -> list[Span]:
        written, _, _ = self._path.read_text().rpartition("\n")  # of what may be being written now, whole lines
        theirs = [json.loads(line) for line in written.splitlines()]
        return [*theirs, *(json.loads(span.to_json()) for span in self._ours.get_finished_spans())]

    def of_trace(self, trace_id: str, are_all: Callable[[list[Span]], bool]) -> list[Span]:
        """The spans of a trace, once they satisfy `are_all`: services send theirs in batches."""
        found: list[Span] = []

        def is_there() -> bool:
            found[:] = [span for span in self.spans() if span["context"]["trace_id"] == trace_id]
            return are_all(found)

        until(is_there)
        return found

    def last_client_span(self) -> ReadableSpan:
        return self._ours.get_finished_spans()[-1]


@pytest.fixture(scope="module")
def ours() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture(scope="module")
def traced(
    demo_gpt_oss: Path, ours: InMemorySpanExporter, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Traced]:
    path = tmp_path_factory.mktemp("traces") / "spans.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # milliseconds between batches
        with running(demo_gpt_oss, options=["--traces", f"file:{path}"]) as stack:
            yield Traced(stack, path, ours)


def named(spans: list[Span], name: str, service: str | None = None) -> Span:
    (found,) = [
        span
        for span in spans
        if span["name"] == name and service in (None, span["resource"]["attributes"].get("service.name"))
    ]
    return found


def trace_id_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"0x{trace.format_trace_id(span.context.trace_id)}"


GENERATE = "mxgpt.v1.ExecutorService/Generate"
RENDER = "mxgpt.v1.TokenizerService/RenderChat"


def services_of(spans: list[Span], name: str) -> set[str | None]:
    """The services that have sent a span of this name."""
    return {span["resource"]["attributes"].get("service.name") for span in spans if span["name"] == name}


def has_generate(spans: list[Span]) -> bool:
    return GENERATE in {span["name"] for span in spans}


def test_the_spans_of_one_request_join(traced: Traced) -> None:
    with Client(traced.stack.address) as client, trace.get_tracer("application").start_as_current_span("question"):
        result = client.chat([{"role": "user", "content": "What is 12 + 30?"}], temperature=0.0, request_id="sum")
    names = {"question", "chat", GENERATE, RENDER, "queue", "prefill", "decode"}
    spans = traced.of_trace(
        trace_id_of(traced.last_client_span()),
        lambda spans: (
            names <= {span["name"] for span in spans}
            and services_of(spans, RENDER) == {"mxgpt-executor", "mxgpt-tokenizer"}
        ),
    )
    question, chat, generate = named(spans, "question"), named(spans, "chat"), named(spans, GENERATE)
    asking, answering = named(spans, RENDER, "mxgpt-executor"), named(spans, RENDER, "mxgpt-tokenizer")
    for child, parent in ((chat, question), (generate, chat), (asking, generate), (answering, asking)):
        assert child["parent_id"] == parent["context"]["span_id"]
        assert parent["start_time"] <= child["start_time"]
        assert child["end_time"] <= parent["end_time"] or parent is chat  # the client may hear of the end first
    phases = [named(spans, name) for name in ("queue", "prefill", "decode")]
    assert all(phase["parent_id"] == generate["context"]["span_id"] for phase in phases)
    assert [phase["end_time"] for phase in phases[:2]] == [phase["start_time"] for phase in phases[1:]]
    attributes = generate["attributes"]
    assert attributes["gen_ai.request.model"] == "demo-gpt-oss"
    assert attributes["gen_ai.response.id"] == "sum"
    assert attributes["mxgpt.reason"] == "OK"
    assert attributes["gen_ai.usage.input_tokens"] == len(result.prompt_token_ids)
    assert attributes["gen_ai.usage.output_tokens"] == len(result.outputs[0].token_ids)
    assert chat["attributes"]["gen_ai.usage.output_tokens"] == len(result.outputs[0].token_ids)
    assert "What is 12" not in json.dumps(spans)
    assert "42" not in {str(value) for span in spans for value in span["attributes"].values()}


def test_a_request_links_to_the_lease_of_its_weights(traced: Traced) -> None:
    """The loader has no part in a request; its span is in the trace of the executor's attaching, linked from each."""
    with Client(traced.stack.address) as client:
        client.complete("one two", max_tokens=2)
    spans = traced.of_trace(
        trace_id_of(traced.last_client_span()), lambda spans: GENERATE in {s["name"] for s in spans}
    )
    (link,) = named(spans, GENERATE)["links"]
    attached = traced.of_trace(link["context"]["trace_id"], lambda spans: len(spans) == 2)
    asking = named(attached, "mxgpt.v1.LoaderService/Attach", "mxgpt-executor")
    answering = named(attached, "mxgpt.v1.LoaderService/Attach", "mxgpt-loader")
    assert link["context"]["span_id"] == asking["context"]["span_id"]
    assert answering["parent_id"] == asking["context"]["span_id"]


def test_a_tokenizer_that_asks_the_loader_carries_the_trace_on(traced: Traced) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with grpc.insecure_channel(traced.stack.tokenizer.address) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        request = tokenizer_pb2.TokenizeRequest(model="another", text="x")
        with pytest.raises(grpc.RpcError):
            stub.Tokenize(request, metadata=[("traceparent", traceparent)])
    spans = traced.of_trace("0x0af7651916cd43dd8448eb211c80319c", lambda spans: len(spans) == 3)
    tokenize = named(spans, "mxgpt.v1.TokenizerService/Tokenize")
    asking = named(spans, "mxgpt.v1.LoaderService/ListModels", "mxgpt-tokenizer")
    answering = named(spans, "mxgpt.v1.LoaderService/ListModels", "mxgpt-loader")
    assert tokenize["parent_id"] == "0xb7ad6b7169203331"
    assert asking["parent_id"] == tokenize["context"]["span_id"]
    assert answering["parent_id"] == asking["context"]["span_id"]
    assert tokenize["attributes"]["error.type"] == "MODEL_NOT_FOUND"
    assert tokenize["status"]["status_code"] == "ERROR"


def test_errors_and_cancellations_end_the_spans(traced: Traced) -> None:
    with Client(traced.stack.address) as client:
        with pytest.raises(MxgptError):
            client.complete("one two", top_p=7.0)
        refused = traced.last_client_span()
        generation = client.generate("one two", ignore_eos=True)
        next(generation)
        generation.close()
        cancelled = traced.last_client_span()
    for span, reason in ((refused, "FIELD_INVALID"), (cancelled, "CANCELLED")):
        spans = traced.of_trace(trace_id_of(span), has_generate)
        assert named(spans, GENERATE)["attributes"]["error.type"] == reason
    assert refused.attributes is not None
    assert refused.attributes["error.type"] == "FIELD_INVALID"


def test_the_asynchronous_client_traces_too(traced: Traced) -> None:
    async def ask() -> None:
        async with AsyncClient(traced.stack.address) as client:
            await client.complete("one two", max_tokens=3)

    asyncio.run(ask())
    spans = traced.of_trace(
        trace_id_of(traced.last_client_span()), lambda spans: GENERATE in {s["name"] for s in spans}
    )
    assert named(spans, GENERATE)["parent_id"] == named(spans, "text_completion")["context"]["span_id"]


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver that keeps what it gets."""

    def __init__(self) -> None:
        self.names: set[tuple[str, str]] = set()  # (service, span)

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            (service,) = (
                each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
            )
            self.names |= {(service, span.name) for scope in resource.scope_spans for span in scope.spans}
        return trace_service_pb2.ExportTraceServiceResponse()


def test_spans_arrive_over_otlp_when_services_stop_at_the_latest(demo_gpt2: Path) -> None:
    receiver = Receiver()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with running(demo_gpt2, options=["--traces", f"http://127.0.0.1:{port}"]) as stack, Client(stack.address) as client:
        client.complete("one two", max_tokens=2)
    server.stop(None)
    assert {("mxgpt-executor", GENERATE), ("mxgpt-executor", "mxgpt.v1.TokenizerService/Tokenize")} <= receiver.names
    assert {("mxgpt-tokenizer", "mxgpt.v1.TokenizerService/Tokenize")} <= receiver.names
    assert {("mxgpt-loader", "mxgpt.v1.LoaderService/Attach")} <= receiver.names


def test_a_receiver_that_is_away_keeps_nobody_from_stopping(demo_gpt2: Path) -> None:
    with running(demo_gpt2, options=["--traces", "http://127.0.0.1:1"]) as stack:
        with Client(stack.address) as client:
            client.complete("one two", max_tokens=2)
        for service in (stack.executor, stack.tokenizer, stack.loader):
            assert service.stop() == 0
    tracing = OTelTracing("test", "here", open_exporter("http://127.0.0.1:1"))
    with tracing.call("mxgpt.v1.ExecutorService/Generate", None):
        pass
    start = time.monotonic()
    tracing.close()
    assert time.monotonic() - start < 8, "the SDK tries for ten seconds"


def test_nobody_pays_who_does_not_trace() -> None:
    code = (
        "import sys, mxgpt, services.executor.executor, services.tokenizer.main, services.loader.main;"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_without_the_extra_it_is_named() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from shared.telemetry_config import TelemetryConfig\n"
        "try: TelemetryConfig(traces='http://localhost:4317')\n"
        "except ValueError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "pip install '.[otel]'" in said


def test_a_target_that_is_none_is_refused() -> None:
    for target in ("localhost:4317", "file:", "ftp://x"):
        with pytest.raises(ValueError, match="--traces"):
            TelemetryConfig(traces=target)
    TelemetryConfig(traces="http://localhost:4317")
