"""What a device is called."""

from __future__ import annotations

import re


def device_index(device: str) -> int | None:
    """N of "cuda:N", 0 of "cuda"; None for "cpu".

    Raises:
        ValueError: for any other name.
    """
    if device == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise ValueError(f"--device: {device!r} is neither 'cpu' nor 'cuda:N'")
    return int(match[1] or 0)
