"""Blocks and the prefix cache: who holds what, what is found again, what is forgotten first."""

from __future__ import annotations

import random

import pytest

from services.executor.blocks import BlockManager, BlockPool
from services.executor.request import Request, Sampling, Stopping
from services.executor.sequence import ActiveRequest, Sequence
from services.executor.step import FULL, WINDOW, KVGroup

BLOCK_SIZE = 4
CHUNK = 8


def make_manager(num_full=16, num_window=12, window=6):
    groups = (KVGroup(FULL, 2, 0), KVGroup(WINDOW, 2, window))
    return BlockManager(groups, BLOCK_SIZE, {FULL: num_full, WINDOW: num_window})


def make_sequence(prompt, max_tokens=64):
    request = Request("r", tuple(prompt), Sampling(seed=0), Stopping(max_tokens=max_tokens))
    return Sequence(ActiveRequest(request, 0, 0.0), 0, (), max_tokens, 1000, 2, BLOCK_SIZE)


def admit(manager, sequence, max_positions=None, num_spare=0):
    max_positions = sequence.num_tokens - 1 if max_positions is None else max_positions
    return manager.attach_prefix(sequence, max_positions, CHUNK, num_spare)


def compute(manager, sequence, num_positions):
    """Run positions up to `num_positions`, in chunks."""
    while sequence.num_computed < num_positions:
        end = min(sequence.num_computed + CHUNK, num_positions)
        assert manager.allocate(sequence, end)
        sequence.num_computed = end
        manager.advance(sequence)
        manager.check_integrity([sequence])


def admitted(manager, prompt, num_positions=None):
    sequence = make_sequence(prompt)
    assert admit(manager, sequence)
    compute(manager, sequence, len(prompt) if num_positions is None else num_positions)
    return sequence


def tables(sequence):
    return [table.ids[: table.end].tolist() for table in sequence.tables]


def free_counts(manager):
    return [usage.num_free for usage in manager.usage()]


def cached_counts(manager):
    return [usage.num_cached for usage in manager.usage()]


def test_a_sequence_holds_a_block_for_each_started_block_of_positions():
    manager = make_manager()
    sequence = admitted(manager, range(5))
    assert [len(table) for table in tables(sequence)] == [2, 2]
    assert free_counts(manager) == [14, 10]
    assert manager.allocate(sequence, 8)
    assert free_counts(manager) == [14, 10]  # the second block had room
    assert manager.allocate(sequence, 9)
    assert free_counts(manager) == [13, 9]
    manager.free(sequence)
    assert free_counts(manager) == [16, 12]
    assert tables(sequence) == [[], []]
    manager.check_integrity([sequence])


def test_window_blocks_are_freed_as_the_window_passes():
    manager = make_manager(window=6)
    sequence = admitted(manager, range(40), 8)
    assert -1 not in tables(sequence)[1]  # the query at 8 sees 3 to 8
    compute(manager, sequence, 9)  # the query at 9 sees 4 to 9
    assert [block == -1 for block in tables(sequence)[1]] == [True, False, False]
    compute(manager, sequence, 12)
    assert [block == -1 for block in tables(sequence)[1]] == [True, False, False]
    compute(manager, sequence, 32)
    assert [block == -1 for block in tables(sequence)[1]] == [True] * 6 + [False] * 2
    assert -1 not in tables(sequence)[0]


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 9, 31])
@pytest.mark.parametrize("chunk", [1, 3, 4, 8])
def test_max_needed_bounds_what_is_held(window, chunk):
    """By brute force over every place where a chunk may begin."""
    pool = BlockPool(KVGroup(WINDOW, 1, window), BLOCK_SIZE, 1)
    held = [
        -(-(begin + count) // BLOCK_SIZE) - pool.first_needed(begin)
        for begin in range(60)
        for count in range(1, chunk + 1)
        if begin + count <= 60
    ]
    assert pool.max_needed(60, chunk) == max(held)
    assert pool.max_needed(3, chunk) == 1


def test_a_prefix_is_found_again():
    manager = make_manager()
    first = admitted(manager, range(14), 12)
    shared = tables(first)
    second = make_sequence([*range(13), 99, 98])
    assert admit(manager, second)
    assert second.num_computed == 12
    assert tables(second)[0] == shared[0][:3]
    assert tables(second)[1] == [-1, *shared[1][1:3]]  # the query at 12 sees 7 to 12
    manager.check_integrity([first, second])


def test_a_prefix_outlives_its_sequence():
    manager = make_manager()
    first = admitted(manager, range(14))
    manager.free(first)
    assert free_counts(manager) == [16, 12]
    assert cached_counts(manager) == [3, 3]
    second = make_sequence(range(14))
    assert admit(manager, second)
    assert second.num_computed == 12
    assert cached_counts(manager) == [0, 1]  # the window's first block is not needed


def test_the_last_token_is_never_taken_from_the_cache():
    manager = make_manager()
    manager.free(admitted(manager, range(12)))
    second = make_sequence(range(12))
    assert admit(manager, second)
    assert second.num_computed == 8


@pytest.mark.parametrize(("num_window", "num_found"), [(12, 12), (5, 0)])
def test_a_hit_needs_the_blocks_of_the_last_window(num_window, num_found):
    manager = make_manager(num_window=num_window, window=6)
    manager.free(admitted(manager, range(16)))
    manager.free(admitted(manager, range(100, 112)))  # of five window blocks it takes the two longest unused
    sequence = make_sequence(range(16))
    assert admit(manager, sequence)
    assert sequence.num_computed == num_found
    manager.check_integrity([sequence])


def test_a_prefix_differs_from_its_first_token_on():
    manager = make_manager()
    manager.free(admitted(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9]))
    other = make_sequence([0, 2, 3, 4, 5, 6, 7, 8, 9])  # its second block's ids are the same
    assert admit(manager, other)
    assert other.num_computed == 0


def test_output_is_found_as_prompt():
    manager = make_manager()
    sequence = admitted(manager, range(6))
    for token_id in (50, 51, 52, 53):
        sequence.append(token_id)
    compute(manager, sequence, 9)
    follow_up = make_sequence([*range(6), 50, 51, 52, 53, 7])
    assert admit(manager, follow_up)
    assert follow_up.num_computed == 8


def test_the_longest_unused_contents_go_first_and_the_end_of_a_prefix_before_its_head():
    manager = make_manager(num_full=6, num_window=6, window=100)
    manager.free(admitted(manager, range(8)))
    manager.free(admitted(manager, range(20, 28)))
    taker = admitted(manager, range(40, 52))  # two blocks are free, one is taken from the first prefix
    first, second = make_sequence([*range(8), 9]), make_sequence([*range(20, 28), 9])
    manager.free(taker)
    assert admit(manager, first)
    assert first.num_computed == 4
    assert admit(manager, second)
    assert second.num_computed == 8


def test_a_block_is_taken_again_only_after_its_contents_are_forgotten():
    manager = make_manager(num_full=3, num_window=3)
    manager.free(admitted(manager, range(12)))
    manager.free(admitted(manager, range(50, 62)))
    again = make_sequence(range(12))
    assert admit(manager, again)
    assert again.num_computed == 0


def test_two_that_compute_the_same_share_later_but_not_then():
    manager = make_manager()
    first, second = make_sequence(range(9)), make_sequence(range(9))
    assert admit(manager, first)
    assert admit(manager, second)
    for sequence in (first, second):
        assert manager.allocate(sequence, 8)
        sequence.num_computed = 8
        manager.advance(sequence)
    assert not set(tables(first)[0]) & set(tables(second)[0])
    manager.check_integrity([first, second])
    manager.free(first)
    manager.check_integrity([second])
    third = make_sequence(range(9))
    assert admit(manager, third)
    assert third.num_computed == 8
    manager.check_integrity([second, third])


def test_unsound_contents_are_not_found_again():
    manager = make_manager()
    manager.free(admitted(manager, range(9)), is_sound=False)
    assert cached_counts(manager) == [0, 0]
    manager.check_integrity([])
    again = make_sequence(range(9))
    assert admit(manager, again)
    assert again.num_computed == 0


def test_admission_wants_room_for_all_known_tokens_and_a_spare():
    manager = make_manager(num_full=4, window=6)
    assert not admit(manager, make_sequence(range(17)))
    assert not admit(manager, make_sequence(range(13)), num_spare=1)
    assert admit(manager, make_sequence(range(13)))


def test_a_refused_admission_changes_nothing():
    manager = make_manager(num_full=4)
    holder = admitted(manager, range(8))
    before = free_counts(manager), cached_counts(manager)
    refused = make_sequence([*range(8), *range(30, 50)])
    assert not admit(manager, refused)
    assert (free_counts(manager), cached_counts(manager)) == before
    manager.check_integrity([holder, refused])


def test_shared_blocks_count_once_at_admission():
    manager = make_manager(num_full=4, num_window=6)
    holder = admitted(manager, range(12))
    sharer = make_sequence(range(13))
    assert admit(manager, sharer)  # three blocks are shared, one is free
    assert manager.allocate(sharer, 13)
    manager.check_integrity([holder, sharer])


def test_allocation_is_all_or_nothing_over_groups():
    manager = make_manager(num_full=16, num_window=2)
    sequence = make_sequence(range(6))
    assert admit(manager, sequence)
    assert not manager.allocate(sequence, 12)
    assert free_counts(manager) == [16, 2]
    assert manager.allocate(sequence, 8)


def test_shortage_names_the_group_that_is_too_small():
    manager = make_manager(num_full=4, num_window=4, window=6)
    assert manager.shortage(16, CHUNK) is None
    assert manager.shortage(17, CHUNK).group == FULL
    assert make_manager(num_full=99, num_window=3, window=6).shortage(40, CHUNK).group == WINDOW


def test_integrity_check_finds_damage():
    manager = make_manager()
    sequence = admitted(manager, range(10))
    sequence.tables[0].ids[1] = sequence.tables[0].ids[0]
    with pytest.raises(AssertionError, match="twice"):
        manager.check_integrity([sequence])
    manager = make_manager()
    sequence = admitted(manager, range(10))
    with pytest.raises(AssertionError, match="miscounted"):
        manager.check_integrity([])
    sequence.token_ids[0] += 1
    with pytest.raises(AssertionError):
        manager.check_integrity([sequence])


@pytest.mark.parametrize("seed", range(8))
def test_random_traces_keep_every_invariant(seed):
    """Admissions of prompts with common prefixes, growth and frees, in any order; few blocks."""
    rng = random.Random(seed)
    manager = make_manager(num_full=14, num_window=10, window=rng.choice([1, 3, 6, 9]))
    held, num_hits, num_refusals = [], 0, 0
    for _ in range(300):
        action = rng.random()
        if action < 0.3:
            start = rng.choice([0, 0, 100])
            sequence = make_sequence([*range(start, start + rng.randint(1, 20)), *rng.choices(range(200, 203), k=3)])
            if admit(manager, sequence, num_spare=rng.randint(0, 2)):
                held.append(sequence)
                num_hits += sequence.num_computed > 0
            else:
                num_refusals += 1
        elif held and action < 0.85:
            sequence = rng.choice(held)
            if sequence.num_computed == sequence.num_tokens:
                sequence.append(rng.randint(300, 303))
            count = min(rng.randint(1, CHUNK), sequence.num_tokens - sequence.num_computed)
            if manager.allocate(sequence, sequence.num_computed + count):
                sequence.num_computed += count
                manager.advance(sequence)
        elif held:
            manager.free(held.pop(rng.randrange(len(held))), is_sound=rng.random() < 0.9)
        manager.check_integrity(held)
    for sequence in held:
        manager.free(sequence)
    assert free_counts(manager) == [14, 10]
    assert num_hits > 5
    assert num_refusals > 5
