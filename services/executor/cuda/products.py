"""Products on a GPU: which kernel runs one, by its rows and its matrix, and how it is launched.

By rows: one (product_one.cu), up to 8 (product.cu), up to 64 (product_rows.cu), more (product_tiled.cu). On a Hopper up
to 16 (product_rows.cu), up to 64 with few outputs (product_split.cu), else product_wgmma.cu. Experts' rows are in
groups of one expert, and the group's rows decide; on a Hopper with more than 4 rows, if they are spread, it is
product_wgmma.cu, in tiles by how many rows an expert has on average.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from services.executor.cuda.arrays import Epilogue, ExpertSum, Floats, Halves, Normed, Product, Routing
from services.executor.cuda.kernels import (
    BOX_ROWS,
    EXACT,
    ONE_DEPTH,
    ONE_WARPS,
    PRODUCT_TILES,
    WGMMA_TILES,
    split_stages,
    tile_bytes,
    wgmma_stages,
    wgmma_tiles,
)
from services.executor.cuda.tiles import STRIP_GROUP, choose_split, choose_tile
from services.executor.cuda.weights import HOPPER, ExpertMatrices, Matrix, Part, Vector
from services.executor.cuda.workspace import Workspace
from shared.cuda_layout import STRIP_ROWS, TILE_COLUMNS, Family
from shared.gpt_config import GPTConfig
from shared.layout import round_up

if TYPE_CHECKING:
    from services.executor.cuda.device import Device

FEW_ROWS = 8  # most that product.cu and normed_route take at once
SMALL_ROWS = 8 * PRODUCT_TILES[-1]  # most that product_rows.cu takes at once
HOPPER_SMALL_ROWS = 16  # the same of a dense matrix on Hopper, where others are better with more
NORMED_ROWS = 4  # most that product.cu puts through RMSNorm itself, in each of its blocks
MANY_ROWS = 64  # past them norms and storing keys have kernels of their own
MAX_NORM = 8192  # values of a row that norm_many.cu takes
HOPPER_GROUPED_ROWS = 4  # in steps of up to so many rows experts take product.cu on Hopper, else product_wgmma.cu
GROUPED_ROWS = 512  # on others experts take product_rows.cu in steps of up to so many, else product_tiled.cu
LOW_ROWS, HIGH_ROWS = 104, 128  # of an expert on average, past which product_wgmma.cu's tiles are wide, or high
GROUP_LIMITS = ((16, 8), (128, 16), (GROUPED_ROWS, 32))  # rows of a step, rows of an expert's group
TILED_ROWS = 128  # of a block of product_tiled.cu
MAX_USED = 8  # experts of a row that product_one.cu chooses
NUM_WARPS = 8  # of a block of product.cu and product_rows.cu
MAX_STRIPS = 128  # of a block of product_one.cu
ONE_BLOCKS = 3  # of it on each multiprocessor
FEW_STRIPS = 6  # of a block of product.cu where experts keep the GPU busy
MAX_MAPS = 1024  # tensor maps that are kept
NO_MAP = bytes(128)  # a tensor map that is not used
SPLIT_ROWS = 64  # most that product_split.cu takes at once
WHOLE_STRIPS = 1024  # from so many strips on a warp of product_rows.cu takes a whole one
STATIC_BYTES = 10240  # that a kernel's static shared memory stays below

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


class Products:
    """Runs products for steps in one workspace.

    Args:
        device: with the model's kernels loaded.
        config: the model's dimensions.
        workspace: where norms, logits of routers and groups of rows lie.
    """

    def __init__(self, device: Device, config: GPTConfig, workspace: Workspace) -> None:
        self._device, self._config, self._workspace = device, config, workspace
        self._is_hopper = device.capability == HOPPER  # where wgmma_tiles.cuh multiplies
        self._map_halves = functools.lru_cache(MAX_MAPS)(device.map_halves)
        self._map_planes = functools.cache(functools.partial(map_planes, device.map_tiles))

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

    def run(self, product: Product, address: int, pitch: int, epilogue: Epilogue) -> None:
        """Run a product; its rows go to `address`, `pitch` values apart, or are added to what is there."""
        matrix = product.matrix
        assert isinstance(matrix, Matrix)
        for part in matrix.parts:
            size = 4 if epilogue in (Epilogue.STORE, Epilogue.RESIDUAL) else 2
            bias = product.bias.address + 4 * part.first_output if product.bias is not None else 0
            self._run_part(product.x, matrix, part, bias, (address + size * part.first_output, pitch), epilogue)

    def run_experts(
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
        if most <= FEW_ROWS and not x.is_spread and self._takes_few(family, most, matrices):
            self._run_few(family, few, planes, x, out, (most, *sizes), (row_ids, groups, are_groups_early))
            return
        if x.is_spread:
            rows = self._gather(x, row_ids, routing.num_pairs) if row_ids else x
            target = (pitch, routing.num_pairs, *sizes)
            total = self._config.num_experts * strips
            self._launch_wgmma(family, rows, planes, total, address, groups, target, num_groups, routing.group_rows)
            return
        addresses = (*planes, x.address, address, row_ids, groups)
        numbers = (x.pitch, pitch, routing.num_pairs, *sizes)
        if routing.group_rows == TILED_ROWS:
            grid = (-(-strips // NUM_WARPS), num_groups, 1)
            self._device.launch(f"product_tiled_{family.name}", grid, 256, *addresses, *numbers)
        else:
            self._run_rows(family, _row_tiles(routing.group_rows), num_groups, addresses, numbers, are_groups_early)

    def run_chosen(self, routing: Routing, matrices: ExpertMatrices, bias: Vector, hidden: Halves) -> None:
        """Gate and up of one row's experts, which are chosen on the way; see `chooses`."""
        planes = (matrices.quants, matrices.scales, matrices.minima, *bias.addresses)
        sizes = (matrices.num_outputs, matrices.num_column_tiles, matrices.num_strips)
        blocks = min(matrices.num_strips, ONE_BLOCKS * self._device.num_multiprocessors // routing.num_used)
        grid, target = (blocks, routing.num_used), (hidden.address, hidden.pitch)
        self._run_one("one_swiglu", matrices.family, grid, planes, routing.x, target, sizes, routing.num_used)

    def run_sum(self, product: ExpertSum, x: Floats) -> None:
        """Add the weighted sum of one row's experts to x."""
        hidden, down = product.hidden, product.down
        planes = (down.quants, down.scales, down.minima, product.bias.address, 0)
        sizes = (down.num_outputs, down.num_column_tiles, down.num_strips)
        grid, target = (down.num_strips, 1), (x.address, x.width)
        # The product before this one has waited for the logits.
        self._run_one(
            "summed", down.family, grid, planes, hidden, target, sizes, hidden.num_rows, are_logits_early=True
        )

    def chooses(self, routing: Routing, gate_up: ExpertMatrices, down: ExpertMatrices) -> bool:
        """Whether the products of one row's experts can choose them."""
        return self._takes_one(gate_up.family, 1, gate_up) and self._takes_one(down.family, routing.num_used, down)

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
            x = x if x.num_rows <= NORMED_ROWS else self.halves(x)
            self._run_few(family, (blocks, 1), planes, x, out, (x.num_rows, *sizes, epilogue, strips), (0, 0, False))
            return
        x = self.halves(x, x.num_rows > HOPPER_SMALL_ROWS)
        numbers = (pitch, x.num_rows, *sizes, epilogue, strips)
        split = choose_split(strips, matrix.num_column_tiles, self._device.num_multiprocessors)
        is_few = x.num_rows <= SPLIT_ROWS and split > 1 and epilogue in (Epilogue.STORE, Epilogue.RESIDUAL)
        if x.is_spread and is_few:
            self._device.launch(
                f"product_split_{split}_{family.name}",
                (split * -(-strips // STRIP_GROUP), 1, 1),
                384,
                *(bias, address, 0, pitch, x.num_rows, *sizes, epilogue, strips),
                *self._maps(family, x, planes, (matrix.num_column_tiles, strips, 1, STRIP_GROUP)),
                shared_bytes=split_stages(family)[1],
            )
        elif x.is_spread:
            self._launch_wgmma(family, x, planes, strips, address, 0, numbers)
        elif x.num_rows > SMALL_ROWS:
            grid = (-(-strips // NUM_WARPS), -(-x.num_rows // TILED_ROWS), 1)
            addresses = (*planes, x.address, address, 0, 0)
            self._device.launch(f"product_tiled_{family.name}", grid, 256, *addresses, x.pitch, *numbers)
        else:
            addresses = (*planes, x.address, address, 0, 0)
            self._run_rows(family, _row_tiles(x.num_rows), 1, addresses, (x.pitch, *numbers), are_groups_early=False)

    def _maps(
        self, family: Family, x: Halves, planes: tuple[int, ...], sizes: tuple[int, int, int, int]
    ) -> tuple[bytes, ...]:
        """Tensor maps of x and of a matrix."""
        rows = self._map_halves(x.address, x.num_rows, x.pitch, BOX_ROWS)
        return rows, *self._map_planes(family, planes[:3], sizes)

    def _gather(self, x: Halves, row_ids: int, num_rows: int) -> Halves:
        """Rows of x in the order of `row_ids`, where the experts' outputs will lie."""
        rows = Halves(self._workspace.outputs, num_rows, x.width, x.is_spread)
        arguments = (x.address, row_ids, rows.address, rows.pitch // 8)
        self._device.launch("gather_halves", (num_rows, 1, 1), 256, *arguments)
        return rows

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

    def _launch_wgmma(
        self,
        family: Family,
        x: Halves,
        planes: tuple[int, ...],  # and biases
        total_strips: int,  # of all experts
        address: int,
        groups: int,
        numbers: tuple[int, ...],  # pitch, rows, outputs, column tiles, epilogue, strips
        num_groups: int = 0,  # of experts' rows; else all rows are one matrix's
        group_rows: int = 0,  # of a group at most
    ) -> None:
        num_strips, rows = numbers[-1], group_rows
        name = next((name for name, tile in wgmma_tiles(family).items() if tile.rows == group_rows), "high")
        if num_groups == 0:
            name, rows = choose_tile(x.num_rows, num_strips, numbers[3], family, self._device.num_multiprocessors)
        tile = WGMMA_TILES[name]
        assert name != "low" or numbers[4] in (Epilogue.STORE, Epilogue.SWIGLU)  # all that they have
        num_row_tiles = num_groups or -(-x.num_rows // rows)
        across = -(-num_strips // tile.num_strips)
        tile_strips = -(-num_strips // across)
        num_tiles = across * num_row_tiles
        self._device.launch(
            f"product_wgmma_{name}_{family.name}",
            (min(num_tiles, self._device.num_multiprocessors), 1, 1),
            tile.threads,
            *(*planes[3:], address, groups, *numbers[:4]),
            *self._maps(family, x, planes, (numbers[3], total_strips, tile.stage_tiles, tile_strips)),
            *(*numbers[4:], tile_strips, rows, num_row_tiles, across, num_tiles),
            shared_bytes=wgmma_stages(family, tile)[1],
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


def most_group_rows(num_rows: int) -> int:
    """Most rows of one expert in a group: about twice what an expert of 32 gets of 4 each, so that few have two."""
    if num_rows > GROUPED_ROWS:
        return TILED_ROWS
    return next(group_rows for limit, group_rows in GROUP_LIMITS if num_rows <= limit)


def most_spread_rows(num_pairs: int, num_experts: int) -> int:
    """The same for product_wgmma.cu: of its tiles, by the rows that an expert has on average."""
    name = "low" if num_pairs <= LOW_ROWS * num_experts else "wide" if num_pairs <= HIGH_ROWS * num_experts else "high"
    return WGMMA_TILES[name].rows


def one_row_shared(family: Family, num_parts: int, column_tiles: int) -> int:
    """Bytes of product_one.cu's dynamic shared memory: rings of groups of tiles, rows of x."""
    group = 4 if family == Family.MXFP4 else 2
    codes, scales = (512, 4) if family == Family.MXFP4 else (1024, 8)
    return ONE_WARPS * ONE_DEPTH * (group * codes + 32 * scales) + 2 * num_parts * (column_tiles + group) * TILE_COLUMNS


def few_rows_shared(family: Family, num_rows: int, column_tiles: int) -> int:
    """Bytes of product.cu's dynamic shared memory: rings, rows of x, sums of shared strips."""
    return _ring_bytes(family, 40960) + 2 * num_rows * (column_tiles * TILE_COLUMNS + 32) + 1024 * (num_rows + 1)


def map_planes(
    map_tiles: Callable[..., bytes],  # Device.map_tiles
    family: Family,
    planes: Sequence[int],
    sizes: tuple[int, int, int, int],  # column tiles, strips, both of a box
) -> tuple[bytes, ...]:
    """Tensor maps of quants, scales and minima (of MXFP4 largest exponents); zeros for those that the family lacks."""
    maps = [map_tiles(address, size, *sizes) for address, size in zip(planes, tile_bytes(family), strict=False)]
    if family == Family.MXFP4:
        maps.append(map_tiles(planes[2], STRIP_ROWS, 1, sizes[1], 1, sizes[3]))
    return (*maps, *[NO_MAP] * (3 - len(maps)))


def _ring_bytes(family: Family, wanted: int) -> int:
    """Of a block's rings, whose slots are as many as make about `wanted` bytes, at least two."""
    slot = SLOT_BYTES[family]
    return NUM_WARPS * slot * max(2, wanted // NUM_WARPS // slot)


def _row_tiles(num_rows: int) -> int:
    """The fewest tiles of 8 rows that product_rows.cu comes in and that hold the rows."""
    return next(tiles for tiles in PRODUCT_TILES if 8 * tiles >= num_rows)
