"""A value made from files that may be replaced while a process runs: certificates, keys, tokens."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)


class Watched(Generic[T]):
    """Made when it is asked for and a file has changed since; the last good value stays while the new one is bad.

    Looking costs one `stat` a file, so that a key taken out of its file is refused from the next call on.

    Args:
        paths: of the files.
        read: makes the value.

    Raises:
        OSError, ValueError: what `read` raises the first time.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._stamps = self._look()
        self.last = read()  # what `get` gave last

    def get(self) -> T:
        """The value of the files as they are now, or as they last were good."""
        stamps = self._look()
        if stamps != self._stamps:
            self._stamps = stamps  # looked at before reading: a change during the read is seen next time
            names = ", ".join(map(str, self._paths))
            try:
                self.last = self._read()
                log.info("read again: %s", names)
            except (OSError, ValueError) as error:
                log.error("kept what was there before: %s", error)
        return self.last

    def _look(self) -> tuple[object, ...]:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> object:
    """What changes when a file is written or replaced, by a link to another one too."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
