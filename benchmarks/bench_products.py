"""Products of some and many rows at gpt-oss-20b's shapes, kernel by kernel, in TFLOP/s.

`python -m benchmarks.bench_products` times product_wgmma.cu in tiles of several sizes beside product_tiled.cu, and for
up to 64 rows product_split.cu, with clusters of several sizes, beside product_rows.cu: with random weights in the
official file's types. Sampled outputs of each are checked against float64; exits with 1 if any is wrong.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.executor.cuda.device import Device
from services.executor.cuda.kernels import (
    BOX_ROWS,
    PRODUCT_TILES,
    ROWS,
    ROWS_ENTRIES,
    SPLITS,
    WGMMA_TILES,
    product_modules,
    split_stages,
    wgmma_stages,
)
from services.executor.cuda.products import SLOT_BYTES, map_planes
from shared.cuda_layout import TILES, Family

NUM_EXPERTS, NUM_USED, HIDDEN = 32, 4, 2880
STORE, SWIGLU = 0, 3
MOST_ERROR = 5e-4  # of a product, relative to the sizes of what is summed; activations and weights are half
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])

Array = NDArray[Any]


class Weights:
    """Random matrices of experts (or of one) on the device, their planes on the host too."""

    def __init__(self, device: Device, family: Family, num_experts: int, num_strips: int, num_inputs: int) -> None:
        random = np.random.default_rng(num_strips)
        self.device, self.family, self.num_strips, self.num_inputs = device, family, num_strips, num_inputs
        self.column_tiles = -(-num_inputs // 64)
        grid = (num_experts, num_strips, self.column_tiles)
        (_, dtype, axes), (_, scale_dtype, scale_axes) = TILES[family]
        shape = (*grid, *axes.values())
        self.quants = np.frombuffer(random.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)
        shape = (*grid, *scale_axes.values())
        if family == Family.MXFP4:
            self.scales: Array = random.integers(117, 123, shape, np.uint8)
        else:
            self.scales = random.uniform(1e-4, 4e-4, shape).astype(scale_dtype)
        self.bias = random.standard_normal((num_experts, 16 * num_strips)).astype(np.float32)
        self.addresses = [device.allocate(part.nbytes) for part in (self.quants, self.scales, self.bias)]
        for address, part in zip(self.addresses, (self.quants, self.scales, self.bias), strict=True):
            device.upload(address, part)
        self.largest = 0
        if family == Family.MXFP4:
            strips = num_experts * num_strips
            self.largest = device.allocate(16 * strips)
            grid = (-(-strips // 8), 1, 1)
            device.launch("largest", grid, 256, self.addresses[1], self.largest, strips, self.column_tiles)
        device.synchronize()

    @functools.cache  # noqa: B019 - these weights live as long as the benchmark
    def map(self, box_tiles: int, box_strips: int) -> tuple[bytes, ...]:
        """Tensor maps of the planes."""
        strips = len(self.quants) * self.num_strips
        planes, sizes = (*self.addresses[:2], self.largest), (self.column_tiles, strips, box_tiles, box_strips)
        return map_planes(self.device.map_tiles, self.family, planes, sizes)

    def strip(self, expert: int, strip: int) -> Array:
        """The values of a strip, (16, 64 column tiles) float64."""
        quants, scales = self.quants[expert, strip], self.scales[expert, strip]
        if self.family == Family.MXFP4:
            codes = np.empty((*quants.shape, 8), np.float64)  # tile, g, t, b, u, v
            for pair, (sign, magnitude) in enumerate(((15, 9), (12, 6), (14, 3), (13, 0))):
                for upper in range(2):
                    size = E2M1[quants >> (magnitude + 16 * upper) & 7]
                    codes[..., 2 * pair + upper] = np.where(quants >> (sign + 16 * upper) & 1, -size, size)
            by_block = np.exp2(scales.astype(np.float64) - 127)  # tile, g, b, u
            return (codes * by_block[:, :, None, :, :, None]).transpose(4, 1, 0, 3, 2, 5).reshape(16, -1)
        codes = quants.astype(np.float64) - 128  # tile, b, g, t, u, v
        by_block = scales.astype(np.float64).transpose(0, 2, 1, 3)  # tile, b, g, u
        return (codes * by_block[:, :, :, None, :, None]).transpose(4, 2, 0, 1, 3, 5).reshape(16, -1)


class Problem:
    """x @ weights for some rows, of one matrix or of the experts that each row is routed to."""

    def __init__(self, device: Device, weights: Weights, num_tokens: int, epilogue: int, group_rows: int = 0) -> None:
        random = np.random.default_rng(num_tokens)
        self.device, self.weights, self.epilogue = device, weights, epilogue
        self.pitch_in = weights.column_tiles * 64
        self.group_rows, self.is_grouped = group_rows, group_rows > 0
        self.gathers = self.is_grouped and epilogue == SWIGLU
        self.num_rows = num_tokens * (NUM_USED if self.is_grouped else 1)
        num_inputs_rows = num_tokens if self.gathers or not self.is_grouped else self.num_rows
        self.x = np.zeros((num_inputs_rows, self.pitch_in), np.float16)
        self.x[:, : weights.num_inputs] = random.standard_normal((num_inputs_rows, weights.num_inputs))
        self.outputs = weights.num_strips * (8 if epilogue == SWIGLU else 16)
        self.item = np.dtype(np.float16 if epilogue == SWIGLU else np.float32)
        self.groups, self.row_ids = np.zeros((0, 4), np.int32), np.arange(self.num_rows, dtype=np.int32)
        if self.is_grouped:
            self._route(random, num_tokens)
        spread_x = self.x.reshape(len(self.x), -1, 4, 4, 2).swapaxes(2, 3)  # as spread.cuh says
        sources = (self.x, spread_x.reshape(self.x.shape), self.row_ids, self.groups)
        self.addresses = [device.allocate(part.nbytes) if part.size else 0 for part in sources]
        for address, part in zip(self.addresses, sources, strict=True):
            if part.size:
                device.upload(address, part)
        self.gathered = device.allocate(2 * self.num_rows * self.pitch_in) if self.gathers else 0
        self.map = device.map_halves(self.gathered or self.addresses[1], self.num_rows, self.pitch_in, BOX_ROWS)
        self.out = device.allocate(self.num_rows * self.outputs * self.item.itemsize)
        device.synchronize()

    def _route(self, random: np.random.Generator, num_tokens: int) -> None:
        experts = np.argsort(random.random((num_tokens, NUM_EXPERTS)), axis=1)[:, :NUM_USED].reshape(-1)
        order = np.argsort(experts, kind="stable").astype(np.int32)
        if self.gathers:
            self.row_ids = order // NUM_USED
        groups, start = [], 0
        for expert, count in enumerate(np.bincount(experts, minlength=NUM_EXPERTS).tolist()):
            pieces = -(-count // self.group_rows)
            size = -(-count // max(pieces, 1) // 32) * 32
            for first in range(0, count, max(size, 1)):
                groups.append((expert, start + first, min(size, count - first), 0))
            start += count
        groups += [(0, 0, 0, 0)] * (min(self.num_rows, NUM_EXPERTS + self.num_rows // self.group_rows) - len(groups))
        self.groups = np.array(groups, np.int32)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Pitch of what is written, rows, outputs, column tiles, epilogue, strips."""
        return (
            *(self.outputs, self.num_rows, self.outputs),
            *(self.weights.column_tiles, self.epilogue, self.weights.num_strips),
        )

    @property
    def tera(self) -> float:
        return 2e-12 * self.num_rows * self.weights.num_strips * 16 * self.weights.num_inputs

    def run_tiled(self) -> None:
        quants, scales, bias = self.weights.addresses
        x, _, row_ids, groups = self.addresses
        addresses = (quants, scales, 0, bias, bias, x, self.out, row_ids if self.gathers else 0, groups)
        tiles = len(self.groups) if self.is_grouped else -(-self.num_rows // 128)
        grid = (-(-self.weights.num_strips // 8), tiles, 1)
        name = f"product_tiled_{self.weights.family.name}"
        self.device.launch(name, grid, 256, *addresses, self.pitch_in, *self.numbers)

    def run_wgmma(self, name: str, tile_rows: int) -> None:
        """With what gathers its rows of x, if they are not those of the tokens."""
        bias = self.weights.addresses[2]
        _, x, row_ids, groups = self.addresses
        if self.gathers:
            pieces = self.pitch_in // 8
            self.device.launch("gather_halves", (self.num_rows, 1, 1), 256, x, row_ids, self.gathered, pieces)
        tile = WGMMA_TILES[name]
        rows = len(self.groups) if self.is_grouped else -(-self.num_rows // tile_rows)
        across = -(-self.weights.num_strips // tile.num_strips)
        tile_strips = -(-self.weights.num_strips // across)
        self.device.launch(
            f"product_wgmma_{name}_{self.weights.family.name}",
            (min(rows * across, self.device.num_multiprocessors), 1, 1),
            tile.threads,
            *(bias, bias, self.out, groups, *self.numbers[:4]),
            *(self.map, *self.weights.map(tile.stage_tiles, tile_strips)),
            *(*self.numbers[4:], tile_strips, tile_rows, rows, across, rows * across),
            shared_bytes=wgmma_stages(self.weights.family, tile)[1],
        )

    def run_rows(self) -> None:
        """Of one matrix, as products.py launches it."""
        quants, scales, bias = self.weights.addresses
        addresses = (quants, scales, 0, bias, bias, self.addresses[0], self.out, 0, 0)
        tiles = next(tiles for tiles in PRODUCT_TILES if 8 * tiles >= self.num_rows)
        self.device.launch(
            f"product_rows_{tiles}_{self.weights.family.name}",
            (self.weights.num_strips, 1, 1),
            256,
            *(*addresses, self.pitch_in, *self.numbers, 8, 0),
            shared_bytes=8 * SLOT_BYTES[self.weights.family] * 3 + 8 * 16 * (8 * tiles + 1) * 4,
        )

    def run_split(self, blocks: int) -> None:
        self.device.launch(
            f"product_split_{blocks}_{self.weights.family.name}",
            (blocks * -(-self.weights.num_strips // 8), 1, 1),
            384,
            *(self.weights.addresses[2], self.out, 0, *self.numbers),
            *(self.map, *self.weights.map(1, 8)),
            shared_bytes=split_stages(self.weights.family)[1],
        )

    def error(self, is_spread: bool) -> float:
        """The largest error of sampled strips, relative to the sum of the products' sizes.

        Args:
            is_spread: outputs in half lie as spread.cuh says.
        """
        found = np.empty((self.num_rows, self.outputs), self.item)
        self.device.download(self.out, found)
        self.device.synchronize()
        if is_spread and self.item == np.float16:
            found = found.reshape(self.num_rows, -1, 4, 4, 2).swapaxes(2, 3).reshape(found.shape)
        random, worst = np.random.default_rng(5), 0.0
        groups = self.groups[self.groups[:, 2] > 0] if self.is_grouped else np.array([(0, 0, self.num_rows, 0)])
        for strip in {0, self.weights.num_strips - 1, *random.integers(0, self.weights.num_strips, 4).tolist()}:
            expert, start, count, _ = groups[random.integers(len(groups))]
            values = self.weights.strip(expert, strip)
            x = self.x[self.row_ids[start : start + count]].astype(np.float64)
            sums = x @ values.T + self.weights.bias[expert].astype(np.float64)[strip * 16 : strip * 16 + 16]
            sizes = np.abs(x) @ np.abs(values).T + 1e-3
            if self.epilogue == SWIGLU:
                biases = self.weights.bias.reshape(-1)[expert * self.outputs + strip * 8 :][:8].astype(np.float64)
                gate, up = (x @ values[half : half + 8].T + biases for half in (0, 8))
                gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
                sums, sizes = gate / (1 + np.exp(-1.702 * gate)) * (up + 1), np.full(gate.shape, 56.0)
            width = sums.shape[1]
            part = found[start : start + count, strip * width : (strip + 1) * width].astype(np.float64)
            assert np.isfinite(part).all()
            worst = max(worst, float((np.abs(part - sums) / sizes).max()))
        return worst


def time_us(device: Device, work: Callable[[], None]) -> float:
    work()
    return statistics.median(device.measure(work, 2) for _ in range(5))


def compare(problem: Problem, name: str, tiles: Sequence[tuple[str, int]], has_tiled: bool = True) -> float:
    """The largest error of all ways."""
    works: dict[str, Callable[[], None]] = {"tiled": problem.run_tiled} if has_tiled else {}
    works |= {f"{tile} {rows}": functools.partial(problem.run_wgmma, tile, rows) for tile, rows in tiles}
    return run_all(problem, name, works)


def compare_some_rows(problem: Problem, name: str) -> float:
    """The same for one matrix and at most 64 rows."""
    works: dict[str, Callable[[], None]] = {"rows": problem.run_rows}
    works |= {f"split {blocks}": functools.partial(problem.run_split, blocks) for blocks in SPLITS}
    return run_all(problem, name, works)


def run_all(problem: Problem, name: str, works: Mapping[str, Callable[[], None]]) -> float:
    results, worst = [], 0.0
    for way, work in works.items():
        problem.device.clear(problem.out, problem.num_rows * problem.outputs * problem.item.itemsize)
        microseconds, error = time_us(problem.device, work), problem.error(is_spread=way not in ("tiled", "rows"))
        results.append(f"{way} {microseconds:.1f} us {problem.tera / microseconds * 1e6:.0f}")
        worst = max(worst, error)
    print(f"{name:26} " + " | ".join(results), flush=True)
    return worst


def main() -> int:
    """Returns 0 if every way gives the products."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    arguments = parser.parse_args()
    device = Device()
    try:
        worst = run(device, (64, 256, 2048) if arguments.quick else (64, 128, 256, 512, 2048, 8192))
    finally:
        device.close()
    if worst > MOST_ERROR:
        print(f"WRONG by {worst:.2g}")
    return int(worst > MOST_ERROR)


def run(device: Device, sizes: Sequence[int]) -> float:
    """The largest error of all."""
    errors = []
    device.load({ROWS: ROWS_ENTRIES})
    for family in (Family.MXFP4, Family.INT8):
        device.load(product_modules(family))
    print(f"{device.name}: outputs x rows of a tile, microseconds, TFLOP/s")
    matrices = {"q, k, v": (5120, HIDDEN), "o": (HIDDEN, 4096)}
    dense = {name: Weights(device, Family.INT8, 1, -(-out // 16), size) for name, (out, size) in matrices.items()}
    gate_up = Weights(device, Family.MXFP4, NUM_EXPERTS, 2 * HIDDEN // 16, HIDDEN)
    down = Weights(device, Family.MXFP4, NUM_EXPERTS, HIDDEN // 16, HIDDEN)
    for num_rows in (9, 17, 32, 64):
        for name, weights in dense.items():
            errors.append(compare_some_rows(Problem(device, weights, num_rows, STORE), f"{name}, {num_rows}"))
    for num_tokens in sizes:
        for name, weights in dense.items():
            low = [("wide", 128), ("high", 128), ("high", 64), ("low", 64)]
            tiles = low if num_tokens <= 512 else [("wide", 128), ("high", 256), ("high", 192), ("high", 160)]
            errors.append(compare(Problem(device, weights, num_tokens, STORE), f"{name}, {num_tokens}", tiles))
        for name, weights, epilogue in (("gate and up", gate_up, SWIGLU), ("down", down, STORE)):
            for tile in ("low", "wide", "high"):
                rows = WGMMA_TILES[tile].rows
                problem = Problem(device, weights, num_tokens, epilogue, rows)
                errors.append(compare(problem, f"{name}, {num_tokens}", [(tile, rows)], has_tiled=tile == "wide"))
    head = Weights(device, Family.INT8, 1, 201088 // 16, HIDDEN)
    errors.append(compare(Problem(device, head, 256, STORE), "head, 256", [("wide", 128), ("high", 256)]))
    return max(errors)


if __name__ == "__main__":
    sys.exit(main())
