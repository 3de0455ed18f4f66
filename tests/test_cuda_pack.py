"""How a step's arrays are packed for the GPU: against loops, without one."""

from __future__ import annotations

import numpy as np
import pytest

from services.executor.cuda.kv import Shape, lay_out, max_ints, pack
from services.executor.step import FULL, WINDOW, Draws, KVGroup, SequenceSlice, StepBatch

GROUPS = (KVGroup(FULL, 1, 0), KVGroup(WINDOW, 1, 40))
BLOCK_SIZE = 32
BASE = 1 << 20
DIRTY = 77


def make_batch(rng, counts):
    """Sequences at random positions, and draws for the last rows of most of them."""
    slices, positions, drawing = [], [], []
    for count in counts:
        end = count + int(rng.integers(0, 200))
        tables = {group.name: rng.integers(0, 500, 10).astype(np.int32) for group in GROUPS}
        slices.append(SequenceSlice(len(positions), count, end, tables))
        positions += range(end - count, end)
        if rng.random() < 0.8:
            drawing.append(len(positions) - 1)
    rows = np.array(drawing, np.int32)
    count = len(drawing)
    draws = Draws(np.arange(count, dtype=np.int32), (), rng.permutation(64)[:count].astype(np.int32), rows, (), rows)
    ids = rng.integers(-5, 500, len(positions)).astype(np.int32)
    return StepBatch(ids, np.array(positions, np.int32), slices, rows), draws


@pytest.mark.parametrize("counts", [[1] * 5, [1], [7, 1, 40, 1], [100]])
def test_arrays_are_where_the_kernels_look(counts):
    rng = np.random.default_rng(len(counts))
    batch, draws = make_batch(rng, counts)
    num_rows, num_logits = sum(counts), len(batch.logits_rows)
    num_items = sum(-(-count // 2) for count in counts)
    shape = Shape(num_rows + 3, num_logits + 2, len(counts) + 3, num_items + 3, 16, 16, 1)
    step = lay_out(shape, GROUPS, BASE)
    out = np.full(step.num_ints + 10, DIRTY, np.int32)
    ints = pack(batch, step, BLOCK_SIZE, 2, BASE, draws, out)
    assert (out[step.num_ints :] == DIRTY).all()

    def view(address, *shape):
        start = (address - BASE) // 4
        return ints[start : start + np.prod(shape)].reshape(shape)

    assert view(step.token_ids, num_rows + 3).tolist() == [*batch.token_ids, 0, 0, 0]
    assert view(step.positions, num_rows + 3).tolist() == [*batch.positions, 0, 0, 0]
    assert view(step.logits_rows, num_logits + 2).tolist() == [*batch.logits_rows, 0, 0]
    assert view(step.seats, num_logits + 2).tolist() == [*draws.seats, -1, -1]
    items = []
    for number, part in enumerate(batch.sequences):
        for first in range(0, part.num_tokens, 2):
            position = part.context_length - part.num_tokens + first
            items.append([part.start + first, min(2, part.num_tokens - first), position, number])
    assert view(step.items, num_items + 3, 4).tolist() == [*items, *([[0] * 4] * 3)]
    for group in GROUPS:
        tables = view(step.tables[group.name], len(counts) + 3, 16)
        places = view(step.places[group.name], num_rows + 3).tolist()
        assert places[num_rows:] == [-1] * 3
        for number, part in enumerate(batch.sequences):
            table = part.block_tables[group.name]
            num_blocks = -(-part.context_length // BLOCK_SIZE)
            assert tables[number].tolist() == [*table[:num_blocks], *([0] * (16 - num_blocks))]
            for row in range(part.start, part.start + part.num_tokens):
                position = int(batch.positions[row])
                assert places[row] == table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        assert not tables[len(counts) :].any()


def test_a_row_without_a_block_is_a_defect():
    batch, draws = make_batch(np.random.default_rng(0), [3])
    batch.sequences[0].block_tables[FULL][:] = -1
    step = lay_out(Shape(3, len(batch.logits_rows), 1, 2, 16, 16, 1), GROUPS, BASE)
    with pytest.raises(AssertionError, match="no block"):
        pack(batch, step, BLOCK_SIZE, 2, BASE, draws)


def test_no_batch_within_the_bounds_takes_more_room():
    rng = np.random.default_rng(5)
    for _ in range(300):
        max_rows, max_sequences = int(rng.integers(1, 300)), int(rng.integers(1, 65))
        width = 1 << int(rng.integers(3, 8))
        rows = int(rng.integers(1, max_rows + 1))
        sequences, items = (int(rng.integers(1, min(rows, bound) + 1)) for bound in (max_sequences, rows))
        logits, table_width = int(rng.integers(0, rows + 1)), 1 << int(rng.integers(3, width.bit_length()))
        step = lay_out(Shape(rows, logits, sequences, items, table_width, 16, 1), GROUPS, BASE)
        assert step.num_ints <= max_ints(GROUPS, max_rows, max_sequences, width)
