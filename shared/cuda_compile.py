"""Kernels to cubins, cached: nvcc where there is a toolkit, else NVRTC.

A cubin's key is the hash of its source, of all headers beside it, of the flags, the compiler's version and the
architecture. It is written aside and renamed, so that processes that compile at once never see half a file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from shared.cuda_memory import GET_COMPILER, gpu_unusable
from shared.errors import Reason, ServiceError

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")  # compiled for by the tests
FLAGS = ("-O3", "-std=c++17")


@dataclass(frozen=True)
class Module:
    """One source file and the -D constants that it is compiled with."""

    source: str  # name in the folder of sources, without .cu
    constants: tuple[tuple[str, int], ...] = ()

    @property
    def defines(self) -> list[str]:
        return [f"-D{name}={value}" for name, value in self.constants]


def architecture(capability: tuple[int, int]) -> str:
    """The target for a device's compute capability: on 9.0 the variant with its own instructions."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if capability == (9, 0) else "")


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mxgpt" / "cubins"


class Compiler:
    """Compiles modules for one architecture.

    Args:
        sources: the folder of the .cu files and of the headers that they include.
        target: such as "sm_90a".
        cache: folder of cubins; made if it is missing.
        nvcc: path of the compiler; None looks on PATH and in CUDA_HOME, then takes NVRTC.

    Raises:
        ServiceError: FIELD_INVALID if there is no compiler at all, saying what to install.
    """

    def __init__(self, sources: Path, target: str, cache: Path | None = None, nvcc: str | None = None) -> None:
        self._sources = sources
        self._target = target
        self._cache = cache or default_cache()
        self._nvcc = nvcc or find_nvcc()
        self._version = _nvcc_version(self._nvcc) if self._nvcc else _nvrtc_version()

    def compile_all(
        self, modules: Sequence[Module], report: Callable[[int, int], None] | None = None
    ) -> Mapping[Module, bytes]:
        """The cubins of modules, compiled in parallel where they are not cached.

        Args:
            report: called with (modules done, modules in all).
        """
        cubins = {}
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for module, cubin in zip(modules, pool.map(self.compile, modules), strict=True):
                cubins[module] = cubin
                if report is not None:
                    report(len(cubins), len(modules))
        return cubins

    def compile(self, module: Module) -> bytes:
        """The cubin of one module, from the cache if it is there."""
        path = self._cache / f"{module.source}-{self._key(module)}.cubin"
        try:
            return path.read_bytes()
        except FileNotFoundError:
            pass
        cubin = self._run_nvcc(module) if self._nvcc else _run_nvrtc(self._sources, module, self._target)
        self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._cache, delete=False) as aside:
            aside.write(cubin)
        os.replace(aside.name, path)
        return cubin

    def _key(self, module: Module) -> str:
        headers = sorted(self._sources.glob("*.cuh"))
        parts = [(self._sources / f"{module.source}.cu").read_bytes(), *(header.read_bytes() for header in headers)]
        parts.append(" ".join((*FLAGS, *module.defines, self._version, self._target)).encode())
        return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]

    def _run_nvcc(self, module: Module) -> bytes:
        assert self._nvcc is not None
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "kernel.cubin"
            command = [self._nvcc, *nvcc_arguments(self._sources, module, self._target), "-o", str(output)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise ServiceError(Reason.INTERNAL, f"nvcc refused {module.source}.cu: {result.stderr.strip()[:1000]}")
            return output.read_bytes()


def nvcc_arguments(sources: Path, module: Module, target: str) -> list[str]:
    """Everything but the compiler's name and the output."""
    generate = f"arch={target.replace('sm_', 'compute_')},code={target}"
    return [*FLAGS, *module.defines, "-cubin", "-gencode", generate, str(sources / f"{module.source}.cu")]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def _nvcc_version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def _nvrtc_version() -> str:
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        raise gpu_unusable("there is no CUDA compiler", GET_COMPILER) from None
    _, major, minor = nvrtc.nvrtcVersion()
    return f"nvrtc {major}.{minor}"


def _run_nvrtc(sources: Path, module: Module, target: str) -> bytes:
    from cuda import pathfinder
    from cuda.bindings import nvrtc

    include = pathfinder.find_nvidia_header_directory("cudart")
    source = (sources / f"{module.source}.cu").read_bytes()
    error, program = nvrtc.nvrtcCreateProgram(source, f"{module.source}.cu".encode(), 0, [], [])
    options = [f"--gpu-architecture={target}", "-std=c++17", f"-I{sources}", f"-I{include}", *module.defines]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise ServiceError(Reason.INTERNAL, f"NVRTC refused {module.source}.cu: {log.decode()[:1000]}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = bytearray(size)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)
