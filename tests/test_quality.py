"""What quantisation costs: the statistics, the picture, and a guard on the demo models' figures."""

import json
import math
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from benchmarks.weight_error import random_tensors, relative_error, scale_rules
from mxgpt.cli.main import run
from mxgpt.evaluate import Answer
from mxgpt.quality import Measurement, Question, compare_text, differences, first_difference
from mxgpt.quality_picture import Column, Panel, draw
from mxgpt.quality_report import Report, describe, fields, panel, table
from mxgpt.quantize_file import quantize_file
from mxgpt.recipes import RECIPES
from mxgpt.results import TokenLogprobs
from mxgpt.tensor_error import TensorError, tensor_errors
from shared.errors import ServiceError
from shared.ggml_type import GGMLType
from shared.quantizers import quantize
from shared.quants import dequantize
from tests.make_quality_goldens import GOLDENS, MODELS, figures
from tests.stack import ROOT
from tests.tiny_models import TINY_GPT2, WIDE_GPT2, write_model


def scored(*pairs):
    """Entries of (logprob, likeliest token)."""
    return [TokenLogprobs(0, logprob, ((best, -0.1),)) for logprob, best in pairs]


def answered(prompt, text, token_ids, is_correct=False):
    return Answer(Question(prompt), text, is_correct, tuple(token_ids))


BASE = Measurement(
    "base.gguf",
    4000,
    1000,
    {"text": scored((-1.0, 1), (-2.0, 2), (-3.0, 3), (-4.0, 4))},
    [answered("a?", "one", [1, 2]), answered("b?", "two", [3], True), answered("c?", "three", [4, 5])],
)
OTHER = Measurement(
    "other.gguf",
    531,
    1000,
    {"text": scored((-1.5, 1), (-2.0, 9), (-3.5, 3), (-5.0, 4))},
    [answered("a?", "one", [1, 2]), answered("b?", "too", [7, 8]), answered("c?", "three", [4])],
)
ERRORS = {
    "other.gguf": [
        TensorError("a.weight", "F32", "MXFP4", 300, 0.1, 0.2),
        TensorError("b.weight", "F32", "Q8_0", 700, 0.01, 0.02),
        TensorError("b.bias", "F32", "F32", 10, 0.0, 0.0),
    ]
}
REPORT = Report("a model", [BASE, OTHER], ERRORS, is_judged=True)


class TestStatistics:
    def test_perplexity_and_its_paired_change(self):
        assert BASE.perplexity("text") == pytest.approx(math.exp(2.5))
        assert OTHER.perplexity("text") == pytest.approx(math.exp(3.0))
        change = compare_text(BASE, OTHER, "text")
        assert change.log_ratio == pytest.approx(0.5)
        assert change.percent == pytest.approx(100 * (math.exp(0.5) - 1))
        # The changes are 0.5, 0, 0.5 and 1: variance 1/6 of four.
        assert change.standard_error == pytest.approx(math.sqrt(1 / 6 / 4))
        assert change.same_top == 0.75

    def test_a_file_against_itself(self):
        change = compare_text(BASE, BASE, "text")
        assert (change.log_ratio, change.standard_error, change.same_top) == (0, 0, 1)
        assert differences(BASE, BASE) == []

    def test_differences_are_of_tokens_not_of_texts(self):
        found = differences(BASE, OTHER)
        assert [(one.base.task.prompt, one.position) for one in found] == [("b?", 0), ("c?", 1)]

    @pytest.mark.parametrize(
        ("one", "two", "position"), [([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [5], 0), ([1, 2, 3], [1, 2], 2)]
    )
    def test_first_difference(self, one, two, position):
        assert first_difference(one, two) == position

    def test_bits_a_weight(self):
        assert (BASE.bits_per_weight, OTHER.bits_per_weight) == (32, 8 * 0.531)

    def test_the_weights_error_counts_values_of_tensors_in_another_type(self):
        assert REPORT.weight_error(OTHER) == pytest.approx(math.sqrt((300 * 0.01 + 700 * 0.0001) / 1000))
        assert REPORT.weight_error(BASE) == 0


class TestReport:
    def test_table(self):
        header, rows, align = table(REPORT)
        assert len(header) == len(rows[0]) == len(rows[1]) == len(align)
        row = dict(zip(header, rows[1], strict=True))
        assert row["FILE"] == "other.gguf"
        assert row["WEIGHTS OFF"] == "5.54 %"
        assert row["PERPLEXITY, TEXT"] == f"{math.exp(3):.5f}"
        assert row["CHANGE"].startswith("+64.872 % +- ")
        assert row["SAME BEST TOKEN"] == "75.00 %"
        assert row["RIGHT"] == "0/3"
        assert row["ANSWERS UNLIKE THE FIRST'S"] == "2"

    def test_differences_in_words(self):
        first, second = differences(BASE, OTHER)
        assert describe(first, is_judged=True) == "'b?': token 0 differs: 'two', now 'too' (now wrong)"
        assert describe(first, is_judged=False) == "'b?': token 0 differs: 'two', now 'too'"
        assert describe(second, is_judged=True) == "'c?': token 1 differs, the answer 'three' does not"

    def test_json_has_all_of_it(self):
        other = json.loads(json.dumps(fields(REPORT)))["files"][1]
        assert other["texts"]["text"]["change_percent"] == pytest.approx(64.872, abs=0.001)
        assert other["differences"][0] == {
            "prompt": "b?",
            "kind": "question",
            "position": 0,
            "base": "two",
            "other": "too",
            "base_right": True,
            "other_right": False,
        }
        assert len(other["tensors"]) == 3

    def test_picture(self):
        """Well-formed, with every label, and bars in proportion to their column's largest value."""
        drawn = draw(
            [panel(REPORT), Panel("<b> & c", ["row"], [Column("none", [0.0], ["0"]), Column("less", [-2], ["-2"])])]
        )
        root = ElementTree.fromstring(drawn)
        tag = "{http://www.w3.org/2000/svg}"
        texts = [element.text for element in root.iter(f"{tag}text")]
        assert {"a model", "<b> & c", "base.gguf", "other.gguf", "32.00", "4.25", "5.54 %", "+64.872 %", "-2"} <= set(
            texts
        )
        bars = [element for element in root.iter(f"{tag}rect") if "bar" in element.get("class", "")]
        widths = [float(bar.get("width")) for bar in bars]
        assert widths[1] / widths[0] == pytest.approx(4.248 / 32, abs=0.01)
        assert (widths[-2], bars[-1].get("class")) == (0, "bar below")
        assert widths[-1] == widths[0]  # a column of its own has a scale of its own
        right_edge = max(float(bar.get("x")) + float(bar.get("width")) for bar in bars)
        assert right_edge < float(root.get("width"))


class TestTensorErrors:
    def test_against_hand_made_values(self, tmp_path):
        base = write_model(tmp_path / "base.gguf", WIDE_GPT2, seed=3)
        other = write_model(tmp_path / "other.gguf", WIDE_GPT2, seed=3, type_of=lambda name: GGMLType.F16)
        for error in tensor_errors(base, other):
            assert (error.base_type, error.type) == ("F32", "F16")
            assert 2**-13 < error.relative < 2**-11
            assert error.largest <= 2**-11
        assert all(error.is_exact for error in tensor_errors(base, base))

    def test_other_models_are_refused(self, tmp_path):
        base = write_model(tmp_path / "base.gguf", WIDE_GPT2)
        other = write_model(tmp_path / "other.gguf", TINY_GPT2)
        with pytest.raises(ServiceError, match="other models"):
            tensor_errors(base, other)


# How far figures may stray from the goldens: sums in another order flip a code now and then, an expert rarely.
MAX_STRAY = {"F16": 2e-5, "Q8_0": 1e-4, "Q4_K_M": 1e-3, "MXFP4": 1e-3}


@pytest.mark.parametrize("model", MODELS)
def test_what_types_cost_is_what_it_was(model, request):
    """The regression guard: a quantiser, decoder or model that got worse on any type shows here."""
    path = request.getfixturevalue(model.removesuffix(".gguf").replace("-", "_"))
    expected = json.loads(GOLDENS.read_text())[model]
    found = figures(path, MODELS[model])
    for name, golden in expected.items():
        assert found[name]["weights_off"] == pytest.approx(golden["weights_off"], rel=1e-3), name
        assert found[name]["mean_loss"] == pytest.approx(golden["mean_loss"], abs=MAX_STRAY[name]), name
        assert found[name]["best_differ"] == pytest.approx(golden["best_differ"], abs=3), name
        assert found[name].get("sha256") == golden.get("sha256"), name
        assert found[name]["mean_loss"] < 0.01, "the claim: perplexity within 1 %"


@pytest.mark.parametrize("name", ["normal", "uniform"])
def test_the_first_rule_of_the_error_table_is_the_quantisers(name):
    values = random_tensors()[name]
    first, second, better = scale_rules(values)
    written = dequantize(quantize(values, GGMLType.MXFP4), GGMLType.MXFP4)
    assert first == pytest.approx(relative_error(written, values), rel=1e-4)
    assert better <= min(first, second)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_benchmark_makes_table_picture_and_json(demo_gpt2, tmp_path):
    command = [sys.executable, "-m", "benchmarks.quality", str(demo_gpt2), "--types", "Q8_0,MXFP4_MOE,MXFP4"]
    command += ["--tasks", "12", "--picture", str(tmp_path / "q.svg"), "--json", str(tmp_path / "q.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=280)
    assert "MXFP4_MOE is left out" in done.stderr
    [report] = json.loads((tmp_path / "q.json").read_text())
    assert [file["name"] for file in report["files"]] == ["F32", "Q8_0", "MXFP4"]
    base, same, other = report["files"]
    assert same["differences"] == []
    assert same["texts"] == base["texts"]  # the file's matrices are Q8_0 already
    assert other["weight_error"] == pytest.approx(0.118, abs=0.001)
    assert 0 < other["texts"]["haiku"]["change_percent"] < 1
    assert all(file["name"] in (tmp_path / "q.svg").read_text() for file in report["files"])


class TestCommand:
    def test_weights_alone(self, demo_gpt2, tmp_path, capsys):
        other = tmp_path / "mxfp4.gguf"
        quantize_file(demo_gpt2, other, RECIPES["MXFP4"])
        assert run(["compare", str(demo_gpt2), str(other), "--tensors"]) == 0
        out = capsys.readouterr().out
        assert "11.8 %" in out
        assert "blk.5.ffn_down.weight" in out

    def test_texts_and_answers_end_to_end(self, demo_gpt2, tmp_path, capsys):
        other = tmp_path / "MXFP4.gguf"
        quantize_file(demo_gpt2, other, RECIPES["MXFP4"])
        text, picture = tmp_path / "text.txt", tmp_path / "picture.svg"
        text.write_text("What is 12 + 30?\n42\nSort these words: silk, fish, yard\nfish, silk, yard\n")
        options = ["--text", str(text), "--window", "24", "--stride", "8", "--tasks", "12"]
        assert run(["compare", str(demo_gpt2), str(other), *options, "--json", "--picture", str(picture)]) == 0
        base, other = json.loads(capsys.readouterr().out)["files"]
        assert base["texts"]["text"]["scored"] > 30
        assert base["texts"]["text"]["change_percent"] == 0
        assert base["differences"] == []
        assert base["right"] >= 11
        assert other["texts"]["text"]["change_percent"] != 0
        assert other["right"] >= 8
        assert "MXFP4.gguf" in picture.read_text()

    @pytest.mark.slow
    def test_prompts_without_right_answers(self, demo_gpt2, tmp_path, capsys):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("What is 2 + 2?\n\nSpell moon.\n")
        copy = tmp_path / "copy.gguf"
        copy.write_bytes(demo_gpt2.read_bytes())
        assert run(["compare", str(demo_gpt2), str(copy), "--prompts", str(prompts)]) == 0
        header, base, same = capsys.readouterr().out.splitlines()
        assert "RIGHT" not in header
        assert base.split()[-1] == same.split()[-1] == "0"

    @pytest.mark.parametrize(
        "options", [["--tasks", "3", "--prompts", "x"], ["--window", "4", "--stride", "4"]], ids=["both", "stride"]
    )
    def test_usage(self, demo_gpt2, demo_gpt_oss, options):
        assert run(["compare", str(demo_gpt2), str(demo_gpt_oss), *options]) == 2

    def test_other_models_are_refused(self, demo_gpt2, demo_gpt_oss, capsys):
        assert run(["compare", str(demo_gpt2), str(demo_gpt_oss)]) == 1
        assert "MODEL_INVALID" in capsys.readouterr().err
