"""The ops in numpy: the specification of every backend, and the one that serves on the CPU.

On the CPU a row's result does not depend, in any bit, on the other rows of its step. Elementwise ops and sums along
a row have that by themselves; products have it in one form only, which `linear` keeps to and `NumpyOps` probes when
it is made (docs/decisions/001-cpu-weight-layout-and-row-invariance.md).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.executor.ops.numpy_kv import KVLayer, TileGroup, Write, attend, plan_tiles, plan_writes, store_kv
from services.executor.step import KVGroup, StepBatch
from services.executor.weights import DecodedMatrix, Matrix, Rows
from shared.gpt_config import GPTConfig, RopeConfig, is_matrix
from shared.layout import COLUMN_MULTIPLE, round_up
from shared.memory import PIECE_OUTPUTS

Floats = NDArray[np.float32]

PIECE_INPUTS = 256  # BLAS sums longer products in pieces of its own choice
PIECE_ROWS = 64
# OpenBLAS multiplies up to a million values without copying them first: twice as fast for five to eight rows.
SMALL_ROWS = 16
SMALL_OUTPUTS = 3072  # times rows
ONE = np.float32(1.0)
SWIGLU_ALPHA = np.float32(1.702)
SWIGLU_LIMIT = np.float32(7.0)


@dataclass(frozen=True)
class NumpyStep:
    """A batch with what all layers need of it."""

    token_ids: NDArray[np.int32]  # (T,)
    positions: NDArray[np.int32]  # (T,)
    logits_rows: NDArray[np.int32]  # (num_logits,)
    rotation: tuple[Floats, Floats] | None  # cosines and sines, each (T, 1, 2, D / 2)
    writes: Mapping[str, Sequence[Write]]  # by group
    tiles: Mapping[str, Sequence[TileGroup]]  # by group


@dataclass(frozen=True)
class Routing:
    """The experts of each row, best first."""

    ids: NDArray[np.intp]  # (T, U)
    weights: Floats  # (T, U)


class NumpyOps:
    """Implements `services.executor.ops.Ops`.

    Args:
        config: the model's dimensions.
        groups: the KV groups of its layers.
        block_size: positions in a KV block, a multiple of 16.
    """

    def __init__(self, config: GPTConfig, groups: Sequence[KVGroup], block_size: int) -> None:
        self._epsilon = np.float32(config.norm_epsilon)
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads
        self._head_size = config.head_size
        self._scale = np.float32(1.0 / math.sqrt(config.head_size))
        self._groups = groups
        self._block_size = block_size
        self._rope = config.rope
        if config.rope is not None:
            frequencies = rope_frequencies(config.rope, config.head_size)
            self._turns = np.stack((-frequencies, frequencies))  # (2, D / 2): x' = x cos - y sin, y' = y cos + x sin
        self._one_row_at_a_time = not is_row_invariant(_product_shapes(config, block_size))
        if self._one_row_at_a_time:
            logging.getLogger(__name__).warning(
                "this machine's BLAS rounds a row differently beside others: rows are computed one at a time, slowly"
            )

    def prepare(self, batch: StepBatch) -> NumpyStep:
        tile_tokens = {"tile_tokens": 1} if self._one_row_at_a_time else {}
        return NumpyStep(
            batch.token_ids,
            batch.positions,
            batch.logits_rows,
            self._rotation(batch.positions),
            {group.name: plan_writes(batch, group.name, self._block_size) for group in self._groups},
            {
                group.name: plan_tiles(
                    batch, group.name, group.window, self._block_size, self._num_heads, **tile_tokens
                )
                for group in self._groups
            },
        )

    def embed(self, table: Rows, ids: NDArray[np.int32]) -> Floats:
        return table.rows(ids)

    def add(self, x: Floats, y: Floats) -> Floats:
        x += y
        return x

    def rms_norm(self, x: Floats, weight: Floats) -> Floats:
        root = np.vecdot(x, x)[:, None]  # (T, 1)
        root /= x.shape[-1]
        root += self._epsilon
        np.sqrt(root, out=root)
        normed: Floats = x / root
        normed *= weight
        return normed

    def layer_norm(self, x: Floats, weight: Floats, bias: Floats) -> Floats:
        mean = np.add.reduce(x, axis=-1, keepdims=True)  # (T, 1)
        mean /= x.shape[-1]
        normed = x - mean
        root = np.vecdot(normed, normed)[:, None]  # (T, 1)
        root /= x.shape[-1]
        root += self._epsilon
        np.sqrt(root, out=root)
        normed /= root
        normed *= weight
        normed += bias
        return normed

    def linear(self, x: Floats, matrix: Matrix, bias: Floats | None = None) -> Floats:
        num_rows = len(x)
        if num_rows == 0:  # no logits are wanted of a chunk that does not end its prompt
            return np.empty((0, matrix.num_outputs), np.float32)
        twice = num_rows == 1 and not self._one_row_at_a_time
        if twice:
            x = np.repeat(x, 2, axis=0)
        product = np.empty((len(x), matrix.width), np.float32)
        multiply(x, matrix, product, self._one_row_at_a_time)
        result = product[:num_rows, : matrix.num_outputs]
        if bias is not None:
            result += bias
        return result

    def gelu(self, x: Floats) -> Floats:
        inner = x * x
        inner *= np.float32(0.044715)
        inner += ONE
        inner *= x
        inner *= np.float32(math.sqrt(2.0 / math.pi))
        np.tanh(inner, out=inner)
        inner += ONE
        inner *= x
        inner *= np.float32(0.5)
        return inner

    def store_kv(self, qkv: Floats, kv: KVLayer, step: NumpyStep, *, rotate: bool) -> Floats:
        num_rows, heads, kv_heads = len(qkv), self._num_heads, self._num_kv_heads
        by_head = qkv.reshape(num_rows, heads + 2 * kv_heads, self._head_size)
        if rotate:
            assert step.rotation is not None
            cosines, sines = step.rotation
            halves = by_head[:, : heads + kv_heads].reshape(num_rows, heads + kv_heads, 2, -1)
            turned = halves[:, :, ::-1] * sines
            halves *= cosines
            halves += turned
        store_kv(kv, step.writes[kv.group], by_head[:, heads : heads + kv_heads], by_head[:, heads + kv_heads :])
        return by_head[:, :heads]

    def attention(self, queries: Floats, kv: KVLayer, step: NumpyStep, sinks: Floats | None = None) -> Floats:
        queries = queries * self._scale
        out = np.empty_like(queries)
        for group in step.tiles[kv.group]:
            attend(group, queries, kv, sinks, out)
        return out.reshape(len(out), -1)

    def route(self, logits: Floats, num_used: int) -> Routing:
        negative = -logits
        ids = negative.argsort(axis=-1, kind="stable")[:, :num_used]  # (T, U)
        negative.sort(axis=-1)
        best = negative[:, :num_used]
        weights = np.exp(best[:, :1] - best)
        weights /= np.add.reduce(weights, axis=-1, keepdims=True)
        return Routing(ids, weights)

    def experts(
        self,
        x: Floats,
        routing: Routing,
        gate_up: Sequence[Matrix],
        gate_up_bias: Floats,
        down: Sequence[Matrix],
        down_bias: Floats,
    ) -> Floats:
        num_rows, num_used = routing.ids.shape
        flat = routing.ids.reshape(-1)
        order = flat.argsort(kind="stable")  # (T U,) pairs of row and expert, by expert
        counts = np.bincount(flat, minlength=len(gate_up)).tolist()  # pairs of each expert
        pairs = x[order // num_used]  # (T U, hidden)
        pairs = self._expert_products(pairs, counts, gate_up, gate_up_bias)  # (T U, 2 ffn)
        pairs = swiglu(pairs)  # (T U, ffn)
        pairs = self._expert_products(pairs, counts, down, down_bias)  # (T U, hidden)
        chosen = np.empty_like(pairs)
        chosen[order] = pairs  # by row again
        chosen = chosen.reshape(num_rows, num_used, -1)
        chosen *= routing.weights[:, :, None]
        total: Floats = np.add.reduce(chosen, axis=1)
        return total

    def select_rows(self, x: Floats, rows: NDArray[np.int32]) -> Floats:
        selected: Floats = x[rows]
        return selected

    def to_numpy(self, x: Floats) -> Floats:
        return x

    def _rotation(self, positions: NDArray[np.int32]) -> tuple[Floats, Floats] | None:
        """Cosines and sines of each row's angles, (T, 1, 2, D / 2), the sines of a head's first half negative."""
        if self._rope is None:
            return None
        angles = positions.astype(np.float32).reshape(-1, 1, 1, 1) * self._turns
        factor = np.float32(self._rope.attention_factor)
        return np.cos(angles) * factor, np.sin(angles) * factor

    def _expert_products(
        self,
        x: Floats,  # (n, inputs), by expert
        counts: Sequence[int],  # rows of each expert
        matrices: Sequence[Matrix],  # of each expert
        biases: Floats,  # (E, outputs)
    ) -> Floats:
        """Each row times its expert's matrix, with its bias, (n, outputs)."""
        num_outputs = matrices[0].num_outputs
        product = np.empty((len(x), matrices[0].width), np.float32)
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            stop = start + count
            # A product takes two rows: a lone one borrows the next, whose own result is written after this.
            end = stop if count > 1 or stop == len(x) else stop + 1
            if end - start == 1 or self._one_row_at_a_time:
                product[start:stop, :num_outputs] = self.linear(x[start:stop], matrices[expert])
            else:
                multiply(x[start:end], matrices[expert], product[start:end])
            product[start:stop, :num_outputs] += biases[expert]
            start = stop
        return product[:, :num_outputs]


def multiply(
    x: Floats,  # (rows, inputs), rows >= 2 unless one at a time
    matrix: Matrix,
    out: Floats,  # (rows, matrix.width)
    one_row_at_a_time: bool = False,
) -> None:
    """out = x @ matrix, in pieces that give a row the same bits whatever other rows there are."""
    num_rows, num_inputs, width = len(x), matrix.num_inputs, matrix.width
    if one_row_at_a_time:  # a stack of products of one row each
        x, out = x[:, None], out[:, None]
    max_columns = PIECE_OUTPUTS if num_rows > SMALL_ROWS or one_row_at_a_time else SMALL_OUTPUTS // num_rows // 64 * 64
    if num_rows <= PIECE_ROWS and num_inputs <= PIECE_INPUTS and width <= max_columns:
        np.matmul(x, matrix.columns(0, width), out=out)
        return
    for column in range(0, width, max_columns):
        end_column = min(column + max_columns, width)
        tile = matrix.columns(column, end_column)
        for row, end_row in _row_pieces(num_rows):
            piece = out[row:end_row, ..., column:end_column]
            np.matmul(x[row:end_row, ..., :PIECE_INPUTS], tile[:PIECE_INPUTS], out=piece)
            for start in range(PIECE_INPUTS, num_inputs, PIECE_INPUTS):
                stop = min(start + PIECE_INPUTS, num_inputs)
                piece += np.matmul(x[row:end_row, ..., start:stop], tile[start:stop])


def swiglu(
    gate_up: Floats,  # (n, 2 ffn), overwritten
) -> Floats:
    """g sigmoid(1.702 g) (u + 1) of g = min(gate, 7) and u = clamp(up, -7, 7), (n, ffn)."""
    ffn = gate_up.shape[-1] // 2
    gate, up = gate_up[:, :ffn], gate_up[:, ffn:]
    np.minimum(gate_up, SWIGLU_LIMIT, out=gate_up)
    np.maximum(up, -SWIGLU_LIMIT, out=up)
    up += ONE
    divisor = gate * -SWIGLU_ALPHA
    np.exp(divisor, out=divisor)
    divisor += ONE
    up *= gate
    activated: Floats = np.divide(up, divisor, out=divisor)
    return activated


def rope_frequencies(rope: RopeConfig, head_size: int) -> Floats:
    """Radians a position for each pair of a head's values, (head_size / 2,).

    YaRN (https://arxiv.org/abs/2309.00071, section 3.2): frequencies that turn more than beta_fast times over the
    original context are kept, those that turn less than beta_slow times are divided by factor, and a linear ramp over
    the dimension's index leads from one to the other. Its ends are not rounded to whole dimensions.
    """
    exponents = np.arange(0, head_size, 2, dtype=np.float64) / head_size
    frequencies = rope.theta**-exponents
    if rope.factor == 1.0:
        return frequencies.astype(np.float32)
    low, high = (
        head_size * math.log(rope.original_context_length / (beta * 2 * math.pi)) / (2 * math.log(rope.theta))
        for beta in (rope.beta_fast, rope.beta_slow)
    )
    low, high = max(low, 0.0), min(high, head_size - 1.0)
    ramp = np.clip((np.arange(head_size // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    kept = (1.0 - ramp) * rope.extrapolation_factor
    blended: Floats = (frequencies * kept + frequencies / rope.factor * (1.0 - kept)).astype(np.float32)
    return blended


def is_row_invariant(shapes: set[tuple[int, int]]) -> bool:
    """Whether `multiply` on this machine gives a row of a product (inputs, outputs) the same bits among any others."""
    random = np.random.default_rng(0)
    for inputs, outputs in sorted(shapes):
        x = random.standard_normal((PIECE_ROWS, inputs), np.float32)
        matrix = DecodedMatrix(random.standard_normal((inputs, outputs), np.float32), outputs)
        whole = np.empty((PIECE_ROWS, outputs), np.float32)
        multiply(x, matrix, whole)
        for num_rows in (2, 3, 4, 5, 8, 13, 16, 17, 31, 48):
            for start in (0, PIECE_ROWS - num_rows):
                part = np.empty((num_rows, outputs), np.float32)
                multiply(x[start : start + num_rows], matrix, part)
                if not np.array_equal(part, whole[start : start + num_rows]):
                    return False
    return True


def _product_shapes(config: GPTConfig, block_size: int) -> set[tuple[int, int]]:
    """(inputs, outputs) of the products that are probed: of attention over a block, and of the weights' pieces."""
    shapes = {(config.head_size, block_size), (block_size, round_up(config.head_size, COLUMN_MULTIPLE))}
    for name, shape in config.expected_tensors().items():
        if is_matrix(name) and name != "position_embd.weight":
            outputs, inputs = shape[-2:]
            columns = _sizes(round_up(outputs, COLUMN_MULTIPLE), PIECE_OUTPUTS)
            shapes |= {(rows, width) for rows in _sizes(inputs, PIECE_INPUTS) for width in columns}
    return shapes


def _sizes(size: int, piece: int) -> set[int]:
    """The sizes of the pieces that something is cut into."""
    return {min(piece, size - start) for start in {0, size // piece * piece} if start < size}


def _row_pieces(num_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most PIECE_ROWS that cover the rows, none of one row if there are more: the last may begin early."""
    for start in range(0, num_rows, PIECE_ROWS):
        stop = min(start + PIECE_ROWS, num_rows)
        yield max(0, min(start, stop - 2)), stop
