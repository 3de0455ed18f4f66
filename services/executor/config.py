"""The executor's configuration, validated once, and what follows from it for the engine."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.executor.engine_config import EngineConfig
from services.executor.step import FULL, GPU_DEPTH, WINDOW
from shared.config import ClientConfig, ServerConfig
from shared.cuda_layout import CUDA_LAYOUT
from shared.devices import device_index
from shared.errors import Reason, ServiceError
from shared.gpt_config import GPTConfig
from shared.layout import LAYOUTS
from shared.memory import kv_groups, num_kv_blocks
from shared.telemetry_config import TelemetryConfig


@dataclass(frozen=True)
class ExecutorConfig:
    """How one executor runs.

    Raises:
        ValueError: for a device of another name than cpu or cuda:N, or a number out of its range.
    """

    server: ServerConfig
    peers: ClientConfig
    loader: str  # target of the loader
    tokenizer: str  # target of the tokenizers
    model: str = ""  # name, alias or digest; empty: the only one that the loader has
    executor_id: str = ""  # empty: host name and process id
    device: str = "cpu"
    max_context: int | None = None  # None: the model's own
    kv_memory_bytes: int = 2**30
    block_size: int = 32
    max_batch_tokens: int = 256
    max_running: int = 64
    max_waiting: int = 512
    write_stall_seconds: float = 60.0
    step_seconds: float = 600.0  # that a step may take before the engine counts as hung
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    def __post_init__(self) -> None:
        device_index(self.device)
        for name in ("kv_memory_bytes", "block_size", "max_batch_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_context is not None and self.max_context < 1:
            raise ValueError(f"max_context must be at least 1, got {self.max_context}")
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting must be at least 0, got {self.max_waiting}")
        for name in ("write_stall_seconds", "step_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be more than 0, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        """The executor's id, made up where none is given."""
        return self.executor_id or f"{socket.gethostname()}-{os.getpid()}"

    @property
    def layouts(self) -> Sequence[str]:
        """The layouts of weights that the device's backend reads, best first."""
        return LAYOUTS if device_index(self.device) is None else (CUDA_LAYOUT,)

    def engine_config(self, model: GPTConfig) -> EngineConfig:
        """The engine's share: KV blocks of each group, as many as the memory holds and the batch can use.

        Raises:
            ServiceError: MEMORY_EXHAUSTED when the memory does not hold one sequence of a single block.
        """
        context = min(self.max_context or model.context_length, model.context_length)
        num_blocks = self._num_blocks(model, context)
        return EngineConfig(
            # What a request without max_tokens may grow to must fit.
            max_context=min(context, num_blocks.get(FULL, context) * self.block_size),
            block_size=self.block_size,
            num_blocks=num_blocks,
            max_batch_tokens=self.max_batch_tokens,
            max_running=self.max_running,
            max_waiting=self.max_waiting,
        )

    def context_warning(self, model: GPTConfig, engine: EngineConfig) -> str | None:
        """Why the context is shorter than was asked for, or than the model's own; None where it is not."""
        wanted = self.max_context or model.context_length
        if engine.max_context >= wanted:
            return None
        whose = "asked for" if self.max_context else "of the model"
        if engine.max_context < min(wanted, model.context_length):
            why = f"the KV memory of {self.kv_memory_bytes >> 20} MiB holds no more"
        else:
            why = "the model has no more"
        return f"the context has {engine.max_context} tokens, not the {wanted} {whose}: {why}"

    def kv_bytes(self, model: GPTConfig, engine: EngineConfig) -> int:
        """Bytes of all the engine's KV blocks."""
        groups = kv_groups(model, self.block_size, on_gpu=self.device != "cpu")
        return sum(engine.num_blocks[group.name] * group.block_bytes for group in groups)

    def _num_blocks(self, model: GPTConfig, context: int) -> dict[str, int]:
        on_gpu = self.device != "cpu"
        groups = kv_groups(model, self.block_size, on_gpu=on_gpu)
        # What the window has passed is freed when a step is over: the next one has its blocks by then.
        max_tokens = self.max_batch_tokens * (GPU_DEPTH if on_gpu else 1)
        useful = num_kv_blocks(model, context, self.max_running, self.block_size, max_tokens)
        remaining = self.kv_memory_bytes
        num_blocks: dict[str, int] = {}
        # Windowed layers first: what they need does not grow with the context.
        for group in sorted(groups, key=lambda group: group.name != WINDOW):
            share = remaining if group.name != WINDOW else remaining // 2
            num_blocks[group.name] = min(useful[group.name], share // group.block_bytes)
            remaining -= num_blocks[group.name] * group.block_bytes
        if min(num_blocks.values()) < 1:
            raise ServiceError(
                Reason.MEMORY_EXHAUSTED,
                f"{self.kv_memory_bytes} bytes of KV memory hold no block; "
                f"one block takes {sum(group.block_bytes for group in groups)} bytes",
            )
        return num_blocks
