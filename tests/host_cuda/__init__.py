"""The loader's kernels compiled for the host, so that their arithmetic is tested where there is no GPU."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from services.loader.cuda.kernels import SOURCES

SHIM = Path(__file__).parent
MAX_ARGUMENTS = 13

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile kernels for the host")


def run(source: str, kernel: str, num_threads: int, arguments: Sequence[int], **constants: int) -> None:
    """Run a kernel on memory of the host, thread by thread."""
    library = _compile(source, tuple(constants.items()))
    padded = (ctypes.c_uint64 * MAX_ARGUMENTS)(*arguments)
    library.run(ctypes.cast(library[kernel], ctypes.c_void_p), ctypes.c_uint64(num_threads), 256, padded)


@functools.cache
def _compile(source: str, constants: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.so"
        defines = [f"-D{name}={value}" for name, value in constants]
        command = ["g++", "-x", "c++", "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", f"-I{SHIM}"]
        command += ["-include", "cuda_fp16.h", *defines, str(SOURCES / f"{source}.cu"), "-o", str(path)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(path))


def parameter_types(source: str, kernel: str) -> str:
    """The types of a kernel's parameters as its source has them: P a pointer, L 64 bits, i an int."""
    source = re.sub(r"//[^\n]*|/\*.*?\*/|\\\n", "", source)
    (macro,) = re.findall(r"#define PARAMETERS(.*)", source) or [""]
    (parameters,) = re.findall(rf"\b{kernel}\(([^)]*)\)\s*\{{", source)
    types, kind = "", ""
    for one in parameters.replace("PARAMETERS", macro).split(","):  # a declaration may name several, as "int a, b"
        words = re.findall(r"\w+", one)
        if len(words) > 1:
            kind = "L" if "Word64" in words else "i" if "int" in words else "?"
        types += "P" if "*" in one else kind
    return types
