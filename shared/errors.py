"""The errors a caller may see: one exception, a closed list of reasons, one status for each.

No transport is imported here: `shared.server` turns a `ServiceError` into a gRPC status with
google.rpc details, so that the core (engine, models, parsers) can raise one and know nothing of gRPC.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class Status(enum.Enum):
    """The gRPC status codes that mxgpt answers with; the values are gRPC's own numbers."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Reason(enum.Enum):
    """Stable reasons, sent as google.rpc.ErrorInfo.reason; each value is the status it comes with."""

    # Requests.
    FIELD_INVALID = (Status.INVALID_ARGUMENT, "A field is out of its range; BadRequest names it.")
    PROMPT_EMPTY = (Status.INVALID_ARGUMENT, "The prompt holds no token.")
    TOKEN_ID_INVALID = (Status.INVALID_ARGUMENT, "A token id lies outside the vocabulary.")
    CONTEXT_LENGTH_EXCEEDED = (Status.INVALID_ARGUMENT, "The prompt does not fit the model's context.")
    CHAT_TEMPLATE_FAILED = (Status.INVALID_ARGUMENT, "The model's template refused the messages or its limits.")
    CHAT_TEMPLATE_MISSING = (Status.FAILED_PRECONDITION, "The model brings no chat template.")
    NOT_BUILT = (Status.UNIMPLEMENTED, "The contract has this field, this version does not serve it yet.")
    REQUEST_ID_IN_USE = (Status.FAILED_PRECONDITION, "A request with this id is running.")
    REQUEST_NOT_FOUND = (Status.NOT_FOUND, "No request with this id is running here.")
    RESUME_DIGEST_MISMATCH = (Status.FAILED_PRECONDITION, "The stream to resume came from another model.")
    # Models and files.
    MODEL_NOT_FOUND = (Status.NOT_FOUND, "No model has this name here, or its file is missing.")
    MODEL_INVALID = (Status.INVALID_ARGUMENT, "The file breaks the GGUF format or its architecture's rules.")
    MODEL_IN_USE = (Status.FAILED_PRECONDITION, "Executors hold leases on the model; the message names them.")
    MODEL_CHANGED = (Status.DATA_LOSS, "The file changed while it was being loaded, or misses its pin.")
    MODEL_NAME_IN_USE = (Status.FAILED_PRECONDITION, "Another model is loaded under this name.")
    ARCHITECTURE_UNSUPPORTED = (Status.UNIMPLEMENTED, "No executor knows this general.architecture.")
    TENSOR_TYPE_UNSUPPORTED = (Status.UNIMPLEMENTED, "A tensor's type is not one of the thirteen served.")
    FILE_VERSION_UNSUPPORTED = (Status.UNIMPLEMENTED, "The GGUF version or byte order is not served.")
    TOKENIZER_UNSUPPORTED = (Status.UNIMPLEMENTED, "The file's tokenizer or pre-tokenizer is not served.")
    LAYOUT_UNSUPPORTED = (Status.FAILED_PRECONDITION, "The loader has no layout that the executor accepts.")
    TICKET_INVALID = (Status.PERMISSION_DENIED, "The descriptor ticket is unknown, used or expired.")
    # Capacity.
    MEMORY_EXHAUSTED = (Status.RESOURCE_EXHAUSTED, "The host lacks the memory; the message has needed and free.")
    VRAM_EXHAUSTED = (Status.RESOURCE_EXHAUSTED, "The GPU lacks the memory; the message has needed and free.")
    KV_EXHAUSTED = (Status.RESOURCE_EXHAUSTED, "The request needs more KV blocks, or memory in a step, than there is.")
    QUEUE_FULL = (Status.RESOURCE_EXHAUSTED, "The waiting line is full; RetryInfo says when to try again.")
    KEY_LIMIT_REACHED = (Status.RESOURCE_EXHAUSTED, "The key has all the calls running that it may; see RetryInfo.")
    # Life and death.
    LOADER_UNAVAILABLE = (Status.UNAVAILABLE, "The loader can't be reached.")
    TOKENIZER_UNAVAILABLE = (Status.UNAVAILABLE, "No tokenizer can be reached.")
    EXECUTOR_UNAVAILABLE = (Status.UNAVAILABLE, "No executor can be reached.")
    STARTING = (Status.UNAVAILABLE, "The service is still loading what it needs.")
    DRAINING = (Status.UNAVAILABLE, "The service is stopping and takes no new work.")
    CANCELLED = (Status.CANCELLED, "The request was cancelled.")
    DEADLINE = (Status.DEADLINE_EXCEEDED, "The deadline passed before the work was done.")
    CLIENT_STALLED = (Status.DEADLINE_EXCEEDED, "The client stopped reading its stream.")
    # At the door.
    UNAUTHENTICATED = (Status.UNAUTHENTICATED, "The call carries no valid token.")
    PERMISSION_DENIED = (Status.PERMISSION_DENIED, "The token is valid, but its role may not call this method.")
    # Ours.
    INTERNAL = (Status.INTERNAL, "A defect of mxgpt; the log has the details under the reference given.")

    def __init__(self, status: Status, meaning: str) -> None:
        self.status = status
        self.meaning = meaning


class ServiceError(Exception):
    """An error that is the caller's to see: a stable reason, a sentence, and what a machine may read.

    Args:
        reason: the stable reason; it fixes the gRPC status.
        message: one sentence for a person, saying what was wrong and, if known, what to do next.
        field: path of the request field at fault, for google.rpc.BadRequest, as "sampling.top_p".
        retry_after: seconds after which a retry may succeed, for google.rpc.RetryInfo.
        metadata: further facts for google.rpc.ErrorInfo.metadata, as text.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str | None = None,
        retry_after: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after = retry_after
        self.metadata = dict(metadata or {})

    @property
    def status(self) -> Status:
        return self.reason.status

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with every part, for errors that cross from the engine's process."""
        return _rebuild, (self.reason, self.message, self.field, self.retry_after, self.metadata)

    def __repr__(self) -> str:
        return f"ServiceError({self.reason.name}, {self.message!r})"


def invalid_field(field: str, message: str) -> ServiceError:
    """A FIELD_INVALID error whose message starts with the field's path."""
    return ServiceError(Reason.FIELD_INVALID, f"{field}: {message}", field=field)


def _rebuild(
    reason: Reason, message: str, field: str | None, retry_after: float | None, metadata: dict[str, str]
) -> ServiceError:
    return ServiceError(reason, message, field=field, retry_after=retry_after, metadata=metadata)
