"""The client's part of a trace: one span a generation, whatever attempts it takes, below the application's own.

Only an application that uses OpenTelemetry has it loaded; for any other, nothing is imported and nothing happens.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

from mxgpt.errors import MxgptError
from mxgpt.results import Result
from mxgpt.v1 import executor_pb2 as pb

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Metadata = tuple[tuple[str, str], ...]


class GenerationSpan(Protocol):
    """The span of one generation."""

    @property
    def is_running(self) -> bool:
        """Started, and not ended."""

    def metadata(self) -> Metadata:
        """What makes an attempt part of the trace; the first one starts the span."""

    def attempt_failed(self, error: MxgptError) -> None:
        """An attempt has failed; another may follow."""

    def end(self, result: Result, error: BaseException | None = None) -> None:
        """Nothing more comes; the span is running until now."""


def span_of(request: pb.GenerateRequest) -> GenerationSpan:
    """The span of a generation, not yet started."""
    return _OTelSpan(request) if "opentelemetry.trace" in sys.modules else _NoSpan()


class _NoSpan:
    is_running = False

    def metadata(self) -> Metadata:
        return ()

    def attempt_failed(self, error: MxgptError) -> None:
        pass

    def end(self, result: Result, error: BaseException | None = None) -> None:
        pass


class _OTelSpan:
    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request = request
        self._span: Span | None = None
        self.is_running = False

    def metadata(self) -> Metadata:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if self._span is None:
            attributes = _attributes(self._request)
            name = f"{attributes['gen_ai.operation.name']} {self._request.model}".strip()
            tracer = trace.get_tracer("mxgpt")
            self._span = tracer.start_span(name, kind=trace.SpanKind.CLIENT, attributes=attributes)
            self.is_running = True
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(self._span))
        return tuple(carrier.items())

    def attempt_failed(self, error: MxgptError) -> None:
        if self._span is not None:
            self._span.add_event("attempt failed", {"error.type": error.reason or error.status.name})

    def end(self, result: Result, error: BaseException | None = None) -> None:
        from opentelemetry.trace import StatusCode

        assert self._span is not None
        self.is_running = False

        usages = [output.usage for output in result.outputs if output.usage is not None]
        if usages:
            self._span.set_attribute("gen_ai.usage.input_tokens", usages[0].num_prompt_tokens)
            self._span.set_attribute("gen_ai.usage.output_tokens", sum(each.num_output_tokens for each in usages))
        self._span.set_attribute("mxgpt.resumes", result.num_resumes)
        if error is not None:
            reason = error.reason if isinstance(error, MxgptError) else ""
            self._span.set_attribute("error.type", reason or type(error).__name__)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


def _attributes(request: pb.GenerateRequest) -> dict[str, str | int | float]:
    """What OpenTelemetry's GenAI conventions want to know of a request; never its text."""
    is_chat = request.WhichOneof("input") == "chat"
    attributes: dict[str, str | int | float] = {
        "gen_ai.operation.name": "chat" if is_chat else "text_completion",
        "gen_ai.provider.name": "mxgpt",
    }
    if request.model:
        attributes["gen_ai.request.model"] = request.model
    if request.stopping.HasField("max_tokens"):
        attributes["gen_ai.request.max_tokens"] = request.stopping.max_tokens
    for name in ("temperature", "top_p", "top_k", "seed"):
        if request.sampling.HasField(name):
            attributes[f"gen_ai.request.{name}"] = getattr(request.sampling, name)
    return attributes
