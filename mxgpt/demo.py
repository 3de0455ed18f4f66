"""``make demo``: serve the bundled model, stream answers to a few prompts, stop everything."""

from __future__ import annotations

import asyncio
import sys
import time

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
    print("\nall stopped; now try `mxgpt serve` and, in another terminal, `mxgpt chat`")


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
