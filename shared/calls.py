"""What becomes of a service's calls: counted by reason, timed, traced, and named in the logs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.errors import Reason, ServiceError
from shared.logs import add_log_fields, log_fields
from shared.tracing import NO_SPAN, Metadata, Span, Tracing

log = logging.getLogger(__name__)

OK = "OK"  # the reason of a call that ended well
REQUEST_ID_KEY = "x-request-id"  # metadata between services: the request that a call is made for
LONG_LIVED = frozenset({"Attach", "DetokenizeStream"})  # open as long as their caller lives: their length says nothing
STARTS_TRACE = frozenset({"Generate", "LoadModel"})  # others are traced where their caller is
DEADLINE_SLACK = 0.05  # seconds by which a client's clock, which starts first, ends a call before this one's would
SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)

_current: ContextVar[Call | None] = ContextVar("call", default=None)


@dataclass
class Call:
    """A call being answered."""

    method: str
    request: Any  # the message; None for a stream of requests
    span: Span
    start: float = field(default_factory=time.monotonic)
    facts: dict[str, Any] = field(default_factory=dict)  # set by the method as it learns them, for the span
    note: str = ""  # for the log, once it has ended

    def ended(self, reason: str) -> None:
        self.span.set({"mxgpt.reason": reason, **self.facts})
        if reason != OK:
            self.span.fail(reason)


class PeerCall(NamedTuple):
    """A call being made."""

    span: Span
    metadata: Metadata  # to send with it


class Calls:
    """The calls of one service.

    Args:
        service: "loader", "tokenizer" or "executor"; the metrics' names begin with it.
        full_name: of the service in the contract, as "mxgpt.v1.LoaderService".
    """

    def __init__(self, service: str, full_name: str, registry: CollectorRegistry, tracing: Tracing) -> None:
        self.tracing = tracing
        self.on_ended: Callable[[Call, str, float], None] = lambda _call, _reason, _seconds: None
        self._full_name = full_name
        self._ended = Counter(
            f"mxgpt_{service}_calls",
            "Calls that have ended, by method and reason: OK, or the reason of the error.",
            ["method", "reason"],
            registry=registry,
        )
        self._running = Gauge(
            f"mxgpt_{service}_calls_running", "Calls that are being answered.", ["method"], registry=registry
        )
        self._seconds = Histogram(
            f"mxgpt_{service}_call_duration_seconds",
            "From a call's arrival to its end, whatever ended it; not of streams that live as long as their caller.",
            ["method"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )

    @contextlib.contextmanager
    def watch(self, method: str, request: Any, context: grpc.aio.ServicerContext) -> Iterator[Call]:
        """Watch over the answering of one call; errors pass through."""
        metadata = context.invocation_metadata()
        for key, value in metadata or ():
            if key == REQUEST_ID_KEY:
                add_log_fields(request_id=unquote(str(value)))
        with self._span(method, metadata) as span:
            add_log_fields(**span.log_fields)
            call = Call(method, request, span)
            _current.set(call)
            running = self._running.labels(method)
            running.inc()
            reason, reference = OK, ""
            try:
                yield call
            except BaseException as error:
                reason = _reason_of(error, context)
                if isinstance(error, ServiceError) and "reference" in error.metadata:
                    reference = f", reference {error.metadata['reference']}"
                raise
            finally:
                running.dec()
                seconds = time.monotonic() - call.start
                self._ended.labels(method, reason).inc()
                if method not in LONG_LIVED:
                    self._seconds.labels(method).observe(seconds)
                self.on_ended(call, reason, seconds)
                call.ended(reason)
                level = logging.DEBUG if reason == OK and method not in STARTS_TRACE else logging.INFO
                log.log(level, "%s ended after %.3f s: %s%s%s", method, seconds, reason, call.note, reference)

    def denied(self, method: str, reason: Reason) -> None:
        """Count a call of a method, by its full name, that was refused at the door: no servicer ever saw it."""
        self._ended.labels(method.rpartition("/")[2], reason.name).inc()

    @contextlib.contextmanager
    def peer(self, service: str, method: str, *, starts_trace: bool = False) -> Iterator[PeerCall]:
        """A call to another service, made for the one that this task answers or, with `starts_trace`, for itself."""
        current = _current.get()
        if current is None and not starts_trace:
            yield PeerCall(NO_SPAN, ())
            return
        request_id = log_fields().get("request_id")
        named = ((REQUEST_ID_KEY, quote(request_id)),) if request_id else ()
        with self.tracing.call(f"mxgpt.v1.{service}/{method}", current.span if current else None) as span:
            try:
                yield PeerCall(span, (*named, *span.metadata))
            except Exception as error:
                span.fail(error.reason.name if isinstance(error, ServiceError) else type(error).__name__)
                raise

    def _span(self, method: str, metadata: Any) -> contextlib.AbstractContextManager[Span]:
        if method in LONG_LIVED:
            return contextlib.nullcontext(NO_SPAN)
        return self.tracing.serve(f"{self._full_name}/{method}", metadata, starts_trace=method in STARTS_TRACE)


def current_call() -> Call:
    """The call that the task that runs is answering."""
    call = _current.get()
    assert call is not None, "no call is being answered here"
    return call


def _reason_of(error: BaseException, context: grpc.aio.ServicerContext) -> str:
    if isinstance(error, ServiceError):
        return error.reason.name
    if isinstance(error, asyncio.CancelledError):
        remaining = context.time_remaining()
        return (Reason.DEADLINE if remaining is not None and remaining <= DEADLINE_SLACK else Reason.CANCELLED).name
    return Reason.INTERNAL.name
