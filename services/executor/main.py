"""The command that starts an executor.

Its options need few imports. All that is to serve is imported once the engine's process runs and does its own.
"""

from __future__ import annotations

import math
from typing import Any

import click

from services.executor.blas import default_num_threads
from services.executor.engine_spawn import start_engine
from shared.config import client_config, client_options, server_config, server_options
from shared.devices import device_index
from shared.telemetry_config import telemetry_config, telemetry_options

DEFAULT_PORT = 50051
COUNT = click.IntRange(1)
SECONDS = click.FloatRange(0, math.inf, min_open=True, max_open=True)


@click.command()
@server_options(DEFAULT_PORT)
@client_options()
@click.option("--loader", default="127.0.0.1:50053", show_default=True, help="Address of the loader.")
@click.option("--tokenizer", default="127.0.0.1:50052", show_default=True, help="Address of the tokenizers.")
@click.option("--model", default="", help="Name, alias or digest of the model; the loader's only one by default.")
@click.option("--executor-id", default="", help="Id in Started and in leases; host and process by default.")
@click.option("--device", default="cpu", show_default=True, help="Device to run on: cpu, or cuda:N.")
@click.option("--threads", "num_threads", type=COUNT, default=default_num_threads, show_default="half the cores")
@click.option("--max-context", type=COUNT, help="Tokens of prompt and output; the model's own by default.")
@click.option("--kv-memory-mib", type=COUNT, show_default="1024; on a GPU 4096", help="Memory for KV blocks, at most.")
@click.option("--max-batch-tokens", type=COUNT, show_default="256; on a GPU 2048", help="Tokens of a step.")
@click.option("--max-running", type=COUNT, default=64, show_default=True, help="Sequences in a step.")
@click.option("--max-waiting", type=click.IntRange(0), default=512, show_default=True, help="Sequences that may wait.")
@click.option("--step-seconds", type=SECONDS, show_default="600; on a GPU 60", help="Longer steps count as hung.")
@click.option(
    "--write-stall-seconds", type=SECONDS, default=60.0, show_default=True, help="Patience with slow readers."
)
@telemetry_options
def main(**options: Any) -> None:
    """Serve Generate for one model, from weights that a loader shares."""
    server = server_config(options)
    telemetry = telemetry_config(options, server, "executor")
    peers = client_config(options)
    try:
        on_gpu = device_index(options["device"]) is not None
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    kv_memory_mib = options.pop("kv_memory_mib")
    if kv_memory_mib is None:
        kv_memory_mib = 4096 if on_gpu else 1024
    options["kv_memory_bytes"] = kv_memory_mib * 2**20
    if options["step_seconds"] is None:
        options["step_seconds"] = 60.0 if on_gpu else 600.0
    if options["max_batch_tokens"] is None:
        options["max_batch_tokens"] = 2048 if on_gpu else 256
    with start_engine(
        options["device"], options.pop("num_threads"), telemetry.log_level, telemetry.log_format
    ) as engine:
        from services.executor.config import ExecutorConfig
        from services.executor.executor import serve

        try:
            config = ExecutorConfig(server=server, peers=peers, telemetry=telemetry, **options)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        raise SystemExit(serve(config, engine))
