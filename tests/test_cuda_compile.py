"""Every kernel compiles for every architecture that mxgpt names, without a GPU, and keeps to registers."""

import re
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.executor.cuda.kernels import SOURCES, modules_of
from services.executor.cuda.products import STATIC_BYTES
from services.loader.cuda import kernels as loader_kernels
from shared.cuda_compile import ARCHITECTURES, Compiler, Module, find_nvcc, nvcc_arguments
from shared.cuda_layout import Family
from shared.errors import ServiceError
from tests.sass import count_products, disassemble, find_nvdisasm, touched_in_flight
from tests.tiny_models import TINY_GPT2, WIDE_GPT_OSS

NVCC, NVDISASM = find_nvcc(), find_nvdisasm()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc: install a CUDA toolkit to compile the kernels")


LARGE_HEADS = [
    Module("attention_decode", (("HEAD_SIZE", size), ("HEAD_SIZE_PADDED", size), ("GROUP", group)))
    for size, group in ((64, 8), (128, 16))  # gpt-oss-20b's, and the most
]


def all_modules():
    return [*(modules_of(WIDE_GPT_OSS, Family) | modules_of(TINY_GPT2, [])), *LARGE_HEADS, Module("read")]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize("sources", [SOURCES, loader_kernels.SOURCES], ids=["executor", "loader"])
def test_all_kernels_compile_without_spills(tmp_path, target, sources):
    def compile(module):
        command = [NVCC, *nvcc_arguments(sources, module, target), "-Xptxas", "-v", "-Werror", "all-warnings"]
        output = tmp_path / f"{module.source}{''.join(module.defines)}"
        result = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        spilled = [int(count) for count in re.findall(r"(\d+) bytes spill", result.stderr)]
        assert spilled, "ptxas reported nothing"
        if module.source in ("product", "product_one", "product_rows"):
            static_bytes = [int(size) for size in re.findall(r"(\d+) bytes smem", result.stderr)]
            assert max(static_bytes, default=0) <= STATIC_BYTES, module
        return max(spilled) > 0

    modules = all_modules() if sources == SOURCES else loader_kernels.MODULES
    assert {module.source for module in modules} == {path.stem for path in sources.glob("*.cu")}
    with ThreadPoolExecutor(2) as pool:
        spills = dict(zip(modules, pool.map(compile, modules), strict=True))
    assert not [module for module in modules if spills[module]]


@needs_nvcc
@pytest.mark.skipif(NVDISASM is None, reason="no nvdisasm: install nvidia-cuda-nvdisasm, or a CUDA toolkit")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_registers_of_products_in_flight_are_left_alone(tmp_path):
    """The compiler does not know that they are in use; see start_product in wgmma.cuh."""
    compiler = Compiler(SOURCES, "sm_90a", tmp_path)
    modules = [
        module
        for module in all_modules()
        if re.search(r"wgmma\w*\.cuh", Path(SOURCES / f"{module.source}.cu").read_text())
    ]
    assert {module.source for module in modules} == {"attention_wgmma", "product_split", "product_wgmma"}
    for module, cubin in compiler.compile_all(modules).items():
        path = tmp_path / "kernel"
        path.write_bytes(cubin)
        sass = disassemble(NVDISASM, path)
        assert count_products(sass) == sass.count("HGMMA") >= 16, module
        assert touched_in_flight(sass) == [], module


IN_FLIGHT = """.text.kernel:
        /*0000*/                   IMAD.MOV.U32 R8, RZ, RZ, R9 ;
.L_x_1:
        /*0010*/                   HGMMA.64x8x16.F32 R8, R4, gdesc[UR4], R8, UP0, gsb0 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/                   LATE ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   LDS.128 R4, [R16] ;
        /*0070*/                   FADD R3, R8, R9 ;
        /*0080*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("statement", "num_found"),
    [
        ("IADD3 R3, R4, R5, RZ", 0),  # what is multiplied may be read
        ("F2FP.F16.F32.PACK_AB R7, R17, R18", 1),
        ("LDS.128 R0, [R20]", 0),
        ("LDS.128 R4, [R20]", 1),
        ("IMAD.WIDE R2, P2, R17, R18, R20", 0),
        ("IMAD.WIDE R3, R17, R18, R20", 1),
        ("FADD R3, R8, R17", 1),
        ("STS [R20], R11", 1),
        ("@!P3 FMUL R10, R17, R18", 1),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 0),
        ("@P1 BRA `(.L_x_1)", 0),
        ("SHFL.BFLY PT, R7, R17, 0x1, 0x1f", 1),
        ("CS2R R6, SRZ", 1),
        ("CS2R.32 R3, SR_CLOCKLO", 0),
        ("BRA.DIV UR6, `(.L_x_2) ;\n        /*0038*/                   FMUL R8, R17, R18", 1),
    ],
)
def test_what_touches_registers_in_flight_is_found(statement, num_found):
    assert len(touched_in_flight(IN_FLIGHT.replace("LATE", statement))) == num_found


def has_nvrtc() -> bool:
    """Whether both of its wheels are there: the compiler's and the one of the headers."""
    try:
        from cuda.bindings import nvrtc
        from cuda.pathfinder import find_nvidia_header_directory

        return nvrtc.nvrtcVersion()[0] == 0 and find_nvidia_header_directory("cudart") is not None
    except (ImportError, RuntimeError):
        return False


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not has_nvrtc(), reason="no NVRTC: install cuda-bindings, nvidia-cuda-nvrtc, nvidia-cuda-runtime")
@pytest.mark.parametrize("sources", [SOURCES, loader_kernels.SOURCES], ids=["executor", "loader"])
def test_all_kernels_compile_where_there_is_no_nvcc(tmp_path, monkeypatch, sources):
    monkeypatch.setattr("shared.cuda_compile.find_nvcc", lambda: None)
    modules = all_modules() if sources == SOURCES else loader_kernels.MODULES
    cubins = Compiler(sources, "sm_90a", tmp_path).compile_all(modules)
    assert all(cubin[:4] == b"\x7fELF" for cubin in cubins.values())


@needs_nvcc
@pytest.mark.parametrize("family", [Family.MXFP4, Family.F16], ids=lambda family: family.name)
def test_arguments_lie_where_kernels_look_for_them(tmp_path, family):
    """PyCUDA packs arguments as `struct` does; the compiler places a tensor map by an address that begins elsewhere."""
    modules = {module: entries for module, entries in modules_of(WIDE_GPT_OSS, [family]).items() if has_map(entries)}
    assert modules
    for module, entries in modules.items():
        found = parameters(Compiler(SOURCES, "sm_90a", tmp_path).compile(module))
        for _, entry, types in entries:
            kinds = [{"T": "128s"}.get(kind, kind) for kind in types]
            ends = [struct.calcsize("".join(kinds[: i + 1])) for i in range(len(kinds))]
            assert found[entry] == [(end - struct.calcsize(kind), end) for kind, end in zip(kinds, ends, strict=True)]


def has_map(entries):
    return any("T" in types for _, _, types in entries)


def parameters(cubin):
    """Where the parameters of each kernel of a cubin begin and end, in bytes: .nv.info's EIATTR_KPARAM_INFO."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)]
    names = cubin[sections[names_at][4] :]
    found = {}
    for name_at, _, _, _, start, num_bytes, *_ in sections:
        name = names[name_at : names.index(b"\0", name_at)].decode()
        if name.startswith(".nv.info."):
            found[name.removeprefix(".nv.info.")] = parameters_of(cubin[start : start + num_bytes])
    return found


def parameters_of(info):
    places, at = {}, 0
    while at < len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:  # the value is the number of bytes that follow
            if attribute == 0x17:
                _, ordinal, offset, bits = struct.unpack_from("<IHHI", info, at)
                places[ordinal] = (offset, offset + (bits >> 18))
            at += value
    return [places[ordinal] for ordinal in sorted(places)]


@needs_nvcc
def test_cubins_are_cached_by_what_they_are_made_of(tmp_path):
    module = Module("rows")
    cubin = Compiler(SOURCES, "sm_80", tmp_path).compile(module)
    assert cubin[:4] == b"\x7fELF"
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"from the cache")
    assert Compiler(SOURCES, "sm_80", tmp_path).compile(module) == b"from the cache"
    assert Compiler(SOURCES, "sm_86", tmp_path).compile(module) != b"from the cache"
    assert len(list(tmp_path.iterdir())) == 2


@needs_nvcc
def test_a_source_that_does_not_compile_is_an_error(tmp_path):
    with pytest.raises(ServiceError, match=r"nvcc refused embed\.cu"):
        Compiler(SOURCES, "sm_80", tmp_path).compile(Module("embed"))  # without its FAMILY


def test_entry_points_take_the_arguments_that_are_declared():
    """The types of each entry point, against its parameters in the source."""
    for module, entries in modules_of(WIDE_GPT_OSS, [Family.MXFP4]).items():
        source = Path(SOURCES / f"{module.source}.cu").read_text()
        source = re.sub(r"//[^\n]*|\\\n", "", source)
        source = re.sub("##(NUM_TILES|M_TILES|STRIPS|BLOCKS)", "1", source)
        for _, entry, types in entries:
            stem = re.sub(r"_\d$", "_1", entry)
            (parameters,) = re.findall(rf"\b{stem}\(([^)]*)\)\s*\{{", source.replace("NAME(", f"{entry}("))
            kinds = [
                "T" if "TensorMap" in one else "P" if "*" in one else "f" if "float" in one else "i"
                for one in parameters.split(",")
            ]
            assert "".join(kinds) == types, entry
