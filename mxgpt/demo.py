"""``make demo``: serve the bundled model, stream answers to a few prompts, stop everything."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from mxgpt.aio import AsyncClient
from mxgpt.bundled import find_model
from mxgpt.cli.answers import AnswerPrinter
from mxgpt.cli.remarks import describe_speed
from mxgpt.cli.terminal import dim
from mxgpt.results import Result
from mxgpt.serve import serving

PROMPTS = (
    "What is 348 + 575?",
    "Sort these words: river, apple, stone, cloud",
    "Translate into Japanese: small cat",
    "Write a haiku about the moon.",
)


async def demo() -> None:
    """The whole of it; prints as it goes."""
    model = find_model()
    start = time.perf_counter()
    print(f"starting loader, tokenizer and executor over {model.name} ...", flush=True)
    async with serving(model) as server:
        print(f"ready on {server.address} after {time.perf_counter() - start:.1f} s", flush=True)
        async with AsyncClient(**server.connection) as client:
            for prompt in PROMPTS:
                result = await _answer(client, prompt)
                print(dim(f"  {describe_speed(result)}", sys.stdout), flush=True)
    command = command_from_here()
    print(f"\nall stopped; now try `{command} serve` and, in another terminal, `{command} chat`")


def command_from_here() -> str:
    """What to type for this environment's mxgpt: its name where that finds it, else its path or this Python's."""
    script = Path(sys.executable).with_name("mxgpt")
    if not script.exists():
        return f"{_short(Path(sys.executable))} -m mxgpt"
    found = shutil.which("mxgpt")
    return "mxgpt" if found is not None and os.path.samefile(found, script) else _short(script)


def _short(path: Path) -> str:
    """The path as a shell takes it, from the working directory where it lies below that."""
    if not path.is_relative_to(Path.cwd()):
        return shlex.quote(str(path))
    relative = shlex.quote(str(path.relative_to(Path.cwd())))
    return relative if "/" in relative else f"./{relative}"


async def _answer(client: AsyncClient, prompt: str) -> Result:
    print(f"\n> {prompt}", flush=True)
    messages = [{"role": "user", "content": prompt}]
    async with client.generate(messages, temperature=0, max_tokens=200) as generation:
        printer = AnswerPrinter(show_thinking=True)
        async for piece in generation:
            printer.print(piece)
        printer.end()
        return generation.result


if __name__ == "__main__":
    try:
        asyncio.run(demo())
    except KeyboardInterrupt:
        sys.exit(130)
