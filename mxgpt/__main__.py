"""``python -m mxgpt``."""

from mxgpt.cli import main

main()
