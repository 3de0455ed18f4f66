"""GGUF headers cut at every byte and mutated at random: the reader answers or refuses, in time and in memory.

Whatever the bytes: no exception but ServiceError, at most a second of the processor, and a traced memory peak of at
most 8 MiB or twice the file's size, whichever is more. Files that are taken are then used: every value and every
tensor is read.
"""

import gc
import random
import struct
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import StringArray, read_gguf, read_tensor
from tests.gguf_files import gguf_bytes, write_gguf

MAX_SECONDS = 1
MAX_PEAK = 8 << 20
REFUSALS = {Reason.MODEL_INVALID, Reason.FILE_VERSION_UNSUPPORTED, Reason.TENSOR_TYPE_UNSUPPORTED}


@pytest.fixture(autouse=True)
def traced():
    gc.collect()
    tracemalloc.start()
    yield
    tracemalloc.stop()


def examine(path, data):
    """Read `data` as a file, within the bounds; the reason of its refusal, or None."""
    overwrite(path, data)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start = time.process_time()
    refusal = None
    try:
        use(read_gguf(path))
    except ServiceError as error:
        refusal = error
    assert time.process_time() - start <= MAX_SECONDS
    assert tracemalloc.get_traced_memory()[1] - before <= max(MAX_PEAK, 2 * len(data))
    if refusal is None:
        return None
    assert refusal.reason in REFUSALS
    assert refusal.message.startswith(f"{path}: byte {refusal.metadata['offset']}: ")
    assert len(refusal.message) < 1000
    return refusal.reason


def overwrite(path, data):
    """Without emptying the file first, after which ext4 writes to the disk on closing: 4 ms for each of thousands."""
    with path.open("r+b" if path.exists() else "wb") as stream:
        stream.write(data)
        stream.truncate()


def use(file):
    """Ask for all that a file has; what was believed must hold."""
    for value in file.metadata.values():
        if isinstance(value, StringArray):
            assert sum(len(text) for text in value) <= file.file_sizes[0]
        assert len(repr(value)) < 100_000
    for info in file.tensors.values():
        assert read_tensor(file, info).nbytes == info.num_bytes == info.type.row_bytes(info.num_elements)
        assert file.data_starts[0] <= info.offset <= info.offset + info.num_bytes <= file.file_sizes[0]


def small_file(seed):
    """A valid file of all value types, several arrays and tensors; 1 to 3 KB of header."""
    generator = np.random.default_rng(seed)
    metadata = {
        "general.architecture": "gpt-oss",
        "tokens": [f"token{i}" for i in range(10 + 20 * (seed % 4))],
        "merges": ["a b", "ab c", "", "日本 語"],
        "types": generator.integers(0, 6, 40).astype(np.int32),
        "scores": generator.normal(size=17).astype(np.float32),
        "flags": generator.integers(0, 2, 9).astype(np.bool_),
        "wide": np.array([1 << 63, 5], np.uint64),
        "none": np.array([], np.int16),
        "block_count": 24,
        "epsilon": 1e-5,
        "theta": np.float64(150000),
        "small": np.int8(-1),
        "add_bos": True,
    }
    types = list(GGMLType)
    tensors = {
        f"blk.{i}.weight": (np.zeros((1 + i % 3, types[i % 13].row_bytes(256)), np.uint8), types[i % 13])
        for i in range(2 + 6 * (seed % 3))
    }
    return gguf_bytes(metadata, tensors, version=2 + seed % 2, alignment=32 << seed % 3)


def mutate(data, source):
    """A few random changes, most of them in the header, the kinds that break parsers."""
    data = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2, 3, 8))):
        start, end = source.choice(((0, 24), *[(24, 400)] * 4, *[(400, 4096)] * 6))
        position = source.randrange(start, end) % len(data)
        kind = source.randrange(7)
        if kind == 0:
            data[position] ^= 1 << source.randrange(8)
        elif kind == 1:
            data[position] = source.randrange(256)
        elif kind in (2, 3):  # a number that means something, where a field begins or anywhere
            width, code = source.choice(((4, "<I"), (8, "<Q")))
            data[position : position + width] = struct.pack(code, telling_number(source, len(data)) % (1 << 8 * width))
        elif kind == 4:
            del data[position : position + source.choice((1, 4, 8, 100))]
        elif kind == 5:
            data[position:position] = source.randbytes(source.choice((1, 4, 8, 100)))
        else:  # a piece of the file over another
            origin = source.randrange(len(data))
            piece = data[origin : origin + source.choice((4, 8, 12, 40))]
            data[position : position + len(piece)] = piece
    return bytes(data)


def telling_number(source, size):
    """Near a power of two, near the file's size, a count whose product with an element's size wraps, or small."""
    kind = source.randrange(4)
    if kind == 0:
        return (1 << source.randrange(65)) + source.randint(-9, 9)
    if kind == 1:
        return max(0, size // source.choice((1, 2, 4, 8, 33)) + source.randint(-40, 40))
    if kind == 2:
        return (1 << 64) // source.choice((2, 3, 4, 8, 12, 16, 32, 34)) + source.randint(-2, 2)
    return source.randrange(64)


def fuzz(path, num_mutations, seed):
    source = random.Random(seed)
    files = [small_file(i) for i in range(12)]
    assert {examine(path, data) for data in files} == {None}
    return Counter(examine(path, mutate(source.choice(files), source)) for _ in range(num_mutations))


def check_outcomes(outcomes):
    """The mutations reach past the first check: some files still pass, and each kind of refusal is met."""
    total = outcomes.total()
    assert outcomes[Reason.MODEL_INVALID] > 0.4 * total
    assert outcomes[None] > 0.02 * total
    assert outcomes[Reason.TENSOR_TYPE_UNSUPPORTED] > 0
    assert outcomes[Reason.FILE_VERSION_UNSUPPORTED] > 0


def test_random_mutations(tmp_path):
    check_outcomes(fuzz(tmp_path / "mutant.gguf", 2000, seed=1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_thousand_random_mutations(tmp_path):
    check_outcomes(fuzz(tmp_path / "mutant.gguf", 20_000, seed=2))


def test_cut_at_every_byte_of_the_first_4_kib(tmp_path):
    tokens = ["t" * i for i in range(80)]
    tensors = {f"blk.{i}.weight": (np.ones((1, 32), np.float32), GGMLType.Q8_0) for i in range(8)}
    data = gguf_bytes({"tokens": tokens, "types": np.ones(80, np.int32)}, tensors)
    path = tmp_path / "cut.gguf"
    assert examine(path, data) is None
    assert read_gguf(path).data_starts[0] >= 4096  # so that each cut is in the header
    for length in range(4097):
        assert examine(path, data[:length]) is Reason.MODEL_INVALID, length


@pytest.mark.parametrize("kind", ["keys", "tensors", "wide tensor names", "empty strings", "long strings", "numbers"])
def test_what_costs_most_memory_and_time(tmp_path, kind):
    """Valid headers, each as full as it may be of one thing (of strings: as many as time allows under tracing)."""
    if kind == "keys":
        data = gguf_bytes({f"{i:04}".rjust(256, "k"): np.uint8(1) for i in range(4096)}, {})
    elif kind in ("tensors", "wide tensor names"):
        filler = "\U0001d11e" + "n" * 54 if kind != "tensors" else ""  # one such character makes all take four bytes
        block = np.zeros((1, 1, 1, 4), np.uint8)
        data = gguf_bytes({}, {f"{i:05}{filler}": (block, GGMLType.F32) for i in range(10240)}, alignment=4)
    elif kind == "empty strings":
        data = gguf_bytes({"strings": [b""] * 200_000}, {})
    elif kind == "long strings":
        data = gguf_bytes({"strings": ["s" * 1_000_000] * 12, "text": "t" * 5_000_000}, {})
    else:
        data = gguf_bytes({"numbers": np.zeros(5_000_000, np.float32)}, {})
    path = tmp_path / "full.gguf"
    path.write_bytes(data)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    file = read_gguf(path)
    assert tracemalloc.get_traced_memory()[1] - before <= max(MAX_PEAK, 2 * len(data))
    tracemalloc.stop()
    start = time.process_time()
    assert list(read_gguf(path).metadata) == list(file.metadata)
    assert time.process_time() - start <= MAX_SECONDS


def test_hostile_shards(tmp_path):
    """A mutated sibling is refused under its own name, or does no harm."""
    source = random.Random(3)
    keys = {"split.count": np.uint16(2), "split.tensors.count": np.int32(2)}
    paths = [tmp_path / f"m-{i + 1:05}-of-00002.gguf" for i in range(2)]
    for i, path in enumerate(paths):
        blocks = np.zeros((1, 34), np.uint8)
        write_gguf(path, {"split.no": np.uint16(i)} | keys, {f"t{i}": (blocks, GGMLType.Q8_0)})
    whole = paths[1].read_bytes()
    outcomes = Counter()
    for _ in range(300):
        overwrite(paths[1], mutate(whole, source))
        try:
            file = read_gguf(paths[0])
            outcomes[all(read_tensor(file, info).nbytes == info.num_bytes for info in file.tensors.values())] += 1
        except ServiceError as error:
            outcomes["refused" if str(paths[0].with_name("m")) in error.message else "unnamed"] += 1
    assert outcomes[False] == outcomes["unnamed"] == 0
    assert outcomes[True] > 0
    assert outcomes["refused"] > 100
