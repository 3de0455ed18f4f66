"""`mxgpt inspect`: what it says about files, and that the memory it names is what is taken."""

import hashlib
import json
import re

import grpc
import numpy as np
import pytest

from mxgpt.cli.main import run
from mxgpt.inspect_file import inspect_file
from mxgpt.v1 import executor_pb2, executor_pb2_grpc, loader_pb2, loader_pb2_grpc
from services.executor.runner import NumpyRunner
from services.executor.weights import Weights
from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf
from shared.memory import num_kv_blocks
from tests.gguf_files import write_gguf
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS, WIDE_GPT_OSS, model_metadata, random_tensor, write_model


def test_demo_model(demo_gpt_oss, capsys):
    assert run(["inspect", str(demo_gpt_oss), "--weights", "--metadata"]) == 0
    out = capsys.readouterr().out
    for said in ("gpt-oss", "MXFP4", "Q8_0", "gpt-4o", "chat template", "stretched 32 times", "general.architecture"):
        assert said in out
    assert out.splitlines()[-1] == "sound: mxgpt can serve it"


def test_the_digest_is_the_one_that_servers_name(stack, demo_gpt_oss, capsys):
    sha256 = hashlib.sha256(demo_gpt_oss.read_bytes()).hexdigest()
    with grpc.insecure_channel(stack.executor.address) as channel:
        stub = executor_pb2_grpc.ExecutorServiceStub(channel)
        request = executor_pb2.GenerateRequest(text="a", stopping={"max_tokens": 1, "ignore_eos": True})
        started = next(iter(stub.Generate(request, timeout=20))).started
        (served,) = stub.ListModels(executor_pb2.ExecutorServiceListModelsRequest(), timeout=20).models
    assert run(["inspect", str(demo_gpt_oss), "--digest"]) == 0
    out = capsys.readouterr().out
    assert started.digest == served.digest
    assert re.search(rf"^  digest +{started.digest}$", out, re.MULTILINE)
    assert f"{demo_gpt_oss.name}  SHA-256 {sha256}" in out


def test_weights_are_what_a_loader_takes(stack, demo_gpt_oss):
    found = inspect_file(demo_gpt_oss)
    with grpc.insecure_channel(stack.loader.address) as channel:
        status = loader_pb2_grpc.LoaderServiceStub(channel).GetStatus(loader_pb2.GetStatusRequest())
    assert found.memory.estimate.weight_bytes == status.resident_bytes


@pytest.mark.parametrize("config", [TINY_GPT2, TINY_GPT_OSS])
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_kv_is_what_a_runner_takes(tmp_path, config, num_sequences):
    path = write_model(tmp_path / "tiny.gguf", config)
    found = inspect_file(path, context=100, num_sequences=num_sequences)
    weights = Weights.from_gguf(read_gguf(path), config)
    num_blocks = num_kv_blocks(config, 100, num_sequences, 32, 256)
    assert found.memory.estimate.kv_bytes == NumpyRunner(config, weights, 32, num_blocks).kv_bytes


def test_what_fits_a_gpu(tmp_path, capsys):
    """Weights lie there once; KV is in halves, and grows with contexts and sequences; the table says the sums."""
    path = write_model(tmp_path / "tiny.gguf", WIDE_GPT_OSS, _mostly_mxfp4)
    memory = inspect_file(path, context=512, num_sequences=3).cuda_memory
    assert memory.estimate.weight_bytes == 3 * (2 << 20), "an allocation for each layer and one for the rest"
    # One full layer: 2 key heads of 64, and as many values, 2 bytes each.
    assert memory.estimate.kv_bytes_per_token == 2 * 2 * 64 * 2
    totals = {number: total for context, number, total in memory.totals if context == 512}
    assert sorted(totals) == [1, 3, 8, 64]
    kv = (totals[64] - totals[1]) // 63
    assert totals[3] - totals[1] == 2 * kv
    assert kv >= 2 * 512 * memory.estimate.kv_bytes_per_token * 0.5
    assert totals[1] == memory.estimate.weight_bytes + 2 * (520 << 20) + memory.estimate.workspace_bytes + kv
    run(["inspect", str(path)])
    out = capsys.readouterr().out
    assert "Memory on a GPU" in out
    assert f"{totals[3] / 2**30:.1f}" in out


def test_json(tmp_path, capsys):
    path = write_model(tmp_path / "wide.gguf", WIDE_GPT_OSS, _mostly_mxfp4)
    assert run(["inspect", str(path), "--json", "--context", "64"]) == 1, "it has no tokenizer"
    fields = json.loads(capsys.readouterr().out)
    assert fields["config"]["hidden_size"] == 256
    assert fields["types"]["MXFP4"]["bytes"] * 8 == fields["types"]["MXFP4"]["values"] * 4.25
    assert fields["memory"]["context"] == 64
    assert fields["tokenizer"] is None
    assert "tokenizer.ggml.model" in fields["problems"][0]


def _mostly_mxfp4(name):
    return GGMLType.MXFP4 if name.endswith("exps.weight") else GGMLType.F32


def _tensors(config, **changed):
    random = np.random.default_rng(0)
    tensors = {name: random_tensor(random, name, shape) for name, shape in config.expected_tensors().items()}
    return {name: (value, GGMLType.F32) for name, value in (tensors | changed).items() if value is not None}


def _write(path, config=TINY_GPT2, metadata=None, **changed):
    keys = {"general.architecture": config.architecture, **model_metadata(config), **(metadata or {})}
    return write_gguf(path, keys, _tensors(config, **changed))


def test_a_missing_tensor(tmp_path, capsys):
    path = _write(tmp_path / "model.gguf", **{"blk.1.ffn_up.weight": None})
    assert run(["inspect", str(path)]) == 1
    out = capsys.readouterr().out
    assert "unsound:" in out
    assert "blk.1.ffn_up.weight" in out
    assert "F32" in out, "what can be said is said all the same"


def test_weights_that_are_no_numbers(tmp_path):
    values = np.ones((200,), np.float32)
    values[7] = np.nan
    path = _write(tmp_path / "model.gguf", **{"blk.0.ffn_up.bias": values.view(np.uint8)})
    assert not any("not finite" in problem for problem in inspect_file(path).problems)
    told = []
    found = inspect_file(path, read_weights=True, on_progress=lambda done, total: told.append((done, total)))
    problem = next(problem for problem in found.problems if "not finite" in problem)
    offset = read_gguf(path).tensors["blk.0.ffn_up.bias"].offset + 4 * 7
    assert f"byte {offset}: tensor 'blk.0.ffn_up.bias'" in problem
    assert told[-1][0] == told[-1][1] == sum(count.num_bytes for count in found.types)


def test_an_architecture_that_is_not_served(tmp_path):
    metadata = {"general.architecture": "llama", "llama.context_length": 5}
    found = inspect_file(write_gguf(tmp_path / "model.gguf", metadata))
    assert any("ARCHITECTURE_UNSUPPORTED" in problem for problem in found.problems)
    assert found.memory is None


def test_metadata_does_not_command_the_terminal(tmp_path, capsys):
    path = _write(tmp_path / "model.gguf", metadata={"general.name": "\x1b[2Jwiped\x07", "long": "x" * 500})
    run(["inspect", str(path), "--metadata"])
    out = capsys.readouterr().out
    assert "wiped" in out
    assert "\x1b" not in out
    assert "(500 characters)" in out


@pytest.mark.parametrize(
    ("content", "reason"), [(None, Reason.MODEL_NOT_FOUND), (b"GGML" + bytes(60), Reason.MODEL_INVALID)]
)
def test_a_file_that_is_no_gguf(tmp_path, content, reason, capsys):
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ServiceError) as caught:
        inspect_file(path)
    assert caught.value.reason is reason
    assert run(["inspect", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
