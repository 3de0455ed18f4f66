"""llama.cpp (through xllamacpp) in this process. Driven by `benchmarks.bench_cpu` over stdin and stdout.

It runs as it does best here: continuous batching, a slot for each stream, no HTTP between; its logs are discarded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp


def main() -> None:
    """Answer {"prompts": [[ids]], "max_tokens": n} with {"seconds": s, "tokens": n}, a line each."""
    path, num_threads = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    servers: dict[int, Any] = {}
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        num_streams = len(job["prompts"])
        if num_streams not in servers:
            servers.clear()  # one at a time
            servers[num_streams] = _serve(path, num_threads, num_streams, job["context"])
        start = time.perf_counter()
        num_tokens = _run(servers[num_streams], job["prompts"], job["max_tokens"])
        answer = {"seconds": time.perf_counter() - start, "tokens": num_tokens, "version": xllamacpp.__version__}
        print(json.dumps(answer), file=answers, flush=True)
    servers.clear()


def _run(server: Any, prompts: list[list[int]], max_tokens: int) -> int:
    def complete(prompt: list[int]) -> int:
        answer = server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        num_tokens: int = answer["usage"]["completion_tokens"]
        return num_tokens

    with ThreadPoolExecutor(len(prompts)) as pool:
        return sum(pool.map(complete, prompts))


def _serve(path: str, num_threads: int, num_streams: int, context: int) -> Any:
    """A server with a slot of `context` tokens for each stream."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = num_streams * context
    parameters.n_parallel = num_streams
    parameters.cpuparams.n_threads = num_threads
    parameters.cpuparams_batch.n_threads = num_threads
    return xllamacpp.Server(parameters)


if __name__ == "__main__":
    main()
