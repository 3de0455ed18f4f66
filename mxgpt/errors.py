"""The one exception that a client raises for what went wrong with a call."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import grpc

from shared.errors import Reason
from shared.rpc_errors import read_details

# Statuses that gRPC itself gives a call whose connection breaks, whose server is stopped, or is not there.
_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)

_NO_EXECUTOR = "what answered there is no executor, or an older one; executors listen on port 50051 by default"


class MxgptError(Exception):
    """A call that failed.

    Attributes:
        status: the gRPC status.
        reason: the stable reason, a name of docs/errors.md such as "CONTEXT_LENGTH_EXCEEDED". It is
            "EXECUTOR_UNAVAILABLE" where the connection failed, and empty where a stranger answered.
        message: one sentence for a person.
        field: path of the request field at fault, such as "sampling.top_p", if one is.
        retry_after: seconds after which the server thinks a retry worth while, if it said so.
        metadata: further facts, as text.
    """

    def __init__(
        self,
        status: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        field: str | None = None,
        retry_after: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after = retry_after
        self.metadata = dict(metadata or {})

    def __reduce__(self) -> tuple[Any, ...]:
        """How it passes to another process: as what it was made of."""
        more: dict[str, Any] = {"field": self.field, "retry_after": self.retry_after, "metadata": self.metadata}
        return partial(MxgptError, self.status, self.reason, self.message, **more), ()

    def __repr__(self) -> str:
        return f"MxgptError({self.status.name}, {self.reason!r}, {self.message!r})"

    @property
    def is_unavailable(self) -> bool:
        """No server could be reached, or the one that was can't serve now."""
        return self.status is grpc.StatusCode.UNAVAILABLE or self.reason == Reason.EXECUTOR_UNAVAILABLE.name


def from_rpc_error(error: grpc.RpcError) -> MxgptError:
    """What a failed call of grpc says, the server's own reason if it sent one."""
    details = read_details(error)
    code: grpc.StatusCode = error.code()
    if details is not None:
        return MxgptError(
            code,
            details.reason,
            details.message,
            field=details.field,
            retry_after=details.retry_after,
            metadata=details.metadata,
        )
    message = error.details() or code.name
    if code in _BROKEN:
        return MxgptError(code, Reason.EXECUTOR_UNAVAILABLE.name, f"no answer from the server: {message}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return deadline_exceeded()
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return MxgptError(code, "", f"{_NO_EXECUTOR} ({message.rstrip('!')})")
    return MxgptError(code, "", message)


def deadline_exceeded() -> MxgptError:
    """The error of a call whose `timeout` has passed."""
    return MxgptError(grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE.name, "the timeout passed before the end")


def early_end() -> MxgptError:
    """The error of a stream that ended in good order, but before its outputs did: a connection cut politely."""
    return MxgptError(
        grpc.StatusCode.UNAVAILABLE, Reason.EXECUTOR_UNAVAILABLE.name, "the stream ended before its outputs did"
    )


def cancelled() -> MxgptError:
    """The error of a call that its own caller has cancelled."""
    return MxgptError(grpc.StatusCode.CANCELLED, Reason.CANCELLED.name, "the call was cancelled")


def invalid_field(field: str, message: str) -> MxgptError:
    """A FIELD_INVALID error found before anything was sent."""
    return MxgptError(grpc.StatusCode.INVALID_ARGUMENT, Reason.FIELD_INVALID.name, f"{field}: {message}", field=field)
