"""``python -m services.executor``."""

from services.executor.main import main

main(prog_name="mxgpt executor")
