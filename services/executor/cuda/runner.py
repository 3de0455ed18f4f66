"""Runs a model on a GPU over KV blocks of its own, step after step.

`launch` only hands work to the GPU: a step's arrays go there in one copy, tokens that are not known yet are taken from
where they were drawn, and what the host is to read comes back behind the step. So the GPU always has the next
step before it has finished one. Two sets of page-locked arrays take turns.

Steps in which every sequence has one token run as a CUDA graph of their shape, captured at the start or when the shape
first occurs; their rows are filled up to the next of `GRAPH_ROWS`, so that there are few shapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from services.executor.cuda.arrays import Epilogue, Product
from services.executor.cuda.device import Device, Graph
from services.executor.cuda.kernels import modules_of
from services.executor.cuda.kv import (
    BLOCK_MULTIPLE,
    CudaStep,
    Shape,
    allocate_kv,
    block_bytes,
    count_items,
    lay_out,
    max_ints,
    pack,
    padded_head_size,
)
from services.executor.cuda.ops import CudaOps, item_tokens, wide_tokens
from services.executor.cuda.products import SMALL_ROWS
from services.executor.cuda.readback import HostBuffer, Launched, RowsToDraw, WantedLogits
from services.executor.cuda.sampling import ROW_SAMPLING, CudaSampler
from services.executor.cuda.weights import CudaWeights
from services.executor.cuda.workspace import MAX_PARTIALS, Workspace
from services.executor.models import MODELS
from services.executor.step import FULL, GPU_DEPTH, WINDOW, Draws, KVGroup, StepBatch, StepResult
from shared.errors import invalid_field
from shared.gpt_config import GPTConfig
from shared.memory import kv_groups

GRAPH_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MAX_LOGITS = 256  # rows of logits at once
MAX_WANTED = 32  # rows of logits that a step brings to the host without waiting for them
MAX_HEAD_SIZE = 128
BUSY_BLOCKS = 3  # of attention on each multiprocessor, that splitting aims at: as many as run at once on Hopper
MAX_SPLITS = 32  # of a sequence's positions: more take longer to merge than they save
SPLIT_CHUNKS = 4  # of 32 positions, that a split has at least: one for each of its warps


class CudaRunner:
    """Implements `services.executor.step.Runner` with CUDA: one step runs while the next one waits behind it.

    Args:
        device: the GPU; the runner's kernels are compiled (or found in the cache) here.
        weights: the model's, in layout cuda.v1.
        block_size: positions in a KV block, a multiple of 32.
        num_blocks: KV blocks of each group, by its name.
        max_batch_tokens: most rows of a step.
        max_sequences: most sequences of a step.
        cache: folder of compiled kernels; None is the user's own.
        report: called with (kernels compiled, kernels in all).

    Raises:
        ServiceError: FIELD_INVALID for another block size or a head that attention does not take, VRAM_EXHAUSTED.
    """

    depth = GPU_DEPTH

    def __init__(
        self,
        device: Device,
        weights: CudaWeights,
        block_size: int,
        num_blocks: Mapping[str, int],
        max_batch_tokens: int,
        max_sequences: int,
        cache: Path | None = None,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        config = weights.config
        _check(config, block_size)
        self._device, self._config, self._block_size = device, config, block_size
        assert BUSY_BLOCKS * device.num_multiprocessors <= MAX_PARTIALS
        self._groups = [KVGroup(group.name, group.num_layers, group.window) for group in kv_groups(config, block_size)]
        device.load(modules_of(config, weights.families), cache, report)
        graph_rows = next((rows for rows in GRAPH_ROWS if rows >= max_sequences), max_sequences)
        max_rows = max(max_batch_tokens, graph_rows)
        self._max_rows = max_rows
        self._max_logits = min(MAX_LOGITS, max_rows)
        self._workspace = Workspace(device, config, max_rows, self._max_logits)
        self._ops = CudaOps(device, config, self._workspace, block_size)
        self._model = MODELS[config.architecture](cast(Any, weights), cast(Any, self._ops))
        by_name = {group.name: group for group in self._groups}
        layer_groups = [by_name[WINDOW if config.is_windowed(layer) else FULL] for layer in range(config.num_layers)]
        self._kv_layers = [
            allocate_kv(device, config, group, num_blocks[group.name], block_size) for group in layer_groups
        ]
        self._kv_bytes = sum(2 * num_blocks[group.name] * block_bytes(config, block_size) for group in layer_groups)
        table_width = _table_width(-(-config.context_length // block_size))
        num_ints = max_ints(self._groups, max_rows, graph_rows, table_width)
        num_ints += max_sequences * ROW_SAMPLING.itemsize // 4
        self._inputs = device.allocate(4 * num_ints)
        self._sampler = CudaSampler(device, config.vocab_size, max_rows, self._max_logits, max_sequences)
        num_wanted = min(MAX_WANTED, max_rows)
        self._buffers = [
            HostBuffer(
                device.pinned((num_ints,), np.int32),
                device.pinned((max_rows,), np.int32),
                device.pinned((num_wanted, config.vocab_size), np.float32),
            )
            for _ in range(self.depth)
        ]
        self._graphs: dict[Shape, Graph] = {}
        self._in_flight: deque[Launched] = deque()
        self._num_launched = 0
        self._capture_ahead(max_sequences, num_blocks[FULL])
        device.synchronize()

    @property
    def kv_groups(self) -> Sequence[KVGroup]:
        return self._groups

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of all KV blocks."""
        return self._kv_bytes

    def launch(self, batch: StepBatch, draws: Draws) -> None:
        with self._device.losing():
            self._launch(batch, draws)

    def collect(self) -> StepResult:
        with self._device.losing():
            return self._in_flight.popleft().result()

    def forward(self, batch: StepBatch) -> NDArray[np.float32]:
        """Write the KV of every row, and wait for it; logits (num_logits, vocab_size)."""
        num_logits = len(batch.logits_rows)
        none = np.empty(0, np.int32)
        wanted = np.arange(num_logits, dtype=np.int32)
        self.launch(batch, Draws(none, (), none, none, (), wanted))
        return self.collect().logits.copy()

    def shape_of(self, batch: StepBatch) -> Shape:
        """The shape under which a batch runs: rounded up where steps are to share a graph."""
        num_rows, num_logits, num_sequences = len(batch.token_ids), len(batch.logits_rows), len(batch.sequences)
        longest = max(sequence.context_length for sequence in batch.sequences)
        table_width = _table_width(-(-longest // self._block_size))
        tile_rows = self._tile_rows
        if not self._is_graph(batch):
            tokens, wide = item_tokens(self._config, tile_rows), wide_tokens(self._config)
            num_wide, num_narrow = count_items(batch, tokens, wide)
            num_items = num_wide + num_narrow
            return Shape(num_rows, num_logits, num_sequences, num_items, table_width, tile_rows, 1, num_wide, wide)
        return self._decode_shape(num_rows, table_width)

    def graph(self, shape: Shape) -> Graph:
        """The graph of a decoding step of this shape: from the last tokens to the best next ones."""
        if shape not in self._graphs:
            step = lay_out(shape, self._groups, self._inputs)

            def work() -> None:
                self._run_head(self._run_model(step))
                self._sampler.take_best(self._workspace.logits, step.seats, 0, shape.num_logits)

            self._graphs[shape] = self._device.capture(work)
        return self._graphs[shape]

    def close(self) -> None:
        """Free the graphs; the memory is the device's to free."""
        for graph in self._graphs.values():
            graph.destroy()
        self._graphs.clear()

    @property
    def _tile_rows(self) -> int:
        return 16 if self._config.num_heads // self._config.num_kv_heads <= 16 else 32

    def _decode_shape(self, num_rows: int, table_width: int) -> Shape:
        rows = next(rows for rows in GRAPH_ROWS if rows >= num_rows)
        return Shape(rows, rows, rows, rows, table_width, self._tile_rows, self._num_splits(rows, table_width))

    def _capture_ahead(self, max_sequences: int, num_blocks: int) -> None:
        """The graphs of any number of short contexts and of one context of any length: what first requests need."""
        for rows in GRAPH_ROWS[: bisect_left(GRAPH_ROWS, max_sequences) + 1]:
            self.graph(self._decode_shape(rows, _table_width(1)))
        width = _table_width(1)
        while width < min(num_blocks, -(-self._config.context_length // self._block_size)):
            width *= 2
            self.graph(self._decode_shape(1, width))

    def _num_splits(self, num_rows: int, table_width: int) -> int:
        """Splits of a sequence's positions: enough blocks to fill the GPU, each with work for its warps."""
        if num_rows > SMALL_ROWS:
            return 1
        chunks = table_width * self._block_size // BLOCK_MULTIPLE
        wanted = BUSY_BLOCKS * self._device.num_multiprocessors // (num_rows * self._config.num_kv_heads)
        return max(1, min(MAX_SPLITS, wanted, chunks // SPLIT_CHUNKS))

    def _launch(self, batch: StepBatch, draws: Draws) -> None:
        assert 1 <= len(batch.token_ids) <= self._max_rows
        buffer = self._buffers[self._num_launched % self.depth]
        shape = self.shape_of(batch)
        self._sampler.take_seats(draws)  # before the rows to draw are made of what is known of seats
        step, rows = self._upload(batch, shape, draws, buffer)
        wanted = WantedLogits(self._device, self._workspace.logits, draws.wanted, buffer.logits)
        if self._is_graph(batch):
            self.graph(shape).launch()
            self._draw(rows, 0, len(batch.logits_rows))
            wanted.read(0, len(batch.logits_rows))
        else:
            self._run_pieces(step, rows, wanted)
        token_ids = buffer.token_ids[: len(batch.logits_rows)]
        if len(token_ids):
            self._device.download(self._sampler.token_ids, token_ids)
        self._in_flight.append(Launched(self._device.mark(), token_ids, draws.rows, wanted))
        self._num_launched += 1

    def _is_graph(self, batch: StepBatch) -> bool:
        """Whether every sequence has one token and logits of every row are wanted."""
        num_rows = len(batch.token_ids)
        return num_rows == len(batch.sequences) == len(batch.logits_rows) and num_rows <= GRAPH_ROWS[-1]

    def _upload(self, batch: StepBatch, shape: Shape, draws: Draws, buffer: HostBuffer) -> tuple[CudaStep, RowsToDraw]:
        """Bring a step's arrays to the device, the rows to draw for behind them."""
        step = lay_out(shape, self._groups, self._inputs)
        tokens = item_tokens(self._config, shape.tile_rows)
        pack(batch, step, self._block_size, tokens, self._inputs, draws, buffer.inputs)
        rows = self._sampler.rows(draws)
        end = step.num_ints + rows.nbytes // 4
        buffer.inputs[step.num_ints : end] = rows.view(np.int32)
        self._device.upload(self._inputs, buffer.inputs[:end])
        return step, RowsToDraw(rows, self._inputs + 4 * step.num_ints)

    def _run_model(self, step: CudaStep) -> Product:
        self._sampler.resolve(step.token_ids, step.shape.num_rows)
        return cast(Product, self._model.forward(self._ops.prepare(step), self._kv_layers))

    def _run_pieces(self, step: CudaStep, rows: RowsToDraw, wanted: WantedLogits) -> None:
        """Run a step as it comes, the head for as many rows of logits at once as there is memory for."""
        head = self._run_model(step)
        for start in range(0, step.shape.num_logits, self._max_logits):
            stop = min(start + self._max_logits, step.shape.num_logits)
            self._run_head(self._ops.rows_of(head, start, stop))
            self._sampler.take_best(self._workspace.logits, step.seats, start, stop)
            self._draw(rows, start, stop)
            wanted.read(start, stop)

    def _draw(self, rows: RowsToDraw, start: int, stop: int) -> None:
        """Draw for those of the rows start : stop of logits, now in memory, that are not simply the best."""
        first, last = np.searchsorted(rows.parameters["row"], (start, stop)).tolist()
        if first < last:
            row_0 = self._workspace.logits - 4 * start * self.vocab_size
            self._sampler.draw(row_0, rows.address + first * ROW_SAMPLING.itemsize, rows.parameters[first:last])

    def _run_head(self, head: Product) -> None:
        if head.x.num_rows:
            self._ops.run(head, self._workspace.logits, self.vocab_size, Epilogue.STORE)


def _table_width(num_blocks: int) -> int:
    """Logical blocks of a table in steps that share a graph: a power of two."""
    return 1 << max(3, (num_blocks - 1).bit_length())


def _check(config: GPTConfig, block_size: int) -> None:
    if block_size < 1 or block_size % BLOCK_MULTIPLE != 0:
        raise invalid_field("block_size", f"a multiple of {BLOCK_MULTIPLE} on the GPU, got {block_size}")
    shared = config.num_heads // config.num_kv_heads
    if config.head_size > MAX_HEAD_SIZE or shared > (32 if padded_head_size(config) <= 64 else 16):
        raise invalid_field("model", f"heads of {config.head_size} values, {shared} to a key head, do not fit the GPU")
