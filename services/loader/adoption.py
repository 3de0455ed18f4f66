"""Adoption: a loader that lacks a model takes its memory from an executor that still holds the descriptors.

Loaders come and go, weights stay: an executor that finds its lease ended attaches again and says what it holds. What
then brings is believed only as far as it can be checked: every allocation is of its size and SHA-256, on the CPU also
sealed, and no name comes to stand for other weights than those that this loader serves or was told to load.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

from services.loader.handover import TICKET_SECONDS, Handover
from services.loader.leases import Leases
from services.loader.loaded_model import LoadedModel
from services.loader.loading import LoadOptions, Source, open_model, pins_of
from services.loader.loads import Loads
from services.loader.store import ModelStore, name_in_use
from shared.digest import digest_of
from shared.errors import Reason, ServiceError, invalid_field
from shared.gguf import GGUFFile
from shared.manifest import Manifest

log = logging.getLogger(__name__)

ARRIVAL_SECONDS = 2 * TICKET_SECONDS  # for an executor to connect and to send


class Adoption:
    """Takes memory in, one model at a time.

    `awaited` are the sources that this loader loads at start: it is their files' contents that their names stand for.
    """

    def __init__(self, store: ModelStore, loads: Loads, leases: Leases, handover: Handover) -> None:
        self.awaited: dict[str, Source] = {}
        self._store = store
        self._loads = loads
        self._leases = leases
        self._handover = handover
        self._one_at_a_time = asyncio.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether memory is being taken in now."""
        return self._one_at_a_time.locked()

    async def adopt(self, held: Manifest, announce: Callable[[bytes], Awaitable[None]]) -> LoadedModel:
        """The model that `held` describes: as loaded or adopted before, or adopted now.

        A copy of it that this loader has loaded is dropped for the executor's memory if nobody leases it. If somebody
        does, both stay, each until its last executor ends.

        Args:
            held: what the executor holds.
            announce: tells the executor to bring it, with the ticket given.

        Raises:
            ServiceError: MODEL_NAME_IN_USE if the name stands for other weights here, STARTING if it will soon stand
                for a model that is being loaded, FIELD_INVALID if the memory does not come or is not what was said.
        """
        async with self._one_at_a_time:
            found = self._find(held)
            if found is not None:
                return found
            file = await self._awaited_file(held)
            ticket, arrival = self._handover.take_back([allocation.num_bytes for allocation in held.allocations])
            try:
                await announce(ticket)
                async with asyncio.timeout(ARRIVAL_SECONDS):
                    descriptors = await arrival
            except OSError as error:  # TimeoutError is one
                raise invalid_field("held", f"its memory did not come: {error}") from None
            finally:
                self._handover.withdraw(ticket)
            return await self._take_in(LoadedModel(held, descriptors, file))

    def _find(self, held: Manifest) -> LoadedModel | None:
        """The model that the executor can lease without bringing anything; None if it is to be adopted."""
        names = (held.model, *held.aliases)
        if self._loads.is_loading(names):
            raise ServiceError(Reason.STARTING, f"{held.model!r} is being loaded; attach again.", retry_after=1.0)
        model = self._store.get(held.model)
        if model is None:
            self._store.require_free(names)
            return None
        if model.manifest.model != held.model or model.manifest.digest != held.digest:
            raise name_in_use(held.model, f"other weights, digest {model.manifest.digest}")
        is_same_memory = model.generations == tuple(allocation.generation for allocation in held.allocations)
        return model if is_same_memory or self._leases.holders(model) else None

    async def _awaited_file(self, held: Manifest) -> GGUFFile | None:
        """The file that this loader was told to load under the name, if it was, and if it is what the executor has."""
        source = self.awaited.get(held.model)
        if source is None:
            return None
        options = self._loads.options
        try:
            file = await asyncio.to_thread(open_model, source.path, options.model_root)
        except ServiceError as error:
            if error.reason is not Reason.MODEL_NOT_FOUND:
                raise
            return None  # nothing else could be loaded under the name
        pins = pins_of(file, source.sha256, options)
        digest = await asyncio.to_thread(digest_of, file, pins, options.num_threads, Event())
        if digest != held.digest:
            raise name_in_use(held.model, f"other weights, those of {source.path} now, digest {digest}")
        return file

    async def _take_in(self, model: LoadedModel) -> LoadedModel:
        """Check what has come, and serve it."""
        try:
            await _verify(model, self._loads.options)
            found = self._find(model.manifest)  # models come and go while memory is hashed
            if found is not None:
                model.free()
                return found
            copy = self._store.get(model.manifest.model)
            if copy is not None:
                model.manifest = dataclasses.replace(model.manifest, aliases=copy.manifest.aliases)
                self._store.remove(copy)
                copy.free()
            self._store.add(model)
        except BaseException:
            model.free()
            raise
        log.info("adopted %s: %d bytes, digest %s", model.names[0], model.resident_bytes, model.manifest.digest)
        return model


async def _verify(model: LoadedModel, options: LoadOptions) -> None:
    """Refuse memory that is not sealed, or not what the manifest says; ends when no thread reads it any more."""
    stop = Event()
    verification = asyncio.ensure_future(asyncio.to_thread(_check_allocations, model, options, stop))
    try:
        await asyncio.shield(verification)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([verification])
        raise


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
