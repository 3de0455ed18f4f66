"""Run a command that ends when its parent does: `python -I -S tether.py PARENT_ID COMMAND...`.

A supervisor that is killed can't stop its children, and these would keep their ports and memory. The kernel sends
them SIGTERM in its stead (PR_SET_PDEATHSIG, which survives exec). Run by path, so that nothing is imported that
the command does not need.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent and become the command."""
    parent_id, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent_id:
        sys.exit("the parent ended before the command began")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
