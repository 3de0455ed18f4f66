"""Traces by OpenTelemetry's SDK, sent over OTLP or written to a file; needs `pip install '.[otel]'`.

The SDK's own environment variables apply: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER,
OTEL_EXPORTER_OTLP_HEADERS and OTEL_BSP_SCHEDULE_DELAY among them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shared.tracing import Attributes, Metadata, Span

CLOSE_SECONDS = 2.0  # what the last spans get to be sent

_PROPAGATOR = TraceContextTextMapPropagator()


class OTelSpan:
    """A span of the SDK."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self.otel = span
        self._tracer = tracer

    def set(self, attributes: Attributes) -> None:
        self.otel.set_attributes(attributes)

    def fail(self, reason: str) -> None:
        self.otel.set_attribute("error.type", reason)
        self.otel.set_status(trace.StatusCode.ERROR)

    def phase(self, name: str, start_ns: int, end_ns: int, attributes: Attributes) -> None:
        parent = trace.set_span_in_context(self.otel)
        span = self._tracer.start_span(name, parent, attributes=attributes, start_time=start_ns)
        span.end(end_ns)

    def follows(self, other: Span) -> None:
        if isinstance(other, OTelSpan):
            self.otel.add_link(other.otel.get_span_context())

    @property
    def metadata(self) -> Metadata:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(self.otel))
        return tuple(carrier.items())

    @property
    def log_fields(self) -> dict[str, str]:
        span = self.otel.get_span_context()
        return {"trace_id": trace.format_trace_id(span.trace_id), "span_id": trace.format_span_id(span.span_id)}


class OTelTracing:
    """The spans of one service, given to `exporter` from a thread of its own."""

    def __init__(self, service: str, instance: str, exporter: SpanExporter) -> None:
        named = {"service.name": f"mxgpt-{service}", "service.instance.id": instance}
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mxgpt")

    @contextlib.contextmanager
    def serve(self, name: str, metadata: Any, *, starts_trace: bool) -> Iterator[Span]:
        carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
        caller = _PROPAGATOR.extract(carrier, otel_context.Context())
        if not starts_trace and not trace.get_current_span(caller).get_span_context().is_valid:
            yield OTelSpan(self._tracer, trace.INVALID_SPAN)
            return
        with self._span(name, trace.SpanKind.SERVER, caller) as span:
            yield span

    @contextlib.contextmanager
    def call(self, name: str, parent: Span | None) -> Iterator[Span]:
        context = otel_context.Context()
        if isinstance(parent, OTelSpan):
            if not parent.otel.get_span_context().is_valid:
                yield parent
                return
            context = trace.set_span_in_context(parent.otel)
        with self._span(name, trace.SpanKind.CLIENT, context) as span:
            yield span

    def close(self) -> None:
        # A receiver that is away would be tried for ten seconds, longer than a service has to stop.
        closing = Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)

    @contextlib.contextmanager
    def _span(self, name: str, kind: trace.SpanKind, context: otel_context.Context) -> Iterator[Span]:
        service, _, method = name.rpartition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        span = self._tracer.start_span(name, context, kind, attributes)
        try:
            yield OTelSpan(self._tracer, span)
        finally:
            span.end()


def check_target(target: str) -> None:
    """Refuse what spans can't be sent to.

    Raises:
        ValueError: unless it is "http://host:port" or "https://..." of an OTLP gRPC receiver, or "file:/path".
    """
    url = urlsplit(target)
    if not (url.netloc if url.scheme in ("http", "https") else url.scheme == "file" and url.path):
        raise ValueError(
            f"--traces: {target!r} is neither an OTLP receiver, as http://localhost:4317, nor a file:/path"
        )


def open_exporter(target: str) -> SpanExporter:
    """What sends spans to a target that `check_target` let pass.

    Raises:
        OSError: when the file can't be written.
    """
    url = urlsplit(target)
    if url.scheme == "file":
        return _FileExporter(Path(unquote(url.path)))
    return OTLPSpanExporter(endpoint=target, insecure=url.scheme == "http")


class _FileExporter(ConsoleSpanExporter):
    """Appends each span as a line of JSON; several processes may share the file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        super().__init__(out=self._file, formatter=_json_line)

    def shutdown(self) -> None:
        self._file.close()


def _json_line(span: ReadableSpan) -> str:
    return f"{span.to_json(indent=None)}\n"
