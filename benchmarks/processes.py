"""What the services below this process hold: descriptors, sockets, threads, memory."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Held:
    """What one process holds."""

    num_descriptors: int
    num_sockets: int  # of them
    num_threads: int
    private_mb: int  # resident, without shared pages


def services() -> dict[str, int]:
    """Process ids of the services below this process, by name; the engine is one of them."""
    found: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            for word in words:
                if word.startswith("services.") and _is_below(int(entry.name), os.getpid()):
                    found[word.removeprefix("services.").removeprefix("executor.")] = int(entry.name)
    return found


def held() -> dict[str, Held]:
    """What each service holds now."""
    return {name: _held(Path(f"/proc/{process_id}")) for name, process_id in sorted(services().items())}


def _held(process: Path) -> Held:
    links = []
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            links.append(os.readlink(descriptor))
    lines = (line.split(":") for line in (process / "status").read_text().splitlines())
    anonymous = next(int(value.split()[0]) for key, value in lines if key == "RssAnon")
    num_sockets = sum(link.startswith("socket:") for link in links)
    return Held(len(links), num_sockets, len(list((process / "task").iterdir())), anonymous // 1024)


def _is_below(process_id: int, ancestor: int) -> bool:
    while process_id > 1:
        if process_id == ancestor:
            return True
        process_id = int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[1])
    return False
