"""The numpy ops against the formulas of their Protocol, written out naively in float64."""

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest

from services.executor.ops import Ops
from services.executor.ops.numpy_kv import BlockRun, _runs, allocate_kv
from services.executor.ops.numpy_ops import NumpyOps, Routing, rope_frequencies, swiglu
from services.executor.step import KVGroup, SequenceSlice, StepBatch
from services.executor.weights import BlockMatrix, DecodedMatrix, GatheredMatrix
from shared.ggml_type import GGMLType
from shared.quantizers import quantize
from shared.quants import dequantize
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS

BLOCK_SIZE = 16
GROUPS = [KVGroup("full", 1, 0), KVGroup("window", 2, TINY_GPT_OSS.sliding_window)]


@pytest.fixture
def random():
    return np.random.default_rng(7)


@pytest.fixture(scope="module")
def ops():
    return NumpyOps(TINY_GPT_OSS, GROUPS, BLOCK_SIZE)


def test_implements_the_protocol():
    """Every op is there under its name, with the arguments of the Protocol in their order."""
    for name, method in inspect.getmembers(Ops, inspect.isfunction):
        if not name.startswith("_"):
            ours = inspect.signature(getattr(NumpyOps, name)).parameters.values()
            theirs = inspect.signature(method).parameters.values()
            assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs], name


@pytest.mark.parametrize("num_rows", [1, 2, 67])
def test_norms(ops, random, num_rows):
    x = 3 * random.standard_normal((num_rows, 90), np.float32) + 1
    weight, bias = random.standard_normal((2, 90), np.float32)
    kept = x.copy()
    wide = x.astype(np.float64)
    mean_square = (wide**2).mean(axis=-1, keepdims=True)
    assert_close(ops.rms_norm(x, weight), wide / np.sqrt(mean_square + 1e-5) * weight)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias
    assert_close(ops.layer_norm(x, weight, bias), expected)
    np.testing.assert_array_equal(x, kept)


def test_norms_of_tiny_rows(ops):
    """Epsilon decides where the values are small."""
    x = np.full((1, 4), 1e-4, np.float32)
    assert_close(ops.rms_norm(x, np.ones(4, np.float32)), np.full((1, 4), 1e-4 / math.sqrt(1e-8 + 1e-5)))


@pytest.mark.parametrize("num_rows", [1, 2, 5, 65, 130])
@pytest.mark.parametrize(("inputs", "outputs"), [(90, 37), (600, 50), (256, 2050)])
def test_linear(ops, random, num_rows, inputs, outputs):
    x = random.standard_normal((num_rows, inputs), np.float32)
    rows = random.standard_normal((outputs, inputs), np.float32)
    bias = random.standard_normal(outputs, np.float32)
    array = np.zeros((inputs, -(-outputs // 16) * 16), np.float32)
    array[:, :outputs] = rows.T
    expected = x.astype(np.float64) @ rows.T.astype(np.float64)
    for matrix in (DecodedMatrix(array, outputs), blocks_of(rows)):
        assert_close(ops.linear(x, matrix), expected, 1e-4)
        assert_close(ops.linear(x, matrix, bias), expected + bias, 1e-4)


def test_no_rows(ops):
    """A step that wants no logits runs the head over nothing."""
    matrix = DecodedMatrix(np.ones((90, 16), np.float32), 16)
    empty = np.empty((0, 90), np.float32)
    assert ops.linear(ops.rms_norm(empty, np.ones(90, np.float32)), matrix).shape == (0, 16)


def test_embeddings(ops, random):
    rows = random.standard_normal((33, 64), np.float32)
    ids = np.array([32, 0, 7, 7], np.int32)
    array = np.zeros((64, 48), np.float32)
    array[:, :33] = rows.T
    for table in (GatheredMatrix(rows), DecodedMatrix(array, 33), blocks_of(rows)):
        found = ops.embed(table, ids)
        np.testing.assert_array_equal(found, rows[ids])
        found += 1  # the ops after it may write over it
    assert rows[0, 0] == array[0, 0]
    quantised = quantize(rows, GGMLType.MXFP4)
    table = BlockMatrix([(quantised, GGMLType.MXFP4)], 64)
    np.testing.assert_array_equal(ops.embed(table, ids), dequantize(quantised, GGMLType.MXFP4)[ids])


def test_gelu(ops):
    x = np.array([[-100.0, -3.0, -0.5, 0.0, 1e-3, 0.5, 3.0, 100.0]], np.float32)
    expected = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x[0].tolist()]
    assert_close(ops.gelu(x), np.array([expected]))


def test_swiglu(random):
    gate_up = 10 * random.standard_normal((50, 2 * 33), np.float32)
    gate_up[0, 0], gate_up[1, 33] = -200.0, 90.0
    gate, up = gate_up[:, :33].astype(np.float64), gate_up[:, 33:].astype(np.float64)
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    with np.errstate(over="ignore"):
        assert_close(swiglu(gate_up.copy()), gate / (1 + np.exp(-1.702 * gate)) * (up + 1))


def test_routing(ops):
    logits = np.array([[1.0, 3.0, 3.0, -1.0, 2.0, 3.0, 0.0, 0.0], [0, 0, 0, 0, 0, 0, 0, 0]], np.float32)
    routing = ops.route(logits, 4)
    np.testing.assert_array_equal(routing.ids, [[1, 2, 5, 4], [0, 1, 2, 3]])
    best = np.exp(np.array([3.0, 3.0, 3.0, 2.0]))
    assert_close(routing.weights, np.array([best / best.sum(), [0.25] * 4]))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 40, 200])
def test_experts(ops, random, num_rows):
    """Each row by itself, through each of its experts; lone rows and experts without rows among them."""
    num_experts, hidden, ffn = 9, 72, 40
    gate_up = random.standard_normal((num_experts, 2 * ffn, hidden), np.float32) / 4
    down = random.standard_normal((num_experts, hidden, ffn), np.float32) / 4
    gate_up_bias = random.standard_normal((num_experts, 2 * ffn), np.float32)
    down_bias = random.standard_normal((num_experts, hidden), np.float32)
    x = random.standard_normal((num_rows, hidden), np.float32)
    ids = np.array([random.permutation(num_experts - 1)[:4] for _ in range(num_rows)])
    ids[0, 0] = num_experts - 1
    weights = random.dirichlet(np.ones(4), num_rows).astype(np.float32)
    found = ops.experts(
        x,
        Routing(ids, weights),
        [decoded(rows) for rows in gate_up],
        gate_up_bias,
        [decoded(rows) for rows in down],
        down_bias,
    )
    expected = np.zeros((num_rows, hidden))
    for row in range(num_rows):
        for expert, weight in zip(ids[row], weights[row], strict=True):
            both = gate_up[expert].astype(np.float64) @ x[row] + gate_up_bias[expert]
            gate, up = np.minimum(both[:ffn], 7), np.clip(both[ffn:], -7, 7)
            inner = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            expected[row] += weight * (down[expert].astype(np.float64) @ inner + down_bias[expert])
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("group", ["full", "window"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention(ops, random, group, with_sinks):
    """Three sequences in one step: a chunk that starts mid-block, a lone token far on, and a fresh prompt."""
    config = TINY_GPT_OSS
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_size
    window = config.sliding_window if group == "window" else 0
    kv = allocate_kv(64, kv_heads, size, BLOCK_SIZE, group)
    kv.keys[:] = np.nan  # what is not written must not be read
    kv.values[:] = np.nan
    free = random.permutation(64).tolist()
    sinks = 2 * random.standard_normal(heads, np.float32) if with_sinks else None
    shares = [(37, 50), (109, 1), (0, 20)]  # positions before the step, tokens in it
    history = []
    for length, _ in shares:
        blocks = {"full": [free.pop() for _ in range(8)], "window": []}
        blocks["window"] = blocks["full"]
        qkv = random.standard_normal((length, (heads + 2 * kv_heads) * size), np.float32)
        history.append((blocks, qkv))
        if length:
            run(ops, kv, [(blocks, 0, length)], qkv, sinks)
    now = random.standard_normal((71, (heads + 2 * kv_heads) * size), np.float32)
    work = [(history[i][0], *shares[i]) for i in range(3)]
    found = run(ops, kv, work, now, sinks)
    assert np.isfinite(found).all()
    start = 0
    for (length, count), (_, before) in zip(shares, history, strict=True):
        rows = np.concatenate((before, now[start : start + count]))
        expected = naive_attention(rows, config, window, sinks)[length:]
        assert_close(found[start : start + count], expected, 1e-5)
        start += count


@pytest.mark.parametrize("group", ["full", "window"])
def test_attention_of_many_streams(ops, random, group):
    """Twelve lone rows whose blocks lie scattered, the first two of each shared by all."""
    config = TINY_GPT_OSS
    window = config.sliding_window if group == "window" else 0
    kv = allocate_kv(80, 2, 20, BLOCK_SIZE, group)
    free = random.permutation(80).tolist()
    prefix = random.standard_normal((2 * BLOCK_SIZE, 200), np.float32)
    shared = [free.pop(), free.pop()]
    run(ops, kv, [({"full": shared, "window": shared}, 0, 2 * BLOCK_SIZE)], prefix, None)
    streams = []
    for length in range(33, 105, 6):
        ids = [*shared, *(free.pop() for _ in range(-(-length // BLOCK_SIZE) - 2))]
        qkv = random.standard_normal((length - 2 * BLOCK_SIZE, 200), np.float32)
        blocks = {"full": ids, "window": ids}
        if len(qkv) > 1:
            run(ops, kv, [(blocks, 2 * BLOCK_SIZE, len(qkv) - 1)], qkv[:-1], None)
        streams.append((blocks, np.concatenate((prefix, qkv))))
    work = [(blocks, len(qkv) - 1, 1) for blocks, qkv in streams]
    sinks = random.standard_normal(6, np.float32)
    assert any(tiles.order is not None for tiles in prepare(ops, work).tiles[group])
    found = run(ops, kv, work, np.stack([qkv[-1] for _, qkv in streams]), sinks)
    for row, (_, qkv) in zip(found, streams, strict=True):
        assert_close(row, naive_attention(qkv, config, window, sinks)[-1], 1e-5)


def test_attention_to_long_contexts_in_small_pieces(ops, random, monkeypatch):
    """Tiles shrink to a token when the scores of more would not fit, and lone tokens go apart."""
    qkv = random.standard_normal((100, 10 * 20), np.float32)
    blocks = {"full": list(range(8)), "window": list(range(8))}
    kv = allocate_kv(8, 2, 20, BLOCK_SIZE, "full")
    expected = run(ops, kv, [(blocks, 0, 100)], qkv, None)
    monkeypatch.setattr("services.executor.ops.numpy_kv.TILE_SCORES", 6 * BLOCK_SIZE * 9)
    kv = allocate_kv(8, 2, 20, BLOCK_SIZE, "full")
    np.testing.assert_array_equal(run(ops, kv, [(blocks, 0, 100)], qkv, None), expected)


def test_a_sink_takes_weight_and_gives_nothing(ops):
    """One visible position: the head is v e^s / (e^s + e^sink)."""
    qkv = np.ones((1, 10 * 20), np.float32)
    sinks = np.array([-30.0, 0.0, 1.0, 4.0, 30.0, 60.0], np.float32)
    kv = allocate_kv(1, 2, 20, BLOCK_SIZE, "full")
    found = run(ops, kv, [({"full": [0], "window": [0]}, 0, 1)], qkv, sinks, rotate=False).reshape(6, 20)
    score = 20 / math.sqrt(20)
    expected = 1 / (1 + np.exp(sinks.astype(np.float64) - score))
    assert_close(found, np.repeat(expected[:, None], 20, axis=1), 1e-6)


def test_rotation(ops):
    """Value i of the first half and value i of the second turn together, by the position times a frequency."""
    rope = TINY_GPT_OSS.rope
    assert rope is not None
    step = prepare(ops, [({"full": [0], "window": [0]}, 3, 1)])
    kv = allocate_kv(1, 2, 20, BLOCK_SIZE, "full")
    qkv = np.arange(200, dtype=np.float32).reshape(1, 200)
    queries = ops.store_kv(qkv.copy(), kv, step, rotate=True)
    angles = 3 * rope_frequencies(rope, 20).astype(np.float64)
    before = qkv.reshape(10, 2, 10)[:8].astype(np.float64)
    first = before[:, 0] * np.cos(angles) - before[:, 1] * np.sin(angles)
    second = before[:, 1] * np.cos(angles) + before[:, 0] * np.sin(angles)
    expected = rope.attention_factor * np.concatenate((first, second), axis=-1)
    assert_close(queries[0], expected[:6], 1e-5)
    assert_close(kv.keys[0, :, :, 3], expected[6:], 1e-5)
    np.testing.assert_array_equal(kv.values[0, :, 3, :20], qkv.reshape(10, 20)[8:])


def test_fresh_blocks_are_cleared(ops):
    kv = allocate_kv(3, 2, 20, BLOCK_SIZE, "full")
    kv.keys[:] = np.inf
    kv.values[:] = np.inf
    found = run(ops, kv, [({"full": [2, 0], "window": [2, 0]}, 0, 17)], np.ones((17, 200), np.float32), None)
    assert np.isfinite(found).all()
    assert not kv.keys[0, :, :, 1:].any()
    assert not kv.values[0, :, 1:].any()
    assert np.isinf(kv.keys[1]).all()


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([5], [(0, 1, slice(5, 6, 1))]),
        ([5, 6, 7, 2], [(0, 3, slice(5, 8, 1)), (3, 4, slice(2, 3, 1))]),
        ([2, 1, 0], [(0, 3, slice(2, None, -1))]),
        ([9, 8, 4, 6, 7], [(0, 2, slice(9, 7, -1)), (2, 3, slice(4, 5, 1)), (3, 5, slice(6, 8, 1))]),
    ],
)
def test_runs_of_blocks(blocks, expected):
    found = list(_runs(4, blocks))
    assert found == [BlockRun(4, *run) for run in expected]
    spanned = [block for run in found for block in range(10)[run.blocks]]
    assert spanned == blocks


def test_tiles_of_unlike_lengths_go_apart(random):
    """Lone tokens behind one, three and forty blocks: the short ones are not padded to the longest."""
    ops = NumpyOps(TINY_GPT2, [KVGroup("full", 1, 0)], BLOCK_SIZE)
    tables = [np.arange(40, dtype=np.int32)] * 4
    lengths = [5, 640, 40, 33]
    slices = [
        SequenceSlice(i, 1, length, {"full": table})
        for i, (length, table) in enumerate(zip(lengths, tables, strict=True))
    ]
    batch = StepBatch(np.zeros(4, np.int32), np.array(lengths, np.int32) - 1, slices, np.arange(4, dtype=np.int32))
    groups = ops.prepare(batch).tiles["full"]
    assert [(group.num_tiles, group.num_blocks) for group in groups] == [(1, 40), (2, 3), (1, 1)]


def run(ops, kv, work, qkv, sinks, rotate=True):
    """Store and attend for a step of (blocks, positions before, tokens) of each sequence."""
    step = prepare(ops, work)
    queries = ops.store_kv(qkv.copy(), kv, step, rotate=rotate)
    return ops.attention(queries, kv, step, sinks)


def prepare(ops, work):
    slices, positions = [], []
    for blocks, before, count in work:
        tables = {name: np.array(ids[: -(-(before + count) // BLOCK_SIZE)], np.int32) for name, ids in blocks.items()}
        slices.append(SequenceSlice(len(positions), count, before + count, tables))
        positions += range(before, before + count)
    rows = np.arange(len(positions), dtype=np.int32)
    return ops.prepare(StepBatch(rows, np.array(positions, np.int32), slices, rows))


def naive_attention(qkv, config, window, sinks):
    """Row by row, head by head, in float64, (rows, heads x size)."""
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_size
    angles = np.arange(len(qkv))[:, None] * rope_frequencies(config.rope, size).astype(np.float64)
    by_head = qkv.astype(np.float64).reshape(len(qkv), -1, size)
    first, second = np.split(by_head[:, : heads + kv_heads], 2, axis=-1)
    cosines = np.cos(angles)[:, None] * config.rope.attention_factor
    sines = np.sin(angles)[:, None] * config.rope.attention_factor
    turned = np.concatenate((first * cosines - second * sines, second * cosines + first * sines), axis=-1)
    out = np.zeros((len(qkv), heads, size))
    for row in range(len(qkv)):
        begin = max(0, row - window + 1) if window else 0
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            scores = turned[begin : row + 1, heads + kv_head] @ turned[row, head] / math.sqrt(size)
            weights = np.exp(scores)
            total = weights.sum() + (0 if sinks is None else np.exp(float(sinks[head])))
            out[row, head] = weights / total @ by_head[begin : row + 1, heads + kv_heads + kv_head]
    return out.reshape(len(qkv), -1)


def decoded(rows):
    """A matrix in the float32 layout, from (outputs, inputs)."""
    array = np.zeros((rows.shape[1], -(-rows.shape[0] // 16) * 16), np.float32)
    array[:, : rows.shape[0]] = rows.T
    return DecodedMatrix(array, rows.shape[0])


def blocks_of(rows):
    """The same as a file's F32 bytes, in two parts."""
    data = np.ascontiguousarray(rows).view(np.uint8)
    if len(rows) == 33:  # rows are gathered from matrices of one part
        return BlockMatrix([(data, GGMLType.F32)], rows.shape[1])
    return BlockMatrix([(data[:20], GGMLType.F32), (data[20:], GGMLType.F32)], rows.shape[1])


def assert_close(found, expected, tolerance=2e-6):
    """Within `tolerance` of the largest value, and finite."""
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def test_a_block_that_is_gone(ops):
    """A table that has lost a block in sight is our own bug, and said so rather than read from elsewhere."""
    table = {"full": np.array([0, 1], np.int32), "window": np.array([-1, 1], np.int32)}
    rows = np.zeros(1, np.int32)
    batch = StepBatch(rows, np.array([30], np.int32), [SequenceSlice(0, 1, 31, table)], rows)
    with pytest.raises(AssertionError, match="a block that is gone"):
        ops.prepare(batch)
    later = replace(batch, positions=np.array([60], np.int32))
    tables = {"full": np.array([0, 1, 2, 3], np.int32), "window": np.array([-1, 1, 2, 3], np.int32)}
    ops.prepare(replace(later, sequences=[SequenceSlice(0, 1, 61, tables)]))
