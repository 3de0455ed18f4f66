"""Steps that are over when they have been launched: what a runner on the CPU is, drawing included."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from services.executor.sampling import draw_tokens
from services.executor.step import Draws, StepBatch, StepResult


class ImmediateRunner(ABC):
    """The half of `services.executor.step.Runner` that runs steps, over a `forward` that gives all logits."""

    depth = 1
    _result: StepResult | None = None

    @abstractmethod
    def forward(self, batch: StepBatch) -> NDArray[np.float32]:
        """Write the KV of every row; logits (num_logits, vocab_size). The batch has at least one row."""

    def launch(self, batch: StepBatch, draws: Draws) -> None:
        logits = self.forward(batch)
        assert len(logits) == len(batch.logits_rows), "the runner gave other rows"
        num_logits = len(logits)
        token_ids: list[int | None] = []
        if len(draws.rows):
            rows = logits if len(draws.rows) == num_logits else logits[draws.rows]
            token_ids = draw_tokens(rows, draws.samplers)
        wanted = logits if len(draws.wanted) == num_logits else logits[draws.wanted]
        self._result = StepResult(token_ids, wanted)

    def collect(self) -> StepResult:
        assert self._result is not None, "no step was launched"
        result, self._result = self._result, None
        return result
