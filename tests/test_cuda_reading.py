"""The reader of a model's files: everything once and in order, whatever becomes free when, and an end in any case."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from services.loader.cuda.reading import SpanReader
from shared.digest import READ_BYTES, StoppedError
from shared.errors import Reason, ServiceError
from shared.gguf import GGUFFile, read_gguf
from tests.gguf_files import write_gguf

NUM_BYTES = 5 * READ_BYTES + 12_345


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    """A file of six spans."""
    path = write_gguf(tmp_path_factory.mktemp("reading") / "a.gguf", {"general.architecture": "gpt2"})
    with path.open("ab") as out:
        out.write(os.urandom(NUM_BYTES - path.stat().st_size))
    return read_gguf(path)


def buffers(count: int) -> list[np.ndarray]:
    return [np.zeros(READ_BYTES, np.uint8) for _ in range(count)]


@pytest.mark.parametrize(("num_threads", "num_buffers"), [(1, 1), (1, 2), (3, 3), (3, 4), (8, 20)])
def test_everything_comes_once_and_in_order(file: GGUFFile, num_threads: int, num_buffers: int) -> None:
    content = b""
    held: list[np.ndarray] = []
    with SpanReader(file, buffers(num_buffers), num_threads, Event()) as reader:
        for span, future in reader:
            buffer = future.result(10)
            assert span.offset == len(content)
            content += buffer[: span.num_bytes].tobytes()
            held.append(buffer)
            random.shuffle(held)
            while held and (len(held) == num_buffers or random.random() < 0.5):
                reader.release(held.pop())
    assert content == file.paths[0].read_bytes()


def read(file: GGUFFile, stop: Event, after: Callable[[int], None]) -> None:
    """Read with one buffer, calling `after` with the number of each span."""
    with SpanReader(file, buffers(1), 1, stop) as reader:
        for number, (_, future) in enumerate(reader):
            buffer = future.result(10)
            after(number)
            reader.release(buffer)


def test_a_reader_that_is_left_early_ends(file: GGUFFile) -> None:
    before = threading.active_count()
    stop = Event()

    def leave(number: int) -> None:
        raise KeyError(number)

    with pytest.raises(KeyError):
        read(file, stop, leave)
    assert stop.is_set()
    assert threading.active_count() == before


def test_a_stop_is_met_at_the_next_span(file: GGUFFile) -> None:
    stop = Event()
    with pytest.raises(StoppedError):
        read(file, stop, lambda number: stop.set())


def test_a_file_that_shrinks_is_refused(file: GGUFFile, tmp_path: Path) -> None:
    path = tmp_path / "b.gguf"
    path.write_bytes(file.paths[0].read_bytes())
    shrinking = read_gguf(path)

    def shrink(number: int) -> None:
        if number == 1:
            os.truncate(path, READ_BYTES)

    for _ in range(2):  # while it is read, and before
        with pytest.raises(ServiceError) as caught:
            read(shrinking, Event(), shrink)
        assert caught.value.reason is Reason.MODEL_CHANGED
