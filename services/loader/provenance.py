"""Where loaded weights came from: each file's plain SHA-256, and whether the file is still the one that was loaded.

A model's digest is made while it loads; the plain SHA-256 of a file, which publishers state, is sequential (6 s for
12 GB), so one thread of the lowest priority computes it afterwards. What is served does not change with its file:
the weights are a copy. But who loads the file again, or compares it with what answers, should know.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from threading import Event

from services.loader.loaded_model import LoadedModel
from services.loader.store import ModelStore
from shared.digest import StoppedError, plain_sha256
from shared.errors import ServiceError
from shared.gguf import GGUFFile, check_unchanged

log = logging.getLogger(__name__)

WATCH_SECONDS = 5.0  # how soon a change of a file is noticed


class Provenance:
    """Watches the files of the models in `store`, and completes what is known of them."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._stop = Event()
        self._pool = ThreadPoolExecutor(1, "provenance", _lower_priority)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Stop, in the middle of a file if need be."""
        self._stop.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._pool.shutdown()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for model in self._store.models:
                await loop.run_in_executor(self._pool, self._look, model)
            await asyncio.sleep(WATCH_SECONDS)

    def _look(self, model: LoadedModel) -> None:
        """Compare a model's files with what they were, and hash them once."""
        if model.file is None or model.is_file_changed:
            return
        try:
            check_unchanged(model.file)
            if not model.file_sha256:
                hashes = tuple(plain_sha256(path, self._stop) for path in model.file.paths)
                check_unchanged(model.file)
                model.file_sha256 = hashes
                log.info("%s: %s", model.manifest.model, _list(model.file, hashes))
        except (ServiceError, OSError) as error:
            model.is_file_changed = True
            why = error.message if isinstance(error, ServiceError) else str(error)
            log.warning("%s is served as it was loaded, but its file is another now: %s", model.manifest.model, why)
        except StoppedError:
            return


def _list(file: GGUFFile, hashes: tuple[str, ...]) -> str:
    return ", ".join(f"{path} has SHA-256 {sha256}" for path, sha256 in zip(file.paths, hashes, strict=True))


def _lower_priority() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread alone, on Linux
