"""The memory that the ops of a GPU write to, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.executor.cuda.kv import padded_head_size
from shared.cuda_layout import TILE_COLUMNS
from shared.gpt_config import GPTConfig
from shared.layout import round_up

if TYPE_CHECKING:
    from services.executor.cuda.device import Device

MAX_PARTIALS = 1024  # of a decoding step's attention: rows, key heads and splits


class Workspace:
    """The memory that ops write to, for steps of at most so many rows and rows of logits."""

    def __init__(self, device: Device, config: GPTConfig, max_rows: int, max_logits: int) -> None:
        def halves(rows: int, width: int) -> int:
            return device.allocate(2 * rows * round_up(width, TILE_COLUMNS))

        def floats(rows: int, width: int) -> int:
            return device.allocate(4 * rows * width)

        head_size = padded_head_size(config)
        qkv_size = config.query_size + 2 * config.kv_size
        pairs = max_rows * max(1, config.num_experts_used)
        self.x = floats(max_rows, config.hidden_size)
        self.embedded = floats(max_rows, config.hidden_size) if config.rope is None else 0
        self.selected = floats(max_rows, config.hidden_size)
        self.normed = halves(max_rows, config.hidden_size)
        self.qkv = floats(max_rows, qkv_size)
        self.angles = floats(max_rows, config.head_size)
        self.queries = device.allocate(2 * max_rows * config.num_heads * head_size)
        self.heads = halves(max_rows, config.query_size)
        self.hidden = halves(pairs, config.ffn_size)
        self.logits = floats(max_logits, config.vocab_size)
        self.partials = floats(MAX_PARTIALS, 32 * (head_size + 2))
        self.counters = device.allocate(4 * max_rows * config.num_kv_heads)
        if config.num_experts:
            # On Hopper first what gate and up read, in half (products.py), then what down writes, in float.
            row_bytes = max(4 * config.hidden_size, 2 * round_up(config.hidden_size, TILE_COLUMNS))
            self.outputs = device.allocate(pairs * row_bytes)
            self.router_logits = floats(max_rows, config.num_experts)
            self.route_counter = device.allocate(4)
            self.expert_ids, self.row_ids, self.pair_places = (device.allocate(4 * pairs) for _ in range(3))
            self.expert_weights = floats(pairs, 1)
            self.groups = device.allocate(16 * (pairs // 8 + config.num_experts + 1))
