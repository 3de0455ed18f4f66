"""An executor's lease on a model: attach, keep the lease, and bring the memory back to a loader that has restarted.

The lease is an open stream. When it ends, the executor goes on serving from the memory that it holds, and attaches
again, saying what it holds, until a loader takes it; that one may ask for the descriptors and adopt the memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc

from mxgpt.v1 import loader_pb2, loader_pb2_grpc
from shared.channel import open_channel
from shared.config import ClientConfig
from shared.descriptors import (
    ACCEPTED,
    REFUSED,
    check_sealed,
    close_all,
    copy_all,
    map_readonly,
    receive_descriptors,
    send_descriptors,
)
from shared.errors import Reason, ServiceError, Status
from shared.manifest import Manifest
from shared.manifest_proto import manifest_from_proto, manifest_to_proto
from shared.rpc_errors import from_rpc_error
from shared.tracing import Metadata

log = logging.getLogger(__name__)

HANDOVER_SECONDS = 30.0
MIN_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 2.0
CPU_LAYOUTS = "cpu."  # prefix of the layouts whose descriptors are memfds


@dataclass(frozen=True)
class Attachment:
    """A model's manifest and the descriptors of its allocations, which can be passed to other processes."""

    manifest: Manifest
    descriptors: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each allocation."""
        return [allocation.num_bytes for allocation in self.manifest.allocations]

    def map(self) -> list[memoryview]:
        """Read-only views of the allocations, each (num_bytes,) uint8."""
        return [map_readonly(descriptor, size) for descriptor, size in zip(self.descriptors, self.sizes, strict=True)]

    def close(self) -> None:
        """Close the descriptors; mappings stay until their last view ends."""
        close_all(self.descriptors)


class LoaderClient:
    """Holds a lease on one model; for one event loop.

    `attachment` is what was leased. `attached` is set while the lease is held, and `changed` is set (by this) and
    cleared (by whoever watches) each time that changes.
    """

    def __init__(self, target: str, config: ClientConfig | None = None) -> None:
        self.attached = asyncio.Event()
        self.changed = asyncio.Event()
        self._channel = open_channel(target, config)
        self._stub = loader_pb2_grpc.LoaderServiceStub(self._channel)
        self.attachment: Attachment | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def attach(self, model: str, layouts: Sequence[str], executor_id: str, metadata: Metadata = ()) -> Attachment:
        """Lease a model and receive its memory; the lease is kept in the background until `close`.

        Args:
            model: name, alias or digest; empty for the only one loaded.
            layouts: that the caller can use, best first.
            executor_id: names the holder to whoever wants to unload the model.
            metadata: to send with the call.

        Raises:
            ServiceError: what the loader answered; LOADER_UNAVAILABLE if it, or its socket, can't be reached.
        """
        assert self._keeping is None, "one client holds one lease"
        request = loader_pb2.AttachRequest(model=model, executor_id=executor_id, layouts=layouts)
        call = self._stub.Attach(request, metadata=metadata)
        try:
            attached = await _first_message(call)
            manifest = manifest_from_proto(attached.manifest)
            descriptors = await _receive(attached, manifest)
        except BaseException:
            call.cancel()
            raise
        self.attachment = Attachment(manifest, descriptors)
        request.held.CopyFrom(manifest_to_proto(manifest))
        self._set_attached(True)
        self._keeping = asyncio.create_task(self._keep(call, request, self.attachment))
        return self.attachment

    async def close(self) -> None:
        """End the lease and close the descriptors."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self._channel.close()
        if self.attachment is not None:
            self.attachment.close()
            self.attachment = None

    async def _keep(
        self, call: grpc.aio.UnaryStreamCall, request: loader_pb2.AttachRequest, attachment: Attachment
    ) -> None:
        """Wait for the lease's end, then seek another one; again and again."""
        try:
            while True:
                error = await _end_of(call)
                self._set_attached(False)
                log.warning("the lease on %s has ended: %s", attachment.manifest.model, error.message)
                # A loader that went away may be back at once; one that refused will not soon think better of it.
                backoff = MIN_BACKOFF_SECONDS if error.status is Status.UNAVAILABLE else MAX_BACKOFF_SECONDS
                while not self.attached.is_set():
                    await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
                    backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
                    call = self._stub.Attach(request)
                    try:
                        await _attach_again(call, attachment)
                        self._set_attached(True)
                        log.info("the lease on %s is held again", attachment.manifest.model)
                    except (ServiceError, OSError) as failure:  # as the latter when descriptors have run out
                        call.cancel()
                        refusal = _refusal(failure)
                        if refusal.message != error.message:
                            log.warning("no lease yet: %s (%s)", refusal.message, refusal.reason.name)
                        error = refusal
        finally:
            call.cancel()

    def _set_attached(self, attached: bool) -> None:
        if attached:
            self.attached.set()
        else:
            self.attached.clear()
        self.changed.set()


async def _first_message(call: grpc.aio.UnaryStreamCall) -> loader_pb2.Attached:
    try:
        message = await call.read()
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, Reason.LOADER_UNAVAILABLE) from None
    if message is grpc.aio.EOF or not message.HasField("attached"):
        raise ServiceError(Reason.LOADER_UNAVAILABLE, "the loader ended the lease before it began")
    attached: loader_pb2.Attached = message.attached
    return attached


async def _end_of(call: grpc.aio.UnaryStreamCall) -> ServiceError:
    """Wait for the end of a lease; why it ended."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error, Reason.LOADER_UNAVAILABLE)
    return ServiceError(Reason.LOADER_UNAVAILABLE, "the loader ended the lease")


def _refusal(failure: ServiceError | OSError) -> ServiceError:
    if isinstance(failure, ServiceError):
        return failure
    return ServiceError(Reason.LOADER_UNAVAILABLE, f"the memory can't be brought to the loader: {failure.strerror}")


async def _attach_again(call: grpc.aio.UnaryStreamCall, attachment: Attachment) -> None:
    """Take up a lease on memory that is held, bringing it to the loader if it asks for it."""
    attached = await _first_message(call)
    if attached.adopt:
        copies = copy_all(attachment.descriptors)  # for a thread, which outlives a cancelled task
        await asyncio.to_thread(_bring, attached, copies, attachment.sizes)


async def _receive(attached: loader_pb2.Attached, manifest: Manifest) -> tuple[int, ...]:
    fetching = asyncio.ensure_future(asyncio.to_thread(_fetch, attached, manifest))
    try:
        return await asyncio.shield(fetching)
    except asyncio.CancelledError:
        fetching.add_done_callback(_close_fetched)
        raise


def _close_fetched(fetching: asyncio.Future[tuple[int, ...]]) -> None:
    if fetching.exception() is None:
        close_all(fetching.result())


def _fetch(attached: loader_pb2.Attached, manifest: Manifest) -> tuple[int, ...]:
    """The descriptors of a manifest's allocations, checked as far as their layout's kind of memory can be."""
    sizes = [allocation.num_bytes for allocation in manifest.allocations]
    with _present_ticket(attached) as connection:
        descriptors = receive_descriptors(connection, sizes, HANDOVER_SECONDS)
    try:
        if manifest.layout.startswith(CPU_LAYOUTS):
            for descriptor, size in zip(descriptors, sizes, strict=True):
                check_sealed(descriptor, size)
    except ValueError as error:
        close_all(descriptors)
        raise ServiceError(Reason.INTERNAL, f"the loader sent what can't be mapped: {error}") from None
    return descriptors


def _bring(attached: loader_pb2.Attached, copies: Sequence[int], sizes: Sequence[int]) -> None:
    """Send descriptors to the loader, and close these copies of them."""
    try:
        with _present_ticket(attached) as connection:
            send_descriptors(connection, copies, sizes, HANDOVER_SECONDS)
    finally:
        close_all(copies)


@contextlib.contextmanager
def _present_ticket(attached: loader_pb2.Attached) -> Iterator[socket.socket]:
    """A connection to the loader's socket on which the ticket was accepted.

    Raises:
        ServiceError: TICKET_INVALID; LOADER_UNAVAILABLE for whatever else goes wrong with it, also in the context.
    """
    path = attached.socket_path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(HANDOVER_SECONDS)
            connection.connect(path)
            with contextlib.suppress(BrokenPipeError):  # strangers are refused unheard: the answer is there already
                connection.sendall(attached.ticket)
            answer = connection.recv(1)
            if answer == REFUSED:
                why = f"the loader refused the ticket on {path}: is this user allowed there (its --allow-uid)?"
                raise ServiceError(Reason.TICKET_INVALID, why)
            if answer != ACCEPTED:
                raise ConnectionError("the loader closed the connection")
            yield connection
    except OSError as error:
        why = f"descriptors did not pass over {path}: {error}; is it on a volume that both share?"
        raise ServiceError(Reason.LOADER_UNAVAILABLE, why) from None
