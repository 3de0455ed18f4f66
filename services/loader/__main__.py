"""``python -m services.loader``."""

from services.loader.main import main

main(prog_name="mxgpt loader")
