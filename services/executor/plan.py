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
    chosen = list(chosen)
    num_tokens = sum(count for _, count in chosen)
    token_ids = np.empty(num_tokens, np.int32)
    positions = np.empty(num_tokens, np.int32)
    shares: list[Share] = []
    slices: list[SequenceSlice] = []
    logits_rows: list[int] = []
    wanted: list[int] = []
    drawing: list[Sequence] = []
    draw_rows: list[int] = []
    start = 0
    for sequence, count in chosen:
        begin = sequence.num_launched
        end = begin + count
        if begin >= sequence.num_tokens:  # it is being drawn, and alone
            assert sequence.seat is not None
            token_ids[start], positions[start] = -1 - sequence.seat, begin
        elif count == 1:
            token_ids[start], positions[start] = sequence.token_ids[begin], begin
        else:
            token_ids[start : start + count] = sequence.token_ids[begin:end]
            positions[start : start + count] = np.arange(begin, end)
        slices.append(SequenceSlice(start, count, end, sequence.block_tables))
        first_wanted, first_scored, num_scored = len(wanted), 0, 0
        if sequence.scores_prompt:
            scored = sequence.rows_to_score(begin, end)
            first_scored, num_scored = scored.start, len(scored)
            wanted.extend(range(len(logits_rows), len(logits_rows) + num_scored))
            logits_rows.extend(start + position - begin for position in scored)
        start += count
        draws = end == sequence.num_tokens + sequence.num_drawing
        if draws:
            if sequence.active.request.logprobs is not None:
                wanted.append(len(logits_rows))
            drawing.append(sequence)
            draw_rows.append(len(logits_rows))
            logits_rows.append(start - 1)
        num_wanted = len(wanted) - first_wanted
        shares.append(Share(sequence, count, draws, first_scored, num_scored, first_wanted, num_wanted))
    batch = StepBatch(token_ids, positions, slices, np.array(logits_rows, np.int32))
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
        rows=np.array(rows, np.int32),
        samplers=[sequence.sampler for sequence in drawing],
        seats=np.array([sequence.seat for sequence in drawing], np.int32),
        token_indices=np.array([sequence.num_output_tokens + sequence.num_drawing for sequence in drawing], np.int32),
        starts=[place for place, sequence in enumerate(drawing) if not sequence.has_drawn],
        wanted=np.array(wanted, np.int32),
    )
