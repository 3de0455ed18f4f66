"""How long the phases of a start or a load take, for one line of a log."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Phases:
    """Phases one after another, from now on.

    Args:
        since_start: the first phase begins when this process did, so that it holds the interpreter's start and imports.
    """

    def __init__(self, *, since_start: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic() - (process_age() if since_start else 0.0)

    def lap(self, name: str) -> None:
        """A phase ends here, and the next one begins."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        """Such as "imports 310 ms, context 95 ms"."""
        return ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in self.seconds.items())


def process_age() -> float:
    """Seconds since this process was started, to a hundredth."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22, counted behind the name: seconds since the boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
