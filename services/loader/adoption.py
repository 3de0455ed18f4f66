"""Adoption: a loader that lacks a model takes its memory from an executor that still holds the descriptors.

Loaders come and go, weights stay: an executor that finds its lease ended attaches again and says what it holds. That
is believed only as far as it can be checked: the files that it names are compared with its digest (`claims`); what
then comes is, allocation by allocation, of its size and SHA-256, on the CPU also sealed; and no name comes to stand
for other weights than those that this loader serves or was told to load.

Who was asked for memory and does not bring it holds up nobody: the first one who brings it is who it is taken from.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

from services.loader.claims import Claims, contents_of, in_thread, require_names
from services.loader.handover import TICKET_SECONDS, Handover
from services.loader.leases import Leases
from services.loader.loaded_model import LoadedModel
from services.loader.loading import LoadOptions, Source, described_files
from services.loader.loads import Loads
from services.loader.store import ModelStore, name_in_use
from shared.descriptors import close_all
from shared.errors import Reason, ServiceError, invalid_field
from shared.manifest import Manifest

log = logging.getLogger(__name__)

ARRIVAL_SECONDS = 2 * TICKET_SECONDS  # for an executor to connect and to send
PROMPT_SECONDS = 2.0  # in which it usually does


class Adoption:
    """Takes memory in, one model at a time.

    `awaited` are the sources that this loader loads at start: it is their files' contents that their names stand for.
    """

    def __init__(
        self, store: ModelStore, loads: Loads, leases: Leases, handover: Handover, awaited: Iterable[Source] = ()
    ) -> None:
        self.awaited = {source.name: source for source in awaited}
        self._store = store
        self._loads = loads
        self._leases = leases
        self._handover = handover
        self._claims = Claims(loads.options, self.awaited)
        self._one_at_a_time = asyncio.Lock()
        self._under_way: list[Manifest] = []

    @property
    def is_busy(self) -> bool:
        """Whether memory or the files that it came from are being checked, or it is about to come now that those are.

        Who was asked for memory and does not bring it counts no longer than that.
        """
        is_about_to_come = time.monotonic() < self._claims.hashed_at + PROMPT_SECONDS
        return self._claims.is_busy or self._one_at_a_time.locked() or (bool(self._under_way) and is_about_to_come)

    @property
    def expected(self) -> set[str]:
        """Names, aliases and digests of models that may be here soon: told to be loaded, or held by executors."""
        held = {name for each in self._under_way for name in (each.model, *each.aliases, each.digest)}
        return held.union(self.awaited)

    async def adopt(self, held: Manifest, announce: Callable[[bytes], Awaitable[None]]) -> LoadedModel:
        """The model that `held` describes: as loaded or adopted before, or adopted now.

        A copy of it that this loader has loaded is dropped for the executor's memory if nobody leases it and both have
        the same contents. Else both stay, each until its last executor ends.

        Args:
            held: what the executor holds.
            announce: tells the executor to bring it, with the ticket given.

        Raises:
            ServiceError: MODEL_NAME_IN_USE if the name stands for other weights here, STARTING if it will soon stand
                for a model that is being loaded, FIELD_INVALID if the memory does not come or is not what was said;
                and as `Claims.files_of`.
        """
        require_names(held)
        found = self._find(held)
        if found is not None:
            return found
        self._under_way.append(held)
        try:
            model = await self._described(held)
            async with self._one_at_a_time:  # another executor may have brought the same memory
                found = self._find(held)
            if found is not None:
                return found
            model.descriptors = await self._arrival(held, announce)
            return await self._take_in(model)
        finally:
            self._under_way.remove(held)

    def _find(self, held: Manifest) -> LoadedModel | None:
        """The model that the executor can lease without bringing anything; None if it is to be adopted."""
        names = (held.model, *held.aliases)
        if self._loads.is_loading(names):
            raise ServiceError(Reason.STARTING, f"{held.model!r} is being loaded; attach again.", retry_after=1.0)
        model = self._store.get(held.model)
        if model is None:
            self._store.require_free(names)
            self._require_like_others(held)
            return None
        if model.manifest.model != held.model or model.manifest.digest != held.digest:
            raise name_in_use(held.model, f"other weights, digest {model.manifest.digest}")
        is_same_memory = model.generations == tuple(allocation.generation for allocation in held.allocations)
        is_copy = contents_of(model.manifest) == contents_of(held)
        return model if is_same_memory or not is_copy or self._leases.holders(model) else None

    def _require_like_others(self, held: Manifest) -> None:
        """Refuse the digest of a model that is here under another name, but with other contents."""
        for model in self._store.models:
            if model.manifest.digest == held.digest and contents_of(model.manifest) != contents_of(held):
                raise invalid_field("held.digest", f"is that of {model.manifest.model!r}, whose contents are others")

    async def _described(self, held: Manifest) -> LoadedModel:
        """The model that held memory will be, still without it: like the copy that is here, or of the files named."""
        copy = self._store.get(held.model)
        if copy is not None:
            manifest = dataclasses.replace(copy.manifest, allocations=held.allocations)
            return LoadedModel(manifest, (), copy.file, copy.file_sha256, copy.is_file_changed)
        file = await self._claims.files_of(held)
        manifest = held if file is None else dataclasses.replace(held, files=described_files(file))
        return LoadedModel(manifest, (), file)

    async def _arrival(self, held: Manifest, announce: Callable[[bytes], Awaitable[None]]) -> tuple[int, ...]:
        """The descriptors that the executor brings."""
        ticket, arrival = self._handover.take_back([allocation.num_bytes for allocation in held.allocations])
        try:
            await announce(ticket)
            async with asyncio.timeout(ARRIVAL_SECONDS):
                return await arrival
        except BaseException as error:
            if arrival.done() and not arrival.cancelled() and arrival.exception() is None:
                close_all(arrival.result())  # they came in the moment in which they were given up
            if isinstance(error, OSError):  # TimeoutError is one
                raise invalid_field("held", f"its memory did not come: {error}") from None
            raise
        finally:
            self._handover.withdraw(ticket)
            arrival.cancel()  # the ticket may be used, and the descriptors on their way

    async def _take_in(self, model: LoadedModel) -> LoadedModel:
        """Check what has come, and serve it, unless somebody else was faster."""
        try:
            async with self._one_at_a_time:
                found = self._find(model.manifest)
                if found is None:
                    await _verify(model, self._loads.options)
                    found = self._find(model.manifest)  # models come and go while memory is hashed
                if found is None:
                    self._add(model)
        except BaseException:
            model.free()
            raise
        if found is not None:
            model.free()
            return found
        log.info("adopted %s: %d bytes, digest %s", model.names[0], model.resident_bytes, model.manifest.digest)
        return model

    def _add(self, model: LoadedModel) -> None:
        """Serve a model, in place of its copy if there is one."""
        copy = self._store.get(model.manifest.model)
        if copy is not None:
            model.manifest = dataclasses.replace(model.manifest, aliases=copy.manifest.aliases)
            self._store.remove(copy)
            copy.free()
        self._store.add(model)


async def _verify(model: LoadedModel, options: LoadOptions) -> None:
    """Refuse memory that is not sealed, or not what the manifest says; ends when no thread reads it any more."""
    stop = Event()
    await in_thread(lambda: _check_allocations(model, options, stop), stop)


def _check_allocations(model: LoadedModel, options: LoadOptions, stop: Event) -> None:
    def check(index: int) -> None:
        path = f"held.allocations[{index}]"
        allocation = model.manifest.allocations[index]
        try:
            options.memory.verify(model.descriptors[index], allocation, stop)
        except ValueError as error:
            raise invalid_field(path, str(error)) from None

    with ThreadPoolExecutor(options.num_threads, "verify") as pool:
        try:
            list(pool.map(check, range(len(model.descriptors))))
        except BaseException:
            stop.set()
            raise
