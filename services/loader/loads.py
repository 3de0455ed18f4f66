"""Loads under way: who asks for a model that is being loaded joins in, and a load that nobody waits for stops.

Models are loaded one after another: each takes all threads, and the memory that it was promised stays free until
it has taken it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from threading import Event

from services.loader.loaded_model import LoadedModel
from services.loader.loading import LoadOptions, Progress, Source, Stage, files_of, load_model, require_pin_count
from services.loader.store import ModelStore, name_in_use
from shared.calls import OK
from shared.digest import StoppedError, digest_of
from shared.errors import Reason, ServiceError, invalid_field
from shared.gguf import check_unchanged

log = logging.getLogger(__name__)


class Load:
    """One load, and how far it is."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.progress = Progress(Stage.PARSE)
        self.stop = Event()
        self.num_waiting = 0
        self.start = time.monotonic()
        self.ended: asyncio.Future[LoadedModel] = asyncio.get_running_loop().create_future()

    def advance(self, progress: Progress) -> None:
        self.progress = progress

    async def wait(self, seconds: float) -> LoadedModel | None:
        """The model, once it is loaded; None if that takes longer than `seconds`; or what went wrong, raised."""
        await asyncio.wait([self.ended], timeout=seconds)
        return self.ended.result() if self.ended.done() else None


class Loads:
    """Starts loads and lets callers join them; for one event loop."""

    def __init__(self, store: ModelStore, options: LoadOptions) -> None:
        self.options = options
        self.on_ended: Callable[[str, float], None] = lambda _outcome, _seconds: None
        self._store = store
        self._loads: dict[str, Load] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()
        # Counting on from the time: no loader of this host gives a number that another one gave.
        self._generations = itertools.count(time.time_ns())

    @contextlib.asynccontextmanager
    async def join(self, source: Source) -> AsyncIterator[Load]:
        """The load of a model: a new one, the one under way, or one that has ended because the model is there.

        Leaving the context gives the load up, unless it has ended or others wait for it.

        Raises:
            ServiceError: MODEL_NAME_IN_USE; FIELD_INVALID or MODEL_CHANGED where the model is there, but not under
                these aliases, or not with this SHA-256.
        """
        load = await self._find_or_start(source)
        load.num_waiting += 1
        try:
            yield load
        finally:
            load.num_waiting -= 1
            if load.num_waiting == 0 and not load.ended.done():
                load.stop.set()

    @property
    def under_way(self) -> list[Load]:
        """The loads that have not ended."""
        return list(self._loads.values())

    def is_loading(self, names: Sequence[str]) -> bool:
        """Whether one of the names is about to stand for a model."""
        return any(set(names).intersection(load.source.names) for load in self._loads.values())

    async def close(self) -> None:
        """Stop every load, and wait until its memory is free."""
        for load in self._loads.values():
            load.stop.set()
        await asyncio.gather(*self._tasks)

    async def _find_or_start(self, source: Source) -> Load:
        while True:
            load = next((load for load in self._loads.values() if set(load.source.names) & set(source.names)), None)
            if load is None:
                break
            if load.source == source and not load.stop.is_set():
                return load
            if (load.source.path, load.source.name) != (source.path, source.name):
                raise name_in_use(source.name, f"the load of {load.source.name!r} that is under way")
            await asyncio.wait([load.ended])  # given up, or with other pins or aliases: see what comes of it
        load = Load(source)
        model = self._store.get(source.name)
        if model is not None:
            await self._require_same(model, source)
            load.ended.set_result(model)
            return load
        self._store.require_free(source.names)
        self._loads[source.name] = load
        task = asyncio.create_task(self._run(load))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return load

    async def _run(self, load: Load) -> None:
        loop = asyncio.get_running_loop()

        def report(progress: Progress) -> None:
            loop.call_soon_threadsafe(load.advance, progress)

        try:
            async with self._one_at_a_time:
                model = await asyncio.to_thread(
                    load_model, load.source, self.options, self._generations, report, load.stop
                )
            if load.stop.is_set():
                model.free()
                raise StoppedError
            self._store.add(model)
            load.ended.set_result(model)
            self.on_ended(OK, time.monotonic() - load.start)
            log.info(
                "loaded %s from %s: %d bytes, %s, digest %s",
                load.source.name, load.source.path, model.resident_bytes, model.manifest.layout, model.manifest.digest,
            )  # fmt: skip
        except StoppedError:
            self._fail(load, ServiceError(Reason.DRAINING, "the loader is stopping, and the load with it"))
        except ServiceError as error:
            self._fail(load, error)
        except Exception as error:
            log.exception("loading %s failed", load.source.path)
            self._fail(load, error)
        finally:
            del self._loads[load.source.name]

    def _fail(self, load: Load, error: Exception) -> None:
        reason = error.reason if isinstance(error, ServiceError) else Reason.INTERNAL
        self.on_ended(reason.name, time.monotonic() - load.start)
        log.info("%s is not loaded: %s", load.source.name, error)
        load.ended.set_exception(error)
        load.ended.exception()  # nobody may be waiting for it

    async def _require_same(self, model: LoadedModel, source: Source) -> None:
        """Refuse to take a loaded model for the one that is asked for, unless it comes from the same files."""
        manifest = model.manifest
        if manifest.model != source.name or manifest.files[0][0] != str(source.path):
            raise name_in_use(source.name, f"model {manifest.model!r} from {manifest.files[0][0]}")
        missing = set(source.aliases).difference(manifest.aliases)
        if missing:
            raise invalid_field("aliases", f"{manifest.model!r} is loaded without {sorted(missing)}; unload it first")
        if not await asyncio.to_thread(self._is_unchanged, model, source.sha256):
            raise name_in_use(source.name, f"what {source.path} held before it changed")

    def _is_unchanged(self, model: LoadedModel, pins: Sequence[str]) -> bool:
        """Whether a model's files are what they were when it was loaded."""
        try:
            file = files_of(model, self.options)
            check_unchanged(file)
        except ServiceError:
            return False
        if pins:
            require_pin_count(pins, file)
            digest_of(file, pins, self.options.num_threads, Event())
        return True
