"""The command `mxgpt`, also as ``python -m mxgpt``."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command of `sys.argv` and exit."""
    # Ctrl-C in the half second of imports ends the process like any other, without a traceback through them.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mxgpt.cli.main import run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run())


if __name__ == "__main__":
    main()
