"""How much a greedy stream depends on what runs beside it, on when it runs, and on whether it runs twice.

python -m benchmarks.bench_divergence [MODEL.gguf] [--device cpu|cuda:N] [--tokens 100000]

Streams run one at a time, then all together, then where KV blocks run out so that they are computed again, then resumed
in the middle. On the CPU all give the same tokens. On a GPU the order of sums depends on the batch, so where the two
best logits lie close together the other one may win; and where two experts are all but equally good the other one may
be chosen, which moves logits much further. Printed for each schedule: tokens compared, up to the first that differs in
each stream, and how far apart the two best logits lay there when the stream ran alone. Exits with 1 if that is more
than the margin anywhere; of a model with experts that is a reason to look, no proof that something is wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from models.train.tasks import held_out_tasks
from mxgpt.bundled import find_model
from mxgpt.cli.terminal import print_table
from services.executor.engine import Engine
from services.executor.engine_config import EngineConfig
from services.executor.request import Request, RequestFailed, ResumedOutput, Sampling, Stopping, TokenDrawn
from services.executor.runner import NumpyRunner
from services.executor.step import Runner
from services.executor.weights import Weights
from services.tokenizer.store import FileStore
from shared.devices import device_index
from shared.gguf import read_gguf
from shared.gpt_config import GPTConfig
from shared.memory import kv_groups

BLOCK_SIZE = 32
MAX_RUNNING = 64
MAX_BATCH_TOKENS = 512
MAX_TOKENS = 256  # of a stream
MARGIN = 0.1  # of two logits, on a GPU: ten times what its half-precision activations do to one, as a rule
EXPERTS_MARGIN = 2.0  # where a router may choose another expert; 1.76 was seen (docs/benchmarks.md)
SEED = 0


MARGIN_HELP = f"of two logits; default: 0 on the CPU, {MARGIN} on a GPU, {EXPERTS_MARGIN} there with experts"


@dataclass
class Stream:
    """What a request gave: ids, and, if it was asked to tell, how far apart the two best logits of each lay."""

    token_ids: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


def main() -> int:
    """Returns 0 if no stream differs where the two best logits are further apart than the margin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=find_model())
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--tokens", type=int, default=100_000, help="to compare for each schedule, about")
    parser.add_argument("--margin", type=float, help=MARGIN_HELP)
    arguments = parser.parse_args()
    is_cpu = device_index(arguments.device) is None
    config = GPTConfig.from_gguf(read_gguf(arguments.model))
    margin = 0.0 if is_cpu else EXPERTS_MARGIN if config.num_experts else MARGIN
    margin = margin if arguments.margin is None else arguments.margin
    blocks_of_stream = -(-config.context_length // BLOCK_SIZE)
    num_blocks = MAX_RUNNING * min(blocks_of_stream, 32)
    runner, close = open_runner(arguments.model, config, arguments.device, num_blocks)
    bounds = EngineConfig(
        max_context=config.context_length,
        num_blocks={group.name: num_blocks for group in runner.kv_groups},
        block_size=BLOCK_SIZE,
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_running=MAX_RUNNING,
        max_waiting=arguments.tokens,
    )
    requests = make_requests(arguments.model, -(-arguments.tokens // MAX_TOKENS))
    try:
        worst = compare(runner, bounds, requests)
    finally:
        close()
    if worst > margin:
        print(f"WRONG: a stream differs where the two best logits are {worst:.4f} apart; the margin is {margin}")
    return 1 if worst > margin else 0


def compare(runner: Runner, bounds: EngineConfig, requests: Sequence[Request]) -> float:
    """Run every schedule and print how it differs; returns the widest gap at which a stream did."""
    start = time.monotonic()
    alone: dict[str, Stream] = {}
    for request in requests:
        alone |= run(Engine(runner, bounds), [replace(request, logprobs=2)])
    gaps = [gap for stream in alone.values() for gap in stream.gaps]
    seconds = time.monotonic() - start
    print(f"{len(gaps):,} tokens of {len(alone)} streams, one at a time: {len(gaps) / seconds:,.0f} tokens/s")
    longest = max(len(request.prompt_token_ids) for request in requests) + MAX_TOKENS
    few = -(-longest // BLOCK_SIZE) * -(-min(len(requests), MAX_RUNNING) // 3)  # enough for a third of what may run
    crowded = Engine(runner, replace(bounds, num_blocks=dict.fromkeys(bounds.num_blocks, few)))
    found = {
        "together": run(Engine(runner, bounds), requests),
        "preempted": run(crowded, requests),
        "resumed": run_resumed(Engine(runner, bounds), requests, alone),
    }
    assert crowded.status().num_preemptions > 0, "there were blocks enough"
    rows, worst = [], -1.0
    for schedule, streams in found.items():
        differing = [gap for id, each in alone.items() if (gap := gap_where_differing(each, streams[id])) is not None]
        compared = sum(num_compared(each, streams[id]) for id, each in alone.items())
        worst = max(worst, *differing, -1.0)
        each = f"{compared / len(differing):,.0f}" if differing else "-"
        widest = f"{max(differing):.4f}" if differing else "-"
        wide = sum(gap > MARGIN for gap in differing)
        rows.append([schedule, f"{compared:,}", str(len(differing)), str(wide), each, widest])
    head = ["schedule", "tokens compared", "streams that differ", f"by more than {MARGIN}", "tokens a difference"]
    print_table([*head, "widest gap"], rows)
    print(f"{crowded.status().num_preemptions} preemptions; tokens whose two best logits lie closer than", end="")
    print("".join(f" {bound}: {sum(gap < bound for gap in gaps) / len(gaps):.2%};" for bound in (0.01, 0.03, 0.1)))
    return worst


def run(engine: Engine, requests: Sequence[Request]) -> dict[str, Stream]:
    """Submit all at once and step until idle; what each gave, by its id."""
    streams = {request.request_id: Stream() for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, RequestFailed):
                raise event.error
            if isinstance(event, TokenDrawn):
                stream = streams[event.request_id]
                stream.token_ids.append(event.token_id)
                if event.logprobs is not None:
                    (_, best), (_, second) = event.logprobs.top
                    stream.gaps.append(best - second)
    return streams


def run_resumed(engine: Engine, requests: Sequence[Request], alone: Mapping[str, Stream]) -> dict[str, Stream]:
    """The same, each resumed after some of the tokens that it gave alone; these are put before what follows."""
    rng = random.Random(SEED)
    before = {id: stream.token_ids[: rng.randrange(1, len(stream.token_ids))] for id, stream in alone.items()}
    resumed = [replace(each, resumed={0: ResumedOutput(tuple(before[each.request_id]))}) for each in requests]
    streams = run(engine, resumed)
    return {id: Stream(before[id] + stream.token_ids) for id, stream in streams.items()}


def gap_where_differing(alone: Stream, other: Stream) -> float | None:
    """Between the two best logits of the first token that differs; None if none does."""
    index = num_compared(alone, other) - 1
    return None if alone.token_ids == other.token_ids else alone.gaps[index]


def num_compared(alone: Stream, other: Stream) -> int:
    """Tokens up to the first that differs, it included."""
    pairs = enumerate(zip(alone.token_ids, other.token_ids, strict=True), 1)
    return next((count for count, (ours, theirs) in pairs if ours != theirs), len(alone.token_ids))


def make_requests(path: Path, count: int) -> list[Request]:
    """Greedy requests about tasks that the demo models have not seen, tokenized as the model wants it."""
    (tokenizer,) = FileStore.read(path).tokenizers
    return [
        Request(
            request_id=str(number),
            prompt_token_ids=tuple(tokenizer.encode(task.prompt, parse_special=False, add_special=True)),
            sampling=Sampling(seed=SEED, temperature=0.0),
            stopping=Stopping(MAX_TOKENS),
        )
        for number, task in enumerate(held_out_tasks(SEED, count))
    ]


def open_runner(path: Path, config: GPTConfig, device: str, num_blocks: int) -> tuple[Runner, Callable[[], None]]:
    """The model on a device, and what closes it."""
    file = read_gguf(path)
    blocks = {group.name: num_blocks for group in kv_groups(config, BLOCK_SIZE)}
    index = device_index(device)
    if index is None:
        return NumpyRunner(config, Weights.from_gguf(file, config), BLOCK_SIZE, blocks), lambda: None
    from services.executor.cuda.device import Device
    from services.executor.cuda.runner import CudaRunner
    from services.executor.cuda.weights import CudaWeights

    gpu = Device(index)
    weights = CudaWeights.from_gguf(gpu, file, config)
    return CudaRunner(gpu, weights, BLOCK_SIZE, blocks, MAX_BATCH_TOKENS, MAX_RUNNING), gpu.close


if __name__ == "__main__":
    sys.exit(main())
