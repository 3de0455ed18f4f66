"""`mxgpt quantize`: what comes out is the same model, rounded once, and nothing else changes."""

import gguf
import numpy as np
import pytest

from models.train.tasks import held_out_tasks, is_correct
from mxgpt.cli.main import run
from mxgpt.inspect_file import inspect_file
from mxgpt.quantize_file import quantize_file
from mxgpt.recipes import RECIPES, tensor_types
from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf, read_tensor
from shared.gpt_config import GPTConfig
from shared.quantizers import quantize
from shared.quants import dequantize
from tests.gguf_files import NUMBER_TYPES, write_gguf
from tests.tiny_models import TINY_GPT2, model_metadata, random_tensor, write_model

MODELS = ("demo_gpt_oss", "demo_gpt2")


def values_of(file, name):
    info = file.tensors[name]
    return dequantize(read_tensor(file, info).reshape(-1, info.row_bytes), info.type)


@pytest.fixture(params=MODELS)
def demo(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("model", "recipe"),
    [("demo_gpt2", recipe) for recipe in ("F32", "F16", "Q8_0", "Q4_K_M", "MXFP4")]
    + [("demo_gpt_oss", recipe) for recipe in ("F16", "MXFP4")],
)
def test_every_tensor_is_the_sources_rounded_once(model, recipe, request, tmp_path):
    demo = request.getfixturevalue(model)
    target = tmp_path / "out.gguf"
    quantize_file(demo, target, RECIPES[recipe])
    source, written = read_gguf(demo), read_gguf(target)
    assert list(written.tensors) == list(source.tensors)
    expected = tensor_types(RECIPES[recipe], source, GPTConfig.from_gguf(source))
    for name, info in written.tensors.items():
        assert info.type is expected[name]
        assert info.shape == source.tensors[name].shape
        rounded = dequantize(quantize(values_of(source, name), info.type), info.type)
        assert np.array_equal(values_of(written, name), rounded)
    assert inspect_file(target, read_weights=True).problems == ()


def test_metadata_keep_their_values_and_widths(demo, tmp_path):
    target = tmp_path / "out.gguf"
    quantize_file(demo, target, RECIPES["MXFP4"])
    before, after = read_gguf(demo).metadata, read_gguf(target).metadata
    assert set(after) == set(before)
    assert after["general.file_type"] == gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    for key in set(before) - {"general.file_type"}:
        assert after.type_of(key) == before.type_of(key), key
        assert np.array_equal(np.array(after[key]), np.array(before[key])), key


def test_odd_metadata_survive(tmp_path):
    """Every width, strings that are no UTF-8, a larger alignment; what tells of shards and of a search is left out."""
    odd = {
        "general.architecture": "gpt2",
        **model_metadata(TINY_GPT2),
        **{f"odd.{type_.name}": type_.dtype.type(1) for type_ in NUMBER_TYPES},
        "odd.string": b"\xff\xfe caf\xc3\xa9",
        "odd.strings": [b"\xff", b"", "ü".encode()],
        "odd.numbers": np.array([-1, 7], np.int16),
        "odd.bools": np.array([True, False]),
        "odd.empty": np.array([], np.float32),
        "quantize.imatrix.file": "calibration.dat",
    }
    random = np.random.default_rng(0)
    tensors = {n: (random_tensor(random, n, s), GGMLType.F32) for n, s in TINY_GPT2.expected_tensors().items()}
    source = write_gguf(tmp_path / "in.gguf", odd, tensors, alignment=128)
    quantize_file(source, tmp_path / "out.gguf", RECIPES["F16"])
    before, after = read_gguf(source).metadata, read_gguf(tmp_path / "out.gguf").metadata
    added = {"general.file_type", "general.quantization_version"}
    assert set(after) == set(before) - {"odd.empty", "quantize.imatrix.file"} | added
    for key in set(after) - added:
        assert after.type_of(key) == before.type_of(key), key
    assert after.get_bytes("odd.string") == odd["odd.string"]
    assert [after.get_strings("odd.strings").bytes_at(i) for i in range(3)] == odd["odd.strings"]
    assert after["odd.numbers"].tolist() == [-1, 7]
    assert after["odd.bools"].tolist() == [True, False]
    assert after.get_int("general.alignment") == 128
    assert all(info.offset % 128 == 0 for info in read_gguf(tmp_path / "out.gguf").tensors.values())


def test_shards_become_one_file(tmp_path):
    source = write_model(tmp_path / "whole.gguf", TINY_GPT2)
    file = read_gguf(source)
    names = list(file.tensors)
    for number, part in enumerate((names[:7], names[7:])):
        keys = {"split.no": np.uint16(number), "split.count": np.uint16(2), "split.tensors.count": np.int32(len(names))}
        metadata = {"general.architecture": "gpt2", **model_metadata(TINY_GPT2), **keys}
        tensors = {name: (values_of(file, name).reshape(file.tensors[name].shape), GGMLType.F32) for name in part}
        write_gguf(tmp_path / f"m-{number + 1:05d}-of-00002.gguf", metadata, tensors)
    quantize_file(tmp_path / "m-00001-of-00002.gguf", tmp_path / "out.gguf", RECIPES["F32"])
    written = read_gguf(tmp_path / "out.gguf")
    assert not any(key.startswith("split.") for key in written.metadata)
    for name in names:
        assert np.array_equal(values_of(written, name), values_of(file, name))


def test_what_was_trained_in_mxfp4_is_copied_byte_for_byte(demo_gpt_oss, tmp_path):
    """Also by way of F32, whose values the quantiser turns back into the same blocks."""
    quantize_file(demo_gpt_oss, tmp_path / "f32.gguf", RECIPES["F32"])
    quantize_file(tmp_path / "f32.gguf", tmp_path / "back.gguf", RECIPES["MXFP4_MOE"])
    quantize_file(demo_gpt_oss, tmp_path / "copy.gguf", RECIPES["MXFP4_MOE"])
    source = read_gguf(demo_gpt_oss)
    for path in (tmp_path / "back.gguf", tmp_path / "copy.gguf"):
        written = read_gguf(path)
        for name, info in source.tensors.items():
            assert np.array_equal(read_tensor(written, written.tensors[name]), read_tensor(source, info)), name


def test_values_too_large_are_refused_and_leave_nothing(tmp_path):
    values = {name: np.ones(shape, np.float32) for name, shape in TINY_GPT2.expected_tensors().items()}
    values["blk.1.ffn_up.weight"][3, 5] = 1e6
    source = write_model(tmp_path / "in.gguf", TINY_GPT2, values=values)
    with pytest.raises(ServiceError, match=r"'blk.1.ffn_up.weight' holds values too large for F16") as error:
        quantize_file(source, tmp_path / "out.gguf", RECIPES["F16"])
    assert error.value.reason is Reason.MODEL_INVALID
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    values = {name: np.ones(shape, np.float32) for name, shape in TINY_GPT2.expected_tensors().items()}
    values["blk.0.ffn_up.bias"][3] = np.nan
    source = write_model(tmp_path / "in.gguf", TINY_GPT2, values=values)
    with pytest.raises(ServiceError, match="not finite"):
        quantize_file(source, tmp_path / "out.gguf", RECIPES["Q8_0"])


class TestCommand:
    def test_writes_and_says_what(self, demo_gpt2, tmp_path, capsys):
        target = tmp_path / "out.gguf"
        assert run(["quantize", str(demo_gpt2), str(target), "--type", "mxfp4"]) == 0
        out = capsys.readouterr().out
        assert "MXFP4       25  4980736  2646016          4.25" in out
        assert target.stat().st_size < 0.6 * demo_gpt2.stat().st_size

    def test_does_not_replace_a_file_unasked(self, demo_gpt2, tmp_path, capsys):
        target = tmp_path / "out.gguf"
        target.write_text("mine")
        assert run(["quantize", str(demo_gpt2), str(target), "--type", "Q8_0"]) == 1
        assert "--force" in capsys.readouterr().err
        assert target.read_text() == "mine"
        assert run(["quantize", str(demo_gpt2), str(target), "--type", "Q8_0", "--force"]) == 0

    def test_may_replace_its_own_source(self, demo_gpt2, tmp_path):
        path = tmp_path / "model.gguf"
        path.write_bytes(demo_gpt2.read_bytes())
        assert run(["quantize", str(path), str(path), "--type", "F16", "--force"]) == 0
        assert read_gguf(path).tensors["token_embd.weight"].type is GGMLType.F16

    def test_a_type_that_is_none(self, demo_gpt2, tmp_path, capsys):
        assert run(["quantize", str(demo_gpt2), str(tmp_path / "out.gguf"), "--type", "Q3_K"]) == 2
        assert "q4_k_m" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["Q4_K_M", "MXFP4"])  # the first has Q4_K, Q5_K, Q6_K and Q8_0 in it
def test_llama_cpp_loads_the_file_and_answers(demo, tmp_path, recipe):
    """Its loader checks every tensor's type and size, its own decoders read the blocks, and the answers make sense."""
    peer = pytest.importorskip("models.train.peer", reason="llama.cpp is not installed (make test-all installs it)")
    target = tmp_path / demo.name
    quantize_file(demo, target, RECIPES[recipe])
    tasks = held_out_tasks(5, 16, thinks="gpt-oss" in demo.name)
    right = sum(is_correct(task, answer) for task, answer in zip(tasks, peer.answers(target, tasks), strict=True))
    assert right >= 13
