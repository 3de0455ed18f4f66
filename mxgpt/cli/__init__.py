"""The command line: `mxgpt COMMAND`."""

from mxgpt.cli.main import main

__all__ = ["main"]
