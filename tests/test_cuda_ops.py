"""Every op of the CUDA backend against float64 numpy: odd sizes, random rows, canaries past what is written."""

from dataclasses import replace

import numpy as np
import pytest

from services.executor.step import SequenceSlice, StepBatch
from shared.cuda_layout import FAMILIES
from shared.ggml_type import GGMLType
from tests.cuda_device import download, make_weights, open_device, upload
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

HALF_STEP = 2.0**-11  # relative error of rounding to half
FLOAT_STEP = 2.0**-23  # of an addition on tensor cores, which cut
CANARY = np.float32(-12345.678)


@pytest.fixture(scope="module")
def device():
    device = open_device()
    yield device
    device.close()


def load(device, config, families):
    from services.executor.cuda.kernels import modules_of

    device.load(modules_of(config, families))


def make_ops(device, config, max_rows=256, block_size=32):
    from services.executor.cuda.ops import CudaOps
    from services.executor.cuda.workspace import Workspace

    return CudaOps(device, config, Workspace(device, config, max_rows, max_rows), block_size)


def halves(device, values, is_spread=False):
    """Rows of half on the device, padded with zeros, and as float64."""
    from services.executor.cuda.arrays import Halves

    rows, width = values.shape
    padded = np.zeros((rows, -(-width // 64) * 64), np.float16)
    padded[:, :width] = values
    address = upload(device, spread(padded) if is_spread else padded)
    return Halves(address, rows, width, is_spread), padded[:, :width].astype(np.float64)


def spread(values):
    """Rows with their columns as spread.cuh puts them, and back; whole 32 columns."""
    return values.reshape(len(values), -1, 4, 4, 2).swapaxes(2, 3).reshape(len(values), -1)


def skip_unless_hopper(device):
    if device.capability != (9, 0):
        pytest.skip("products of warpgroups run on devices of compute capability 9.0")


def product_bound(x, weights, type, is_spread=False):
    """How far a product may be off: additions in float, and for types that are not exact in half their rounding.

    wgmma_tiles.cuh, to which spread rows go, rounds INT8's weights too, once their scales are multiplied in.
    """
    sums = np.abs(x) @ np.abs(weights).T
    family = FAMILIES[type].name
    is_exact = family in ("F16", "MXFP4") or (family == "INT8" and not is_spread)
    return sums * ((0 if is_exact else HALF_STEP) + (x.shape[1] / 16 + 16) * FLOAT_STEP) + 1e-6


@pytest.mark.parametrize("num_rows", [1, 3, 8, 9, 20, 33, 64, 65, 130, 256, 1030])
@pytest.mark.parametrize(
    ("type", "outputs", "inputs"),
    [
        (GGMLType.MXFP4, 5120, 2880),
        (GGMLType.MXFP4, 37, 32),
        (GGMLType.Q8_0, 2881, 4096),
        (GGMLType.Q8_0, 16, 96),
        (GGMLType.Q5_0, 65, 160),
        (GGMLType.Q4_0, 40, 64),
        (GGMLType.IQ4_NL, 129, 288),
        (GGMLType.Q4_1, 70, 2080),
        (GGMLType.Q5_1, 64, 96),
        (GGMLType.Q4_K, 50, 512),
        (GGMLType.Q5_K, 66, 256),
        (GGMLType.Q6_K, 131, 768),
        (GGMLType.F32, 77, 90),
        (GGMLType.F16, 301, 72),
        (GGMLType.BF16, 123, 1001),
    ],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("is_spread", [False, True], ids=["", "spread"])
def test_products(device, type, outputs, inputs, num_rows, is_spread):
    from services.executor.cuda.arrays import Epilogue

    if is_spread:
        skip_unless_hopper(device)
    random = np.random.default_rng(outputs * num_rows)
    weights, held = make_weights(
        device, [[("w.weight", (random.standard_normal((outputs, inputs)) / 16).astype(np.float32), type)]]
    )
    matrix = held["w.weight"].astype(np.float64)
    bias = random.standard_normal(outputs).astype(np.float32)
    load(device, TINY_GPT2, [FAMILIES[type]])
    ops = make_ops(device, TINY_GPT2)
    x, exact = halves(device, random.standard_normal((num_rows, inputs)), is_spread)
    from services.executor.cuda.weights import Vector

    product = ops.linear(x, weights.matrix("w.weight"), Vector((upload(device, bias),), (outputs,)))
    bound, expected = product_bound(exact, matrix, type, is_spread), exact @ matrix.T + bias
    pitch = outputs + 3
    out = upload(device, np.full((num_rows + 2, pitch), CANARY))
    ops.run(product, out, pitch, Epilogue.STORE)
    found = download(device, out, (num_rows + 2, pitch), np.float32)
    assert_within(found[:num_rows, :outputs], expected, bound)
    assert (found[num_rows:] == CANARY).all()
    assert (found[:, outputs:] == CANARY).all()
    ops.run(product, out, pitch, Epilogue.RESIDUAL)
    twice = download(device, out, (num_rows + 2, pitch), np.float32)
    assert_within(twice[:num_rows, :outputs], 2 * expected, 2 * bound + np.abs(expected) * 1e-6)
    pitch = -(-outputs // 64) * 64 + 64
    out = upload(device, np.full((num_rows + 2, pitch), 7.0, np.float16))
    ops.run(product, out, pitch, Epilogue.GELU)
    found = download(device, out, (num_rows + 2, pitch), np.float16)
    found = spread(found) if is_spread else found
    assert_within(found[:num_rows, :outputs], gelu(expected), 1.2 * bound + np.abs(expected) * HALF_STEP + 2e-6)
    assert (found[num_rows:] == 7).all()
    assert (found[:, outputs:] == 7).all()
    if type == GGMLType.MXFP4:
        assert np.abs(twice[:num_rows, :outputs] - 2 * expected).max() <= 0.01 * np.abs(2 * expected).max()


@pytest.mark.parametrize("type", [GGMLType.MXFP4, GGMLType.Q8_0], ids=lambda t: t.name)
@pytest.mark.parametrize("outputs", [2000, 60_001], ids=["few strips a block", "many"])
def test_what_one_rows_product_adds_at_its_end(device, outputs, type):
    """Biases and residuals: of few strips a block copies them ahead, of many it reads them when it needs them."""
    from services.executor.cuda.arrays import Epilogue
    from services.executor.cuda.weights import Vector

    random = np.random.default_rng(outputs)
    values = random.standard_normal((outputs, 64)).astype(np.float32)
    weights, held = make_weights(device, [[("w.weight", values, type)]])
    matrix = held["w.weight"].astype(np.float64)
    load(device, TINY_GPT2, [FAMILIES[type]])
    ops = make_ops(device, TINY_GPT2)
    x, exact = halves(device, random.standard_normal((1, 64)))
    expected, bound = exact @ matrix.T, product_bound(exact, matrix, type)
    for _ in range(3):
        biases, residuals = random.standard_normal((2, outputs)).astype(np.float32)
        out = upload(device, np.concatenate([residuals, [CANARY]]))
        bias = Vector((upload(device, biases),), (outputs,))
        ops.run(ops.linear(x, weights.matrix("w.weight"), bias), out, outputs, Epilogue.RESIDUAL)
        found = download(device, out, (outputs + 1,), np.float32)
        assert_within(found[:outputs], (expected + biases + residuals)[0], bound[0] + 1e-6 * np.abs(expected[0]))
        assert found[outputs] == CANARY


@pytest.mark.parametrize(("num_rows", "is_spread"), [(2, False), (70, False), (70, True)])
@pytest.mark.parametrize("extreme", [30, 64, 127, 200])
def test_mxfp4_scales_of_any_size(device, extreme, num_rows, is_spread):
    """Powers of two far from one: nothing is flushed, nothing overflows before it must."""
    from services.executor.cuda.arrays import Epilogue

    if is_spread:
        skip_unless_hopper(device)
    random = np.random.default_rng(extreme)
    values = np.ldexp(random.standard_normal((32, 64)), extreme - 127).astype(np.float32)
    weights, held = make_weights(device, [[("w.weight", values, GGMLType.MXFP4)]])
    load(device, TINY_GPT2, [FAMILIES[GGMLType.MXFP4]])
    ops = make_ops(device, TINY_GPT2)
    x, exact = halves(device, random.standard_normal((num_rows, 64)), is_spread)
    out = upload(device, np.zeros((num_rows, 32), np.float32))
    ops.run(ops.linear(x, weights.matrix("w.weight")), out, 32, Epilogue.STORE)
    found = download(device, out, (num_rows, 32), np.float32)
    matrix = held["w.weight"].astype(np.float64)
    assert_within(found, exact @ matrix.T, np.abs(exact) @ np.abs(matrix).T * 2.0**-16 + 1e-44)


@pytest.mark.parametrize(("num_rows", "is_spread"), [(2, False), (70, False), (70, True), (200, True)])
def test_mxfp4_blocks_far_smaller_than_their_row(device, num_rows, is_spread):
    """Blocks 2^-20 of the row's largest count in full where x is zero at all others."""
    from services.executor.cuda.arrays import Epilogue

    if is_spread:
        skip_unless_hopper(device)
    random = np.random.default_rng(num_rows)
    values = random.standard_normal((48, 192)).astype(np.float32)
    values[:, 64:] *= 2.0**-20
    weights, held = make_weights(device, [[("w.weight", values, GGMLType.MXFP4)]])
    load(device, TINY_GPT2, [FAMILIES[GGMLType.MXFP4]])
    ops = make_ops(device, TINY_GPT2)
    rows = random.standard_normal((num_rows, 192))
    rows[:, :64] = 0
    x, exact = halves(device, rows, is_spread)
    out = upload(device, np.zeros((num_rows, 48), np.float32))
    ops.run(ops.linear(x, weights.matrix("w.weight")), out, 48, Epilogue.STORE)
    matrix = held["w.weight"].astype(np.float64)
    bound = np.abs(exact) @ np.abs(matrix).T * 2.0**-16 + 1e-12
    assert_within(download(device, out, (num_rows, 48), np.float32), exact @ matrix.T, bound)


@pytest.mark.parametrize("type", list(GGMLType), ids=lambda type: type.name)
def test_embedding_rows(device, type):
    random = np.random.default_rng(1)
    values = random.standard_normal((301, 512)).astype(np.float32)
    weights, held = make_weights(device, [[("token_embd.weight", values, type)]])
    config = replace(TINY_GPT2, hidden_size=512, num_heads=8, num_kv_heads=8, head_size=64)
    load(device, config, [FAMILIES[type]])
    ops = make_ops(device, config)
    ids = random.permutation(301)[:50].astype(np.int32)
    ops.prepare(small_step(upload(device, ids), len(ids)))
    x = ops.embed(weights.embedding("token_embd.weight"), ops._step.token_ids)
    expected = held["token_embd.weight"][ids].astype(np.float64)
    assert_within(download(device, x.address, (50, 512), np.float32), expected, np.abs(expected) * HALF_STEP + 6e-8)


@pytest.mark.parametrize("num_rows", [7, 70])
@pytest.mark.parametrize("size", [1, 90, 255, 2880])
def test_norms(device, size, num_rows):
    from services.executor.cuda.arrays import Floats
    from services.executor.cuda.weights import Vector

    config = replace(TINY_GPT2, hidden_size=size, num_heads=1, num_kv_heads=1, head_size=size)
    random = np.random.default_rng(size)
    load(device, TINY_GPT2, [])
    ops = make_ops(device, config if size < 129 else replace(TINY_GPT_OSS, hidden_size=size), num_rows + 1)
    values = (random.standard_normal((num_rows, size)) * 30 + 5).astype(np.float32)
    weight, bias = (random.standard_normal(size).astype(np.float32) for _ in range(2))
    x = Floats(upload(device, values), num_rows, size)
    vectors = [Vector((upload(device, vector),), (size,)) for vector in (weight, bias)]
    exact = values.astype(np.float64)
    roots = np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5)
    assert_halves(device, ops.halves(ops.rms_norm(x, vectors[0]), is_spread=num_rows > 64), exact / roots * weight)
    centred = exact - exact.mean(axis=1, keepdims=True)
    roots = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    slack = np.abs(values).max() * 2.0**-20 / roots * np.abs(weight)  # the mean's own rounding
    assert_halves(device, ops.layer_norm(x, *vectors), centred / roots * weight + bias, slack)


def assert_halves(device, normed, expected, slack=0.0):
    found = download(device, normed.address, (normed.num_rows, normed.pitch), np.float16)
    found = spread(found) if normed.is_spread else found
    bound = np.abs(expected) * HALF_STEP * 1.01 + slack + 1e-6
    assert_within(found[:, : normed.width], expected, bound)
    assert (found[:, normed.width :] == 0).all()


ATTENTION = {
    "grouped": TINY_GPT_OSS,
    "gpt-oss": replace(TINY_GPT_OSS, num_heads=64, num_kv_heads=8, head_size=64, sliding_window=128),
    "twelve to a head": replace(TINY_GPT_OSS, num_heads=12, num_kv_heads=1, head_size=32),
    "heads of 96": replace(TINY_GPT_OSS, num_heads=6, num_kv_heads=3, head_size=96),
    "heads of 128": replace(TINY_GPT_OSS, num_heads=16, num_kv_heads=1, head_size=128, sliding_window=33),
    "not grouped": replace(TINY_GPT2, hidden_size=90),
}


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("name", list(ATTENTION))
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_attention(device, name, windowed, block_size, wide):
    """Prompts, a chunk, and decoding with as many splits as a graph may have; sinks, windows, several sequences."""
    check = AttentionCheck(device, ATTENTION[name], windowed, block_size)
    check.step([(0, 150), (1, 1), (2, 33)], wide=wide)
    check.step([(0, 1), (2, 60), (3, 7)], wide=wide)
    check.step([(0, 201), (1, 40), (3, 2)], wide=wide)
    for num_splits in (1, 2, 5, 64):
        check.step([(0, 1), (1, 1), (2, 1), (3, 1)], num_splits)


class AttentionCheck:
    """Sequences whose keys and values grow step by step, on the device and in float64."""

    def __init__(self, device, config, windowed, block_size):
        from services.executor.cuda.kv import allocate_kv
        from services.executor.cuda.weights import Vector
        from services.executor.step import KVGroup

        load(device, config, [])
        self.device, self.config, self.block_size = device, config, block_size
        self.window = (config.sliding_window or 40) if windowed else 0
        self.group = KVGroup("full", 1, self.window)
        self.ops = make_ops(device, config, 256, block_size)
        self.kv = allocate_kv(device, config, self.group, 64, block_size)
        self.inputs = device.allocate(1 << 16)
        self.random = np.random.default_rng(7)
        self.free = self.random.permutation(64).tolist()
        self.tables = [[] for _ in range(4)]
        self.keys = [np.empty((0, config.num_kv_heads, config.head_size)) for _ in range(4)]
        self.values = [np.empty((0, config.num_kv_heads, config.head_size)) for _ in range(4)]
        sinks = self.random.standard_normal(config.num_heads).astype(np.float32) * 2
        self.sinks = sinks.astype(np.float64) if config.rope else None
        self.sinks_vector = Vector((upload(device, sinks),), sinks.shape) if config.rope else None
        self.qkv_address = device.allocate(4 * 256 * (config.query_size + 2 * config.kv_size))

    def step(self, work, num_splits=1, wide=False):
        """Rows for sequences, (index, rows) each.

        Args:
            wide: prompts go to attention_prefill.cu.
        """
        from services.executor.cuda.arrays import Halves
        from services.executor.cuda.kv import Shape, count_items, lay_out, pack
        from services.executor.cuda.ops import item_tokens, wide_tokens

        config, device = self.config, self.device
        slices, positions = [], []
        for index, count in work:
            end = len(self.keys[index]) + count
            while len(self.tables[index]) * self.block_size < end:
                self.tables[index].append(self.free.pop())
            tables = {"full": np.array(self.tables[index], np.int32)}
            slices.append(SequenceSlice(len(positions), count, end, tables))
            positions += range(end - count, end)
        rows = len(positions)
        ids = np.zeros(rows, np.int32)
        batch = StepBatch(ids, np.array(positions, np.int32), slices, ids[:0])
        shared = config.num_heads // config.num_kv_heads
        tile_rows = 32 if not wide and rows > len(work) and config.head_size <= 64 and shared <= 32 else 16
        tokens = item_tokens(config, tile_rows)
        if wide:
            num_wide, num_narrow = count_items(batch, tokens, wide_tokens(config))
            widths = num_wide, wide_tokens(config)
        else:
            widths, num_narrow = (0, 0), sum(-(-count // tokens) for _, count in work)
        shape = Shape(rows, 0, len(work), num_narrow + widths[0], 32, tile_rows, num_splits, *widths)
        step = lay_out(shape, [self.group], self.inputs)
        device.upload(self.inputs, pack(batch, step, self.block_size, tokens, self.inputs))
        self.ops.prepare(step)
        qkv = self.random.standard_normal((rows, config.query_size + 2 * config.kv_size)).astype(np.float32)
        device.upload(self.ops._workspace.qkv, qkv)
        queries = self.ops.place_kv(self.kv, step, rotate=config.rope is not None)
        replaced = replace(self.kv, window=self.window)
        heads = self.ops.attention(queries, replaced, step, self.sinks_vector)
        assert isinstance(heads, Halves)
        found = download(device, heads.address, (rows, heads.pitch), np.float16)
        found = (spread(found) if heads.is_spread else found)[:, : heads.width]
        assert np.isfinite(found).all()
        expected = self.reference(qkv, batch, [index for index, _ in work])
        largest = max(np.abs(values).max() for values in self.values if len(values))
        # Weights and the result are rounded to half, scores are sums over D products of halves.
        np.testing.assert_allclose(found.astype(np.float64), expected, atol=4 * HALF_STEP * largest)

    def reference(self, qkv, batch, indices):
        config = self.config
        by_head = qkv.astype(np.float64).reshape(len(qkv), -1, config.head_size)
        heads, kv_heads = config.num_heads, config.num_kv_heads
        if config.rope is not None:
            by_head[:, : heads + kv_heads] = self.turned(by_head[:, : heads + kv_heads], batch.positions)
        by_head = by_head.astype(np.float16).astype(np.float64)
        out = np.empty((len(qkv), heads, config.head_size))
        for index, sequence in zip(indices, batch.sequences, strict=True):
            rows = slice(sequence.start, sequence.start + sequence.num_tokens)
            self.keys[index] = np.concatenate([self.keys[index], by_head[rows, heads : heads + kv_heads]])
            self.values[index] = np.concatenate([self.values[index], by_head[rows, heads + kv_heads :]])
            keys, values = (np.repeat(part[index], heads // kv_heads, axis=1) for part in (self.keys, self.values))
            scores = np.einsum("thd,phd->htp", by_head[rows, :heads], keys) / np.sqrt(config.head_size)
            distance = batch.positions[rows][:, None] - np.arange(len(keys))
            scores[:, (distance < 0) | ((distance >= self.window) & (self.window > 0))] = -np.inf
            if self.sinks is not None:
                sinks = np.broadcast_to(self.sinks[:, None, None], (*scores.shape[:2], 1))
                scores = np.concatenate([scores, sinks], axis=2)
            weights = np.exp(scores - scores.max(axis=2, keepdims=True))
            weights /= weights.sum(axis=2, keepdims=True)
            out[rows] = np.einsum("htp,phd->thd", weights[:, :, : len(keys)], values)
        return out.reshape(len(qkv), -1)

    def turned(self, heads, positions):
        from services.executor.ops.numpy_ops import rope_frequencies

        frequencies = rope_frequencies(self.config.rope, self.config.head_size)
        angles = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)[:, None]
        cosines, sines = (part(angles) * self.config.rope.attention_factor for part in (np.cos, np.sin))
        first, second = np.split(heads, 2, axis=-1)
        return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)


@pytest.mark.parametrize("type", [GGMLType.MXFP4, GGMLType.Q8_0, GGMLType.F32, GGMLType.Q6_K], ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("num_rows", "kind"),
    [
        *((count, "normed") for count in (1, 2, 8)),
        *((count, "") for count in (1, 7, 16, 31, 60, 65, 200, 700)),
        *((count, "spread") for count in (9, 33, 65, 120, 200, 700)),
        *((count, "alike") for count in (65, 200)),
    ],
)
def test_experts(device, num_rows, kind, type):
    """Norm, router, choice, order, products, activation and sum, from rows of half to the residual.

    Alike: all rows go to the same experts, so that most groups, and all that some blocks of a product see, are empty.
    """
    from services.executor.cuda.arrays import Floats

    is_normed, is_spread = kind == "normed", kind in ("spread", "alike")
    if is_spread:
        skip_unless_hopper(device)
    wide = type == GGMLType.Q6_K
    config = replace(
        TINY_GPT_OSS, hidden_size=256 if wide else 96, ffn_size=256 if wide else 160, num_experts=40 if wide else 12
    )
    hidden, ffn, experts, used = config.hidden_size, config.ffn_size, config.num_experts, config.num_experts_used
    random = np.random.default_rng(num_rows)

    def values(*shape):
        return (random.standard_normal(shape) * 1.5 / np.sqrt(shape[-1])).astype(np.float32)

    favourites = np.where(np.arange(experts) < used, 50 if kind == "alike" else 0, 0).astype(np.float32)
    weights, held = make_weights(
        device,
        [
            [("blk.0.ffn_gate_inp.weight", values(experts, hidden), GGMLType.F32)],
            [("blk.0.ffn_gate_inp.bias", values(experts) + favourites, GGMLType.F32)],
            [
                ("blk.0.ffn_gate_exps.weight", values(experts, ffn, hidden), type),
                ("blk.0.ffn_up_exps.weight", values(experts, ffn, hidden), type),
            ],
            [("blk.0.ffn_gate_exps.bias", 3 * values(experts, ffn), GGMLType.F32)],
            [("blk.0.ffn_up_exps.bias", 3 * values(experts, ffn), GGMLType.F32)],
            [("blk.0.ffn_down_exps.weight", values(experts, hidden, ffn), type)],
            [("blk.0.ffn_down_exps.bias", values(experts, hidden), GGMLType.F32)],
        ],
    )
    weights.config = config
    held = {name.split(".", 2)[2]: array.astype(np.float64) for name, array in held.items()}
    load(device, config, weights.families)
    ops = make_ops(device, config, 700)
    x, exact = halves(device, random.standard_normal((num_rows, hidden)) * 2, is_spread)
    if is_normed:
        x, exact = normed_rows(device, random, num_rows, hidden)
    residual = random.standard_normal((num_rows + 1, hidden)).astype(np.float32)
    target = Floats(upload(device, residual), num_rows, hidden)
    router = ops.linear(x, weights.matrix("blk.0.ffn_gate_inp.weight"), weights.vector("blk.0.ffn_gate_inp.bias"))
    outputs = ops.experts(
        x,
        ops.route(router, used),
        weights.expert_matrices("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"),
        weights.vector("blk.0.ffn_gate_exps.bias", "blk.0.ffn_up_exps.bias"),
        weights.expert_matrices("blk.0.ffn_down_exps.weight"),
        weights.vector("blk.0.ffn_down_exps.bias"),
    )
    ops.add(target, outputs)
    found = download(device, target.address, (num_rows + 1, hidden), np.float32)

    logits = exact @ held["ffn_gate_inp.weight"].T + held["ffn_gate_inp.bias"]
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :used]
    best = np.take_along_axis(logits, ids, axis=1)
    apart = -np.diff(np.sort(-logits, axis=1)[:, ::-1][:, ::-1], axis=1)
    clear = (np.abs(apart[:, :used]) > 1e-4).all(axis=1)
    assert clear.mean() > 0.9
    if num_rows > 1 or not is_normed:  # else it is the products that choose
        chosen = download(device, ops._workspace.expert_ids, (num_rows, used), np.int32)
        assert (chosen[clear] == ids[clear]).all()
    mixture = np.exp(best - best[:, :1])
    mixture /= mixture.sum(axis=1, keepdims=True)
    expected, scale = residual[:num_rows].astype(np.float64), np.zeros(num_rows)
    for row in range(num_rows):
        for rank, expert in enumerate(ids[row]):
            gate = held["ffn_gate_exps.weight"][expert] @ exact[row] + held["ffn_gate_exps.bias"][expert]
            up = held["ffn_up_exps.weight"][expert] @ exact[row] + held["ffn_up_exps.bias"][expert]
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            inner = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            down = held["ffn_down_exps.weight"][expert]
            expected[row] += mixture[row, rank] * (down @ inner + held["ffn_down_exps.bias"][expert])
            scale[row] = max(scale[row], np.abs(down).max() * np.abs(inner).sum())
    bound = (3 * HALF_STEP * scale + 1e-5)[:, None] * np.ones(hidden)
    assert_within(found[:num_rows][clear], expected[clear], bound[clear])
    assert (found[num_rows:] == residual[num_rows:]).all()


@pytest.mark.parametrize("num_experts", [5, 40, 1000])
def test_experts_are_chosen_in_order_whatever_their_logits(device, num_experts):
    """Equal ones by their number, both zeros alike, infinities first and last, what is no number after them."""
    random = np.random.default_rng(num_experts)
    logits = random.integers(-3, 4, (67, num_experts)).astype(np.float32)
    logits[random.random(logits.shape) < 0.2] = -0.0
    for row, value in enumerate((np.inf, -np.inf, np.nan, -np.nan)):
        logits[row::5][random.random(logits[row::5].shape) < 0.7] = value
    logits[4::5] *= np.float32(1e-40)
    load(device, TINY_GPT_OSS, [])
    ids, weights = device.allocate(4 * 67 * 4), device.allocate(4 * 67 * 4)
    device.launch("choose_experts", (17, 1, 1), 128, upload(device, logits), ids, weights, 67, num_experts, 4)
    found = download(device, ids, (67, 4), np.int32)
    expected = np.argsort(np.where(np.isnan(logits), np.inf, -logits), axis=1, kind="stable")
    is_number = ~np.isnan(np.take_along_axis(logits, expected[:, :4], axis=1))
    assert (found == expected[:, :4])[is_number].all()
    assert is_number.mean() > 0.6
    assert ((found >= 0) & (found < num_experts)).all()
    assert all(len(set(row)) == 4 for row in found.tolist())


@pytest.mark.parametrize("num_rows", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("type", [GGMLType.MXFP4, GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.BF16], ids=lambda t: t.name)
def test_products_of_rows_that_they_normalise(device, num_rows, type):
    from services.executor.cuda.arrays import Epilogue

    random = np.random.default_rng(num_rows)
    values = (random.standard_normal((333, 1280)) / 30).astype(np.float32)
    weights, held = make_weights(device, [[("w.weight", values, type)]])
    load(device, TINY_GPT2, [FAMILIES[type]])
    ops = make_ops(device, TINY_GPT2)
    x, exact = normed_rows(device, random, num_rows, 1280)
    out = upload(device, np.full((num_rows + 1, 333), CANARY))
    ops.run(ops.linear(x, weights.matrix("w.weight")), out, 333, Epilogue.STORE)
    found = download(device, out, (num_rows + 1, 333), np.float32)
    matrix = held["w.weight"].astype(np.float64)
    bound = product_bound(exact, matrix, type) + HALF_STEP * np.abs(exact) @ np.abs(matrix).T
    assert_within(found[:num_rows], exact @ matrix.T, bound)
    assert (found[num_rows:] == CANARY).all()


def normed_rows(device, random, num_rows, width):
    """Rows whose RMSNorm is left to what reads them, and what it gives in float64."""
    from services.executor.cuda.arrays import Floats, Normed
    from services.executor.cuda.weights import Vector

    values = (random.standard_normal((num_rows, width)) * 9).astype(np.float32)
    weight = random.uniform(0.5, 2.0, width).astype(np.float32)
    x = Normed(Floats(upload(device, values), num_rows, width), Vector((upload(device, weight),), (width,)))
    exact = values.astype(np.float64)
    return x, exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5) * weight


def test_rows_are_gathered_and_added(device):
    from services.executor.cuda.arrays import Floats

    load(device, TINY_GPT2, [])
    ops = make_ops(device, TINY_GPT2)
    random = np.random.default_rng(0)
    values = random.standard_normal((9, 90)).astype(np.float32)
    x, y = (Floats(upload(device, part), 9, 90) for part in (values, values[::-1]))
    ops._step = small_step(0, 9, num_logits=3)
    rows = np.array([7, 0, 7], np.int32)
    selected = ops.select_rows(x, upload(device, rows))
    assert (download(device, selected.address, (3, 90), np.float32) == values[rows]).all()
    ops.add(x, y)
    assert (download(device, x.address, (9, 90), np.float32) == values + values[::-1]).all()


def small_step(token_ids, num_rows, num_logits=0):
    from services.executor.cuda.kv import CudaStep, Shape

    shape = Shape(num_rows, num_logits, 1, 1, 1, 16, 1)
    return CudaStep(shape, token_ids, 0, 0, 0, 0, {}, {}, 0)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def assert_within(found, expected, bound):
    assert np.isfinite(found).all()
    excess = np.abs(found.astype(np.float64) - expected) / bound
    worst = np.unravel_index(excess.argmax(), excess.shape)
    assert excess.max() <= 1, f"at {worst}: {found[worst]} for {expected[worst]}, {excess.max():.2f} times the bound"
