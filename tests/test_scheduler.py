"""Which sequences a step runs: budget, rank, chunks, preemption, and how the batch is laid out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from services.executor.blocks import BlockManager
from services.executor.engine_config import EngineConfig
from services.executor.request import Request, Sampling, Stopping
from services.executor.scheduler import Scheduler
from services.executor.sequence import ActiveRequest, Sequence
from services.executor.step import FULL, WINDOW, KVGroup
from shared.errors import Reason, ServiceError

BLOCK_SIZE = 4


class Bench:
    """A scheduler whose steps are carried out by counting, without a model."""

    def __init__(self, num_full=64, num_window=64, **bounds):
        config = EngineConfig(
            **{"max_context": 128, "max_batch_tokens": 16, "max_running": 4, **bounds},
            num_blocks={FULL: num_full, WINDOW: num_window},
            block_size=BLOCK_SIZE,
        )
        groups = (KVGroup(FULL, 1, 0), KVGroup(WINDOW, 1, 6))
        self.blocks = BlockManager(groups, BLOCK_SIZE, config.num_blocks)
        self.scheduler = Scheduler(config, self.blocks)
        self.arrivals = itertools.count()

    def add(self, num_tokens, priority=0, num_outputs=1, prompt_logprobs=None, first_id=None):
        arrival = next(self.arrivals)
        first_id = 1000 * (arrival + 1) if first_id is None else first_id
        request = Request(
            str(arrival),
            tuple(range(first_id, first_id + num_tokens)),
            Sampling(seed=0, num_outputs=num_outputs),
            Stopping(max_tokens=64),
            prompt_logprobs=prompt_logprobs,
            priority=priority,
        )
        active = ActiveRequest(request, arrival, 0.0)
        for index in range(num_outputs):
            active.sequences[index] = Sequence(active, index, (), 64, 10**6, 2, BLOCK_SIZE)
            self.scheduler.add(active.sequences[index])
        return list(active.sequences.values()) if num_outputs > 1 else active.sequences[0]

    def step(self):
        """Schedule and carry out; returns [(sequence, num_tokens)]."""
        plan = self.scheduler.schedule()
        if plan:
            self.scheduler.launch(plan)
            self.scheduler.collect(plan)
        for share in plan.shares if plan else ():
            sequence, active = share.sequence, share.sequence.active
            sequence.num_computed += share.num_tokens
            self.blocks.advance(sequence)
            active.is_prompt_computed |= sequence.num_computed >= sequence.num_prompt_tokens
            if share.draws:
                sequence.append(7)
        self.scheduler.check_integrity()
        self.blocks.check_integrity(self.scheduler.running + self.scheduler.waiting)
        return [(share.sequence, share.num_tokens) for share in plan.shares] if plan else []


def test_a_long_prompt_runs_in_chunks_of_the_budget():
    bench = Bench()
    sequence = bench.add(37)
    assert [bench.step() for _ in range(4)] == [[(sequence, count)] for count in (16, 16, 5, 1)]


def test_decodes_go_on_beside_a_prompt():
    bench = Bench()
    first, second = bench.add(3), bench.add(3)
    assert bench.step() == [(first, 3), (second, 3)]
    prompt = bench.add(40)
    assert bench.step() == [(first, 1), (second, 1), (prompt, 14)]
    assert bench.step() == [(first, 1), (second, 1), (prompt, 14)]
    assert bench.step() == [(first, 1), (second, 1), (prompt, 12)]
    assert bench.step() == [(first, 1), (second, 1), (prompt, 1)]


def test_a_worse_ranked_decode_keeps_its_token_beside_a_better_ranked_prompt():
    bench = Bench()
    decode = bench.add(3)
    bench.step()
    prompt = bench.add(40, priority=5)
    assert bench.step() == [(decode, 1), (prompt, 15)]  # in the step of its admission it comes last
    assert bench.step() == [(prompt, 15), (decode, 1)]


def test_the_budget_left_by_one_prompt_goes_to_the_next():
    bench = Bench()
    first, second, third = bench.add(10), bench.add(10), bench.add(30)
    assert bench.step() == [(first, 10), (second, 6)]
    assert bench.step() == [(first, 1), (second, 4), (third, 11)]
    assert bench.step() == [(first, 1), (second, 1), (third, 14)]


def test_admission_is_by_priority_then_arrival():
    bench = Bench(max_running=1)
    late, urgent, low = bench.add(3), bench.add(3, priority=2), bench.add(3, priority=-1)
    order = []
    while bench.scheduler.waiting or bench.scheduler.running:
        ((sequence, _),) = bench.step()
        order.append(sequence)
        bench.scheduler.remove(sequence)
    assert order == [urgent, late, low]


def test_max_running_bounds_the_batch():
    bench = Bench(max_running=2)
    sequences = [bench.add(2) for _ in range(5)]
    assert [sequence for sequence, _ in bench.step()] == sequences[:2]
    bench.scheduler.remove(sequences[0])
    assert [sequence for sequence, _ in bench.step()] == sequences[1:3]


def test_a_long_prompt_is_not_overtaken():
    bench = Bench(num_full=8)
    holder = bench.add(16)
    bench.step()
    long, short = bench.add(20), bench.add(2)
    assert bench.step() == [(holder, 1)]  # there would be room for the short one
    bench.scheduler.remove(holder)
    assert bench.step() == [(long, 16)]
    assert bench.step() == [(long, 4), (short, 2)]


def test_blocks_are_taken_from_the_worst_ranked():
    bench = Bench(num_full=8, max_running=4)
    low, first, second = bench.add(7, priority=-1), bench.add(7), bench.add(8)
    bench.step()  # first 7, second 8, low 1
    assert bench.scheduler.running == [first, second, low]
    gone = []
    while first.num_tokens < 24:
        before = bench.scheduler.running[:]
        bench.step()
        gone += [sequence for sequence in before if sequence not in bench.scheduler.running]
    assert gone[0] is low
    assert first not in gone
    assert bench.scheduler.num_preemptions == len(gone)


def test_a_preempted_sequence_keeps_its_tokens_and_finds_its_blocks_again():
    bench = Bench(num_full=8, max_running=4)
    first, second = bench.add(12), bench.add(12)
    while second not in bench.scheduler.waiting or second.num_tokens == 12:
        bench.step()
    tokens = second.token_ids[: second.num_tokens].tolist()
    bench.scheduler.remove(first)
    ((again, num_tokens),) = bench.step()
    assert again is second
    assert second.token_ids[: len(tokens)].tolist() == tokens
    assert num_tokens < len(tokens)  # leading blocks were still cached


def test_a_preempted_sequence_does_not_come_straight_back():
    bench = Bench(num_full=8, max_running=4)
    first, second = bench.add(12), bench.add(12)
    while bench.scheduler.num_preemptions == 0:
        bench.step()
    for _ in range(4):
        assert bench.step() == [(first, 1)]
    assert bench.scheduler.waiting == [second]


def test_other_outputs_wait_until_the_first_has_computed_the_prompt():
    bench = Bench()
    first, second, third = bench.add(21, num_outputs=3)
    after = bench.add(2)
    assert bench.step() == [(first, 16)]
    assert bench.step() == [(first, 5), (after, 2)]
    assert bench.step() == [(first, 1), (after, 1), (second, 1), (third, 1)]  # 20 of 21 come from the cache
    shared = first.tables[0].ids[:5].tolist()
    assert second.tables[0].ids[:5].tolist() == shared
    assert third.tables[0].ids[5] != second.tables[0].ids[5]


def test_the_next_output_computes_the_prompt_when_the_first_is_gone():
    bench = Bench()
    first, second = bench.add(21, num_outputs=2)
    bench.step()
    bench.scheduler.remove(first)
    del first.active.sequences[0]
    assert bench.step() == [(second, 5)]  # the 16 that had been computed are cached


def test_the_batch_lies_sequence_after_sequence():
    bench = Bench()
    first, _ = bench.add(3, first_id=10), bench.add(20, first_id=50)
    launched = bench.scheduler.schedule()
    bench.scheduler.launch(launched)
    bench.scheduler.collect(launched)
    first.append(7)
    plan = bench.scheduler.schedule()
    batch = plan.batch
    assert batch.token_ids.tolist() == [7, *range(63, 70)]
    assert batch.positions.tolist() == [3, *range(13, 20)]
    assert batch.logits_rows.tolist() == [0, 7]
    assert batch.token_ids.dtype == batch.positions.dtype == batch.logits_rows.dtype == np.int32
    assert [(part.start, part.num_tokens, part.context_length) for part in batch.sequences] == [(0, 1, 4), (1, 7, 20)]
    assert [np.count_nonzero(part.block_tables[FULL] >= 0) for part in batch.sequences] == [1, 5]


def test_a_chunk_that_does_not_end_the_prompt_wants_no_logits():
    bench = Bench()
    bench.add(20)
    plan = bench.scheduler.schedule()
    assert plan.batch.logits_rows.tolist() == []
    assert not plan.shares[0].draws


def test_scored_rows_are_bounded_and_asked_for_once():
    bench = Bench(max_scored_rows=5)
    bench.add(12, prompt_logprobs=0)
    rows = []
    for _ in range(3):
        plan = bench.scheduler.schedule()
        (share,) = plan.shares
        rows.append((share.num_tokens, share.num_scored_rows, share.draws, plan.batch.logits_rows.tolist()))
        bench.scheduler.launch(plan)
        bench.scheduler.collect(plan)
    assert rows == [
        (5, 5, False, [0, 1, 2, 3, 4]),
        (5, 5, False, [0, 1, 2, 3, 4]),
        (2, 1, True, [0, 1]),  # position 10 scores token 11, the last; position 11 draws
    ]


def test_scoring_takes_from_the_cache_only_what_it_has_scored():
    bench = Bench()
    bench.scheduler.remove(_computed(bench, bench.add(14, first_id=1)))
    scoring = bench.add(14, first_id=1, prompt_logprobs=0)
    assert bench.step() == [(scoring, 14)]
    bench.scheduler.remove(scoring)
    plain = bench.add(14, first_id=1)
    assert bench.step() == [(plain, 2)]


def _computed(bench, sequence):
    while sequence.num_computed < sequence.num_prompt_tokens:
        bench.step()
    return sequence


def test_nothing_to_do():
    assert Bench().scheduler.schedule() is None


@pytest.mark.parametrize(
    ("field", "bounds"),
    [
        ("max_batch_tokens", {"max_batch_tokens": 3, "max_running": 4}),
        ("max_running", {"max_running": 0}),
        ("max_waiting", {"max_waiting": -1}),
        ("max_context", {"max_context": 0}),
        ("block_size", {"block_size": 0}),
        ("num_blocks", {"num_blocks": {FULL: 0}}),
        ("max_scored_rows", {"max_scored_rows": 0}),
    ],
)
def test_bounds_that_contradict_each_other_are_refused(field, bounds):
    with pytest.raises(ServiceError) as error:
        EngineConfig(**{"max_context": 8, "num_blocks": {FULL: 1}, **bounds})
    assert error.value.reason is Reason.FIELD_INVALID
    assert error.value.field == field
