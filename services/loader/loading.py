"""Loads a model: parse, check, plan, then fill and seal its allocations while its files are hashed beside it.

One thread calls `load_model`; pools of its own do the work. Whatever ends it early (an error, a stop) frees all
that was allocated. At no time is a second copy of the weights in memory.
"""

from __future__ import annotations

import enum
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Lock

from services.loader.cpu_memory import CpuMemory
from services.loader.loaded_model import LoadedModel
from services.loader.memory import Memory
from services.loader.tokenizer_check import TokenizerChecks
from shared.descriptors import close_all
from shared.digest import StoppedError, digest_of
from shared.errors import Reason, ServiceError, invalid_field
from shared.gguf import GGUFFile, read_gguf
from shared.gpt_config import GPTConfig
from shared.layout import Plan
from shared.manifest import Allocation, Manifest
from shared.phases import Phases
from shared.pins import Pins

log = logging.getLogger(__name__)

MAX_NAME_BYTES = 256
NUM_REPORTS = 200  # of a load's progress, about


class Stage(enum.Enum):
    """Stages of a load, in order; the values are those of mxgpt.v1.LoadStage."""

    PARSE = 1
    WEIGHTS = 2
    SEAL = 3
    READY = 4


@dataclass(frozen=True)
class Source:
    """What to load, and under which names.

    Raises:
        ServiceError: FIELD_INVALID, for a name or a pin that is none.
    """

    path: Path
    name: str
    aliases: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()  # pins: of each file, in order; empty to expect nothing

    def __post_init__(self) -> None:
        check_name("name", self.name)
        for index, alias in enumerate(self.aliases):
            check_name(f"aliases[{index}]", alias)
        if len(set(self.names)) != len(self.names):
            raise invalid_field("aliases", "a name comes twice")
        for index, pin in enumerate(self.sha256):
            if re.fullmatch(r"[0-9a-f]{64}", pin) is None:
                raise invalid_field(f"sha256[{index}]", "is no SHA-256 in lower-case hexadecimal")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class LoadOptions:
    """How this loader loads."""

    model_root: Path | None = None  # files lie below it, symbolic links followed; None: anywhere
    num_threads: int = 4  # that hash
    memory: Memory = field(default_factory=CpuMemory)
    pins: Pins | None = None  # of all files that this loader reads
    tokenizer_checks: TokenizerChecks = field(default_factory=TokenizerChecks)


@dataclass(frozen=True)
class Progress:
    """How far a load is."""

    stage: Stage
    bytes_done: int = 0  # of the tensors in the files
    bytes_total: int = 0


def load_model(
    source: Source,
    options: LoadOptions,
    generations: Iterator[int],
    report: Callable[[Progress], None],
    stop: Event,
) -> LoadedModel:
    """Load a model into sealed memory; the caller frees it.

    Args:
        generations: numbers for allocations, none of which was ever used.
        report: called from several threads, one at a time.
        stop: set by another thread to give up.

    Raises:
        ServiceError: for a file that can't be served, or a host or a GPU without the memory.
        StoppedError: if the stop was set.
    """
    report(Progress(Stage.PARSE))
    phases = Phases()
    _require_below(options.model_root, source.path)
    with options.tokenizer_checks.begin(source.path) as check:  # so that a model with a broken tokenizer is not served
        file, config, planned = plan_model(source.path, options)
        require_pin_count(source.sha256, file)
        source = replace(source, sha256=pins_of(file, source.sha256, options))
        options.memory.require_free(planned, file, f"model {source.name!r}")
        counter = _Counter(planned, file, report, stop)
        phases.lap("parse")
        filled = options.memory.fill(planned, file, source.sha256, counter.add, stop, phases)
        try:
            eog_token_ids = check.eog_token_ids(file)
        except BaseException:
            close_all(filled.descriptors)
            raise
    phases.lap("tokenizer")
    allocations = zip(planned.allocation_sizes, filled.sha256, generations, strict=False)
    manifest = Manifest(
        model=source.name,
        aliases=source.aliases,
        digest=filled.digest,
        layout=planned.layout,
        config=config,
        allocations=tuple(Allocation(*each, filled.sha256_piece_bytes) for each in allocations),
        tensors=dict(planned.tensors),
        files=described_files(file),
        eog_token_ids=eog_token_ids,
    )
    log.info("%s: %d bytes of weights are in memory: %s", source.name, counter.bytes_total, phases)
    return LoadedModel(manifest, filled.descriptors, file, source.sha256)


def open_model(path: Path, model_root: Path | None) -> GGUFFile:
    """Parse a model's files, which must lie below `model_root` if there is one.

    Raises:
        ServiceError: FIELD_INVALID for a path outside the root; for a file that is not sound, see `read_gguf`.
    """
    _require_below(model_root, path)
    file = read_gguf(path)
    for shard in file.paths:
        _require_below(model_root, shard)
    return file


def plan_model(path: Path, options: LoadOptions) -> tuple[GGUFFile, GPTConfig, Plan]:
    """What a model's files say, and how this loader places its weights; errors as `load_model`, before weights."""
    file = open_model(path, options.model_root)
    config = GPTConfig.from_gguf(file)
    config.check_tensors(file)
    return file, config, options.memory.plan(file, config)


def files_of(model: LoadedModel, options: LoadOptions) -> GGUFFile:
    """The files that a model came from; those of an adopted one are read and compared with its digest, once.

    Raises:
        ServiceError: MODEL_NOT_FOUND if they are gone, MODEL_CHANGED if they are others now.
    """
    if model.file is None:
        manifest = model.manifest
        path = Path(manifest.files[0][0]) if manifest.files else Path()
        file = open_model(path, options.model_root)
        if digest_of(file, pins_of(file, (), options), options.num_threads, Event()) != manifest.digest:
            why = f"{path}: no longer the file that {manifest.model!r} was loaded from; its memory was adopted."
            raise ServiceError(Reason.MODEL_CHANGED, why, metadata={"file": str(path)})
        model.file = file
    return model.file


def require_pin_count(pins: Sequence[str], file: GGUFFile) -> None:
    """Refuse pins that don't match the files one by one."""
    if len(pins) not in (0, len(file.paths)):
        raise invalid_field("sha256", f"has {len(pins)} entries for {len(file.paths)} files")


def pins_of(file: GGUFFile, asked: Sequence[str], options: LoadOptions) -> tuple[str, ...]:
    """The SHA-256 that each file must have: by the loader's list if there is one, by the caller's wish, or none.

    Raises:
        ServiceError: MODEL_CHANGED if a file is not on the list, or the caller wants another than the list has.
    """
    if options.pins is None:
        return tuple(asked)
    pins = options.pins.of(file.paths)
    if asked and tuple(asked) != pins:
        why = f"{file.paths[0]}: the SHA-256 asked for is not the one pinned in {options.pins.path}."
        raise ServiceError(Reason.MODEL_CHANGED, why, metadata={"file": str(file.paths[0])})
    return pins


def described_files(file: GGUFFile) -> tuple[tuple[str, int], ...]:
    """A model's files as its manifest has them."""
    return tuple((str(path), size) for path, size in zip(file.paths, file.file_sizes, strict=True))


def is_below(root: Path | None, path: Path) -> bool:
    """Whether a path, its symbolic links followed, lies below the root, if there is one."""
    return root is None or path.resolve().is_relative_to(root.resolve())


def check_name(field: str, name: str) -> None:
    """Refuse what no model can be called (FIELD_INVALID, naming the field)."""
    if not name or len(name.encode()) > MAX_NAME_BYTES or not name.isprintable():
        raise invalid_field(field, f"{name!r:.80} is no name: 1 to {MAX_NAME_BYTES} printable bytes")


def default_name(path: Path) -> str:
    """A file's name without its ending and the number of its shard."""
    return re.sub(r"-\d{5}-of-\d{5}$", "", path.name.removesuffix(".gguf"))


class _Counter:
    """Counts what several threads have placed."""

    def __init__(self, planned: Plan, file: GGUFFile, report: Callable[[Progress], None], stop: Event) -> None:
        self.bytes_total = sum(file.tensors[name].num_bytes for name in planned.tensors)
        self._report = report
        self._stop = stop
        self._lock = Lock()
        self._bytes_done = 0
        self._bytes_reported = 0

    def add(self, num_bytes: int) -> None:
        """More file bytes are placed.

        Raises:
            StoppedError: if the stop was set.
        """
        if self._stop.is_set():
            raise StoppedError
        with self._lock:
            self._bytes_done += num_bytes
            is_done = self._bytes_done == self.bytes_total
            if is_done or self._bytes_done - self._bytes_reported >= self.bytes_total // NUM_REPORTS:
                self._bytes_reported = self._bytes_done
                stage = Stage.SEAL if is_done else Stage.WEIGHTS
                self._report(Progress(stage, self._bytes_done, self.bytes_total))


def _require_below(root: Path | None, path: Path) -> None:
    if not is_below(root, path):
        raise invalid_field("path", f"{path} lies outside of this loader's model root")
