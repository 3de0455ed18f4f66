"""One step laid out: who takes part, the batch for the runner, and what it draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.executor.sequence import Sequence
from services.executor.step import Draws, SequenceSlice, StepBatch


class Share(NamedTuple):
    """One sequence's part of a step, and of its logits."""

    sequence: Sequence
    num_tokens: int
    draws: bool  # the next token
    first_scored: int  # the first prompt position that it scores
    num_scored_rows: int  # rows that score prompt tokens
    first_wanted: int  # its first row among those wanted on the host: those that score, then the one drawn from
    num_wanted: int


class Plan(NamedTuple):
    """One step."""

    shares: list[Share]
    batch: StepBatch
    draws: Draws


def lay_out(chosen: Iterable[tuple[Sequence, int]]) -> Plan:
    """Lay the next tokens of sequences out, so many of each, sequence after sequence."""
    token_ids: list[int] = []
    positions: list[int] = []
    shares: list[Share] = []
    slices: list[SequenceSlice] = []
    logits_rows: list[int] = []
    wanted: list[int] = []
    drawing: list[Sequence] = []
    draw_rows: list[int] = []
    for sequence, count in chosen:
        start, begin = len(token_ids), sequence.num_launched
        end = begin + count
        if begin >= sequence.num_tokens:  # it is being drawn, and alone
            assert sequence.seat is not None
            token_ids.append(-1 - sequence.seat)
            positions.append(begin)
        else:
            token_ids += sequence.token_ids[begin:end].tolist()
            positions += range(begin, end)
        slices.append(SequenceSlice(start, count, end, sequence.block_tables))
        first_wanted, first_scored, num_scored = len(wanted), 0, 0
        if sequence.scores_prompt:
            scored = sequence.rows_to_score(begin, end)
            first_scored, num_scored = scored.start, len(scored)
            wanted += range(len(logits_rows), len(logits_rows) + num_scored)
            logits_rows += range(start + first_scored - begin, start + first_scored - begin + num_scored)
        draws = end == sequence.num_tokens + sequence.num_drawing
        if draws:
            if sequence.active.request.logprobs is not None:
                wanted.append(len(logits_rows))
            drawing.append(sequence)
            draw_rows.append(len(logits_rows))
            logits_rows.append(start + count - 1)
        num_wanted = len(wanted) - first_wanted
        shares.append(Share(sequence, count, draws, first_scored, num_scored, first_wanted, num_wanted))
    batch = StepBatch(_ints(token_ids), _ints(positions), slices, _ints(logits_rows))
    return Plan(shares, batch, _draws(drawing, draw_rows, wanted))


def probe(block_tables: Mapping[str, NDArray[np.int32]]) -> Plan:
    """A step of one token that nobody has asked for, whose logits are wanted: it shows whether a runner runs.

    Args:
        block_tables: of each group a table (1,) of a block that holds nothing.
    """
    zero = np.zeros(1, np.int32)
    return Plan([], StepBatch(zero, zero, [SequenceSlice(0, 1, 1, block_tables)], zero), _draws([], [], [0]))


def _draws(drawing: list[Sequence], rows: list[int], wanted: list[int]) -> Draws:
    return Draws(
        rows=_ints(rows),
        samplers=[sequence.sampler for sequence in drawing],
        seats=_ints([sequence.seat for sequence in drawing]),
        token_indices=_ints([sequence.num_output_tokens + sequence.num_drawing for sequence in drawing]),
        starts=[place for place, sequence in enumerate(drawing) if not sequence.has_drawn],
        wanted=_ints(wanted),
    )


def _ints(values: list[int] | list[int | None]) -> NDArray[np.int32]:
    return np.array(values, np.int32)
