"""ggml's own quantisers and decoders, out of the library inside xllamacpp: what llama.cpp itself writes and reads."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from shared.ggml_type import GGMLType

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (make test-all installs it)")

DECODERS = {
    GGMLType.MXFP4: "dequantize_row_mxfp4",
    GGMLType.Q8_0: "dequantize_row_q8_0",
    GGMLType.Q4_K: "dequantize_row_q4_K",
    GGMLType.Q5_K: "dequantize_row_q5_K",
    GGMLType.Q6_K: "dequantize_row_q6_K",
}


def _library():
    """The extension module as a plain library; pytest skips where it does not show ggml's functions."""
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    if not hasattr(library, "ggml_quantize_chunk"):
        pytest.skip("this build of xllamacpp hides ggml's functions", allow_module_level=True)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    for name in DECODERS.values():
        getattr(library, name).argtypes = [pointer, pointer, integer]
    return library


LIBRARY = _library()


def ggml_quantize(values, type_):
    """(rows, columns) float32 to blocks (rows, row_bytes), without an importance matrix."""
    values = np.ascontiguousarray(values)
    blocks = np.zeros((len(values), type_.row_bytes(values.shape[1])), np.uint8)
    written = LIBRARY.ggml_quantize_chunk(
        int(type_), values.ctypes.data, blocks.ctypes.data, 0, len(values), values.shape[1], None
    )
    assert written == blocks.nbytes
    return blocks


def ggml_dequantize(blocks, type_):
    """(rows, row_bytes) to (rows, columns) float32."""
    blocks = np.ascontiguousarray(blocks)
    values = np.empty((len(blocks), blocks.shape[1] // type_.type_size * type_.block_size), np.float32)
    getattr(LIBRARY, DECODERS[type_])(blocks.ctypes.data, values.ctypes.data, values.size)
    return values
