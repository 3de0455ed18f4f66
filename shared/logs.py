"""Logs on stderr: one line a record, with the service's name; prompts and answers never appear in them."""

from __future__ import annotations

import logging
import sys


def set_up_logs(service: str, level: str = "INFO") -> None:
    """Send this process's log records to stderr as "time level service logger: message"."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)s {service} %(name)s: %(message)s",
        force=True,
    )
