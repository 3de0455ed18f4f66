"""How much memory this process may still take: the host's, within the limits of its control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shared.errors import Reason, ServiceError

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def require_free(num_bytes: int, what: str) -> None:
    """Refuse what does not fit, before anything is allocated.

    Raises:
        ServiceError: MEMORY_EXHAUSTED, with the bytes needed and the bytes free.
    """
    free = free_bytes()
    if num_bytes > free:
        raise memory_exhausted(num_bytes, free, what)


def memory_exhausted(needed: int, free: int, what: str) -> ServiceError:
    """The error (to be raised) for what does not fit."""
    return ServiceError(
        Reason.MEMORY_EXHAUSTED,
        f"{what} needs {needed} bytes of memory ({needed / 2**30:.2f} GiB); {free} ({free / 2**30:.2f} GiB) are free.",
        metadata={"needed_bytes": str(needed), "free_bytes": str(free)},
    )


def free_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes that can be allocated without swapping: MemAvailable, or what a control group leaves if that is less."""
    return max(0, min([_available(proc), *_left_in_groups(proc, cgroups)]))


def _available(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable (Linux 3.14 and later have)")


def _left_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """What each group with a limit leaves, from this process's own up to the root; versions 1 and 2."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, file_pages = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            file_pages = "total_inactive_file"
        else:
            continue
        # In a container the path may be the host's, and its own group is mounted at the root.
        group = root / path.lstrip("/")
        for directory in (group, *group.parents):
            if not directory.is_relative_to(root):
                break
            left = _left_in(directory, limit, usage, file_pages)
            if left is not None:
                yield left


def _left_in(group: Path, limit: str, usage: str, file_pages: str) -> int | None:
    """The limit less the usage; pages of files that the kernel would drop count as free."""
    try:
        limit_text = (group / limit).read_text().strip()
        used = int((group / usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit_text == "max":
        return None
    return int(limit_text) - used + int(statistics.get(file_pages, 0))
