"""Small random models: their files, and a way to run them step by step without an engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from services.executor.runner import NumpyRunner
from services.executor.step import SequenceSlice, StepBatch
from services.executor.weights import Weights
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf
from shared.gpt_config import GPTConfig, RopeConfig
from shared.layout import FLOAT32_BUDGET
from shared.quantizers import quantize

TINY_GPT2 = GPTConfig(
    architecture="gpt2",
    vocab_size=301,
    context_length=160,
    num_layers=2,
    hidden_size=90,
    num_heads=5,
    num_kv_heads=5,
    head_size=18,
    ffn_size=200,
    norm_epsilon=1e-5,
    tied_head=True,
    num_experts=0,
    num_experts_used=0,
    sliding_window=0,
    rope=None,
)
TINY_GPT_OSS = GPTConfig(
    architecture="gpt-oss",
    vocab_size=257,
    context_length=4096,
    num_layers=3,
    hidden_size=72,
    num_heads=6,
    num_kv_heads=2,
    head_size=20,
    ffn_size=88,
    norm_epsilon=1e-5,
    tied_head=False,
    num_experts=8,
    num_experts_used=4,
    sliding_window=40,
    rope=RopeConfig(150000.0, 32.0, 64, 32.0, 1.0, 0.1 * float(np.log(32.0)) + 1.0, 1.0),
)
# Every dimension a multiple of 256, so that each quantisation type fits each matrix.
WIDE_GPT2 = replace(TINY_GPT2, num_layers=1, hidden_size=256, num_heads=4, num_kv_heads=4, head_size=64, ffn_size=512)
WIDE_GPT_OSS = replace(
    TINY_GPT_OSS, num_layers=2, hidden_size=256, num_heads=4, num_kv_heads=2, head_size=64, ffn_size=256, num_experts=5
)


def write_model(
    path: Path,
    config: GPTConfig,
    type_of: Callable[[str], GGMLType] = lambda name: GGMLType.F32,
    seed: int = 0,
    metadata: Mapping[str, object] | None = None,
    values: Mapping[str, NDArray[np.float32]] | None = None,
) -> Path:
    """Write a model of this config, random or of the values given, its tensors in the types that `type_of` says."""
    writer = gguf.GGUFWriter(path, config.architecture)
    for key, value in (model_metadata(config) | dict(metadata or {})).items():
        add_value(writer, key, value)
    random = np.random.default_rng(seed)
    for name, shape in config.expected_tensors().items():
        tensor = random_tensor(random, name, shape) if values is None else values[name]
        type_ = type_of(name)
        if type_ == GGMLType.F32:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, quantize(tensor, type_), raw_dtype=gguf.GGMLQuantizationType(int(type_)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensor(random: np.random.Generator, name: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """Values that keep activations near one, and leave nothing at zero."""
    values = random.standard_normal(shape, np.float32)
    if "norm.weight" in name:
        return 1 + 0.2 * values
    if name.endswith(".weight") and len(shape) > 1 and "embd" not in name:
        return values * np.float32(1.5 / np.sqrt(shape[-1]))
    return 0.5 * values


def model_metadata(config: GPTConfig) -> dict[str, object]:
    """The keys of a file of this config; ints become UINT32, floats FLOAT32."""
    values: dict[str, object] = {
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_size,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads,
    }
    if config.rope is None:
        values["attention.layer_norm_epsilon"] = config.norm_epsilon
    else:
        values |= {
            "attention.head_count_kv": config.num_kv_heads,
            "attention.key_length": config.head_size,
            "attention.value_length": config.head_size,
            "attention.layer_norm_rms_epsilon": config.norm_epsilon,
            "attention.sliding_window": config.sliding_window,
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_used,
            "expert_feed_forward_length": config.ffn_size,
            "rope.freq_base": config.rope.theta,
            "rope.scaling.type": "yarn" if config.rope.factor != 1 else "none",
            "rope.scaling.factor": config.rope.factor,
            "rope.scaling.original_context_length": config.rope.original_context_length,
        }
    return {f"{config.architecture}.{key}": value for key, value in values.items()}


def add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_array(key, value)


def load_runner(
    path: Path, *, num_sequences: int = 1, block_size: int = 32, float32_budget: int = FLOAT32_BUDGET
) -> "SteppedRunner":
    """A runner of this file, with KV blocks for `num_sequences` at full context."""
    file = read_gguf(path)
    config = GPTConfig.from_gguf(file)
    weights = Weights.from_gguf(file, config, float32_budget)
    num_blocks = num_sequences * -(-config.context_length // block_size)
    groups = {"full": num_blocks, "window": num_blocks}
    return SteppedRunner(NumpyRunner(config, weights, block_size, groups), config, block_size, groups)


@dataclass
class SteppedSequence:
    """Tokens, how many of them have been run, and the blocks that they lie in."""

    token_ids: list[int]
    num_computed: int = 0
    tables: dict[str, list[int]] = field(default_factory=dict)
    logits: list[NDArray[np.float32]] = field(default_factory=list)  # of each position run


@dataclass
class SteppedRunner:
    """Runs chosen numbers of tokens of chosen sequences; blocks are handed out in random order."""

    runner: NumpyRunner
    config: GPTConfig
    block_size: int
    num_blocks: Mapping[str, int]

    def __post_init__(self) -> None:
        random = np.random.default_rng(1)
        self.free = {name: random.permutation(count).tolist() for name, count in self.num_blocks.items()}

    def step(self, work: Sequence[tuple[SteppedSequence, int]]) -> None:
        """Run the next `count` tokens of each sequence; all logits are wanted."""
        slices, token_ids, positions = [], [], []
        for sequence, count in work:
            end = sequence.num_computed + count
            tables = {group.name: self._extend(sequence, group, end) for group in self.runner.kv_groups}
            slices.append(SequenceSlice(len(token_ids), count, end, tables))
            token_ids += sequence.token_ids[sequence.num_computed : end]
            positions += range(sequence.num_computed, end)
        rows = np.arange(len(token_ids), dtype=np.int32)
        batch = StepBatch(np.array(token_ids, np.int32), np.array(positions, np.int32), slices, rows)
        logits = self.runner.forward(batch)
        assert logits.shape == (len(token_ids), self.config.vocab_size)
        assert logits.dtype == np.float32
        for (sequence, count), slice_ in zip(work, slices, strict=True):
            sequence.num_computed += count
            sequence.logits += list(logits[slice_.start : slice_.start + count])

    def run(self, token_ids: Sequence[int], chunk: int) -> NDArray[np.float32]:
        """The logits of a whole sequence run alone, `chunk` tokens a step, (len(token_ids), vocab_size)."""
        sequence = SteppedSequence(list(token_ids))
        while sequence.num_computed < len(token_ids):
            self.step([(sequence, min(chunk, len(token_ids) - sequence.num_computed))])
        self.release(sequence)
        return np.stack(sequence.logits)

    def release(self, sequence: SteppedSequence) -> None:
        for name, table in sequence.tables.items():
            self.free[name] += [block for block in table if block >= 0]
        sequence.tables = {}

    def _extend(self, sequence: SteppedSequence, group, end: int) -> NDArray[np.int32]:
        table = sequence.tables.setdefault(group.name, [])
        while len(table) * self.block_size < end:
            table.append(self.free[group.name].pop())
        if group.window:
            passed = max(0, sequence.num_computed - group.window + 1) // self.block_size
            for index in range(passed):
                if table[index] >= 0:
                    self.free[group.name].append(table[index])
                    table[index] = -1
        return np.array(table, np.int32)
