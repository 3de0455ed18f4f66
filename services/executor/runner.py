"""Runs a model on the CPU over KV blocks of its own, one step at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from services.executor.immediate import ImmediateRunner
from services.executor.models import build_model
from services.executor.ops.numpy_kv import allocate_kv
from services.executor.ops.numpy_ops import NumpyOps
from services.executor.step import FULL, WINDOW, KVGroup, StepBatch
from services.executor.weights import Weights
from shared.errors import invalid_field
from shared.gpt_config import GPTConfig
from shared.layout import COLUMN_MULTIPLE
from shared.memory import kv_groups


class NumpyRunner(ImmediateRunner):
    """Implements `services.executor.step.Runner` with numpy.

    Args:
        config: the model's dimensions.
        weights: its tensors, in a CPU layout.
        block_size: positions in a KV block, a multiple of 16.
        num_blocks: KV blocks of each group, by its name.

    Raises:
        ServiceError: FIELD_INVALID for another block size.
        MemoryError: the host lacks the memory for the KV blocks.
    """

    def __init__(self, config: GPTConfig, weights: Weights, block_size: int, num_blocks: Mapping[str, int]) -> None:
        if block_size < 1 or block_size % COLUMN_MULTIPLE != 0:
            raise invalid_field("block_size", f"a multiple of {COLUMN_MULTIPLE} on the CPU, got {block_size}")
        self._vocab_size = config.vocab_size
        self._groups = [KVGroup(group.name, group.num_layers, group.window) for group in kv_groups(config, block_size)]
        self._ops = NumpyOps(config, self._groups, block_size)
        self._model = build_model(weights, self._ops)
        self._kv_layers = [
            allocate_kv(num_blocks[group], config.num_kv_heads, config.head_size, block_size, group)
            for group in (WINDOW if config.is_windowed(layer) else FULL for layer in range(config.num_layers))
        ]

    @property
    def kv_groups(self) -> Sequence[KVGroup]:
        return self._groups

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of all KV blocks."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._kv_layers)

    def forward(self, batch: StepBatch) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):  # exp of a large negative gate: the sigmoid is then zero, as it should be
            logits: NDArray[np.float32] = self._model.forward(self._ops.prepare(batch), self._kv_layers)
        return logits
