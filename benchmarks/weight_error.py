"""How far each type's values lie from the weights: on random tensors, and on every matrix of a file.

    python -m benchmarks.weight_error [FILE.gguf]

An error is the root mean square of the differences over that of the values. A file's matrices are taken as it holds
them (demo-gpt2's went through Q8_0 once, so Q8_0 shows nothing there) and named without their layer: the figures are
the least and the largest of the layers. MXFP4's scale is the specification's; the last table shows two other rules.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mxgpt.bundled import find_model
from mxgpt.cli.terminal import print_table
from shared.codecs import MXFP4, Floats
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf, read_tensor
from shared.gpt_config import is_matrix
from shared.quantizers import quantize
from shared.quants import dequantize

TYPES = [
    GGMLType.F16,
    GGMLType.BF16,
    GGMLType.Q8_0,
    GGMLType.Q6_K,
    GGMLType.Q4_K,
    GGMLType.IQ4_NL,
    GGMLType.Q4_0,
    GGMLType.MXFP4,
]
SHAPE = (1024, 1024)
SEED = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", nargs="?", type=Path, help="default: demo-gpt2.gguf")
    path = parser.parse_args().file or find_model("demo-gpt2.gguf")
    random = random_tensors()
    matrices = file_matrices(path)
    header = ("RANDOM VALUES", *(type_.name for type_ in TYPES))
    print_table(header, [(name, *_errors([values])) for name, values in random.items()], align="l" + "r" * len(TYPES))
    print()
    header = (path.name, *header[1:])
    print_table(header, [(name, *_errors(found)) for name, found in matrices.items()], align="l" + "r" * len(TYPES))
    print()
    tensors = random | {name: found[0] for name, found in matrices.items()}
    rows = [(name, *(f"{100 * error:.2f} %" for error in scale_rules(values))) for name, values in tensors.items()]
    print_table(("MXFP4'S SCALE", "SPECIFICATION'S", "LARGEST TO 7 OR UNDER", "BETTER OF BOTH"), rows, align="lrrr")


def random_tensors() -> Mapping[str, Floats]:
    """By name, (1024, 1024)."""
    random = np.random.default_rng(SEED)
    outliers = random.normal(size=SHAPE) * np.where(random.random(SHAPE) < 0.001, 20, 1)
    values = {
        "normal": random.normal(size=SHAPE),
        "uniform": random.uniform(-1, 1, SHAPE),
        "Laplace": random.laplace(size=SHAPE),
        "Student's t, 3 degrees": random.standard_t(3, SHAPE),
        "normal, 1 in 1,000 times 20": outliers,
    }
    return {name: array.astype(np.float32) for name, array in values.items()}


def file_matrices(path: Path) -> Mapping[str, Sequence[Floats]]:
    """Each kind of matrix, as rows, of all layers."""
    file = read_gguf(path)
    found: dict[str, list[Floats]] = {}
    for name, info in file.tensors.items():
        if is_matrix(name) and info.shape[-1] % 256 == 0:
            rows = read_tensor(file, info).reshape(-1, info.row_bytes)
            found.setdefault(re.sub(r"^blk\.\d+\.|\.weight$", "", name), []).append(dequantize(rows, info.type))
    return found


def _errors(matrices: Sequence[Floats]) -> Sequence[str]:
    """The error under each type, from the least to the largest of the matrices."""
    texts = []
    for type_ in TYPES:
        errors = [100 * relative_error(dequantize(quantize(m, type_), type_), m) for m in matrices]
        least, largest = f"{min(errors):.3g}", f"{max(errors):.3g}"
        texts.append(f"{largest} %" if least == largest else f"{least} to {largest} %")
    return texts


def scale_rules(values: Floats) -> tuple[float, float, float]:
    """The error under three rules for a block's scale.

    They are: the specification's (floor of the largest value's logarithm, less 2: what lies past 6 steps becomes 6);
    the smallest scale that brings the largest value to 7 steps or under, as the demo models were trained; and for each
    block whichever of the first and its double gives the smaller error.
    """
    blocks = values.reshape(-1, 32)
    largest = np.maximum(np.abs(blocks).max(axis=1), np.float32(2.0**-100))
    floor = np.floor(np.log2(largest)) - 2
    rounded = [_rounded(blocks, exponents) for exponents in (floor, np.ceil(np.log2(largest / 7)), floor + 1)]
    squares = [((one - blocks) ** 2).sum(axis=1) for one in rounded]
    better = np.where((squares[0] <= squares[2])[:, None], rounded[0], rounded[2])
    first, second, third = (relative_error(one, blocks) for one in (rounded[0], rounded[1], better))
    return first, second, third


def _rounded(blocks: Floats, exponents: Floats) -> Floats:
    """The blocks, (num_blocks, 32), as codes of MXFP4 under these scales hold them."""
    magnitudes = MXFP4.values[:8]
    scales = np.exp2(exponents)[:, None]
    codes = np.searchsorted((magnitudes[1:] + magnitudes[:-1]) / 2, np.abs(blocks) / scales)
    rounded: Floats = np.sign(blocks) * magnitudes[codes] * scales
    return rounded


def relative_error(approximate: Floats, values: Floats) -> float:
    difference = approximate.astype(np.float64) - values
    return float(np.sqrt(np.mean(difference**2) / np.mean(values.astype(np.float64) ** 2)))


if __name__ == "__main__":
    main()
