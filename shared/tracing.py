"""Traces of requests across services: what a service needs of them, and what it has where they are off: nothing.

Context travels in gRPC metadata as W3C's `traceparent`. `shared.otel` makes real spans; it is imported, and
OpenTelemetry with it, only where `--traces` asks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

Attributes = Mapping[str, str | bool | int | float | Sequence[str]]
Metadata = tuple[tuple[str, str], ...]


class Span(Protocol):
    """One operation of a trace."""

    def set(self, attributes: Attributes) -> None:
        """Add what is known by now."""

    def fail(self, reason: str) -> None:
        """The operation ended in an error."""

    def phase(self, name: str, start_ns: int, end_ns: int, attributes: Attributes) -> None:
        """Add a child that is over already; times are nanoseconds since 1970."""

    def follows(self, other: Span) -> None:
        """Link to an operation of another trace that this one builds on."""

    @property
    def metadata(self) -> Metadata:
        """What makes a call a child of this span."""

    @property
    def log_fields(self) -> dict[str, str]:
        """What names the span in a log line."""


class Tracing(Protocol):
    """The spans of one service."""

    def serve(self, name: str, metadata: Any, *, starts_trace: bool) -> AbstractContextManager[Span]:
        """The span of a call being answered: in its caller's trace or, if `starts_trace`, in one of its own."""

    def call(self, name: str, parent: Span | None) -> AbstractContextManager[Span]:
        """The span of a call being made, below `parent` or, without one, in a trace of its own."""

    def close(self) -> None:
        """Send what has not been sent; may block for two seconds."""


class NoSpan:
    """A span that nobody sees."""

    metadata: Metadata = ()

    def set(self, attributes: Attributes) -> None:
        pass

    def fail(self, reason: str) -> None:
        pass

    def phase(self, name: str, start_ns: int, end_ns: int, attributes: Attributes) -> None:
        pass

    def follows(self, other: Span) -> None:
        pass

    @property
    def log_fields(self) -> dict[str, str]:
        return {}


NO_SPAN = NoSpan()


class NoTracing:
    """What a service has whose traces are off."""

    @contextlib.contextmanager
    def serve(self, name: str, metadata: Any, *, starts_trace: bool) -> Iterator[Span]:
        yield NO_SPAN

    @contextlib.contextmanager
    def call(self, name: str, parent: Span | None) -> Iterator[Span]:
        yield NO_SPAN

    def close(self) -> None:
        pass
