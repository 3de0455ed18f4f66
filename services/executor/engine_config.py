"""How much an engine takes on: validated once, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.errors import invalid_field


@dataclass(frozen=True)
class EngineConfig:
    """Bounds of one engine.

    Raises:
        ServiceError: FIELD_INVALID, naming the field, where the bounds contradict each other.
    """

    max_context: int  # most tokens of prompt and output together
    num_blocks: Mapping[str, int]  # KV blocks of each group
    block_size: int = 32  # tokens a block holds
    max_batch_tokens: int = 512  # tokens of one step
    max_running: int = 64  # sequences of one step
    max_waiting: int = 256  # sequences accepted beyond max_running
    max_scored_rows: int = 64  # prompt positions scored for one sequence in one step: bounds logits and messages
    retry_after: float = 1.0  # seconds, told with QUEUE_FULL

    def __post_init__(self) -> None:
        for name in ("max_context", "block_size", "max_batch_tokens", "max_running", "max_scored_rows"):
            if getattr(self, name) < 1:
                raise invalid_field(name, f"at least 1, got {getattr(self, name)}")
        if self.max_waiting < 0:
            raise invalid_field("max_waiting", f"at least 0, got {self.max_waiting}")
        if self.max_batch_tokens < self.max_running:
            # Else a step full of decodes could leave a prompt no token to go on with.
            raise invalid_field("max_batch_tokens", f"at least max_running = {self.max_running}")
        for group, num_blocks in self.num_blocks.items():
            if num_blocks < 1:
                raise invalid_field("num_blocks", f"at least 1 for group {group}, got {num_blocks}")
