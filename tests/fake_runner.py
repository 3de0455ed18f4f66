"""A model that a person can compute: its logits mix all token ids of the context, read back from KV blocks.

What it stores in a block is the token id and the position of each row. A query's logits depend on every id that
the full group's table leads to and on the window's ids by the window's table, so a wrong table, a block freed too
early or a cached block with other contents changes what is drawn.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import replace

import numpy as np

from services.executor.immediate import ImmediateRunner
from services.executor.sampling import draw_tokens
from services.executor.step import FULL, WINDOW, KVGroup, StepResult


def fake_logits(token_ids, window, vocab_size, positions=None):
    """Logits after a context (num_tokens,) of ids; `positions` as stored, 0, 1, ... where they are right."""
    token_ids = np.asarray(token_ids, np.uint64)
    positions = np.arange(len(token_ids)) if positions is None else positions
    everything = _mix_context(token_ids, np.asarray(positions, np.uint64))
    recent = _mix_context(token_ids[-window:], np.asarray(positions, np.uint64)[-window:])
    return _logits(everything, recent, vocab_size)


class FakeRunner(ImmediateRunner):
    """Implements step.Runner over arrays of ids and positions."""

    def __init__(self, vocab_size=40, window=6, block_size=4, num_blocks=None):
        self.vocab_size = vocab_size
        self.window = window
        self.block_size = block_size
        self.num_blocks = num_blocks or {FULL: 24, WINDOW: 16}
        self.kv_groups = (KVGroup(FULL, 1, 0), KVGroup(WINDOW, 1, window))
        self.batches = []  # every batch it was given
        self.fails_at = None  # number of the step that raises
        self.fails_from = None  # number of the first of the steps that all raise
        self.max_slice = None  # tokens of a sequence that a step has memory for
        self.next_error = None  # raised by the next step, once
        self.nan_token_id = None  # a context that ends in it gives NaN
        self._stored = {name: np.full((count, block_size, 2), -1) for name, count in self.num_blocks.items()}

    def forward(self, batch):
        self.batches.append(batch)
        if self.fails_at == len(self.batches) or (self.fails_from and len(self.batches) >= self.fails_from):
            raise RuntimeError("the fake model fails as told")
        if self.next_error is not None:
            error, self.next_error = self.next_error, None
            raise error
        if self.max_slice and max(part.num_tokens for part in batch.sequences) > self.max_slice:
            raise MemoryError("the fake model lacks memory as told")
        assert (np.diff(batch.logits_rows) > 0).all()
        wanted = set(batch.logits_rows.tolist())
        logits = np.empty((len(wanted), self.vocab_size), np.float32)
        num_read = 0
        for part in batch.sequences:
            rows = range(part.start, part.start + part.num_tokens)
            first = part.context_length - part.num_tokens
            assert batch.positions[rows].tolist() == list(range(first, part.context_length))
            for name in self.num_blocks:
                self._write(name, part.block_tables[name], batch, rows)
            for row in rows:
                if row in wanted:
                    logits[num_read] = self._read(part.block_tables, int(batch.positions[row]))
                    num_read += 1
        return logits

    def _write(self, name, table, batch, rows):
        for row in rows:
            position = int(batch.positions[row])
            block = table[position // self.block_size]
            assert block >= 0, "a row has no block"
            self._stored[name][block, position % self.block_size] = batch.token_ids[row], position

    def _read(self, tables, position):
        everything = self._gather(FULL, tables[FULL], range(position + 1))
        recent = self._gather(WINDOW, tables[WINDOW], range(max(0, position - self.window + 1), position + 1))
        logits = _logits(_mix_context(*everything), _mix_context(*recent), self.vocab_size)
        if self.nan_token_id is not None and everything[0][-1] == self.nan_token_id:
            logits[3] = np.nan
        return logits

    def _gather(self, name, table, positions):
        positions = np.asarray(positions)
        blocks = table[positions // self.block_size]
        assert (blocks >= 0).all(), "a position that the query sees has no block"
        stored = self._stored[name][blocks, positions % self.block_size].astype(np.uint64)
        return stored[:, 0], stored[:, 1]


class LateRunner(FakeRunner):
    """The fake model as a device runs it: nothing of a step is known until it is collected, one step later.

    What it draws with is its own, made when a sequence takes its seat: the engine's samplers lag behind.
    """

    depth = 2

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._samplers, self._last_ids = {}, {}  # by seat
        self._results = deque()
        self.launched = []  # every batch as it came; `batches` have their tokens filled in

    def launch(self, batch, draws):
        assert len(self._results) < self.depth, "too many steps at once"
        self.launched.append(batch)
        try:
            self._results.append(self._run(batch, draws))
        except RuntimeError as error:
            self._results.append(error)

    def collect(self):
        result = self._results.popleft()
        if isinstance(result, RuntimeError):
            raise result
        return result

    def _run(self, batch, draws):
        token_ids = [self._last_ids[-1 - token_id] if token_id < 0 else token_id for token_id in batch.token_ids]
        logits = self.forward(replace(batch, token_ids=np.array(token_ids, np.int32)))
        for place in draws.starts:
            self._samplers[int(draws.seats[place])] = copy.deepcopy(draws.samplers[place])
        samplers = [self._samplers[seat] for seat in draws.seats.tolist()]
        assert [sampler.num_tokens for sampler in samplers] == draws.token_indices.tolist()
        drawn = draw_tokens(logits[draws.rows], samplers) if samplers else []
        for seat, sampler, token_id in zip(draws.seats.tolist(), samplers, drawn, strict=True):
            self._last_ids[seat] = token_id or 0
            sampler.observe(token_id or 0)
        return StepResult(drawn, logits[draws.wanted])


def _mix_context(token_ids, positions):
    """One 64-bit number for (num_tokens,) ids at (num_tokens,) positions."""
    return _mix((token_ids + np.uint64(1)) * _mix(positions + np.uint64(7))).sum(dtype=np.uint64)


def _logits(everything, recent, vocab_size):
    ids = np.arange(vocab_size, dtype=np.uint64)
    mixed = _mix(everything ^ _mix(recent + np.uint64(99) + ids))
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(8 / 2**24)


def _mix(numbers):
    """The finaliser of splitmix64, elementwise modulo 2**64."""
    with np.errstate(over="ignore"):
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return numbers ^ (numbers >> np.uint64(31))
