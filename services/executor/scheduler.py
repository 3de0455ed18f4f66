"""Decides which sequences run in the next step, and with how many of their tokens.

Sequences are ranked by priority, then arrival, then output index. `running` and `waiting` are kept in that order.
One pass over `running`, best first, gives every decode its token and shares what is left of the budget among
prompts; who lacks blocks takes them from the worst ranked. So the best ranked sequence always goes on, and
every sequence becomes the best ranked one in the end.
"""

from __future__ import annotations

import itertools
from bisect import insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.executor.blocks import BlockManager
from services.executor.engine_config import EngineConfig
from services.executor.sequence import Rank, Sequence
from services.executor.step import SequenceSlice, StepBatch


@dataclass(frozen=True)
class Share:
    """One sequence's part of a step, and of its logits."""

    sequence: Sequence
    num_tokens: int
    logits_start: int  # its first row of logits
    num_scored_rows: int  # rows that score prompt tokens; they come first
    draws: bool  # one more row, to draw the next token from


@dataclass(frozen=True)
class Plan:
    """One step: who takes part, and the batch for the runner."""

    shares: list[Share]
    batch: StepBatch


class Scheduler:
    """The waiting line and the running batch."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self._config = config
        self._blocks = blocks
        self._positions: NDArray[np.int32] = np.arange(config.max_context, dtype=np.int32)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into the waiting line."""
        insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence, is_sound: bool = True) -> None:
        """Take a sequence out, wherever it is, and its blocks back; see BlockManager.free for `is_sound`."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._blocks.free(sequence, is_sound)

    def schedule(self) -> Plan | None:
        """Choose the next step and give it the blocks that it writes; None when there is nothing to run."""
        chosen: list[tuple[Sequence, int]] = []
        budget = self._choose_running(chosen)
        self._admit(chosen, budget)
        return self._plan(chosen) if chosen else None

    def check_integrity(self) -> None:
        """Assert what holds between steps of the line and the batch."""
        assert len(self.running) <= self._config.max_running
        for line in (self.running, self.waiting):
            assert all(first.rank < second.rank for first, second in itertools.pairwise(line)), "a line is out of order"
        for sequence in self.running:
            assert sequence.num_computed < sequence.num_tokens, "nothing is left to run"
        for sequence in self.waiting:
            assert sequence.num_computed == sequence.num_allocated == 0, "a waiting sequence holds blocks"

    def _choose_running(self, chosen: list[tuple[Sequence, int]]) -> int:
        """Choose among running sequences; returns the tokens left for others."""
        num_decodes = sum(sequence.num_pending == 1 for sequence in self.running)
        budget = self._config.max_batch_tokens - num_decodes
        place = 0
        while place < len(self.running):  # it may shrink from its end
            sequence = self.running[place]
            num_pending = sequence.num_pending
            num_tokens = 1 if num_pending == 1 else self._chunk(sequence, budget)
            if num_tokens and self._allocate(sequence, num_tokens):
                chosen.append((sequence, num_tokens))
                budget -= num_tokens if num_pending > 1 else 0
            place += 1
        return budget

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """How many of its waiting positions a sequence runs now."""
        num_tokens = min(sequence.num_pending, budget)
        if sequence.scores_prompt:
            num_tokens = min(num_tokens, self._config.max_scored_rows)
        return num_tokens

    def _allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence its blocks, preempting from the worst ranked on; False if that is itself."""
        while not self._blocks.allocate(sequence, sequence.num_computed + num_tokens):
            worst = self.running[-1]
            self._preempt(worst)
            if worst is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the waiting line: its tokens stay, their KV will be found in the cache or computed again."""
        self.running.remove(sequence)
        self._blocks.free(sequence)
        self.add(sequence)
        self.num_preemptions += 1

    def _admit(self, chosen: list[tuple[Sequence, int]], budget: int) -> None:
        """Admit from the waiting line, best first, until one does not fit: a long prompt is never overtaken."""
        place = 0
        while place < len(self.waiting) and budget > 0 and len(self.running) < self._config.max_running:
            sequence = self.waiting[place]
            active = sequence.active
            if sequence is not active.leader and not active.is_prompt_computed:
                place += 1  # it will find the prompt in the cache
                continue
            if not self._attach(sequence):
                return
            del self.waiting[place]
            insort(self.running, sequence, key=_rank)
            num_tokens = self._chunk(sequence, budget)
            is_allocated = self._blocks.allocate(sequence, sequence.num_computed + num_tokens)
            assert is_allocated, "the blocks were counted before it was admitted"
            chosen.append((sequence, num_tokens))
            budget -= num_tokens

    def _attach(self, sequence: Sequence) -> bool:
        # The last token is always run: its logits are wanted. So are those of every position to be scored.
        max_positions = sequence.num_tokens - 1
        if sequence.scores_prompt:
            max_positions = sequence.active.num_scored_rows
        # A block to spare for each running sequence, lest the newcomer be preempted at once.
        num_spare = len(self.running)
        if not self._blocks.attach_prefix(sequence, max_positions, self._config.max_batch_tokens, num_spare):
            return False
        active = sequence.active
        num_cached_tokens = min(sequence.num_computed, sequence.num_prompt_tokens)
        self.num_cached_tokens += num_cached_tokens
        if not active.is_started:
            active.num_cached_tokens = num_cached_tokens
        return True

    def _plan(self, chosen: list[tuple[Sequence, int]]) -> Plan:
        """Lay the tokens of the chosen out, sequence after sequence."""
        num_tokens = sum(count for _, count in chosen)
        token_ids = np.empty(num_tokens, np.int32)
        positions = np.empty(num_tokens, np.int32)
        shares: list[Share] = []
        slices: list[SequenceSlice] = []
        logits_rows: list[int] = []
        start = 0
        for sequence, count in chosen:
            begin, end = sequence.num_computed, sequence.num_computed + count
            token_ids[start : start + count] = sequence.token_ids[begin:end]
            positions[start : start + count] = self._positions[begin:end]
            slices.append(SequenceSlice(start, count, end, self._block_tables(sequence)))
            scored = sequence.rows_to_score(begin, end)
            draws = end == sequence.num_tokens
            shares.append(Share(sequence, count, len(logits_rows), len(scored), draws))
            logits_rows.extend(start + position - begin for position in scored)
            start += count
            if draws:
                logits_rows.append(start - 1)
        batch = StepBatch(token_ids, positions, slices, np.array(logits_rows, np.int32))
        return Plan(shares, batch)

    def _block_tables(self, sequence: Sequence) -> dict[str, NDArray[np.int32]]:
        names = self._blocks.group_names
        return {name: table.ids[: table.end].copy() for name, table in zip(names, sequence.tables, strict=True)}


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank
