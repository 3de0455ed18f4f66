"""The blocking client."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, Unpack

import grpc

from mxgpt.connection import DEFAULT_TARGET, Connection
from mxgpt.errors import MxgptError, cancelled, early_end, from_rpc_error
from mxgpt.options import Message, Options, Prompt, build_request
from mxgpt.results import Piece, Result
from mxgpt.retry import Executors, Retries, RetryPolicy
from mxgpt.tracing import span_of
from mxgpt.transcript import Transcript
from mxgpt.v1 import executor_pb2 as pb
from mxgpt.v1 import executor_pb2_grpc as pb_grpc

UNARY_TIMEOUT = 10.0  # seconds for calls that generate nothing


class Client:
    """Talks to one executor or to many, as if they were one. Threads may share it.

        with Client("localhost:50051") as client:
            for piece in client.generate("1, 2, 3, 4,", max_tokens=64):
                print(piece.text, end="", flush=True)

    A call that fails before its first token is tried again; a stream that breaks later goes on with another
    executor of the same model, no token lost and none repeated (except with content="text", where ids, by
    which it would go on, don't come).

    Args:
        target, token, tls_root, tls_certificate, tls_key, tls_server_name: see `Connection`.
        timeout: seconds for each generation, all attempts together, where the call does not say otherwise.
        retry: how often and how patiently to try again.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        **connection: Any,
    ) -> None:
        self._connection = Connection(target, **connection)
        self._channel = self._connection.open()
        self._stub: Any = pb_grpc.ExecutorServiceStub(self._channel)
        self._timeout = timeout
        self._policy = retry or RetryPolicy()
        self._executors = Executors()

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Generation:
        """Start a generation; iterate over it for its pieces, close it to cancel it.

        Args:
            prompt: text; token ids; or messages of a chat, each a mapping with "role" and "content".
            timeout: seconds for all attempts together.
            options: fields of Sampling, Stopping, Output, Chat and Constraint by their names in the contract.

        Raises:
            TypeError: for an option that does not exist.
            MxgptError: FIELD_INVALID for a value that its field can't hold. Everything else that may go wrong
                is raised by the iteration.
        """
        request = build_request(prompt, options)
        retries = Retries(self._policy, self._executors, timeout if timeout is not None else self._timeout)
        return Generation(self._stub, request, retries, self._connection.metadata)

    def complete(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Result:
        """As `generate`, but returns when all has come."""
        with self.generate(prompt, timeout=timeout, **options) as generation:
            for _ in generation:
                pass
            return generation.result

    def chat(self, messages: Sequence[Message], *, timeout: float | None = None, **options: Unpack[Options]) -> Result:
        """Answer a conversation; the answer is the result's `content`, the reasoning is in its outputs."""
        return self.complete(messages, timeout=timeout, **options)

    def cancel(self, request_id: str) -> str:
        """Cancel a request by its id, best effort; returns the id of the executor that ran it.

        Raises:
            MxgptError: REQUEST_NOT_FOUND where the executor reached does not run it.
        """
        response: pb.CancelResponse = self._call(self._stub.Cancel, pb.CancelRequest(request_id=request_id))
        return response.executor_id

    def list_models(self) -> list[pb.ServedModel]:
        """The models served."""
        return list(self._call(self._stub.ListModels, pb.ExecutorServiceListModelsRequest()).models)

    def status(self) -> pb.ExecutorServiceGetStatusResponse:
        """What one executor is doing now: whichever the balancer picks."""
        request = pb.ExecutorServiceGetStatusRequest()
        response: pb.ExecutorServiceGetStatusResponse = self._call(self._stub.GetStatus, request)
        return response

    def close(self) -> None:
        """Close the connections; generations that still run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        retries = Retries(self._policy, self._executors, UNARY_TIMEOUT)
        while True:
            try:
                response = method(request, timeout=retries.remaining(), metadata=self._connection.metadata)
            except grpc.RpcError as error:
                delay = retries.delay_after(from_rpc_error(error), started=False)
            else:
                retries.succeeded()
                return response
            time.sleep(delay)


class Generation(Iterator[Piece]):
    """A running generation: an iterator of pieces, and a context manager that cancels what is left of it.

    The request is sent when the first piece is asked for. Any thread may cancel it.
    """

    def __init__(
        self,
        stub: Any,
        request: pb.GenerateRequest,
        retries: Retries,
        metadata: tuple[tuple[str, str], ...],
    ) -> None:
        self._call: Any = None  # the attempt that runs, a grpc call
        self._cancelled = threading.Event()
        self._stub = stub
        self._transcript = Transcript(request)
        self._span = span_of(request)
        self._retries = retries
        self._metadata = metadata

    @property
    def result(self) -> Result:
        """What has come so far; all of it once the iteration has ended."""
        return self._transcript.result(self._retries.num_resumes)

    def __next__(self) -> Piece:
        try:
            while not self._transcript.is_finished:
                piece = self._receive()
                if piece is not None:
                    return piece
        except BaseException as error:
            self._end_span(error)
            self.close()
            raise
        self._read_end()
        self._end_span()
        raise StopIteration

    def close(self) -> None:
        """Cancel what still runs, on the server too."""
        self._cancelled.set()
        if self._call is not None:
            self._call.cancel()
        self._end_span()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._call is not None:
            self._call.cancel()

    def _receive(self) -> Piece | None:
        """Take the next message, of a new attempt if need be."""
        if self._cancelled.is_set():
            raise cancelled()
        if self._call is None:
            self._call = self._open()
        try:
            response = next(self._call)
        except StopIteration:
            self._recover(early_end())
            return None
        except grpc.RpcError as error:
            self._recover(from_rpc_error(error))
            return None
        self._retries.succeeded()
        return self._transcript.receive(response)

    def _read_end(self) -> None:
        """Let the call end by itself, so that the server sees no cancellation; whatever it says counts no more."""
        with contextlib.suppress(grpc.RpcError):
            if self._call is not None:
                next(self._call, None)

    def _open(self) -> Any:
        timeout = self._retries.remaining()
        metadata = (*self._metadata, *self._span.metadata())
        return self._stub.Generate(self._transcript.next_request(), timeout=timeout, metadata=metadata)

    def _end_span(self, error: BaseException | None = None) -> None:
        if self._span.is_running:
            self._span.end(self.result, error)

    def _recover(self, error: MxgptError) -> None:
        """Wait until the next attempt is due, or raise the error."""
        self._call = None
        self._span.attempt_failed(error)
        if self._cancelled.is_set():
            raise cancelled()
        if not self._transcript.can_go_on:
            raise error
        self._cancelled.wait(self._retries.delay_after(error, self._transcript.has_started))
