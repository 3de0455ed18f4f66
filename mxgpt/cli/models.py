"""`mxgpt models`: what a server serves, and how busy it is."""

from __future__ import annotations

import json
from typing import Any

import click
from google.protobuf.json_format import MessageToDict

from mxgpt.cli.options import connect, server_options
from mxgpt.cli.terminal import print_table
from mxgpt.v1 import executor_pb2 as pb


@click.command(
    epilog="""\b
Examples:
  mxgpt models
  mxgpt models --server gpu1:50051,gpu2:50051 --json | jq .models
"""
)
@server_options
@click.option("--json", "as_json", is_flag=True, help="Models and the executor's whole status, as JSON.")
def models(as_json: bool, **options: Any) -> None:
    """List the models of a server, and what the executor that answered is doing."""
    with connect(options) as client:
        served, status = client.list_models(), client.status()
    if as_json:
        fields = {"models": [_fields(model) for model in served], "status": _fields(status)}
        print(json.dumps(fields, indent=2))
        return
    header = ("MODEL", "ALIASES", "ARCHITECTURE", "CONTEXT", "VOCABULARY", "DIGEST")
    rows = [
        (m.name, ",".join(m.aliases) or "-", m.architecture, m.context_length, m.vocab_size, m.digest[:12])
        for m in served
    ]
    print_table(header, rows, align="lllrr")
    print()
    print(_describe(status))


def _describe(status: pb.ExecutorServiceGetStatusResponse) -> str:
    blocks = ", ".join(f"{b.num_free} of {b.num_blocks} {b.group} KV blocks free" for b in status.blocks)
    draining = "; draining" if status.draining else ""
    return (
        f"executor {status.executor_id} on {status.device}: {status.num_running} running, "
        f"{status.num_waiting} waiting, {blocks or 'no KV blocks'}; "
        f"{status.num_output_tokens} tokens written since its start{draining}"
    )


def _fields(message: Any) -> dict[str, Any]:
    fields: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return fields
