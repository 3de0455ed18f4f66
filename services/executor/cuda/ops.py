"""The ops on a GPU, under the models that numpy's are under (services/executor/ops).

Residuals, sums and logits are float32; what products read (norms, heads, activations) is rounded to half, and keys,
values and queries are half. Products of a kind that another op can finish are not run when `linear` is called: it
returns a `Product`, and the op that takes it runs it with bias, activation or residual in its epilogue. Arrays are
addresses in a workspace that is made once; an op's result lives until the next op of its kind.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from services.executor.cuda.arrays import (
    Epilogue,
    ExpertOutputs,
    ExpertSum,
    Floats,
    Halves,
    Normed,
    Product,
    Routing,
    Unplaced,
)
from services.executor.cuda.kernels import ATTENTION_WGMMA_BYTES, ATTENTION_WGMMA_HEAD, MAX_GROUP
from services.executor.cuda.kv import CudaStep, KVLayer, padded_head_size
from services.executor.cuda.products import (
    FEW_ROWS,
    HOPPER_GROUPED_ROWS,
    HOPPER_SMALL_ROWS,
    MANY_ROWS,
    Products,
    most_group_rows,
    most_spread_rows,
)
from services.executor.cuda.weights import HOPPER, ExpertMatrices, Matrix, Vector
from services.executor.cuda.workspace import Workspace
from services.executor.ops.numpy_ops import rope_frequencies
from shared.gpt_config import GPTConfig

if TYPE_CHECKING:
    from services.executor.cuda.device import Device

LOG2_E = math.log2(math.e)  # attention's exponentials are of base 2
ROUTER_ROWS = 256  # past them the router's product is taken by tensor cores
MAX_SORTED = 1024  # pairs of rows and experts that route.cu chooses and sorts in one block
FEW_PAIRS = 64  # up to which that is faster than choosing in many blocks and sorting in one


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
        self._products = Products(device, config, workspace)
        self._is_hopper = device.capability == HOPPER
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
        grid = (x.num_rows, -(-table.num_inputs // (8 * 128)), 1)
        self._device.launch(f"embed_{part.family.name}", grid, 128, *arguments)
        return x

    def add(self, x: Floats, y: Floats | Product | ExpertSum | ExpertOutputs) -> Floats:
        if isinstance(y, Product):
            self.run(y, x.address, x.width, Epilogue.RESIDUAL)
        elif isinstance(y, ExpertSum):
            self._products.run_sum(y, x)
        elif isinstance(y, ExpertOutputs):
            self._combine(x, y)
        else:
            count = x.num_rows * x.width
            self._device.launch("add", (-(-count // 256), 1, 1), 256, x.address, y.address, count)
        return x

    def rms_norm(self, x: Floats, weight: Vector) -> Normed:
        return Normed(x, weight)

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
        is_spread = self._is_hopper and shape.num_rows > HOPPER_SMALL_ROWS
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
        if isinstance(x, Normed) and (num_rows > FEW_ROWS or pairs > MAX_SORTED):
            x = self.halves(x, num_rows > HOPPER_GROUPED_ROWS)
        is_spread = x.is_spread if isinstance(x, Halves) else self._is_hopper and num_rows > HOPPER_GROUPED_ROWS
        group_rows = most_spread_rows(pairs, num_experts) if is_spread else most_group_rows(num_rows)
        max_groups = min(pairs, num_experts + pairs // group_rows)
        if isinstance(x, Normed):
            normed = Halves(workspace.normed, num_rows, x.width, is_spread)
            device.launch(
                "normed_route",
                (num_experts, 1, 1),
                256,
                *(x.x.address, x.weight.address, weight.address, bias.address, normed.address),
                *(workspace.router_logits, workspace.route_counter, workspace.expert_ids, workspace.expert_weights),
                *(workspace.row_ids, workspace.pair_places, workspace.groups),
                *(num_rows, x.width, normed.pitch, num_used, group_rows, max_groups, is_spread),
                self._config.norm_epsilon,
            )
            return Routing(normed, num_used, pairs, group_rows, max_groups, is_sorted=num_rows > 1)
        addresses = (x.address, weight.address, bias.address, workspace.router_logits)
        if num_rows > ROUTER_ROWS:
            grid = (-(-num_rows // 32), -(-num_experts // 32), 1)
            numbers = (num_rows, num_experts, x.width, x.pitch, x.is_spread)
            device.launch("router_many", grid, 256, *addresses, *numbers)
        else:
            grid = (num_experts, -(-num_rows // 8), 1)
            device.launch("router", grid, 256, *addresses, num_rows, x.width, x.pitch, x.is_spread)
        routing = Routing(x, num_used, pairs, group_rows, max_groups)
        if pairs <= FEW_PAIRS:
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
            if self._products.chooses(routing, gate_up, down):
                self._products.run_chosen(routing, gate_up, gate_up_bias, hidden)
                return ExpertSum(hidden, down, down_bias)
            self._sort(routing)
        outputs = ExpertOutputs(workspace.outputs, x.num_rows, down.num_outputs)
        biases = gate_up_bias.addresses
        self._products.run_experts(routing.x, routing, gate_up, biases, workspace.row_ids, target, Epilogue.SWIGLU)
        down_biases = (down_bias.address, 0)
        self._products.run_experts(
            hidden, routing, down, down_biases, 0, (outputs.address, outputs.width), Epilogue.STORE
        )
        return outputs

    def select_rows(self, x: Floats, rows: int) -> Floats:
        if self._step.shape.num_logits == x.num_rows:
            return x  # rows ascend: they are all of them
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
        self._products.run(product, address, pitch, epilogue)

    def halves(self, rows: Halves | Normed, is_spread: bool = False) -> Halves:
        """Rows in half, as `Products.halves`."""
        return self._products.halves(rows, is_spread)

    def _sort(self, routing: Routing) -> None:
        """Experts and order of rows whose logits are there."""
        workspace = self._workspace
        chosen = (workspace.router_logits, workspace.expert_ids, workspace.expert_weights)
        order = (workspace.row_ids, workspace.pair_places, workspace.groups)
        sizes = (routing.x.num_rows, self._config.num_experts, routing.num_used, routing.group_rows, routing.max_groups)
        self._device.launch("route", (1, 1, 1), 1024, *chosen, *order, *sizes)

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

    def _combine(self, x: Floats, outputs: ExpertOutputs) -> None:
        workspace = self._workspace
        addresses = (outputs.address, workspace.pair_places, workspace.expert_weights, x.address)
        is_many = x.num_rows > MANY_ROWS and x.width % 4 == 0
        name, columns = ("combine_many", 1024) if is_many else ("combine", 256)
        grid = (-(-x.width // columns), x.num_rows, 1)
        self._device.launch(name, grid, 256, *addresses, x.width, self._config.num_experts_used)


def decode_shared(head_size: int) -> int:
    """Bytes of attention_decode.cu's dynamic shared memory: chunks, then what its warps merge."""
    chunks = 4 * (2 if head_size <= 64 else 1) * 128 * head_size
    return max(chunks, 4 * 4 * MAX_GROUP * (head_size + 4))


def item_tokens(config: GPTConfig, tile_rows: int) -> int:
    """Tokens of an item of attention, whose rows of queries fill a tile."""
    return tile_rows // (config.num_heads // config.num_kv_heads)


def wide_tokens(config: GPTConfig) -> int:
    """The same of an item of attention_prefill.cu."""
    rows = 128 if padded_head_size(config) <= 64 else 64
    return rows // (config.num_heads // config.num_kv_heads)
