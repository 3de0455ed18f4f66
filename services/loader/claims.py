"""What an executor says of memory that it holds, compared with the files that it is said to come from.

That memory has the SHA-256s that were said is checked when it comes (`adoption`); here it is whether the model's names
are names, whether its digest is that of its files, and whether its planes lie as these files' would. That the bytes
in them were made of the files is not checked: it would take as long as loading. Where files are gone, the executor is
believed, unless the loader has a list of pins.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TypeVar

from services.loader.loading import LoadOptions, Source, check_name, open_model, pins_of
from services.loader.store import name_in_use
from shared.digest import digest_of
from shared.errors import Reason, ServiceError, invalid_field
from shared.gguf import GGUFFile, check_unchanged
from shared.gpt_config import GPTConfig
from shared.manifest import Manifest

T = TypeVar("T")

MAX_KNOWN = 16  # files whose digests are remembered: who is refused comes back every two seconds


class Claims:
    """Checks what is said; files are hashed one after another, each once while it stays as it is.

    Args:
        awaited: the sources that this loader was told to load, by name: a name of theirs stands for their files.
    """

    def __init__(self, options: LoadOptions, awaited: Mapping[str, Source]) -> None:
        self._options = options
        self._awaited = awaited
        self._known: dict[Path, tuple[GGUFFile, str | ServiceError]] = {}
        self._one_at_a_time = asyncio.Lock()
        self.hashed_at = -math.inf  # when files were last hashed, by the monotonic clock

    @property
    def is_busy(self) -> bool:
        """Whether files are being hashed now."""
        return self._one_at_a_time.locked()

    async def files_of(self, held: Manifest) -> GGUFFile | None:
        """The files that held memory came from, or those that its name was to be loaded from; None if they are gone.

        Raises:
            ServiceError: MODEL_NAME_IN_USE if a name was to stand for other weights, MODEL_CHANGED if the files have
                another digest or miss their pins, FIELD_INVALID if they lie outside of the model root or hold another
                model than was said; with pins, MODEL_NOT_FOUND if they are gone.
        """
        source = self._awaited_source(held)
        path = Path(held.files[0][0]) if source is None else source.path
        stop = Event()
        async with self._one_at_a_time:
            try:
                file, digest = await in_thread(lambda: self._digest(path, stop), stop)
            except ServiceError as error:
                if error.reason is not Reason.MODEL_NOT_FOUND or self._options.pins is not None:
                    raise
                if source is not None and held.files[0][0] != str(path):
                    raise name_in_use(source.name, f"{path}, which this loader was told to load") from None
                return None
        if source is not None and digest != held.digest:
            raise name_in_use(source.name, f"other weights, those of {path} now, digest {digest}")
        if digest != held.digest:
            why = f"{path}: the file has digest {digest}, not {held.digest} like the memory that is held."
            raise ServiceError(Reason.MODEL_CHANGED, why, metadata={"file": str(path)})
        await asyncio.to_thread(self._require_planned, held, file)
        return file

    def _awaited_source(self, held: Manifest) -> Source | None:
        """What this loader was told to load under a name of the model, if it was."""
        sources = [self._awaited[name] for name in (held.model, *held.aliases) if name in self._awaited]
        if len(sources) > 1:
            raise name_in_use(sources[1].name, f"{sources[1].path}, which this loader was told to load")
        return sources[0] if sources else None

    def _digest(self, path: Path, stop: Event) -> tuple[GGUFFile, str]:
        """Files and their digest; blocks."""
        file, digest = self._known.pop(path, None) or (None, "")
        if file is None or not _is_unchanged(file):
            file = open_model(path, self._options.model_root)
            pins = pins_of(file, (), self._options)
            try:
                digest = digest_of(file, pins, self._options.num_threads, stop)
            except ServiceError as error:
                digest = error
            self.hashed_at = time.monotonic()
        self._known[path] = file, digest
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        if isinstance(digest, ServiceError):
            raise digest.with_traceback(None)
        return file, digest

    def _require_planned(self, held: Manifest, file: GGUFFile) -> None:
        """Refuse dimensions that are not the files', and planes that this loader would have placed elsewhere."""
        config = GPTConfig.from_gguf(file)
        config.check_tensors(file)
        if config != held.config:
            raise invalid_field("held.config", f"is not what {file.paths[0]} says")
        planned = self._options.memory.plan(file, config)
        if planned.layout != held.layout:  # by a loader of other options
            if self._options.pins is not None:
                why = f"is {held.layout!r}, not {planned.layout!r} as this loader places it, and it has pins"
                raise invalid_field("held.layout", why)
            return
        sizes = tuple(allocation.num_bytes for allocation in held.allocations)
        if sizes != tuple(planned.allocation_sizes) or dict(planned.tensors) != dict(held.tensors):
            raise invalid_field("held.tensors", f"do not lie as those of {file.paths[0]} would")


def require_names(held: Manifest) -> None:
    """Refuse names that no model can be loaded under, and memory that came from nowhere.

    Raises:
        ServiceError: FIELD_INVALID.
    """
    check_name("held.model", held.model)
    for index, alias in enumerate(held.aliases):
        check_name(f"held.aliases[{index}]", alias)
    if len({held.model, *held.aliases}) != 1 + len(held.aliases):
        raise invalid_field("held.aliases", "a name comes twice")
    path = held.files[0][0] if held.files else ""
    if not path.startswith("/") or "\0" in path:
        raise invalid_field("held.files", "names no file with its whole path")


def contents_of(manifest: Manifest) -> Manifest:
    """All that two copies of a model in memory have in common."""
    allocations = tuple(replace(allocation, generation=0) for allocation in manifest.allocations)
    return replace(manifest, model="", aliases=(), files=(), allocations=allocations)


async def in_thread(work: Callable[[], T], stop: Event) -> T:
    """What `work` returns; cancelled, this sets `stop`, and ends when the work has."""
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([working])
        raise


def _is_unchanged(file: GGUFFile) -> bool:
    try:
        check_unchanged(file)
    except ServiceError:
        return False
    return True
