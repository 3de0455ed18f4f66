"""What numpy's BLAS is told before it starts: the environment of a process that computes on the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}  # what OpenBLAS's SkylakeX kernels use


def blas_environment(num_threads: int, given: Mapping[str, str], cpuinfo: Path = CPUINFO) -> dict[str, str]:
    """The variables to set: threads, and OpenBLAS's kernels.

    OpenBLAS chooses kernels by the processor's model; newer AMD ones get those for AVX2, which are slower than those
    for AVX-512 that they can run, and whose rows depend on each other (docs/decisions/001).

    Args:
        num_threads: of BLAS.
        given: the environment that there is; a choice of kernels in it stays.
        cpuinfo: the processor's description.
    """
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(num_threads))
    if "OPENBLAS_CORETYPE" not in given and _features(cpuinfo) >= AVX512:
        return {**threads, "OPENBLAS_CORETYPE": "SkylakeX"}
    return threads


def default_num_threads() -> int:
    """Half of the cores that this process may use: the other half serves, tokenizes and loads."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def _features(cpuinfo: Path) -> set[str]:
    """The processor's features; none where the file is missing or says none, as on Arm."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
