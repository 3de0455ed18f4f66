"""Errors between `ServiceError` and the wire: a gRPC status with google.rpc details, both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from shared.errors import Reason, ServiceError, Status

DOMAIN = "mxgpt"
DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE_BYTES = 1024  # of an error; it travels in trailers, twice and escaped, and clients take 8 KiB of those


@dataclass(frozen=True)
class ErrorDetails:
    """The google.rpc details of an error; `reason` is text, for a newer server may know more reasons."""

    reason: str
    message: str
    field: str | None
    retry_after: float | None  # seconds
    metadata: dict[str, str]


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def status_code(status: Status) -> grpc.StatusCode:
    """gRPC's own name for a status."""
    return _CODES[status.value]


async def abort(context: grpc.aio.ServicerContext, error: ServiceError) -> NoReturn:
    """End a call with an error; a message that quotes too much of what the caller sent is cut.

    Raises:
        grpc.aio.AbortError: always.
    """
    encoded = error.message.encode(errors="replace")
    if len(encoded) > MAX_MESSAGE_BYTES:
        cut = encoded[: MAX_MESSAGE_BYTES - 3].decode(errors="ignore") + "..."
        error = ServiceError(
            error.reason, cut, field=error.field, retry_after=error.retry_after, metadata=error.metadata
        )
    await context.abort(
        status_code(error.status), error.message, trailing_metadata=((DETAILS_KEY, error_details(error)),)
    )
    raise AssertionError("abort raises")


def error_details(error: ServiceError) -> bytes:
    """A serialized google.rpc.Status with ErrorInfo and, where they apply, BadRequest and RetryInfo."""
    details = [error_details_pb2.ErrorInfo(reason=error.reason.name, domain=DOMAIN, metadata=error.metadata)]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=error.status.value, message=error.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    serialized: bytes = status.SerializeToString()
    return serialized


def from_rpc_error(error: grpc.RpcError, unreachable: Reason) -> ServiceError:
    """The `ServiceError` that a server sent, or one with the reason `unreachable` where no server answered.

    A status that carries no reason of ours becomes `unreachable` too, except for deadlines and refused tokens. So does
    CANCELLED: to a call that its caller has not cancelled, gRPC says so of a server that stops.
    """
    details = read_details(error)
    if details is not None and details.reason in Reason.__members__:
        return ServiceError(
            Reason[details.reason],
            details.message,
            field=details.field,
            retry_after=details.retry_after,
            metadata=details.metadata,
        )
    code = error.code()
    message = error.details() or code.name
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ServiceError(Reason.DEADLINE, message)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return ServiceError(Reason.UNAUTHENTICATED, message)
    return ServiceError(unreachable, f"{unreachable.meaning} ({code.name}: {message})")


def from_peer_error(error: grpc.RpcError, unreachable: Reason) -> ServiceError:
    """As `from_rpc_error`, for a call that one service made of another on behalf of a caller.

    A peer that turns the service away is `unreachable` to the caller, whose own key is not what was wrong.
    """
    found = from_rpc_error(error, unreachable)
    if found.reason in (Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED, Reason.KEY_LIMIT_REACHED):
        why = f"{unreachable.meaning} (it turns this service away: {found.message})"
        return ServiceError(unreachable, why, retry_after=found.retry_after)
    return found


def read_details(error: grpc.RpcError) -> ErrorDetails | None:
    """What a server of mxgpt sent with its status; None if the status came from elsewhere."""
    serialized = dict(error.trailing_metadata() or ()).get(DETAILS_KEY)
    if not isinstance(serialized, bytes):
        return None
    status = status_pb2.Status.FromString(serialized)
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry: error_details_pb2.RetryInfo | None = None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            detail.Unpack(bad_request)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
    if info.domain != DOMAIN:
        return None
    return ErrorDetails(
        info.reason,
        status.message,
        field=bad_request.field_violations[0].field if bad_request.field_violations else None,
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retry is not None else None,
        metadata=dict(info.metadata),
    )
