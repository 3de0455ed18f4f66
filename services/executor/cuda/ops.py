"""The ops on a GPU, under the models that numpy's are under (services/executor/ops).

Residuals, sums and logits are float32; what products read (norms, heads, activations) is rounded to half, and keys,
values and queries are half. Products of a kind that another op can finish are not run when `linear` is called: it
returns a `Product`, and the op that takes it runs it with bias, activation or residual in its epilogue. Arrays are
addresses in a workspace that is made once; an op's result lives until the next op of its kind.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from services.executor.cuda.device import Device
from services.executor.cuda.kernels import PRODUCT_TILES, wgmma_strips
from services.executor.cuda.kv import CudaStep, KVLayer, padded_head_size
from services.executor.cuda.tiles import choose_tile
from services.executor.cuda.weights import ExpertMatrices, Matrix, Part, Vector
from services.executor.ops.numpy_ops import rope_frequencies
from shared.cuda_layout import TILE_COLUMNS, Family
from shared.gpt_config import GPTConfig
from shared.layout import round_up

LOG2_E = math.log2(math.e)  # attention's exponentials are of base 2
SMALL_ROWS = 8 * PRODUCT_TILES[-1]  # most that product.cu takes at once
FEW_ROWS = 64  # past them routing and storing keys have kernels of their own
GROUPED_ROWS = 512  # up to here experts have few rows each: product.cu, else product_tiled.cu
TILED_ROWS = 128  # of a block of product_tiled.cu
TARGET_BLOCKS = 1024  # of a decoding step's attention, at most where it splits: about eight on each multiprocessor
MAX_SPLITS = 64


class Epilogue(enum.IntEnum):
    """What a product does with its sums; the numbers are those of epilogue.cuh."""

    STORE = 0
    RESIDUAL = 1
    GELU = 2
    SWIGLU = 3


@dataclass(frozen=True)
class Floats:
    """float32, (num_rows, width)."""

    address: int
    num_rows: int
    width: int


@dataclass(frozen=True)
class Halves:
    """What a product reads: half, (num_rows, width), its rows `pitch` apart, what pads them zero."""

    address: int
    num_rows: int
    width: int

    @property
    def pitch(self) -> int:
        return round_up(self.width, TILE_COLUMNS)


@dataclass(frozen=True)
class Product:
    """x @ matrix + bias, not run yet."""

    x: Halves
    matrix: Matrix | Vector  # a Vector: the router's, (outputs, inputs) in float32
    bias: Vector | None


@dataclass(frozen=True)
class Routing:
    """The experts of each row, and pairs of rows and experts in their order; addresses."""

    num_pairs: int
    group_rows: int  # most rows of a group
    max_groups: int


@dataclass(frozen=True)
class ExpertOutputs:
    """The experts' outputs, (num_pairs, hidden) float32, not summed up yet."""

    address: int
    num_rows: int
    width: int


class Workspace:
    """The memory that ops write to, for steps of at most so many rows and rows of logits."""

    def __init__(self, device: Device, config: GPTConfig, max_rows: int, max_logits: int) -> None:
        def halves(rows: int, width: int) -> int:
            return device.allocate(2 * rows * round_up(width, TILE_COLUMNS))

        def floats(rows: int, width: int) -> int:
            return device.allocate(4 * rows * width)

        head_size = padded_head_size(config)
        qkv_size = config.query_size + 2 * config.kv_size
        pairs = max_rows * max(1, config.num_experts_used)
        self.x = floats(max_rows, config.hidden_size)
        self.embedded = floats(max_rows, config.hidden_size) if config.rope is None else 0
        self.selected = floats(max_rows, config.hidden_size)
        self.normed = halves(max_rows, config.hidden_size)
        self.qkv = floats(max_rows, qkv_size)
        self.angles = floats(max_rows, config.head_size)
        self.queries = device.allocate(2 * max_rows * config.num_heads * head_size)
        self.heads = halves(max_rows, config.query_size)
        self.hidden = halves(pairs, config.ffn_size)
        self.logits = floats(max_logits, config.vocab_size)
        self.partials = floats(TARGET_BLOCKS, 32 * (head_size + 2))
        self.counters = device.allocate(4 * max_rows * config.num_kv_heads)
        if config.num_experts:
            self.outputs = floats(pairs, config.hidden_size)
            self.router_logits = floats(max_rows, config.num_experts)
            self.expert_ids, self.row_ids, self.pair_places = (device.allocate(4 * pairs) for _ in range(3))
            self.expert_weights = floats(pairs, 1)
            self.groups = device.allocate(16 * (pairs // 8 + config.num_experts + 1))


class CudaOps:
    """Implements `services.executor.ops.Ops`.

    Args:
        device: with the model's kernels loaded.
        config: the model's dimensions.
        workspace: large enough for every step.
        block_size: positions in a KV block, a multiple of 32.
    """

    def __init__(self, device: Device, config: GPTConfig, workspace: Workspace, block_size: int) -> None:
        self._device, self._config, self._workspace = device, config, workspace
        self._block_size = block_size
        self._angles = 0
        self._is_hopper = device.capability == (9, 0)  # where product_wgmma.cu takes the products of many rows
        if config.rope is not None:
            frequencies = rope_frequencies(config.rope, config.head_size)
            self._frequencies = device.allocate(frequencies.nbytes)
            device.upload(self._frequencies, frequencies)
            device.synchronize()

    def prepare(self, step: CudaStep) -> CudaStep:
        """Compute what all layers need of the step: the rotary angles of its rows."""
        rope = self._config.rope
        if rope is not None:
            grid, threads = (step.shape.num_rows, 1, 1), self._config.head_size // 2
            arguments = (step.positions, self._frequencies, self._workspace.angles, rope.attention_factor)
            self._device.launch("rotation", grid, threads, *arguments)
        self._step = step
        return step

    def embed(self, table: Matrix, ids: int) -> Floats:
        (part,) = table.parts
        is_token = ids == self._step.token_ids
        x = Floats(
            self._workspace.x if is_token else self._workspace.embedded, self._step.shape.num_rows, table.num_inputs
        )
        arguments = (part.quants, part.scales, part.minima, ids, x.address, table.num_inputs, table.num_column_tiles)
        self._device.launch(f"embed_{part.family.name}", (x.num_rows, 1, 1), 128, *arguments)
        return x

    def add(self, x: Floats, y: Floats | Product | ExpertOutputs) -> Floats:
        if isinstance(y, Product):
            self.run(y, x.address, x.width, Epilogue.RESIDUAL)
        elif isinstance(y, ExpertOutputs):
            self._combine(x, y)
        else:
            count = x.num_rows * x.width
            self._device.launch("add", (-(-count // 256), 1, 1), 256, x.address, y.address, count)
        return x

    def rms_norm(self, x: Floats, weight: Vector) -> Halves:
        normed = Halves(self._workspace.normed, x.num_rows, x.width)
        if x.num_rows:
            arguments = (x.address, weight.address, normed.address, x.width, normed.pitch, self._config.norm_epsilon)
            self._device.launch("rms_norm", (x.num_rows, 1, 1), 256, *arguments)
        return normed

    def layer_norm(self, x: Floats, weight: Vector, bias: Vector) -> Halves:
        normed = Halves(self._workspace.normed, x.num_rows, x.width)
        if x.num_rows:
            addresses = (x.address, weight.address, bias.address, normed.address)
            arguments = (x.width, normed.pitch, self._config.norm_epsilon)
            self._device.launch("layer_norm", (x.num_rows, 1, 1), 256, *addresses, *arguments)
        return normed

    def linear(self, x: Halves, matrix: Matrix | Vector, bias: Vector | None = None) -> Product:
        return Product(x, matrix, bias)

    def gelu(self, x: Product) -> Halves:
        assert isinstance(x.matrix, Matrix)
        hidden = Halves(self._workspace.hidden, x.x.num_rows, x.matrix.num_outputs)
        self.run(x, hidden.address, hidden.pitch, Epilogue.GELU)
        return hidden

    def store_kv(self, qkv: Product, kv: KVLayer, step: CudaStep, *, rotate: bool) -> int:
        assert isinstance(qkv.matrix, Matrix)
        config, workspace = self._config, self._workspace
        self.run(qkv, workspace.qkv, qkv.matrix.num_outputs, Epilogue.STORE)
        num_rows, num_all = step.shape.num_rows, config.num_heads + 2 * config.num_kv_heads
        addresses = (workspace.qkv, workspace.angles if rotate else 0, step.places[kv.group])
        targets = (workspace.queries, kv.keys, kv.values)
        scale = LOG2_E / math.sqrt(config.head_size)
        sizes = (config.num_heads, config.num_kv_heads, self._block_size, scale)
        if num_rows > FEW_ROWS:
            grid = (num_all, -(-num_rows // 32), 1)
            self._device.launch("store_kv_many", grid, 256, *addresses, *targets, *sizes, num_rows)
        else:
            self._device.launch("store_kv", (num_all, num_rows, 1), 32, *addresses, *targets, *sizes)
        return workspace.queries

    def attention(self, queries: int, kv: KVLayer, step: CudaStep, sinks: Vector | None = None) -> Halves:
        config, shape = self._config, step.shape
        heads = Halves(self._workspace.heads, shape.num_rows, config.query_size)
        tables, sink_address = step.tables[kv.group], sinks.address if sinks else 0
        sizes = (config.num_heads, config.num_kv_heads, self._block_size, shape.table_width, kv.window, heads.pitch)
        if shape.num_wide:
            addresses = (queries, kv.keys, kv.values, step.items, tables, sink_address, heads.address)
            grid = (config.num_kv_heads, shape.num_wide, 1)
            self._device.launch("attention_prefill", grid, 128, *addresses, *sizes)
        if shape.num_items > shape.num_wide:
            items = step.items + 16 * shape.num_wide
            self._device.launch(
                f"attention_{shape.tile_rows // 16}",
                (config.num_kv_heads, shape.num_items - shape.num_wide, 1 if kv.window else shape.num_splits),
                128,
                *(queries, kv.keys, kv.values, items, tables, sink_address),
                *(heads.address, self._workspace.partials, self._workspace.counters),
                *sizes,
            )
        return heads

    def route(self, logits: Product, num_used: int) -> Routing:
        device, workspace, num_experts = self._device, self._workspace, self._config.num_experts
        x, weight, bias = logits.x, logits.matrix, logits.bias
        assert isinstance(weight, Vector)
        assert bias is not None
        num_rows = x.num_rows
        pairs = num_rows * num_used
        group_rows = TILED_ROWS if self._is_hopper and num_rows > SMALL_ROWS else _group_rows(num_rows)
        max_groups = min(pairs, num_experts + pairs // group_rows)
        addresses = (x.address, weight.address, bias.address, workspace.router_logits)
        if num_rows > FEW_ROWS:
            grid = (-(-num_rows // 32), -(-num_experts // 32), 1)
            device.launch("router_many", grid, 256, *addresses, num_rows, num_experts, x.width, x.pitch)
        else:
            device.launch("router", (num_experts, -(-num_rows // 8), 1), 128, *addresses, num_rows, x.width, x.pitch)
        chosen = (workspace.router_logits, workspace.expert_ids, workspace.expert_weights)
        order = (workspace.row_ids, workspace.pair_places, workspace.groups)
        sizes = (num_rows, num_experts, num_used, group_rows, max_groups)
        if num_rows <= FEW_ROWS:
            device.launch("route", (1, 1, 1), 1024, *chosen, *order, *sizes)
        else:
            device.launch("choose_experts", (-(-num_rows // 4), 1, 1), 128, *chosen, num_rows, num_experts, num_used)
            device.launch("sort_pairs", (1, 1, 1), 1024, workspace.expert_ids, *order, *sizes)
        return Routing(pairs, group_rows, max_groups)

    def experts(
        self,
        x: Halves,
        routing: Routing,
        gate_up: ExpertMatrices,
        gate_up_bias: Vector,
        down: ExpertMatrices,
        down_bias: Vector,
    ) -> ExpertOutputs:
        workspace = self._workspace
        hidden = Halves(workspace.hidden, routing.num_pairs, gate_up.num_outputs)
        outputs = ExpertOutputs(workspace.outputs, x.num_rows, down.num_outputs)
        biases = gate_up_bias.addresses
        self._run_experts(
            x, routing, gate_up, biases, workspace.row_ids, (hidden.address, hidden.pitch), Epilogue.SWIGLU
        )
        down_biases = (down_bias.address, 0)
        self._run_experts(hidden, routing, down, down_biases, 0, (outputs.address, outputs.width), Epilogue.STORE)
        return outputs

    def select_rows(self, x: Floats, rows: int) -> Floats:
        selected = Floats(self._workspace.selected, self._step.shape.num_logits, x.width)
        if selected.num_rows:
            self._device.launch("gather", (selected.num_rows, 1, 1), 256, x.address, rows, selected.address, x.width)
        return selected

    def rows_of(self, product: Product, start: int, stop: int) -> Product:
        """The product of some of its rows."""
        x = product.x
        return replace(product, x=Halves(x.address + 2 * start * x.pitch, stop - start, x.width))

    def run(self, product: Product, address: int, pitch: int, epilogue: Epilogue) -> None:
        """Run a product; its rows go to `address`, `pitch` values apart, or are added to what is there."""
        matrix = product.matrix
        assert isinstance(matrix, Matrix)
        for part in matrix.parts:
            size = 4 if epilogue in (Epilogue.STORE, Epilogue.RESIDUAL) else 2
            bias = product.bias.address + 4 * part.first_output if product.bias is not None else 0
            self._run_part(product.x, matrix, part, bias, (address + size * part.first_output, pitch), epilogue)

    def _run_part(
        self, x: Halves, matrix: Matrix, part: Part, bias: int, out: tuple[int, int], epilogue: Epilogue
    ) -> None:
        address, pitch = out
        addresses = (part.quants, part.scales, part.minima, bias, 0, x.address, address, 0, 0)
        sizes = (x.pitch, pitch, x.num_rows, part.num_outputs, matrix.num_column_tiles, epilogue)
        if x.num_rows > SMALL_ROWS and self._is_hopper:
            self._launch_wgmma(part.family, part.num_strips, x.num_rows, addresses, sizes)
            return
        if x.num_rows > SMALL_ROWS:
            grid = (-(-part.num_strips // 8), -(-x.num_rows // TILED_ROWS), 1)
            self._device.launch(f"product_tiled_{part.family.name}", grid, 256, *addresses, *sizes, part.num_strips)
            return
        tiles = _product_tiles(x.num_rows)
        self._device.launch(f"product_{tiles}_{part.family.name}", (part.num_strips, 1, 1), 256, *addresses, *sizes)

    def _run_experts(
        self,
        x: Halves,
        routing: Routing,
        matrices: ExpertMatrices,
        biases: tuple[int, ...],
        row_ids: int,
        out: tuple[int, int],
        epilogue: Epilogue,
    ) -> None:
        address, pitch = out
        groups = self._workspace.groups
        addresses = (matrices.quants, matrices.scales, matrices.minima, *biases, x.address, address, row_ids, groups)
        sizes = (x.pitch, pitch, routing.num_pairs, matrices.num_outputs, matrices.num_column_tiles, epilogue)
        family, strips = matrices.family.name, matrices.num_strips
        if routing.group_rows == TILED_ROWS and self._is_hopper:
            self._launch_wgmma(matrices.family, strips, 0, addresses, sizes, routing.max_groups)
        elif routing.group_rows == TILED_ROWS:
            grid = (-(-strips // 8), routing.max_groups, 1)
            self._device.launch(f"product_tiled_{family}", grid, 256, *addresses, *sizes, strips)
        else:
            grid = (strips, routing.max_groups, 1)
            self._device.launch(f"product_{routing.group_rows // 8}_{family}", grid, 256, *addresses, *sizes)

    def _launch_wgmma(
        self,
        family: Family,
        num_strips: int,
        num_rows: int,
        addresses: tuple[int, ...],
        sizes: tuple[int, ...],
        num_groups: int = 0,  # of experts' rows; else all rows are one matrix's
    ) -> None:
        strips, rows = wgmma_strips(family)[-1], TILED_ROWS
        if num_groups == 0:
            choices, num_processors = wgmma_strips(family), self._device.num_multiprocessors
            strips, rows = choose_tile(num_rows, num_strips, sizes[4], family, choices, num_processors)
        num_row_tiles = num_groups or -(-num_rows // rows)
        num_tiles = num_row_tiles * -(-num_strips // (8 * strips))
        grid = (min(num_tiles, self._device.num_multiprocessors), 1, 1)
        name = f"product_wgmma_{strips}_{family.name}"
        self._device.launch(name, grid, 384, *addresses, *sizes, num_strips, rows, num_row_tiles)

    def _combine(self, x: Floats, outputs: ExpertOutputs) -> None:
        workspace = self._workspace
        addresses = (outputs.address, workspace.pair_places, workspace.expert_weights, x.address)
        grid = (-(-x.width // 256), x.num_rows, 1)
        self._device.launch("combine", grid, 256, *addresses, x.width, self._config.num_experts_used)


def _product_tiles(num_rows: int) -> int:
    """The fewest tiles of 8 rows that product.cu comes in and that hold the rows."""
    return next(tiles for tiles in PRODUCT_TILES if 8 * tiles >= num_rows)


def _group_rows(num_rows: int) -> int:
    """Most rows of one expert in a group: about twice what an expert of 32 gets of 4 each."""
    for limit, group_rows in ((8, 8), (32, 16), (64, 32), (GROUPED_ROWS, 64)):
        if num_rows <= limit:
            return group_rows
    return TILED_ROWS


def item_tokens(config: GPTConfig, tile_rows: int) -> int:
    """Tokens of an item of attention, whose rows of queries fill a tile."""
    return tile_rows // (config.num_heads // config.num_kv_heads)


def wide_tokens(config: GPTConfig) -> int:
    """The same of an item of attention_prefill.cu."""
    rows = 128 if padded_head_size(config) <= 64 else 64
    return rows // (config.num_heads // config.num_kv_heads)
