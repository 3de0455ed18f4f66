"""What an executor's memory gives its engine."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from services.executor.config import ExecutorConfig
from services.executor.main import main
from shared.config import ClientConfig, ServerConfig
from shared.errors import Reason, ServiceError
from shared.gguf import read_gguf
from shared.gpt_config import GPTConfig
from shared.memory import kv_groups, num_kv_blocks
from tests.stack import ROOT


@pytest.fixture(scope="module")
def model() -> GPTConfig:
    return GPTConfig.from_gguf(read_gguf(ROOT / "models" / "demo-gpt-oss.gguf"))


def config(**options: Any) -> ExecutorConfig:
    return ExecutorConfig(ServerConfig("127.0.0.1:0"), ClientConfig(), "loader:1", "tokenizer:1", **options)


def test_each_device_reads_layouts_of_its_own() -> None:
    assert config(device="cpu").layouts == ("cpu.f32.v1", "cpu.blocks.v1")
    assert config(device="cuda:1").layouts == ("cuda.v1",)


def test_kv_blocks_stay_within_their_memory(model: GPTConfig) -> None:
    sizes = {group.name: group.block_bytes for group in kv_groups(model, 32)}
    for mebibytes in (2, 17, 64, 1024):
        engine = config(kv_memory_bytes=mebibytes << 20).engine_config(model)
        taken = sum(engine.num_blocks[name] * size for name, size in sizes.items())
        assert taken <= mebibytes << 20
        assert engine.max_context <= engine.num_blocks["full"] * engine.block_size


def test_no_more_blocks_than_the_batch_can_use(model: GPTConfig) -> None:
    """As many as the estimate of memory says: `mxgpt inspect` tells what is then allocated."""
    engine = config(kv_memory_bytes=1 << 40, max_running=2, max_batch_tokens=64).engine_config(model)
    assert engine.num_blocks == num_kv_blocks(model, model.context_length, 2, 32, 64)
    assert engine.num_blocks["full"] == 2 * (model.context_length // 32)
    assert engine.max_context == model.context_length


def test_little_memory_shortens_the_context_and_none_is_an_error(model: GPTConfig) -> None:
    assert config(kv_memory_bytes=2 << 20).engine_config(model).max_context < model.context_length
    with pytest.raises(ServiceError, match="hold no block") as caught:
        config(kv_memory_bytes=1000).engine_config(model)
    assert caught.value.reason is Reason.MEMORY_EXHAUSTED


def test_a_shorter_context_can_be_asked_for_and_a_longer_one_not(model: GPTConfig) -> None:
    assert config(max_context=100).engine_config(model).max_context == 100
    assert config(max_context=10**9).engine_config(model).max_context == model.context_length


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, None),
        ({"max_context": 100}, None),
        ({"max_context": 10**9}, "not the 1000000000 asked for: the model has no more"),
        ({"kv_memory_bytes": 2 << 20}, "not the {own} of the model: the KV memory of 2 MiB holds no more"),
        (
            {"max_context": 10**9, "kv_memory_bytes": 2 << 20},
            "not the 1000000000 asked for: the KV memory of 2 MiB holds no more",
        ),
        ({"max_context": 32, "kv_memory_bytes": 2 << 20}, None),
    ],
)
def test_a_context_shorter_than_wanted_is_told(model: GPTConfig, options: dict[str, Any], words: str | None) -> None:
    made = config(**options)
    engine = made.engine_config(model)
    warning = made.context_warning(model, engine)
    if words is None:
        assert warning is None
    else:
        words = words.format(own=model.context_length)
        assert warning == f"the context has {engine.max_context} tokens, {words}"


@pytest.mark.parametrize(
    "bad",
    [
        *({"device": "gpu"}, {"kv_memory_bytes": 0}, {"max_context": 0}, {"max_context": -1}),
        *({"max_waiting": -1}, {"write_stall_seconds": 0.0}, {"write_stall_seconds": math.nan}, {"step_seconds": -1.0}),
    ],
)
def test_what_can_not_run_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        config(**bad)


def test_a_model_without_windows_has_one_group() -> None:
    gpt2 = GPTConfig.from_gguf(read_gguf(ROOT / "models" / "demo-gpt2.gguf"))
    assert set(config().engine_config(gpt2).num_blocks) == {"full"}


def test_a_model_of_one_layer_has_windows_only(model: GPTConfig) -> None:
    engine = config().engine_config(replace(model, num_layers=1))
    assert list(engine.num_blocks) == ["window"]
    assert engine.max_context == model.context_length


@pytest.mark.parametrize("option", ["--kv-memory-mib", "--max-batch-tokens", "--max-context"])
def test_nothing_is_not_taken_for_the_default(option: str) -> None:
    result = CliRunner().invoke(main, [option, "0"])
    assert result.exit_code == 2
    assert "x>=1" in result.output


@pytest.mark.parametrize("option", [("--max-waiting", "-1"), ("--write-stall-seconds", "0"), ("--max-context", "-1")])
def test_an_option_out_of_its_range_is_refused_by_name(option: tuple[str, str]) -> None:
    result = CliRunner().invoke(main, option)
    assert result.exit_code == 2
    assert option[0].strip("-").replace("-", "_") in result.output.replace("-", "_")
