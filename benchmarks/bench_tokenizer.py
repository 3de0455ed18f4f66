"""DetokenizeStream of a tokenizer process on this machine: tokens a second, and what a token costs.

    python -m benchmarks.bench_tokenizer [--model models/demo-gpt-oss.gguf] [--messages 3000]

One message carries one id of each sequence, as an engine step does. "lock-step" sends a message when the one before
is answered, which bounds an engine that waits for text; "pipelined" sends them as fast as they are taken. The client
shares the machine. "handle" is the work on the messages alone, in this process, without the transport.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from mxgpt.v1 import tokenizer_pb2 as pb
from mxgpt.v1 import tokenizer_pb2_grpc
from services.tokenizer.backends import Tokenizer
from services.tokenizer.detokenizer import Detokenizer
from services.tokenizer.store import FileStore

TEXT = "The quick brown fox — läuft über 東京 👩‍🚀 and back, 12,345 times.\n" * 40
PROMPT = "<|start|>assistant<|channel|>final<|message|>"
STOP_STRINGS = ("STOP", "\n\nUser:")
NUM_SEQUENCES = (1, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=Path("models/demo-gpt-oss.gguf"))
    parser.add_argument("--messages", type=int, default=3000)
    arguments = parser.parse_args()
    tokenizer = asyncio.run(FileStore.read(arguments.model).find(""))
    command = [sys.executable, "-m", "services.tokenizer", "--listen", "127.0.0.1:0", "--model", str(arguments.model)]
    table = Table(title=f"Detokenizing in Harmony's format with {len(STOP_STRINGS)} stop strings")
    for column in (
        "sequences",
        "pipelined tok/s",
        "lock-step tok/s",
        "us a step",
        "server CPU us/token",
        "handle us/token",
    ):
        table.add_column(column, justify="right")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        for num_sequences in NUM_SEQUENCES:
            requests = step_messages(tokenizer, num_sequences, arguments.messages)
            table.add_row(
                str(num_sequences),
                *asyncio.run(measure(address, server.pid, requests, num_sequences)),
                f"{handle_microseconds(tokenizer, requests, num_sequences):.1f}",
            )
        server.terminate()
    Console().print(table)


def step_messages(tokenizer: Tokenizer, num_sequences: int, num_messages: int) -> list[Any]:
    """What an engine with so many sequences sends: an opening, then one id of each in every message."""
    ids = tokenizer.encode(TEXT, parse_special=False, add_special=False)
    prompt = tokenizer.encode(PROMPT, parse_special=True, add_special=False)
    harmony = bool(tokenizer.vocabulary.harmony_markers)
    opens = [
        pb.SequenceOpen(sequence_id=index, prompt_token_ids=prompt, stop_strings=STOP_STRINGS, harmony=harmony)
        for index in range(num_sequences)
    ]
    steps = [
        [
            pb.SequenceTokens(sequence_id=index, token_ids=[ids[(step + 7 * index) % len(ids)]])
            for index in range(num_sequences)
        ]
        for step in range(num_messages)
    ]
    return [pb.DetokenizeStreamRequest(opens=opens), *(pb.DetokenizeStreamRequest(tokens=tokens) for tokens in steps)]


async def measure(address: str, process_id: int, requests: Sequence[Any], num_sequences: int) -> list[str]:
    num_tokens = num_sequences * (len(requests) - 1)
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        await stub.GetInfo(pb.GetInfoRequest(), wait_for_ready=True)
        cpu_before, start = cpu_seconds(process_id), time.perf_counter()
        num_answers = sum([1 async for _ in stub.DetokenizeStream(iter(requests))])
        pipelined, cpu = time.perf_counter() - start, cpu_seconds(process_id) - cpu_before
        assert num_answers == len(requests)
        call = stub.DetokenizeStream()
        start = time.perf_counter()
        for request in requests:
            await call.write(request)
            await call.read()
        lock_step = time.perf_counter() - start
        await call.done_writing()
    return [
        f"{num_tokens / pipelined:,.0f}",
        f"{num_tokens / lock_step:,.0f}",
        f"{lock_step / len(requests) * 1e6:,.0f}",
        f"{cpu / num_tokens * 1e6:.1f}",
    ]


def handle_microseconds(tokenizer: Tokenizer, requests: Sequence[Any], num_sequences: int) -> float:
    detokenizer = Detokenizer(tokenizer.vocabulary)
    start = time.process_time()
    for request in requests:
        detokenizer.handle(request).SerializeToString()
    return (time.process_time() - start) / (num_sequences * len(requests)) * 1e6


def cpu_seconds(process_id: int) -> float:
    fields = Path(f"/proc/{process_id}/stat").read_text().split()
    return (int(fields[13]) + int(fields[14])) / 100  # clock ticks of Linux


if __name__ == "__main__":
    main()
