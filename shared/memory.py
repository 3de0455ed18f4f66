"""What a model takes in memory: weights and KV to the byte, activations as an upper bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.gpt_config import GPTConfig
from shared.layout import COLUMN_MULTIPLE, Plan, round_up
from shared.quants import STEP_VALUES

HEAD_MULTIPLE = 32  # dimensions of a head that attention reads at once on a GPU
FULL = "full"
WINDOW = "window"

# How the numpy backend cuts its work: attention into tiles, products into pieces.
TILE_TOKENS = 32  # of one sequence, attended to at once
TILE_SCORES = 1 << 20  # of all tiles that are attended to at once, however long the context
PIECE_OUTPUTS = 1024
TABLE_TYPES = ("IQ4_NL", "MXFP4")  # decoded through indices, which take more room than values
RUN_BYTES = 200  # of the objects that describe a run of blocks, and in the worst case each block is one
FIXED_BYTES = 1 << 17  # small arrays, and Python's own objects


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that serving a model takes."""

    weight_bytes: int  # exact
    kv_bytes: int  # exact: the blocks that hold every sequence at full context
    kv_bytes_per_token: int  # in layers that see all positions
    activation_bytes: int  # at least a step's peak; at most a quarter more from 16 tokens a step on


@dataclass(frozen=True)
class KVGroupSize:
    """A group of layers that share block tables, and what one of its blocks takes in all of them."""

    name: str  # "full" or "window"
    num_layers: int
    window: int  # positions a query sees, itself included; 0: all
    block_bytes: int


def kv_groups(config: GPTConfig, block_size: int, *, on_gpu: bool = False) -> list[KVGroupSize]:
    """The KV groups of a model, the full one first; a group without layers is left out.

    On the CPU a position takes head_size floats of each key head, and of each value head as many rounded up to 16.
    On a GPU it takes as many halves, both rounded up to 32.
    """
    value_size = round_up(config.head_size, COLUMN_MULTIPLE)
    layer_bytes = 4 * config.num_kv_heads * block_size * (config.head_size + value_size)
    if on_gpu:
        layer_bytes = 2 * config.num_kv_heads * block_size * 2 * round_up(config.head_size, HEAD_MULTIPLE)
    windowed = config.num_windowed_layers
    groups = [
        KVGroupSize(FULL, config.num_layers - windowed, 0, layer_bytes * (config.num_layers - windowed)),
        KVGroupSize(WINDOW, windowed, config.sliding_window, layer_bytes * windowed),
    ]
    return [group for group in groups if group.num_layers]


def num_kv_blocks(
    config: GPTConfig, context_length: int, num_sequences: int, block_size: int, max_batch_tokens: int
) -> Mapping[str, int]:
    """Blocks of each group that hold `num_sequences` of `context_length` tokens, whatever their steps."""
    per_sequence = {}
    for group in kv_groups(config, block_size):
        blocks = -(-context_length // block_size)
        if group.window:
            # The window before a step's tokens and these themselves, wherever blocks begin.
            span = group.window - 1 + max_batch_tokens
            blocks = min(blocks, (span + block_size - 2) // block_size + 1)
        per_sequence[group.name] = num_sequences * blocks
    return per_sequence


def estimate_memory(
    config: GPTConfig,
    plan: Plan,
    context_length: int = 0,
    num_sequences: int = 1,
    block_size: int = 32,
    max_batch_tokens: int = 256,
) -> MemoryEstimate:
    """What weights, KV and activations take on the CPU.

    Args:
        plan: where the weights will lie.
        context_length: tokens of each sequence; 0: the model's context.
        num_sequences: sequences at once.
        block_size: positions in a KV block.
        max_batch_tokens: tokens of a step.
    """
    context_length = context_length or config.context_length
    num_blocks = num_kv_blocks(config, context_length, num_sequences, block_size, max_batch_tokens)
    groups = kv_groups(config, block_size)
    num_tokens = max(num_sequences, min(max_batch_tokens, context_length * num_sequences))
    return MemoryEstimate(
        weight_bytes=plan.num_bytes,
        kv_bytes=sum(group.block_bytes * num_blocks[group.name] for group in groups),
        kv_bytes_per_token=sum(group.block_bytes // block_size for group in groups if not group.window),
        activation_bytes=_activation_bytes(config, plan, context_length, num_sequences, block_size, num_tokens),
    )


def _activation_bytes(
    config: GPTConfig, plan: Plan, context_length: int, num_sequences: int, block_size: int, num_tokens: int
) -> int:
    """The largest sum of arrays that are alive at once in a step of the numpy backend.

    The step runs `num_tokens` tokens at the end of full contexts and gives one row of logits for each sequence.
    """
    rotation = 2 * num_tokens * config.head_size if config.rope is not None else 0
    lasting = num_tokens * config.hidden_size + rotation + _mask_floats(config, context_length, block_size, num_tokens)
    feed_forward = _expert_floats(config, num_tokens) if config.num_experts else _dense_floats(config, num_tokens)
    attention = _attention_floats(config, context_length, num_sequences, block_size, num_tokens)
    products = max(feed_forward, num_tokens * (config.query_size + 2 * config.kv_size))
    layer = num_tokens * config.hidden_size + max(attention, products + _decoded_floats(plan, is_head=False))
    head = num_sequences * (2 * config.hidden_size + round_up(config.vocab_size, COLUMN_MULTIPLE))
    head += _decoded_floats(plan, is_head=True)
    run_bytes = RUN_BYTES * num_sequences * -(-context_length // block_size)
    return 4 * (lasting + max(layer, head)) + run_bytes + FIXED_BYTES


def _mask_floats(config: GPTConfig, context_length: int, block_size: int, num_tokens: int) -> int:
    """A row's mask covers the blocks of its own tile, in windowed layers also those of the window before."""
    floats = 0
    for group in kv_groups(config, block_size):
        blocks = min((group.window + TILE_TOKENS) // block_size + 1, -(-context_length // block_size))
        floats += num_tokens * block_size * blocks
    return floats


def _attention_floats(
    config: GPTConfig, context_length: int, num_sequences: int, block_size: int, num_tokens: int
) -> int:
    """Queries, keys and values as multiplied, queries scaled, heads; and of some tiles scores and weighted values."""
    rows = config.query_size + 2 * config.kv_size + 2 * config.query_size
    num_blocks = -(-context_length // block_size)
    max_tokens = max(1, TILE_SCORES // (config.num_heads * block_size) // num_blocks)
    value_size = round_up(config.head_size, COLUMN_MULTIPLE)
    scores, values = num_blocks * block_size, num_blocks * value_size
    of_one = min(TILE_TOKENS, num_tokens, max_tokens) * (scores + values + 2 * config.head_size)
    # Rows of many sequences go into the order of their blocks and back; a lone row of a head is computed twice.
    copies = 2 if config.num_heads == config.num_kv_heads else 1
    of_many = min(num_sequences, max_tokens) * copies * 2 * (scores + values) if num_sequences > 1 else 0
    return num_tokens * rows + config.num_heads * max(of_one, of_many)


def _decoded_floats(plan: Plan, *, is_head: bool) -> int:
    """Of the largest piece of a matrix that is decoded when it is used: decoded, transposed, and on the way."""
    floats = [0]
    for tensor in plan.tensors.values():
        if tensor.planes[0].role == "blocks" and tensor.name.startswith("blk.") != is_head:
            piece = tensor.shape[-1] * min(round_up(tensor.shape[-2], COLUMN_MULTIPLE), PIECE_OUTPUTS)
            on_the_way = min(piece, STEP_VALUES) * (4 if tensor.type in TABLE_TYPES else 1)
            floats.append(2 * piece + on_the_way)
    return max(floats)


def _dense_floats(config: GPTConfig, num_tokens: int) -> int:
    return 2 * num_tokens * round_up(config.ffn_size, COLUMN_MULTIPLE)


def _expert_floats(config: GPTConfig, num_tokens: int) -> int:
    """Of each pair of row and expert: input, gate and up; or these and their product; or that and the output."""
    hidden, ffn = config.hidden_size, config.ffn_size
    gate_up = round_up(2 * ffn, COLUMN_MULTIPLE)
    output = round_up(hidden, COLUMN_MULTIPLE)
    pairs = num_tokens * config.num_experts_used
    routing = 4 * num_tokens * config.num_experts + 8 * pairs  # logits, and indices of 64 bits
    return pairs * max(hidden + gate_up, gate_up + ffn, ffn + output, 2 * output) + routing
