"""What the ops of the CUDA backend launch, on a device that only writes it down: no GPU is needed.

For one row and for many, prompts and decoding, three kinds of GPU and several types of weights: every launch has the
arguments that its kernel declares, a grid, and no more shared memory than the device has.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.gpt_oss_file import GPT_OSS_20B, type_of
from services.executor.cuda.arrays import Epilogue
from services.executor.cuda.kernels import WGMMA_TILES, modules_of
from services.executor.cuda.kv import KVLayer, Shape, lay_out
from services.executor.cuda.ops import CudaOps, item_tokens, wide_tokens
from services.executor.cuda.tiles import choose_split
from services.executor.cuda.weights import CudaWeights
from services.executor.cuda.workspace import Workspace
from services.executor.models import MODELS
from services.executor.step import FULL, WINDOW, KVGroup
from shared.cuda_layout import is_tiled, plan
from shared.ggml_type import GGMLType
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS

# Its head is only one more matrix.
OSS_20B = replace(GPT_OSS_20B, vocab_size=20480, num_layers=TINY_GPT_OSS.num_layers, context_length=4096)
GPUS = {
    "H100": {"capability": (9, 0), "max_shared_bytes": 232448, "num_multiprocessors": 132},
    "3090": {"capability": (8, 6), "max_shared_bytes": 101376, "num_multiprocessors": 82},
    "5090": {"capability": (12, 0), "max_shared_bytes": 101376, "num_multiprocessors": 170},
}
DECODING = (1, 2, 4, 5, 8, 9, 16, 17, 64, 65, 128, 129, 256)  # rows around every bound
PROMPTS = (1, 30, 70, 300, 384, 385, 896, 897, 1030)


class RecordedDevice:
    """Hands out addresses and keeps what was launched."""

    def __init__(self, capability, max_shared_bytes, num_multiprocessors):
        self.capability, self.max_shared_bytes = capability, max_shared_bytes
        self.num_multiprocessors = num_multiprocessors
        self.launches = []
        self.end = 1 << 20
        self.sizes = {}

    def allocate(self, num_bytes):
        address = self.end
        self.sizes[address] = num_bytes
        self.end += -(-num_bytes // 256) * 256
        return address

    def launch(self, name, grid, threads, *arguments, shared_bytes=0):
        self.launches.append((name, grid, threads, arguments, shared_bytes))

    def map_halves(self, address, num_rows, pitch, box_rows):
        assert address % 16 == pitch % 64 == 0
        assert num_rows > 0
        assert num_rows * pitch * 2 <= self.sizes[address]
        return bytes(128)

    def map_tiles(self, address, tile_bytes, column_tiles, num_strips, box_tiles, box_strips):
        assert address % 16 == tile_bytes % 16 == 0
        assert address > 0
        assert address + tile_bytes * column_tiles * num_strips <= self.end
        assert 1 <= box_tiles <= 2
        assert 1 <= box_strips <= 256
        return bytes(128)

    def upload(self, address, values):
        pass

    def synchronize(self):
        pass


def in_half(name):
    return GGMLType.F16 if is_tiled(name) else GGMLType.F32


@pytest.mark.parametrize("gpu", list(GPUS))
@pytest.mark.parametrize(
    ("config", "type_of"),
    [
        *((OSS_20B, type_of), (OSS_20B, in_half), (TINY_GPT_OSS, in_half), (TINY_GPT2, in_half)),
        (replace(TINY_GPT_OSS, hidden_size=16), in_half),
        *((replace(TINY_GPT_OSS, num_experts=256, num_experts_used=used), type_of) for used in (10, 200)),
    ],
    ids=["gpt-oss-20b", "gpt-oss-20b in half", "tiny gpt-oss", "tiny gpt2", "16 wide", "10 used", "200 used"],
)
def test_every_launch_is_one_that_its_kernel_takes(gpu, config, type_of):
    for shape in (*map(decoding, DECODING), *(prompt(config, rows) for rows in PROMPTS)):
        device = RecordedDevice(**GPUS[gpu])
        weights = make_weights(device, config, type_of)
        declared = {
            entry[0]: entry[2] for entries in modules_of(config, weights.families).values() for entry in entries
        }
        run(device, config, weights, shape)
        assert device.launches
        for name, grid, threads, arguments, shared_bytes in device.launches:
            what = f"{name} for {shape}"
            assert name in declared, what
            assert len(arguments) == len(declared[name]), what
            for kind, argument in zip(declared[name], arguments, strict=True):
                wanted = {"f": float, "T": bytes}.get(kind, int)
                assert isinstance(argument, wanted), f"{what}: {kind} got {argument!r}"
                assert kind != "P" or argument == 0 or 1 << 20 <= argument < device.end, what
            assert min(grid) >= 1, what
            assert max(grid[1:]) <= 65535, what
            assert threads in range(8, 1025), what
            assert shared_bytes + 1024 <= device.max_shared_bytes, what
            if name.startswith("product_split"):
                assert grid[0] % int(name.split("_")[2]) == 0, what  # whole clusters
            if name.startswith("product_wgmma"):
                tile = WGMMA_TILES[name.split("_")[2]]
                strips, tile_strips, rows, num_row_tiles, across, num_tiles = arguments[-6:]
                assert rows <= tile.rows, what  # in shared memory
                assert tile_strips <= tile.num_strips, what
                assert (across - 1) * tile_strips < strips <= across * tile_strips, what
                assert num_tiles == across * num_row_tiles, what


@pytest.mark.parametrize(
    ("outputs", "inputs", "blocks"),
    [(5120, 2880, 2), (2880, 4096, 4), (768, 768, 8), (768, 192, 2), (768, 64, 1), (8448, 2880, 2), (8465, 2880, 1)],
)
def test_blocks_that_share_a_tile_each_have_columns_and_a_multiprocessor(outputs, inputs, blocks):
    assert choose_split(-(-outputs // 16), -(-inputs // 64), 132) == blocks


@pytest.mark.parametrize("gpu", list(GPUS))
def test_one_stream_takes_six_kernels_a_layer(gpu):
    device = RecordedDevice(**GPUS[gpu])
    run(device, OSS_20B, make_weights(device, OSS_20B, type_of), decoding(1))
    names = [name for name, *_ in device.launches if name != "largest"]  # that runs once, when the model is made
    layer = ["product_one_store_INT8", "attention_decode", "product_one_residual_INT8", "normed_route"]
    layer += ["product_one_swiglu_MXFP4", "product_summed_MXFP4"]
    ends = ["rotation", "embed_INT8"], ["product_one_store_INT8"]
    assert names == [*ends[0], *layer * OSS_20B.num_layers, *ends[1]]


def decoding(num_rows):
    return Shape(num_rows, num_rows, num_rows, num_rows, 64, 16, 5)


def prompt(config, num_rows):
    wide, narrow = wide_tokens(config), item_tokens(config, 16)
    num_wide = -(-num_rows // wide) if num_rows > narrow else 0
    return Shape(num_rows, 1, 1, num_wide or 1, 64, 16, 1, num_wide, wide)


def make_weights(device, config, type_of):
    shapes = config.expected_tensors()
    infos = {name: SimpleNamespace(name=name, shape=shape, type=type_of(name)) for name, shape in shapes.items()}
    planned = plan(SimpleNamespace(tensors=infos), config)
    return CudaWeights(config, planned.tensors, [device.allocate(size) for size in planned.allocation_sizes], device)


def run(device, config, weights, shape):
    """One step of the model and its head."""
    workspace = Workspace(device, config, 2048, 256)
    ops = CudaOps(device, config, workspace, 32)
    model = MODELS[config.architecture](weights, ops)
    groups = [KVGroup(FULL, 1, 0), *([KVGroup(WINDOW, 1, config.sliding_window)] if config.sliding_window else [])]
    step = lay_out(shape, groups, device.allocate(1 << 20))
    kv_layers = []
    for layer in range(config.num_layers):
        group = groups[-1] if config.is_windowed(layer) else groups[0]
        keys, values = (device.allocate(1 << 20) for _ in range(2))
        kv_layers.append(KVLayer(group.name, group.window, keys, values, 4096))
    head = model.forward(ops.prepare(step), kv_layers)
    ops.run(head, workspace.logits, config.vocab_size, Epilogue.STORE)
