"""A request inside the engine, and its sequences: one for each output that runs."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Ids

import numpy as np
from numpy.typing import NDArray

from services.executor.request import FinishReason, OutputFinished, Request
from services.executor.sampling import OutputSampler

Rank = tuple[int, int, int]


class BlockTable:
    """The blocks of one sequence in one group.

    ids[i] is the block of positions i * block_size : (i + 1) * block_size for begin <= i < end, else -1.
    """

    __slots__ = ("begin", "end", "ids")

    def __init__(self, max_blocks: int) -> None:
        self.ids: NDArray[np.int32] = np.full(max_blocks, -1, np.int32)  # (max_blocks,)
        self.begin = 0
        self.end = 0


class ActiveRequest:
    """A request that the engine holds: its sequences that still run, and what they share."""

    def __init__(self, request: Request, arrival: int, submit_time: float) -> None:
        self.request = request
        self.prompt_token_ids: NDArray[np.int32] = np.array(request.prompt_token_ids, np.int32)
        self.arrival = arrival  # order of submission
        self.submit_time = submit_time  # of the engine's clock, seconds
        self.sequences: dict[int, Sequence] = {}  # running or waiting, by output index, ascending
        self.ended: list[OutputFinished] = []  # outputs that had ended before they ran, until they are told
        self.num_cached_tokens = 0  # of the prompt, at the first admission
        self.is_started = False  # RequestStarted has been sent
        self.is_prompt_computed = False  # by one of the sequences; the others find it in the prefix cache
        # Prompt positions whose next token is to be scored, and how many of them have been, in steps launched.
        self.num_rows_to_score = 0 if request.prompt_logprobs is None else len(request.prompt_token_ids) - 1
        self.num_scored_rows = 0

    @property
    def leader(self) -> Sequence:
        """The sequence that computes the prompt for all, and scores it."""
        return next(iter(self.sequences.values()))


class Sequence:
    """One output of a request: its tokens, how far they are computed, and the blocks that hold them.

    Positions 0 : num_computed are in the KV blocks. Up to num_launched they are in steps that run, and the tokens from
    num_tokens on, num_drawing of them, are not known yet; what follows waits to be run. The next token can be drawn
    once no position waits. Outside the running batch num_computed and num_launched are 0, and there is no seat; but
    steps that were launched before may hold the sequence still, and draw its next token.

    Args:
        active: the request.
        index: which of its outputs.
        resumed_token_ids: what the output had before.
        max_tokens: most tokens of the output.
        vocab_size: number of ids.
        num_groups, block_size: of the KV blocks.
    """

    __slots__ = (
        "active", "block_hashes", "block_tables", "has_drawn", "index", "max_tokens",
        "num_allocated", "num_computed", "num_drawing", "num_in_flight", "num_launched", "num_prompt_tokens",
        "num_registered", "num_tokens", "rank", "sampler", "seat", "stop_ids", "tables", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        active: ActiveRequest,
        index: int,
        resumed_token_ids: Ids[int],
        max_tokens: int,
        vocab_size: int,
        num_groups: int,
        block_size: int,
    ) -> None:
        request = active.request
        self.active = active
        self.index = index
        self.max_tokens = max_tokens
        self.stop_ids = request.stopping.stop_token_ids | request.stopping.eog_token_ids
        self.rank: Rank = (-request.priority, active.arrival, index)  # smaller goes first
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_tokens = self.num_prompt_tokens
        capacity = self.num_prompt_tokens + max(max_tokens, len(resumed_token_ids))
        self.token_ids: NDArray[np.int32] = np.empty(capacity, np.int32)  # (capacity,), known up to num_tokens
        self.token_ids[: self.num_tokens] = active.prompt_token_ids
        self.sampler = OutputSampler(request.sampling, request.stopping, index, vocab_size, request.prompt_token_ids)
        self.num_computed = 0
        self.num_launched = 0
        self.num_drawing = 0
        self.num_in_flight = 0  # steps that hold it
        self.seat: int | None = None  # its number in the running batch
        self.has_drawn = False  # since it took its seat
        # Kept by the block manager.
        self.tables = tuple(BlockTable(-(-capacity // block_size)) for _ in range(num_groups))
        self.num_allocated = 0  # positions that the tables hold blocks for
        self.num_registered = 0  # leading blocks known to the prefix cache
        self.block_tables: Mapping[str, NDArray[np.int32]] = {}  # ids of `tables` by group, in the running batch
        self.block_hashes: list[bytes] = []  # of leading full blocks, as far as they have been wanted
        for token_id in resumed_token_ids:
            self.append(token_id)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Positions to run before the next token can be drawn, at least 1."""
        return self.num_tokens + self.num_drawing - self.num_launched

    @property
    def awaits_its_last(self) -> bool:
        """Whether the last token that it may have is being drawn: it will not be run."""
        return self.num_drawing > 0 and self.num_output_tokens + self.num_drawing >= self.max_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether this sequence is to score prompt tokens yet."""
        active = self.active
        return active.num_scored_rows < active.num_rows_to_score and self is active.leader

    def rows_to_score(self, begin: int, end: int) -> range:
        """Those of the positions begin : end whose next token is yet to be scored."""
        if not self.scores_prompt:
            return range(0)
        return range(max(begin, self.active.num_scored_rows), min(end, self.active.num_rows_to_score))

    def append(self, token_id: int) -> None:
        """Take one more token of the output."""
        self.token_ids[self.num_tokens] = token_id
        self.num_tokens += 1
        self.sampler.observe(token_id)

    def ending(self) -> tuple[FinishReason, int | None] | None:
        """Why the last token of the output ended it, and the stop id if one did; None while it goes on."""
        num_output_tokens = self.num_output_tokens
        if num_output_tokens == 0:
            return None
        last = int(self.token_ids[self.num_tokens - 1])
        if last in self.stop_ids and num_output_tokens > self.active.request.stopping.min_tokens:
            return FinishReason.STOP, last
        if num_output_tokens >= self.max_tokens:
            return FinishReason.LENGTH, None
        return None
