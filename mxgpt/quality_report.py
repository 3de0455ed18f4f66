"""Measurements of a model's files as a table, a picture, JSON, and a list of the answers that differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mxgpt.quality import Difference, Measurement, compare_text, differences
from mxgpt.quality_picture import Column, Panel
from mxgpt.tensor_error import TensorError


@dataclass(frozen=True)
class Report:
    """A model's files, the first of which is what the others are compared with."""

    title: str
    measurements: Sequence[Measurement]
    errors: Mapping[str, Sequence[TensorError]]  # by file name; the first has none
    is_judged: bool  # the questions have right answers

    @property
    def base(self) -> Measurement:
        return self.measurements[0]

    @property
    def texts(self) -> Sequence[str]:
        return list(self.base.entries)

    def weight_error(self, measurement: Measurement) -> float:
        """Relative error of the weights, root mean square over the tensors whose type is not the base's; else 0."""
        errors = [error for error in self.errors.get(measurement.name, ()) if error.type != error.base_type]
        num_values = sum(error.num_values for error in errors)
        return math.sqrt(sum(e.num_values * e.relative**2 for e in errors) / num_values) if errors else 0.0


def table(report: Report) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
    """Header, rows and alignment, for `print_table`."""
    header = ["FILE", "BYTES", "BITS A WEIGHT", "WEIGHTS OFF"]
    for text in report.texts:
        header += [f"PERPLEXITY, {text.upper()}", "CHANGE", "SAME BEST TOKEN"]
    if report.base.answers:
        header += ["RIGHT"] if report.is_judged else []
        header += ["ANSWERS UNLIKE THE FIRST'S"]
    return header, [_row(report, measurement) for measurement in report.measurements], "l" + "r" * (len(header) - 1)


def panel(report: Report) -> Panel:
    """The same, to draw."""
    measurements = report.measurements
    sizes = [measurement.bits_per_weight for measurement in measurements]
    errors = [100 * report.weight_error(measurement) for measurement in measurements]
    columns = [
        Column("bits a weight, all in", sizes, [f"{size:.2f}" for size in sizes]),
        Column("weights off (RMS)", errors, [f"{error:.3g} %" for error in errors]),
    ]
    for text in report.texts:
        changes = [compare_text(report.base, measurement, text) for measurement in measurements]
        labels = [percent_label(change.percent) for change in changes]
        columns.append(Column(f"perplexity, {text}", [change.percent for change in changes], labels))
    if report.base.answers and report.is_judged:
        num_tasks = len(report.base.answers)
        wrong = [num_tasks - measurement.num_right for measurement in measurements]
        columns.append(Column(f"wrong answers of {num_tasks}", wrong, [str(count) for count in wrong]))
    if report.base.answers:
        turned = [len(differences(report.base, measurement)) for measurement in measurements]
        columns.append(Column("answers unlike the first's", turned, [str(count) for count in turned]))
    return Panel(report.title, [measurement.name for measurement in measurements], columns)


def fields(report: Report) -> dict[str, Any]:
    """All of it, for JSON."""
    return {
        "title": report.title,
        "files": [
            {
                "name": measurement.name,
                "bytes": measurement.num_bytes,
                "bits_per_weight": measurement.bits_per_weight,
                "weight_error": report.weight_error(measurement),
                "texts": {text: _text_fields(report, measurement, text) for text in report.texts},
                "tasks": len(measurement.answers),
                "right": measurement.num_right if report.is_judged else None,
                "differences": [_difference_fields(one) for one in differences(report.base, measurement)],
                "tensors": [
                    {"name": e.name, "type": e.type, "relative": e.relative, "largest": e.largest}
                    for e in report.errors.get(measurement.name, ())
                ],
            }
            for measurement in report.measurements
        ],
    }


def describe(difference: Difference, is_judged: bool) -> str:
    """One difference in a line."""
    base, other = difference.base, difference.other
    question = f"{base.task.prompt!r}: token {difference.position} differs"
    if base.text == other.text:
        return f"{question}, the answer {base.text!r} does not"
    if not is_judged:
        return f"{question}: {base.text!r}, now {other.text!r}"
    verdicts = {(True, False): "now wrong", (False, True): "now right", (False, False): "wrong both times"}
    verdict = verdicts.get((base.is_correct, other.is_correct), "right both times")
    return f"{question}: {base.text!r}, now {other.text!r} ({verdict})"


def percent_label(percent: float) -> str:
    """A change for table and picture: a thousandth of a percent is less than any text can tell."""
    return f"{percent:+.3f} %"


def _row(report: Report, measurement: Measurement) -> Sequence[str]:
    row = [
        measurement.name,
        f"{measurement.num_bytes:,}",
        f"{measurement.bits_per_weight:.2f}",
        f"{100 * report.weight_error(measurement):.3g} %",
    ]
    for text in report.texts:
        change = compare_text(report.base, measurement, text)
        row.append(f"{measurement.perplexity(text):.5f}")
        row.append(f"{percent_label(change.percent)} +- {change.percent_margin:.3f}")
        row.append(f"{100 * change.same_top:.2f} %")
    if report.base.answers:
        row += [f"{measurement.num_right}/{len(measurement.answers)}"] if report.is_judged else []
        row.append(str(len(differences(report.base, measurement))))
    return row


def _text_fields(report: Report, measurement: Measurement, text: str) -> dict[str, float]:
    change = compare_text(report.base, measurement, text)
    return {
        "perplexity": measurement.perplexity(text),
        "scored": change.num_scored,
        "change_percent": change.percent,
        "change_margin": change.percent_margin,
        "same_top": change.same_top,
    }


def _difference_fields(difference: Difference) -> dict[str, Any]:
    return {
        "prompt": difference.base.task.prompt,
        "kind": difference.base.task.kind,
        "position": difference.position,
        "base": difference.base.text,
        "other": difference.other.text,
        "base_right": difference.base.is_correct,
        "other_right": difference.other.is_correct,
    }
