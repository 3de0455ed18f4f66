"""Drawing tokens on the GPU, with what services/executor/sampling.py draws from the same logits.

What a sequence of the running batch needs to go on is kept by its seat: the parameters on the host, packed into the
inputs of each step; the last token, the counts that penalties want, and the lists of biases and stops on the device,
where draws update them. So the host need not know one token to have the next one drawn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from services.executor.cuda.device import Device
from services.executor.sampling import OutputSampler
from services.executor.step import Draws

CHUNK = 1024  # values of a block over chunks; threads of a block for a row
MAX_CHUNKS = 1024
NUM_BUCKETS = 512
BEST_CHUNK = 2048  # values of a block of take_best
MAX_ROWS = 64  # rows whose weights are in memory at once
LIST_LENGTH = 2048  # most biases, and most stop ids, of a sequence

ROW_SAMPLING = np.dtype(
    [
        *((name, np.float64) for name in ("temperature", "top_p", "min_p")),
        *((name, np.float64) for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")),
        *((name, np.uint32) for name in ("seed_low", "seed_high", "output_index", "token_index")),
        *((name, np.int32) for name in ("row", "seat", "top_k", "num_biases", "num_stops")),
        *((name, np.int32) for name in ("has_penalties", "masks_stops", "padding")),
    ]
)  # as sample.cu has it


class CudaSampler:
    """The memory of seats, and the kernels of sample.cu over it.

    Args:
        device: with the kernels loaded.
        vocab_size: length of a row of logits.
        max_rows: most rows of logits of a step.
        max_logits: most rows of logits in memory at once.
        num_seats: most sequences of a step.
    """

    def __init__(self, device: Device, vocab_size: int, max_rows: int, max_logits: int, num_seats: int) -> None:
        self._device, self._vocab_size = device, vocab_size
        self._num_chunks = -(-vocab_size // CHUNK)
        assert self._num_chunks <= MAX_CHUNKS
        self.token_ids = device.allocate(4 * max_rows)  # of the step's rows of logits
        self._best = device.allocate(8 * max_logits)
        self._counters = device.allocate(4 * max_logits)
        # By seat.
        self._last_tokens = device.allocate(4 * num_seats)
        self._counts = device.allocate(4 * num_seats * vocab_size)
        self._bias_ids, self._stop_ids = (device.allocate(4 * num_seats * LIST_LENGTH) for _ in range(2))
        self._biases = device.allocate(8 * num_seats * LIST_LENGTH)
        self._parameters = np.zeros(num_seats, ROW_SAMPLING)
        self._takes_argmax = np.ones(num_seats, np.bool_)
        self._min_tokens = np.zeros(num_seats, np.int32)  # 0 without stop ids
        # By row, of those that are weighed at once.
        self._max_weighed = min(MAX_ROWS, num_seats)
        chunks = 8 * self._max_weighed * self._num_chunks
        self._values = device.allocate(8 * self._max_weighed * vocab_size)
        self._ids = device.allocate(4 * self._max_weighed * vocab_size)
        self._largest = device.allocate(2 * chunks)
        self._chunk_best, self._chunk_sums = device.allocate(chunks), device.allocate(chunks)
        self._chunk_ties = device.allocate(chunks // 2)
        self._row_best = device.allocate(8 * self._max_weighed)
        self._buckets = device.allocate(8 * 2 * NUM_BUCKETS * self._max_weighed)  # zero between steps
        self._num_listed = device.allocate(4 * self._max_weighed)  # the same
        self._cuts = device.allocate(24 * self._max_weighed)
        # What set_counts reads: prompt and output have no more distinct ids than there are.
        self._seen = device.allocate(8 * vocab_size)

    def take_seats(self, draws: Draws) -> None:
        """Bring to the device what the draws that start their seats need."""
        for place in draws.starts:
            self._take_seat(int(draws.seats[place]), draws.samplers[place])

    def rows(self, draws: Draws) -> NDArray[np.void]:
        """(num_rows,) of ROW_SAMPLING: the draws that are not simply the best of their row, in their order."""
        seats, indices = draws.seats, draws.token_indices
        masks = indices < self._min_tokens[seats]
        (chosen,) = (masks | ~self._takes_argmax[seats]).nonzero()
        rows = self._parameters[seats[chosen]]
        rows["token_index"] = indices[chosen]
        rows["row"] = draws.rows[chosen]
        rows["masks_stops"] = masks[chosen]
        return rows

    def resolve(self, token_ids: int, count: int) -> None:
        """Put the last tokens of seats where the ids of a step, (count,) at an address, name the seats."""
        self._device.launch("resolve_tokens", (-(-count // 256), 1, 1), 256, token_ids, self._last_tokens, count)

    def take_best(self, logits: int, seats: int, start: int, stop: int) -> None:
        """Take the best of rows start : stop of the step's logits, which lie at `logits` from `start` on.

        Args:
            seats: address of (num_logits,) ints, -1 for rows that don't draw.
        """
        grid = (-(-self._vocab_size // BEST_CHUNK), stop - start, 1)
        addresses = (logits, seats + 4 * start, self.token_ids + 4 * start, self._last_tokens)
        self._device.launch("take_best", grid, 256, *addresses, self._best, self._counters, self._vocab_size)

    def draw(self, logits: int, rows: int, parameters: NDArray[np.void]) -> None:
        """Draw for rows that are not simply the best, after `take_best`.

        Args:
            logits: address of the step's row 0 (which need not be in memory).
            rows: address of the parameters on the device.
            parameters: (num_rows,) of ROW_SAMPLING.
        """
        for start in range(0, len(parameters), self._max_weighed):
            some = parameters[start : start + self._max_weighed]
            self._draw(logits, rows + start * ROW_SAMPLING.itemsize, len(some), bool((some["top_p"] < 1).any()))

    def _draw(self, logits: int, rows: int, count: int, has_nucleus: bool) -> None:
        vocab_size = self._vocab_size
        sums = (self._chunk_best, self._chunk_sums, self._row_best)
        lists = (self._bias_ids, self._biases, self._stop_ids)
        adjusted = (self._values, self._largest)
        self._over_chunks("adjust_rows", count, rows, logits, self._counts, *lists, *adjusted, vocab_size, LIST_LENGTH)
        weighed = (self._largest, self._values, *sums)
        self._over_chunks("weigh_rows", count, rows, self._stop_ids, *weighed, vocab_size, LIST_LENGTH)
        if has_nucleus:
            self._find_nuclei(rows, count)
        drawn = (self.token_ids, self._last_tokens, self._counts)
        cut = (self._cuts, self._chunk_ties)
        arguments = (rows, self._values, self._ids, *sums, *cut, *drawn, vocab_size, self._num_chunks)
        self._device.launch("draw_rows", (count, 1, 1), CHUNK, *arguments)

    def _find_nuclei(self, rows: int, count: int) -> None:
        vocab_size, buckets = self._vocab_size, self._buckets
        for level in (1, 2):
            arguments = (rows, self._values, self._chunk_sums, buckets, vocab_size, level)
            self._over_chunks("sum_buckets", count, *arguments)
        listed = (self._chunk_sums, buckets, self._ids, self._num_listed)
        self._over_chunks("list_border", count, rows, self._values, *listed, vocab_size)
        found = (rows, self._values, self._ids, self._num_listed, self._chunk_sums, buckets, self._cuts)
        self._device.launch("find_cut", (count, 1, 1), CHUNK, *found, vocab_size, self._num_chunks)
        kept = (rows, self._values, self._cuts, self._chunk_sums, self._chunk_ties)
        self._over_chunks("sum_kept", count, *kept, vocab_size)

    def _over_chunks(self, name: str, count: int, *arguments: int) -> None:
        self._device.launch(name, (self._num_chunks, count, 1), 256, *arguments)

    def _take_seat(self, seat: int, sampler: OutputSampler) -> None:
        sampling, seen = sampler.sampling, sampler.seen
        assert max(len(sampler.bias_ids), len(sampler.stop_ids)) <= LIST_LENGTH
        self._takes_argmax[seat] = sampler.is_plain_greedy
        self._min_tokens[seat] = sampler.min_tokens if len(sampler.stop_ids) else 0
        self._parameters[seat] = (
            *(sampling.temperature, sampling.top_p, sampling.min_p),
            *(sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty),
            *(sampling.seed & 0xFFFFFFFF, sampling.seed >> 32, sampler.index, 0),
            *(0, seat, min(sampling.top_k, self._vocab_size), len(sampler.bias_ids), len(sampler.stop_ids)),
            *(seen is not None, 0, 0),
        )
        first = seat * LIST_LENGTH
        if len(sampler.bias_ids):
            self._device.upload(self._bias_ids + 4 * first, sampler.bias_ids.astype(np.int32))
            self._device.upload(self._biases + 8 * first, sampler.biases)
        if self._min_tokens[seat] > sampler.num_tokens:
            self._device.upload(self._stop_ids + 4 * first, sampler.stop_ids.astype(np.int32))
        if seen is not None:
            counts = self._counts + 4 * seat * self._vocab_size
            self._device.clear(counts, 4 * self._vocab_size)
            values = self._seen + 4 * self._vocab_size
            self._device.upload(self._seen, seen.ids.astype(np.int32))
            self._device.upload(values, seen.counts.astype(np.uint32))
            num_ids = len(seen.ids)
            self._device.launch("set_counts", (-(-num_ids // 256), 1, 1), 256, self._seen, values, counts, num_ids)
