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
from services.executor.cuda.kernels import (
    ATTENTION_WGMMA_BYTES,
    ATTENTION_WGMMA_HEAD,
    EXACT,
    ONE_DEPTH,
    ONE_WARPS,
    PRODUCT_TILES,
    wgmma_stages,
    wgmma_strips,
)
from services.executor.cuda.kv import CudaStep, KVLayer, padded_head_size
from services.executor.cuda.tiles import choose_tile
from services.executor.cuda.weights import ExpertMatrices, Matrix, Part, Vector
from services.executor.ops.numpy_ops import rope_frequencies
from shared.cuda_layout import TILE_COLUMNS, Family
from shared.gpt_config import GPTConfig
from shared.layout import round_up

LOG2_E = math.log2(math.e)  # attention's exponentials are of base 2
FEW_ROWS = 8  # most that product.cu and normed_route take at once
SMALL_ROWS = 8 * PRODUCT_TILES[-1]  # most that product_rows.cu takes at once
SORTED_PAIRS = 1024  # of rows and experts, chosen and sorted by one kernel
MANY_ROWS = 64  # past them norms, routing and storing keys have kernels of their own
MAX_NORM = 8192  # values of a row that norm_many.cu takes
HOPPER_GROUPED_ROWS = 256  # up to here experts have few rows each on Hopper: product_rows.cu, else product_wgmma.cu
GROUPED_ROWS = 512  # the same on others, before product_tiled.cu
TILED_ROWS = 128  # of a block of product_tiled.cu
MAX_USED = 8  # experts of a row that product_one.cu chooses
NUM_WARPS = 8  # of a block of product.cu and product_rows.cu
MAX_STRIPS = 128  # of a block of product_one.cu
ONE_BLOCKS = 3  # of it on each multiprocessor
FEW_STRIPS = 6  # of a block of product.cu where experts keep the GPU busy
MANY_STRIP_ROWS = 16  # up to here product_rows.cu is the better one on Hopper even for a matrix of many strips
WHOLE_STRIPS = 1024  # from so many strips on a warp of product_rows.cu takes a whole one
MAX_PARTIALS = 1024  # of a decoding step's attention: rows, key heads and splits
MAX_SPLITS = 64
STATIC_BYTES = 10240  # that a kernel's static shared memory stays below
MAX_GROUP = 16  # query heads of a key head in attention_decode.cu

GROUP_LIMITS = ((16, 8), (64, 16), (GROUPED_ROWS, 32))  # rows of a step, rows of an expert's group

# Bytes that a warp's lanes hold of a tile in a slot of their ring (weights.cuh).
SLOT_BYTES = {
    Family.MXFP4: 640,
    Family.INT8: 1280,
    Family.AFFINE32: 2048,
    Family.AFFINE16: 1536,
    Family.F32: 4096,
    Family.F16: 2048,
    Family.BF16: 2048,
}


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
    is_spread: bool = False  # columns in the order that product_wgmma.cu reads (spread.cuh)

    @property
    def pitch(self) -> int:
        return round_up(self.width, TILE_COLUMNS)


@dataclass(frozen=True)
class Normed:
    """RMSNorm of rows, not run yet: what reads few of them does it, what reads many says how they are to lie."""

    x: Floats
    weight: Vector

    @property
    def num_rows(self) -> int:
        return self.x.num_rows

    @property
    def width(self) -> int:
        return self.x.width


@dataclass(frozen=True)
class Unplaced:
    """Queries, keys and values of rows that attention turns and places itself: those of a decoding step."""

    rotate: bool


@dataclass(frozen=True)
class Product:
    """x @ matrix + bias, not run yet."""

    x: Halves | Normed
    matrix: Matrix | Vector  # a Vector: the router's, (outputs, inputs) in float32
    bias: Vector | None


@dataclass(frozen=True)
class Routing:
    """The experts of each row, and pairs of rows and experts in their order, in the workspace."""

    x: Halves  # what was routed
    num_used: int
    num_pairs: int
    group_rows: int  # most rows of a group
    max_groups: int
    is_sorted: bool = True  # else there are logits, of one row


@dataclass(frozen=True)
class ExpertSum:
    """The weighted sum of one row's experts, not run yet."""

    hidden: Halves  # a row for each expert
    down: ExpertMatrices
    bias: Vector


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
        self.partials = floats(MAX_PARTIALS, 32 * (head_size + 2))
        self.counters = device.allocate(4 * max_rows * config.num_kv_heads)
        if config.num_experts:
            self.outputs = floats(pairs, config.hidden_size)
            self.router_logits = floats(max_rows, config.num_experts)
            self.route_counter = device.allocate(4)
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

    def add(self, x: Floats, y: Floats | Product | ExpertSum | ExpertOutputs) -> Floats:
        if isinstance(y, Product):
            self.run(y, x.address, x.width, Epilogue.RESIDUAL)
        elif isinstance(y, ExpertSum):
            self._run_sum(y, x)
        elif isinstance(y, ExpertOutputs):
            self._combine(x, y)
        else:
            count = x.num_rows * x.width
            self._device.launch("add", (-(-count // 256), 1, 1), 256, x.address, y.address, count)
        return x

    def rms_norm(self, x: Floats, weight: Vector) -> Normed:
        return Normed(x, weight)

    def halves(self, rows: Halves | Normed, is_spread: bool = False) -> Halves:
        """Rows in half, their norm run if it has not been: then spread on a Hopper, if that is wanted and possible."""
        if isinstance(rows, Halves):
            return rows
        x, weight = rows.x, rows.weight
        is_wide = x.width % 4 == 0 and x.width <= MAX_NORM
        normed = Halves(self._workspace.normed, x.num_rows, x.width, is_spread and is_wide and self._is_hopper)
        if x.num_rows:
            arguments = (x.address, weight.address, normed.address, x.width, normed.pitch, self._config.norm_epsilon)
            if normed.is_spread or (x.num_rows > MANY_ROWS and is_wide):
                self._device.launch("rms_norm_many", (x.num_rows, 1, 1), 256, *arguments, int(normed.is_spread))
            else:
                self._device.launch("rms_norm", (x.num_rows, 1, 1), 256, *arguments)
        return normed

    def layer_norm(self, x: Floats, weight: Vector, bias: Vector) -> Halves:
        normed = Halves(self._workspace.normed, x.num_rows, x.width)
        if x.num_rows:
            addresses = (x.address, weight.address, bias.address, normed.address)
            arguments = (x.width, normed.pitch, self._config.norm_epsilon)
            self._device.launch("layer_norm", (x.num_rows, 1, 1), 256, *addresses, *arguments)
        return normed

    def linear(self, x: Halves | Normed, matrix: Matrix | Vector, bias: Vector | None = None) -> Product:
        return Product(x, matrix, bias)

    def gelu(self, x: Product) -> Halves:
        assert isinstance(x.matrix, Matrix)
        rows = self.halves(x.x)
        hidden = Halves(self._workspace.hidden, rows.num_rows, x.matrix.num_outputs, rows.is_spread)
        self.run(replace(x, x=rows), hidden.address, hidden.pitch, Epilogue.GELU)
        return hidden

    def store_kv(self, qkv: Product, kv: KVLayer, step: CudaStep, *, rotate: bool) -> int | Unplaced:
        assert isinstance(qkv.matrix, Matrix)
        self.run(qkv, self._workspace.qkv, qkv.matrix.num_outputs, Epilogue.STORE)
        return self.place_kv(kv, step, rotate=rotate)

    def place_kv(self, kv: KVLayer, step: CudaStep, *, rotate: bool) -> int | Unplaced:
        """What `store_kv` does with queries, keys and values that lie in the workspace."""
        config, workspace = self._config, self._workspace
        if step.shape.is_decode and config.num_heads // config.num_kv_heads <= MAX_GROUP:
            return Unplaced(rotate)
        num_rows, num_all = step.shape.num_rows, config.num_heads + 2 * config.num_kv_heads
        addresses = (workspace.qkv, workspace.angles if rotate else 0, step.places[kv.group])
        targets = (workspace.queries, kv.keys, kv.values)
        scale = LOG2_E / math.sqrt(config.head_size)
        sizes = (config.num_heads, config.num_kv_heads, self._block_size, scale)
        if num_rows > MANY_ROWS:
            grid = (num_all, -(-num_rows // 32), 1)
            self._device.launch("store_kv_many", grid, 256, *addresses, *targets, *sizes, num_rows)
        else:
            self._device.launch("store_kv", (num_all, num_rows, 1), 32, *addresses, *targets, *sizes)
        return workspace.queries

    def attention(self, queries: int | Unplaced, kv: KVLayer, step: CudaStep, sinks: Vector | None = None) -> Halves:
        config, shape = self._config, step.shape
        is_spread = self._is_hopper and shape.num_rows > MANY_ROWS
        heads = Halves(self._workspace.heads, shape.num_rows, config.query_size, is_spread)
        if isinstance(queries, Unplaced):
            self._attend_decoding(queries, kv, step, sinks, heads)
            return heads
        tables, sink_address = step.tables[kv.group], sinks.address if sinks else 0
        sizes = (config.num_heads, config.num_kv_heads, self._block_size, shape.table_width, kv.window, heads.pitch)
        if shape.num_wide:
            addresses = (queries, kv.keys, kv.values, step.items, tables, sink_address, heads.address)
            grid = (config.num_kv_heads, shape.num_wide, 1)
            if is_spread and padded_head_size(config) == ATTENTION_WGMMA_HEAD:
                shared_bytes = ATTENTION_WGMMA_BYTES
                self._device.launch("attention_wgmma", grid, 384, *addresses, *sizes, shared_bytes=shared_bytes)
            else:
                self._device.launch("attention_prefill", grid, 128, *addresses, *sizes, is_spread)
        if shape.num_items > shape.num_wide:
            items = step.items + 16 * shape.num_wide
            self._device.launch(
                f"attention_{shape.tile_rows // 16}",
                (config.num_kv_heads, shape.num_items - shape.num_wide, 1 if kv.window else shape.num_splits),
                128,
                *(queries, kv.keys, kv.values, items, tables, sink_address),
                *(heads.address, self._workspace.partials, self._workspace.counters),
                *(*sizes, is_spread),
            )
        return heads

    def route(self, logits: Product, num_used: int) -> Routing:
        device, workspace, num_experts = self._device, self._workspace, self._config.num_experts
        x, weight, bias = logits.x, logits.matrix, logits.bias
        assert isinstance(weight, Vector)
        assert bias is not None
        num_rows = x.num_rows
        pairs = num_rows * num_used
        if not (isinstance(x, Normed) and num_rows <= FEW_ROWS):
            x = self.halves(x, num_rows > HOPPER_GROUPED_ROWS)
        group_rows = TILED_ROWS if isinstance(x, Halves) and x.is_spread else _group_rows(num_rows)
        max_groups = min(pairs, num_experts + pairs // group_rows)
        if isinstance(x, Normed):
            assert pairs <= SORTED_PAIRS
            normed = Halves(workspace.normed, num_rows, x.width)
            device.launch(
                "normed_route",
                (num_experts, 1, 1),
                256,
                *(x.x.address, x.weight.address, weight.address, bias.address, normed.address),
                *(workspace.router_logits, workspace.route_counter, workspace.expert_ids, workspace.expert_weights),
                *(workspace.row_ids, workspace.pair_places, workspace.groups),
                *(num_rows, x.width, normed.pitch, num_used, group_rows, max_groups, self._config.norm_epsilon),
            )
            return Routing(normed, num_used, pairs, group_rows, max_groups, is_sorted=num_rows > 1)
        addresses = (x.address, weight.address, bias.address, workspace.router_logits)
        if num_rows > MANY_ROWS:
            grid = (-(-num_rows // 32), -(-num_experts // 32), 1)
            numbers = (num_rows, num_experts, x.width, x.pitch, x.is_spread)
            device.launch("router_many", grid, 256, *addresses, *numbers)
        else:
            device.launch("router", (num_experts, -(-num_rows // 8), 1), 256, *addresses, num_rows, x.width, x.pitch)
        routing = Routing(x, num_used, pairs, group_rows, max_groups)
        if pairs <= SORTED_PAIRS:
            self._sort(routing)
        else:
            chosen = (workspace.router_logits, workspace.expert_ids, workspace.expert_weights)
            order = (workspace.row_ids, workspace.pair_places, workspace.groups)
            sizes = (num_rows, num_experts, num_used, group_rows, max_groups)
            device.launch("choose_experts", (-(-num_rows // 4), 1, 1), 128, *chosen, num_rows, num_experts, num_used)
            device.launch("sort_pairs", (1, 1, 1), 1024, workspace.expert_ids, *order, *sizes)
        return routing

    def experts(
        self,
        x: Halves | Normed,
        routing: Routing,
        gate_up: ExpertMatrices,
        gate_up_bias: Vector,
        down: ExpertMatrices,
        down_bias: Vector,
    ) -> ExpertSum | ExpertOutputs:
        workspace = self._workspace
        hidden = Halves(workspace.hidden, routing.num_pairs, gate_up.num_outputs, routing.x.is_spread)
        target = (hidden.address, hidden.pitch)
        if not routing.is_sorted:
            if self._takes_one(gate_up.family, 1, gate_up) and self._takes_one(down.family, routing.num_used, down):
                self._run_chosen(routing, gate_up, gate_up_bias, hidden)
                return ExpertSum(hidden, down, down_bias)
            self._sort(routing)
        outputs = ExpertOutputs(workspace.outputs, x.num_rows, down.num_outputs)
        biases = gate_up_bias.addresses
        self._run_experts(routing.x, routing, gate_up, biases, workspace.row_ids, target, Epilogue.SWIGLU)
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
        if isinstance(x, Normed):
            rows = Floats(x.x.address + 4 * start * x.width, stop - start, x.width)
            return replace(product, x=replace(x, x=rows))
        return replace(product, x=replace(x, address=x.address + 2 * start * x.pitch, num_rows=stop - start))

    def run(self, product: Product, address: int, pitch: int, epilogue: Epilogue) -> None:
        """Run a product; its rows go to `address`, `pitch` values apart, or are added to what is there."""
        matrix = product.matrix
        assert isinstance(matrix, Matrix)
        for part in matrix.parts:
            size = 4 if epilogue in (Epilogue.STORE, Epilogue.RESIDUAL) else 2
            bias = product.bias.address + 4 * part.first_output if product.bias is not None else 0
            self._run_part(product.x, matrix, part, bias, (address + size * part.first_output, pitch), epilogue)

    def _run_part(
        self,
        x: Halves | Normed,
        matrix: Matrix,
        part: Part,
        bias: int,
        out: tuple[int, int],
        epilogue: Epilogue,
    ) -> None:
        address, pitch = out
        family, strips = part.family, part.num_strips
        planes, sizes = (part.quants, part.scales, part.minima, bias, 0), (part.num_outputs, matrix.num_column_tiles)
        blocks = min(strips, (ONE_BLOCKS if x.num_rows == 1 else 2) * self._device.num_multiprocessors)
        is_spread = isinstance(x, Halves) and x.is_spread
        if x.num_rows == 1 and not is_spread and self._takes_one(family, 1, matrix):
            self._run_one(f"one_{epilogue.name.lower()}", family, (blocks, 1), planes, x, out, (*sizes, strips))
            return
        if x.num_rows <= FEW_ROWS and not is_spread and self._takes_few(family, x.num_rows, matrix):
            self._run_few(family, (blocks, 1), planes, x, out, (x.num_rows, *sizes, epilogue, strips), (0, 0, False))
            return
        x = self.halves(x, x.num_rows > SMALL_ROWS or (x.num_rows > MANY_STRIP_ROWS and strips >= WHOLE_STRIPS))
        addresses = (*planes, x.address, address, 0, 0)
        numbers = (x.pitch, pitch, x.num_rows, *sizes, epilogue, strips)
        if x.is_spread:
            self._launch_wgmma(family, strips, x.num_rows, addresses, numbers)
        elif x.num_rows > SMALL_ROWS:
            grid = (-(-strips // NUM_WARPS), -(-x.num_rows // TILED_ROWS), 1)
            self._device.launch(f"product_tiled_{family.name}", grid, 256, *addresses, *numbers)
        else:
            self._run_rows(family, _row_tiles(x.num_rows), 1, addresses, numbers, are_groups_early=False)

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
        family, strips, num_groups = matrices.family, matrices.num_strips, routing.max_groups
        planes = (matrices.quants, matrices.scales, matrices.minima, *biases)
        sizes = (matrices.num_outputs, matrices.num_column_tiles, epilogue, strips)
        are_groups_early = row_ids == 0  # the product before this one has waited for them
        most = min(routing.group_rows, routing.x.num_rows)
        blocks = max(2 * self._device.num_multiprocessors // num_groups, -(-strips // FEW_STRIPS))
        few = (min(strips, blocks), num_groups)
        if most <= FEW_ROWS and self._takes_few(family, most, matrices):
            self._run_few(family, few, planes, x, out, (most, *sizes), (row_ids, groups, are_groups_early))
            return
        addresses = (*planes, x.address, address, row_ids, groups)
        numbers = (x.pitch, pitch, routing.num_pairs, *sizes)
        if x.is_spread:
            self._launch_wgmma(family, strips, 0, addresses, numbers, num_groups)
        elif routing.group_rows == TILED_ROWS:
            grid = (-(-strips // NUM_WARPS), num_groups, 1)
            self._device.launch(f"product_tiled_{family.name}", grid, 256, *addresses, *numbers)
        else:
            self._run_rows(family, _row_tiles(routing.group_rows), num_groups, addresses, numbers, are_groups_early)

    def _run_one(
        self,
        entry: str,
        family: Family,
        grid: tuple[int, int],
        planes: tuple[int, ...],
        x: Halves | Normed,
        out: tuple[int, int],
        sizes: tuple[int, int, int],  # outputs, column tiles, strips
        num_used: int = 0,  # experts that are chosen; 0 for a dense matrix
        *,
        are_logits_early: bool = False,
    ) -> None:
        """product_one.cu."""
        address, pitch = out
        logits = self._workspace.router_logits if num_used else 0
        if isinstance(x, Normed):
            source = (x.x.address, x.weight.address, address, logits, x.width, x.width, pitch)
        else:
            source = (x.address, 0, address, logits, x.pitch, x.width, pitch)
        flags = (self._config.num_experts, num_used, int(are_logits_early))
        num_parts = num_used if entry == "summed" else 1
        self._device.launch(
            f"product_{entry}_{family.name}",
            (max(grid[0], -(-sizes[2] // MAX_STRIPS)), grid[1], 1),
            32 * ONE_WARPS,
            *(*planes, *source, *sizes, *flags, self._config.norm_epsilon),
            shared_bytes=one_row_shared(family, num_parts, sizes[1]),
        )

    def _run_chosen(self, routing: Routing, matrices: ExpertMatrices, bias: Vector, hidden: Halves) -> None:
        """Gate and up of one row's experts, which are chosen on the way."""
        planes = (matrices.quants, matrices.scales, matrices.minima, *bias.addresses)
        sizes = (matrices.num_outputs, matrices.num_column_tiles, matrices.num_strips)
        blocks = min(matrices.num_strips, ONE_BLOCKS * self._device.num_multiprocessors // routing.num_used)
        grid, target = (blocks, routing.num_used), (hidden.address, hidden.pitch)
        self._run_one("one_swiglu", matrices.family, grid, planes, routing.x, target, sizes, routing.num_used)

    def _sort(self, routing: Routing) -> None:
        """Experts and order of rows whose logits are there."""
        workspace = self._workspace
        chosen = (workspace.router_logits, workspace.expert_ids, workspace.expert_weights)
        order = (workspace.row_ids, workspace.pair_places, workspace.groups)
        sizes = (routing.x.num_rows, self._config.num_experts, routing.num_used, routing.group_rows, routing.max_groups)
        self._device.launch("route", (1, 1, 1), 1024, *chosen, *order, *sizes)

    def _run_few(
        self,
        family: Family,
        grid: tuple[int, int],
        planes: tuple[int, ...],
        x: Halves | Normed,
        out: tuple[int, int],
        sizes: tuple[int, ...],  # most rows of a group, outputs, column tiles, epilogue, strips
        rows: tuple[int, int, bool],  # row ids, groups, whether the groups may be read before the wait
    ) -> None:
        """product.cu."""
        address, pitch = out
        row_ids, groups, are_groups_early = rows
        if isinstance(x, Normed):
            source = (x.x.address, x.weight.address, address, row_ids, groups, x.width, x.width, pitch)
        else:
            source = (x.address, 0, address, row_ids, groups, x.pitch, round_up(x.width, TILE_COLUMNS), pitch)
        num_rows, column_tiles = sizes[0], sizes[2]
        self._device.launch(
            f"product_{family.name}",
            (*grid, 1),
            32 * NUM_WARPS,
            *(*planes, *source, *sizes, int(are_groups_early), self._config.norm_epsilon),
            shared_bytes=few_rows_shared(family, num_rows, column_tiles),
        )

    def _run_rows(
        self,
        family: Family,
        tiles: int,
        num_groups: int,
        addresses: tuple[int, ...],
        numbers: tuple[int, ...],
        are_groups_early: bool,
    ) -> None:
        """product_rows.cu, a strip shared by a block's warps where there are few."""
        strips = numbers[-1]
        shares = 1 if strips * num_groups >= WHOLE_STRIPS else NUM_WARPS
        grid = (-(-strips * shares // NUM_WARPS), num_groups, 1)
        partial = 0 if shares == 1 else NUM_WARPS * 16 * (8 * tiles + 1) * 4
        self._device.launch(
            f"product_rows_{tiles}_{family.name}",
            grid,
            32 * NUM_WARPS,
            *(*addresses, *numbers, shares, int(are_groups_early)),
            shared_bytes=_ring_bytes(family, 32768) + partial,
        )

    def _run_sum(self, product: ExpertSum, x: Floats) -> None:
        hidden, down = product.hidden, product.down
        planes = (down.quants, down.scales, down.minima, product.bias.address, 0)
        sizes = (down.num_outputs, down.num_column_tiles, down.num_strips)
        grid, target = (down.num_strips, 1), (x.address, x.width)
        # The product before this one has waited for the logits.
        self._run_one(
            "summed", down.family, grid, planes, hidden, target, sizes, hidden.num_rows, are_logits_early=True
        )

    def _takes_one(self, family: Family, num_parts: int, matrix: Matrix | ExpertMatrices) -> bool:
        """Whether product_one.cu takes the family, and so many rows of x fit in shared memory."""
        if family not in EXACT or num_parts > MAX_USED:
            return False
        return self._fits(one_row_shared(family, num_parts, matrix.num_column_tiles))

    def _takes_few(self, family: Family, num_rows: int, matrix: Matrix | ExpertMatrices) -> bool:
        """Whether product.cu can hold so many rows of x in shared memory."""
        return self._fits(few_rows_shared(family, num_rows, matrix.num_column_tiles))

    def _fits(self, shared_bytes: int) -> bool:
        return shared_bytes + STATIC_BYTES <= self._device.max_shared_bytes

    def _attend_decoding(
        self, queries: Unplaced, kv: KVLayer, step: CudaStep, sinks: Vector | None, heads: Halves
    ) -> None:
        config, workspace, shape = self._config, self._workspace, step.shape
        self._device.launch(
            "attention_decode",
            (config.num_kv_heads, shape.num_rows, 1 if kv.window else shape.num_splits),
            128,
            *(workspace.qkv, workspace.angles if queries.rotate else 0, step.places[kv.group], step.items),
            *(step.tables[kv.group], sinks.address if sinks else 0, kv.keys, kv.values),
            *(heads.address, workspace.partials, workspace.counters),
            *(config.num_heads, config.num_kv_heads, self._block_size, shape.table_width, kv.window, heads.pitch),
            *(heads.is_spread, LOG2_E / math.sqrt(config.head_size)),
            shared_bytes=decode_shared(padded_head_size(config)),
        )

    def _launch_wgmma(
        self,
        family: Family,
        num_strips: int,
        num_rows: int,
        addresses: tuple[int, ...],
        numbers: tuple[int, ...],  # with column tiles and strips
        num_groups: int = 0,  # of experts' rows; else all rows are one matrix's
    ) -> None:
        strips, rows = wgmma_strips(family)[-1], TILED_ROWS
        if num_groups == 0:
            strips, rows = choose_tile(num_rows, num_strips, numbers[4], family, self._device.num_multiprocessors)
        num_row_tiles = num_groups or -(-num_rows // rows)
        num_tiles = num_row_tiles * -(-num_strips // (8 * strips))
        grid = (min(num_tiles, self._device.num_multiprocessors), 1, 1)
        name = f"product_wgmma_{strips}_{family.name}"
        shared_bytes = wgmma_stages(family)[1]
        self._device.launch(name, grid, 384, *addresses, *numbers, rows, num_row_tiles, shared_bytes=shared_bytes)

    def _combine(self, x: Floats, outputs: ExpertOutputs) -> None:
        workspace = self._workspace
        addresses = (outputs.address, workspace.pair_places, workspace.expert_weights, x.address)
        is_many = x.num_rows > MANY_ROWS and x.width % 4 == 0
        name, columns = ("combine_many", 1024) if is_many else ("combine", 256)
        grid = (-(-x.width // columns), x.num_rows, 1)
        self._device.launch(name, grid, 256, *addresses, x.width, self._config.num_experts_used)


def one_row_shared(family: Family, num_parts: int, column_tiles: int) -> int:
    """Bytes of product_one.cu's dynamic shared memory: rings of groups of tiles, rows of x."""
    group = 4 if family == Family.MXFP4 else 2
    codes, scales = (512, 4) if family == Family.MXFP4 else (1024, 8)
    return ONE_WARPS * ONE_DEPTH * (group * codes + 32 * scales) + 2 * num_parts * (column_tiles + group) * TILE_COLUMNS


def few_rows_shared(family: Family, num_rows: int, column_tiles: int) -> int:
    """Bytes of product.cu's dynamic shared memory: rings, rows of x, sums of shared strips."""
    return _ring_bytes(family, 40960) + 2 * num_rows * (column_tiles * TILE_COLUMNS + 32) + 1024 * (num_rows + 1)


def decode_shared(head_size: int) -> int:
    """Bytes of attention_decode.cu's dynamic shared memory: chunks, then what its warps merge."""
    chunks = 4 * (2 if head_size <= 64 else 1) * 128 * head_size
    return max(chunks, 4 * 4 * MAX_GROUP * (head_size + 3))


def _ring_bytes(family: Family, wanted: int) -> int:
    """Of a block's rings, whose slots are as many as make about `wanted` bytes, at least two."""
    slot = SLOT_BYTES[family]
    return NUM_WARPS * slot * max(2, wanted // NUM_WARPS // slot)


def _row_tiles(num_rows: int) -> int:
    """The fewest tiles of 8 rows that product_rows.cu comes in and that hold the rows."""
    return next(tiles for tiles in PRODUCT_TILES if 8 * tiles >= num_rows)


def _group_rows(num_rows: int) -> int:
    """Most rows of one expert in a group: about twice what an expert of 32 gets of 4 each, so that few have two."""
    if num_rows > GROUPED_ROWS:
        return TILED_ROWS
    return next(group_rows for limit, group_rows in GROUP_LIMITS if num_rows <= limit)


def item_tokens(config: GPTConfig, tile_rows: int) -> int:
    """Tokens of an item of attention, whose rows of queries fill a tile."""
    return tile_rows // (config.num_heads // config.num_kv_heads)


def wide_tokens(config: GPTConfig) -> int:
    """The same of an item of attention_prefill.cu."""
    rows = 128 if padded_head_size(config) <= 64 else 64
    return rows // (config.num_heads // config.num_kv_heads)
