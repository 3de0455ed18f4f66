"""The command `mxgpt`, also as ``python -m mxgpt``."""

from __future__ import annotations

import os
import signal
import sys

_SERVICES = ("serve", "loader", "tokenizer", "executor")


def main() -> None:
    """Run the command of `sys.argv` and exit."""
    _open_streams()
    if sys.argv[1:2] and sys.argv[1] not in _SERVICES:
        # gRPC reads it when it is imported. Its log says in its own way what the command's one line of error says.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Ctrl-C in the half second of imports ends the process like any other, without a traceback through them.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mxgpt.cli.main import run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run())


def _open_streams() -> None:
    """Standard streams that take anything: one that was closed leads nowhere, characters that it lacks become "?"."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It gets the lowest number that is free, which is the stream's own.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
