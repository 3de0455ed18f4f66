"""Decides which sequences run in the next step, and with how many of their tokens.

Sequences are ranked by priority, then arrival, then output index. `running` and `waiting` are kept in that order.
One pass over `running`, best first, gives every decode its token and shares what is left of the budget among
prompts; who lacks blocks takes them from the worst ranked. So the best ranked sequence always goes on, and
every sequence becomes the best ranked one in the end.

A step is planned while the one before it may still run. A token that is being drawn there is run by its seat
(step.py); a sequence that turns out to have ended leaves a row in the step launched since, which nobody reads.
"""

from __future__ import annotations

import itertools
from bisect import insort

from services.executor.blocks import BlockManager
from services.executor.engine_config import EngineConfig
from services.executor.plan import Plan, lay_out
from services.executor.sequence import Rank, Sequence


class Scheduler:
    """The waiting line and the running batch."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self._config = config
        self._blocks = blocks
        self._free_seats = list(range(config.max_running - 1, -1, -1))  # the last one is taken first

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into the waiting line."""
        insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence, is_sound: bool = True) -> None:
        """Take a sequence out, wherever it is, and its blocks back; see BlockManager.free for `is_sound`."""
        if sequence.seat is None:
            self.waiting.remove(sequence)
        else:
            self._unseat(sequence, is_sound)

    def schedule(self) -> Plan | None:
        """Choose the next step and give it the blocks that it writes; None when there is nothing to run."""
        chosen: list[tuple[Sequence, int]] = []
        budget = self._choose_running(chosen)
        self._admit(chosen, budget)
        return lay_out(chosen) if chosen else None

    def launch(self, plan: Plan) -> None:
        """A plan's step runs: the next one is planned as if it were over."""
        for share in plan.shares:
            sequence = share.sequence
            sequence.num_launched += share.num_tokens
            sequence.num_in_flight += 1
            sequence.active.num_scored_rows += share.num_scored_rows
            if share.draws:
                sequence.num_drawing += 1
                sequence.has_drawn = True

    def collect(self, plan: Plan) -> None:
        """A plan's step is over, whatever came of it."""
        for share in plan.shares:
            share.sequence.num_in_flight -= 1
            share.sequence.num_drawing -= share.draws

    def check_integrity(self) -> None:
        """Assert what holds between steps of the line and the batch."""
        assert len(self.running) <= self._config.max_running
        for line in (self.running, self.waiting):
            assert all(first.rank < second.rank for first, second in itertools.pairwise(line)), "a line is out of order"
        for sequence in self.running:
            assert sequence.num_computed <= sequence.num_launched, "more is computed than was launched"
            assert sequence.num_pending > 0, "nothing is left to run"
        for sequence in self.waiting:
            assert sequence.num_computed == sequence.num_allocated == 0, "a waiting sequence holds blocks"
            assert sequence.num_launched == 0, "a waiting sequence runs"
            assert sequence.seat is None, "a waiting sequence has a seat"
        taken = [sequence.seat for sequence in self.running if sequence.seat is not None]
        assert sorted([*taken, *self._free_seats]) == list(range(self._config.max_running)), "seats are miscounted"

    def _choose_running(self, chosen: list[tuple[Sequence, int]]) -> int:
        """Choose among running sequences; returns the tokens left for others."""
        num_decodes = sum(sequence.num_pending == 1 for sequence in self.running)
        budget = self._config.max_batch_tokens - num_decodes
        place = 0
        while place < len(self.running):  # it may shrink from its end
            sequence = self.running[place]
            if sequence.awaits_its_last:
                place += 1
                continue
            num_pending = sequence.num_pending
            num_tokens = 1 if num_pending == 1 else self._chunk(sequence, budget)
            has_blocks = sequence.num_launched + num_tokens <= sequence.num_allocated
            if num_tokens and (has_blocks or self._allocate(sequence, num_tokens)):
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
        while not self._blocks.allocate(sequence, sequence.num_launched + num_tokens):
            worst = self.running[-1]
            self._preempt(worst)
            if worst is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the waiting line: its tokens stay, their KV will be found in the cache or computed again."""
        self._unseat(sequence)
        self.add(sequence)
        self.num_preemptions += 1

    def _unseat(self, sequence: Sequence, is_sound: bool = True) -> None:
        """Out of the running batch, its blocks and its seat free."""
        assert sequence.seat is not None
        self.running.remove(sequence)
        self._free_seats.append(sequence.seat)
        sequence.seat = None
        self._blocks.free(sequence, is_sound)

    def _admit(self, chosen: list[tuple[Sequence, int]], budget: int) -> None:
        """Admit from the waiting line, best first, until one does not fit: a long prompt is never overtaken."""
        place = 0
        while place < len(self.waiting) and budget > 0 and len(self.running) < self._config.max_running:
            sequence = self.waiting[place]
            active = sequence.active
            if sequence.num_in_flight:
                return  # preempted while a step draws its next token, which it will need
            if sequence is not active.leader and not active.is_prompt_computed:
                place += 1  # it will find the prompt in the cache
                continue
            if not self._attach(sequence):
                return
            del self.waiting[place]
            insort(self.running, sequence, key=_rank)
            sequence.seat, sequence.has_drawn = self._free_seats.pop(), False
            sequence.block_tables = self._blocks.tables_of(sequence)
            num_tokens = self._chunk(sequence, budget)
            is_allocated = self._blocks.allocate(sequence, sequence.num_launched + num_tokens)
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


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank
