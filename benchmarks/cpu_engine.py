"""mxgpt's engine alone, in this process: no server, no text. Driven by `benchmarks.bench_cpu` over stdin and stdout."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

from services.executor.engine import Engine
from services.executor.engine_config import EngineConfig
from services.executor.request import Request, RequestFailed, Sampling, Stopping, TokenDrawn
from services.executor.runner import NumpyRunner
from services.executor.weights import Weights
from shared.gguf import read_gguf
from shared.gpt_config import GPTConfig
from shared.memory import kv_groups

BLOCK_SIZE = 32  # as executors have it
MAX_RUNNING = 64
MAX_BATCH_TOKENS = 256


def main() -> None:
    """Answer {"prompts": [[ids]], "max_tokens": n} with {"seconds": s, "tokens": n}, a line each."""
    engine = _build(Path(sys.argv[1]))
    numbers = itertools.count()
    print("{}", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        requests = [
            Request(
                request_id=str(next(numbers)),
                prompt_token_ids=tuple(prompt),
                sampling=Sampling(seed=0, temperature=0.0),
                stopping=Stopping(max_tokens=job["max_tokens"]),
            )
            for prompt in job["prompts"]
        ]
        start = time.perf_counter()
        num_tokens = _run(engine, requests)
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": num_tokens}), flush=True)


def _run(engine: Engine, requests: list[Request]) -> int:
    for request in requests:
        engine.submit(request)
    num_tokens = 0
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, RequestFailed):
                raise event.error
            num_tokens += isinstance(event, TokenDrawn)
    return num_tokens


def _build(path: Path) -> Engine:
    gguf = read_gguf(path)
    config = GPTConfig.from_gguf(gguf)
    config.check_tensors(gguf)
    num_blocks = 16 * (-(-config.context_length // BLOCK_SIZE) + 1)
    groups = {group.name: num_blocks for group in kv_groups(config, BLOCK_SIZE)}
    runner = NumpyRunner(config, Weights.from_gguf(gguf, config), BLOCK_SIZE, groups)
    bounds = EngineConfig(
        max_context=config.context_length,
        num_blocks=groups,
        block_size=BLOCK_SIZE,
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_running=MAX_RUNNING,
    )
    return Engine(runner, bounds)


if __name__ == "__main__":
    main()
