"""What a running server delivers to many clients at once: rates and latencies, as the clients see them.

Streams are closed loops: each sends its next request when the last one has ended. Every request writes the same
number of tokens (end-of-generation ids are passed over), so that runs can be compared.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mxgpt.aio import AsyncClient
from mxgpt.errors import MxgptError
from mxgpt.options import Prompt
from mxgpt.tasks import run_all


@dataclass(frozen=True)
class Load:
    """What to send."""

    prompts: Sequence[Prompt]  # taken in turn
    num_streams: int
    num_requests: int
    max_tokens: int
    temperature: float = 0.0


@dataclass
class Measurement:
    """What came of it. Times are in seconds, one entry a request or a gap between tokens."""

    seconds: float = 0.0  # from the first request to the last token
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    first_token: list[float] = field(default_factory=list)  # from sending a request to its first token
    between_tokens: list[float] = field(default_factory=list)  # a piece's tokens share the time since the last piece
    whole: list[float] = field(default_factory=list)
    errors: list[MxgptError] = field(default_factory=list)

    @property
    def output_rate(self) -> float:
        """Tokens written a second, of all streams together."""
        return self.num_output_tokens / self.seconds


def random_prompts(num_prompts: int, num_tokens: int, vocab_size: int, seed: int = 0) -> list[Prompt]:
    """Prompts of random ids, no two alike from the start, so that no prefix cache helps."""
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(num_prompts)]


async def measure(client: AsyncClient, load: Load, on_progress: Callable[[int], None] = lambda _: None) -> Measurement:
    """Send a load; requests that fail are counted and not sent again beyond what the client does by itself."""
    found = Measurement()
    numbers = iter(range(load.num_requests))
    num_done = 0

    async def stream() -> None:
        nonlocal num_done
        for number in numbers:
            try:
                await _request(client, load, load.prompts[number % len(load.prompts)], found)
            except MxgptError as error:
                found.errors.append(error)
            num_done += 1
            on_progress(num_done)

    start = time.perf_counter()
    await run_all(stream() for _ in range(min(load.num_streams, load.num_requests)))
    found.seconds = time.perf_counter() - start
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values do not exceed (nearest rank); NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 1000) // 1000) - 1)] if ordered else float("nan")


async def _request(client: AsyncClient, load: Load, prompt: Prompt, found: Measurement) -> None:
    start = last = time.perf_counter()
    is_first = True
    async with client.generate(
        prompt, max_tokens=load.max_tokens, temperature=load.temperature, ignore_eos=True
    ) as generation:
        async for piece in generation:
            now = time.perf_counter()
            if is_first:
                found.first_token.append(now - start)
                is_first = False
            elif piece.token_ids:
                found.between_tokens += [(now - last) / len(piece.token_ids)] * len(piece.token_ids)
            last = now
        usage = generation.result.usage
    found.whole.append(last - start)
    assert usage is not None
    found.num_prompt_tokens += usage.num_prompt_tokens
    found.num_cached_tokens += usage.num_cached_tokens
    found.num_output_tokens += usage.num_output_tokens
