"""`mxgpt inspect`: what is in a GGUF file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from mxgpt.cli.failures import FAILED, OK
from mxgpt.cli.terminal import json_text, print_table, printable, progress
from mxgpt.inspect_file import CudaMemory, Inspection, inspect_file


@click.command(
    epilog="""\b
Examples:
  mxgpt inspect models/demo-gpt-oss.gguf
  mxgpt inspect gpt-oss-120b-00001-of-00003.gguf --context 32768 --sequences 8
  mxgpt inspect download.gguf --weights && mxgpt serve --model download.gguf
  mxgpt inspect model.gguf --json | jq .memory.estimate.weight_bytes

\b
Exit code 1 says that mxgpt can't serve the file.
"""
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--context", type=click.IntRange(1), help="Tokens of a sequence, for the memory. Default: the model's.")
@click.option("--sequences", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once, likewise.")
@click.option("--weights", is_flag=True, help="Also read every weight, in search of values that are no numbers.")
@click.option("--digest", is_flag=True, help="Also hash it: the digest that servers name, and each file's SHA-256.")
@click.option("--metadata", is_flag=True, help="List all metadata.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def inspect(
    context_: click.Context,
    /,
    file: Path,
    context: int | None,
    sequences: int,
    weights: bool,
    digest: bool,
    metadata: bool,
    as_json: bool,
) -> None:
    """Show what a GGUF file holds, whether it is sound, and the memory that serving it takes, on the CPU or on a GPU.

    FILE may be the first of several shards. Its header is checked as a loader checks it; nothing is loaded.
    """
    with progress() as bar:
        task = bar.add_task("weights", total=None, visible=weights)
        found = inspect_file(
            file, context, sequences, weights, digest, lambda done, total: bar.update(task, completed=done, total=total)
        )
    if as_json:
        print(json_text(_fields(found), indent=2))
    else:
        _print(found, metadata)
    context_.exit(FAILED if found.problems else OK)


def _print(found: Inspection, with_metadata: bool) -> None:
    print(f"{found.paths[0]}: GGUF version {found.version}, {len(found.paths)} file(s), {_size(sum(found.file_sizes))}")
    if found.config is not None:
        _print_pairs("Model", _describe_config(found))
    if found.tokenizer is not None:
        _print_pairs("Tokenizer", _describe_tokenizer(found))
    if found.digest:
        _print_pairs("Provenance", {"digest": found.digest} | _sha256_by_file(found))
    if with_metadata:
        _print_pairs("Metadata", found.metadata)
    print()
    rows = [(c.name, c.num_tensors, c.num_values, _size(c.num_bytes), f"{c.bits_per_value:.2f}") for c in found.types]
    print_table(("TYPE", "TENSORS", "VALUES", "SIZE", "BITS A VALUE"), rows, align="lrrrr")
    if found.memory is not None:
        _print_pairs("Memory on the CPU", _describe_memory(found))
    if found.cuda_memory is not None:
        _print_pairs("Memory on a GPU", _describe_cuda_memory(found.cuda_memory))
        _print_cuda_totals(found.cuda_memory)
    print()
    for problem in found.problems:
        print(printable(f"unsound: {problem}"))
    if not found.problems:
        unread = "" if found.weights_were_read else "; weights were not read, --weights checks them too"
        print(f"sound: mxgpt can serve it{unread}")


def _sha256_by_file(found: Inspection) -> dict[str, str]:
    return {path.name: f"SHA-256 {sha256}" for path, sha256 in zip(found.paths, found.sha256, strict=True)}


def _describe_config(found: Inspection) -> dict[str, str]:
    config = found.config
    assert config is not None
    described = {
        "architecture": config.architecture,
        "parameters": f"{found.num_parameters:,}",
        "layers": f"{config.num_layers}, {config.hidden_size} wide, feed-forward {config.ffn_size}",
        "heads": f"{config.num_heads} of {config.head_size}, {config.num_kv_heads} for keys and values",
        "context": f"{config.context_length} tokens",
        "vocabulary": f"{config.vocab_size} tokens{', head tied to the embedding' if config.tied_head else ''}",
    }
    if config.num_experts:
        described["experts"] = f"{config.num_experts}, of which a token uses {config.num_experts_used}"
    if config.sliding_window:
        described["window"] = f"{config.sliding_window} positions in {config.num_windowed_layers} layers"
    if config.rope is not None:
        rope = config.rope
        stretch = f", stretched {rope.factor:g} times from {rope.original_context_length}" if rope.factor != 1 else ""
        described["rotary"] = f"theta {rope.theta:g}{stretch}"
    return described


def _describe_tokenizer(found: Inspection) -> dict[str, str]:
    tokenizer = found.tokenizer
    assert tokenizer is not None
    return {
        "kind": f"{tokenizer.kind}, pre-tokenizer {tokenizer.pre or 'not named'}",
        "tokens": f"{len(tokenizer.tokens)}, {len(tokenizer.merges)} merges",
        "end of text": ", ".join(f"{tokenizer.tokens[i]} ({i})" for i in tokenizer.eog_token_ids) or "none",
        "chat template": f"{len(tokenizer.chat_template)} characters" if tokenizer.chat_template else "none",
    }


def _describe_memory(found: Inspection) -> dict[str, str]:
    memory = found.memory
    assert memory is not None
    estimate = memory.estimate
    return {
        "weights": f"{_size(estimate.weight_bytes)} as {memory.layout}, shared by all executors of a machine",
        "KV": f"{_size(estimate.kv_bytes)} for {memory.num_sequences} sequence(s) of {memory.context} tokens",
        "KV per token": f"{_size(estimate.kv_bytes_per_token)} in layers that see all positions",
        "activations": f"{_size(estimate.activation_bytes)} at most, in each executor",
    }


def _describe_cuda_memory(memory: CudaMemory) -> dict[str, str]:
    estimate = memory.estimate
    return {
        "weights": f"{_size(estimate.weight_bytes)}, shared by all executors of the GPU",
        "KV per token": f"{_size(estimate.kv_bytes_per_token)} in layers that see all positions",
        "workspace": f"{_size(estimate.workspace_bytes)} at most, in each executor",
        "context": f"{_size(estimate.context_bytes)} about, in the loader and in each executor",
    }


def _print_cuda_totals(memory: CudaMemory) -> None:
    """GiB in all, with one executor."""
    numbers = sorted({number for _, number, _ in memory.totals})
    rows = [
        [context, *(f"{total / 2**30:.1f}" for length, _, total in memory.totals if length == context)]
        for context in sorted({context for context, _, _ in memory.totals})
    ]
    print()
    header = ("CONTEXT", *(f"{number} SEQUENCE{'S' if number > 1 else ''}" for number in numbers))
    print_table(header, rows, align="r" * len(header))
    print("  GiB in all, with one executor whose --kv-memory-mib is as large as that")


def _fields(found: Inspection) -> dict[str, Any]:
    tokenizer = found.tokenizer
    return {
        "files": [{"path": str(p), "bytes": n} for p, n in zip(found.paths, found.file_sizes, strict=True)],
        "version": found.version,
        "parameters": found.num_parameters,
        "config": dataclasses.asdict(found.config) if found.config else None,
        "tokenizer": None
        if tokenizer is None
        else {
            "kind": tokenizer.kind,
            "pre": tokenizer.pre,
            "tokens": len(tokenizer.tokens),
            "merges": len(tokenizer.merges),
            "eog_token_ids": tokenizer.eog_token_ids,
            "has_chat_template": bool(tokenizer.chat_template),
        },
        "types": {
            c.name: {"tensors": c.num_tensors, "values": c.num_values, "bytes": c.num_bytes} for c in found.types
        },
        "memory": dataclasses.asdict(found.memory) if found.memory else None,
        "cuda_memory": dataclasses.asdict(found.cuda_memory) if found.cuda_memory else None,
        "weights_were_read": found.weights_were_read,
        "digest": found.digest or None,
        "sha256": found.sha256 or None,
        "problems": found.problems,
        "metadata": found.metadata,
    }


def _print_pairs(title: str, pairs: dict[str, str]) -> None:
    print(f"\n{title}")
    width = max(map(len, pairs))
    for name, text in pairs.items():
        print(printable(f"  {name:<{width}}  {text}"))


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit} ({num_bytes:,} bytes)"
    return f"{num_bytes} bytes"
