"""The client for asyncio: `mxgpt.client`, with await."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self, Unpack

import grpc

from mxgpt.client import UNARY_TIMEOUT
from mxgpt.connection import DEFAULT_TARGET, Connection
from mxgpt.errors import MxgptError, cancelled, early_end, from_rpc_error
from mxgpt.options import Message, Options, Prompt, build_request
from mxgpt.results import Piece, Result
from mxgpt.retry import Executors, Retries, RetryPolicy
from mxgpt.tracing import span_of
from mxgpt.transcript import Transcript
from mxgpt.v1 import executor_pb2 as pb
from mxgpt.v1 import executor_pb2_grpc as pb_grpc


class AsyncClient:
    """As `mxgpt.Client`, for one event loop.

    async with AsyncClient("localhost:50051") as client:
        async for piece in client.generate("1, 2, 3, 4,", max_tokens=64):
            print(piece.text, end="", flush=True)

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
        self._channel = self._connection.open_async()
        self._stub: Any = pb_grpc.ExecutorServiceStub(self._channel)
        self._timeout = timeout
        self._policy = retry or RetryPolicy()
        self._executors = Executors()

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> AsyncGeneration:
        """Start a generation; iterate over it for its pieces. Arguments and errors are those of `Client.generate`."""
        request = build_request(prompt, options)
        retries = Retries(self._policy, self._executors, timeout if timeout is not None else self._timeout)
        return AsyncGeneration(self._stub, request, retries, self._connection.metadata)

    async def complete(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Result:
        """As `generate`, but returns when all has come."""
        async with self.generate(prompt, timeout=timeout, **options) as generation:
            async for _ in generation:
                pass
            return generation.result

    async def chat(
        self, messages: Sequence[Message], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Result:
        """Answer a conversation; the answer is the result's `content`, the reasoning is in its outputs."""
        return await self.complete(messages, timeout=timeout, **options)

    async def cancel(self, request_id: str) -> str:
        """Cancel a request by its id; see `Client.cancel`."""
        response: pb.CancelResponse = await self._call(self._stub.Cancel, pb.CancelRequest(request_id=request_id))
        return response.executor_id

    async def list_models(self) -> list[pb.ServedModel]:
        """The models served."""
        response = await self._call(self._stub.ListModels, pb.ExecutorServiceListModelsRequest())
        return list(response.models)

    async def status(self) -> pb.ExecutorServiceGetStatusResponse:
        """What one executor is doing now: whichever the balancer picks."""
        response: pb.ExecutorServiceGetStatusResponse = await self._call(
            self._stub.GetStatus, pb.ExecutorServiceGetStatusRequest()
        )
        return response

    async def close(self) -> None:
        """Close the connections; generations that still run are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, method: Callable[..., Any], request: Any) -> Any:
        retries = Retries(self._policy, self._executors, UNARY_TIMEOUT)
        while True:
            try:
                response = await method(request, timeout=retries.remaining(), metadata=self._connection.metadata)
            except grpc.RpcError as error:
                delay = retries.delay_after(from_rpc_error(error), started=False)
            else:
                retries.succeeded()
                return response
            await asyncio.sleep(delay)


class AsyncGeneration(AsyncIterator[Piece]):
    """A running generation: an async iterator of pieces, and a context manager that cancels what is left of it.

    The request is sent when the first piece is asked for. Cancelling the task that iterates cancels it too.
    """

    def __init__(
        self, stub: Any, request: pb.GenerateRequest, retries: Retries, metadata: tuple[tuple[str, str], ...]
    ) -> None:
        self._call: Any = None  # the attempt that runs, a grpc.aio call
        self._closed = False
        self._stub = stub
        self._transcript = Transcript(request)
        self._span = span_of(request)
        self._retries = retries
        self._metadata = metadata

    @property
    def result(self) -> Result:
        """What has come so far; all of it once the iteration has ended."""
        return self._transcript.result(self._retries.num_resumes)

    async def __anext__(self) -> Piece:
        try:
            while not self._transcript.is_finished:
                piece = await self._receive()
                if piece is not None:
                    return piece
        except BaseException as error:
            self._end_span(error)
            self.close()
            raise
        await self._read_end()
        self._end_span()
        raise StopAsyncIteration

    def close(self) -> None:
        """Cancel what still runs, on the server too. Another task that iterates gets CANCELLED."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()
        self._end_span()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def _receive(self) -> Piece | None:
        """Take the next message, of a new attempt if need be."""
        if self._closed:
            raise cancelled()
        if self._call is None:
            self._call = self._open()
        try:
            response = await self._call.read()
        except grpc.RpcError as error:
            await self._recover(from_rpc_error(error))
            return None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise cancelled() from None  # by `close` of another task, not this task itself
            raise
        if response is grpc.aio.EOF:
            await self._recover(early_end())
            return None
        self._retries.succeeded()
        return self._transcript.receive(response)

    async def _read_end(self) -> None:
        """Let the call end by itself, so that the server sees no cancellation; whatever it says counts no more."""
        with contextlib.suppress(grpc.RpcError):
            if self._call is not None:
                await self._call.read()

    def _open(self) -> Any:
        timeout = self._retries.remaining()
        metadata = (*self._metadata, *self._span.metadata())
        return self._stub.Generate(self._transcript.next_request(), timeout=timeout, metadata=metadata)

    def _end_span(self, error: BaseException | None = None) -> None:
        if self._span.is_running:
            self._span.end(self.result, error)

    async def _recover(self, error: MxgptError) -> None:
        """Wait until the next attempt is due, or raise the error."""
        self._call = None
        self._span.attempt_failed(error)
        if self._closed:
            raise cancelled()
        if not self._transcript.can_go_on:
            raise error
        await asyncio.sleep(self._retries.delay_after(error, self._transcript.has_started))
