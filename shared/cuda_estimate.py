"""What a model takes of a GPU's memory: weights and KV to the byte, the rest as an upper bound.

The weights lie there once, whatever the number of executors; each executor has KV blocks, a workspace and a context of
its own, and the loader a context.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.cuda_layout import STRIP_ROWS, TILE_COLUMNS
from shared.gpt_config import GPTConfig
from shared.layout import Plan, round_up
from shared.memory import HEAD_MULTIPLE, MemoryEstimate, kv_groups, num_kv_blocks

CONTEXT_BYTES = 520 << 20  # of a process that uses a GPU; measured on an H100 and an H200
GRANULARITY = 2 << 20  # bytes, of allocations that are shared
BLOCK_SIZE = 32  # positions of a KV block, as an executor has it
MAX_BATCH_TOKENS = 2048  # of a step, likewise
MAX_RUNNING = 64  # sequences of a step, likewise
MAX_LOGITS = 256  # rows of logits at once
SPLIT_BYTES = 1024 * 32 * 4  # of attention's partial sums, for each value of a head


@dataclass(frozen=True)
class CudaEstimate:
    """Bytes on one GPU."""

    weight_bytes: int
    kv_bytes_per_token: int  # in layers that see all positions
    workspace_bytes: int  # of each executor
    context_bytes: int  # of each process

    def total(self, kv_bytes: int, num_executors: int = 1) -> int:
        """With a loader and executors of so much KV each."""
        own = kv_bytes + self.workspace_bytes + self.context_bytes
        return self.weight_bytes + self.context_bytes + num_executors * own


def estimate_cuda(config: GPTConfig, plan: Plan) -> CudaEstimate:
    """The memory of a model whose weights are planned in layout cuda.v1, with an executor's own defaults."""
    groups = kv_groups(config, BLOCK_SIZE, on_gpu=True)
    return CudaEstimate(
        weight_bytes=sum(round_up(size, GRANULARITY) for size in plan.allocation_sizes),
        kv_bytes_per_token=sum(group.block_bytes // BLOCK_SIZE for group in groups if not group.window),
        workspace_bytes=workspace_bytes(config, MAX_BATCH_TOKENS, MAX_RUNNING),
        context_bytes=CONTEXT_BYTES,
    )


def estimate_serving(config: GPTConfig, plan: Plan, context_length: int, num_sequences: int) -> MemoryEstimate:
    """The same in the terms of the CPU's estimate, for sequences of `context_length` tokens (0: the model's).

    Activations are an executor's workspace. Contexts, which processes have whatever the model, are left out.
    """
    estimate = estimate_cuda(config, plan)
    return MemoryEstimate(
        weight_bytes=estimate.weight_bytes,
        kv_bytes=kv_bytes(config, context_length or config.context_length, num_sequences),
        kv_bytes_per_token=estimate.kv_bytes_per_token,
        activation_bytes=estimate.workspace_bytes,
    )


def kv_bytes(config: GPTConfig, context_length: int, num_sequences: int) -> int:
    """Of the blocks that hold sequences at full context, whatever their steps."""
    num_blocks = num_kv_blocks(config, context_length, num_sequences, BLOCK_SIZE, MAX_BATCH_TOKENS)
    groups = kv_groups(config, BLOCK_SIZE, on_gpu=True)
    return sum(group.block_bytes * num_blocks[group.name] for group in groups)


def workspace_bytes(config: GPTConfig, max_rows: int, max_running: int) -> int:
    """Upper bound of an executor's memory beside weights and KV, for steps of so many rows and sequences."""
    padded_head = round_up(config.head_size, HEAD_MULTIPLE)
    halves = 2 * (
        round_up(config.hidden_size, TILE_COLUMNS)
        + round_up(config.query_size, TILE_COLUMNS)
        + config.num_heads * padded_head
    )
    floats = 4 * (3 * config.hidden_size + config.query_size + 2 * config.kv_size + config.head_size)
    output = max(4 * config.hidden_size, 2 * round_up(config.hidden_size, TILE_COLUMNS))
    pair = 2 * round_up(config.ffn_size, TILE_COLUMNS) + output + 32
    row = halves + floats + 4 * (config.num_experts + config.num_kv_heads) + pair * max(1, config.num_experts_used)
    logits = (4 * MAX_LOGITS + 12 * max_running + 4 * max_running) * config.vocab_size
    # The largest exponents of experts' rows, a byte each.
    expert = round_up(2 * config.ffn_size, STRIP_ROWS) + round_up(config.hidden_size, STRIP_ROWS)
    experts = config.num_layers * config.num_experts * expert
    return max_rows * row + logits + experts + SPLIT_BYTES * (padded_head + 2) + (16 << 20)
