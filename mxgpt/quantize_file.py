"""A GGUF file written anew with its tensors in other types; metadata, names and order stay.

A tensor that has its type already is copied byte for byte, so that what was trained in MXFP4 stays what was trained.
All others are decoded and rounded once. One tensor is in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from mxgpt.recipes import Recipe, tensor_types
from shared.codecs import Bytes
from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import GGUFFile, StringArray, TensorInfo, check_unchanged, read_gguf, read_tensor
from shared.gguf_metadata import ValueType
from shared.gpt_config import GPTConfig
from shared.layout import refuse_invalid
from shared.quantizers import encode
from shared.quants import dequantize, find_invalid

STEP_VALUES = 1 << 22  # decoded at once
WRITTEN_ANEW = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version")
LEFT_OUT = ("split.", "quantize.imatrix.")  # shards become one file; no importance matrix is used


def quantize_file(
    source: Path, target: Path, recipe: Recipe, on_progress: Callable[[int, int], None] = lambda _done, _total: None
) -> None:
    """Write `target`, which appears only once it is whole, from `source`, or from it and its further shards.

    Args:
        on_progress: called with the number of values written and of all.

    Raises:
        ServiceError: for a source that could not be served, or a value too large for its new type.
        OSError: when the target can't be written.
    """
    file = read_gguf(source)
    config = GPTConfig.from_gguf(file)
    config.check_tensors(file)
    part = target.with_name(f"{target.name}.part")
    try:
        _write(file, config, part, recipe, on_progress)
        check_unchanged(file)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _write(
    file: GGUFFile, config: GPTConfig, path: Path, recipe: Recipe, on_progress: Callable[[int, int], None]
) -> None:
    types = tensor_types(recipe, file, config)
    writer = gguf.GGUFWriter(path, config.architecture)
    try:
        _add_metadata(writer, file, recipe)
        for name, info in file.tensors.items():
            shape = (*info.shape[:-1], types[name].row_bytes(info.shape[-1]))
            num_bytes = int(np.prod(shape, dtype=np.int64))
            raw_type = gguf.GGMLQuantizationType(int(types[name]))
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), num_bytes, raw_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total = sum(info.num_elements for info in file.tensors.values())
        done = 0
        for name, info in file.tensors.items():
            writer.write_tensor_data(_converted(file, info, types[name]))
            done += info.num_elements
            on_progress(done, total)
    finally:
        writer.close()


def _add_metadata(writer: gguf.GGUFWriter, file: GGUFFile, recipe: Recipe) -> None:
    """All keys with their types, but for empty arrays, which gguf-py can't write."""
    metadata = file.metadata
    if "general.alignment" in metadata:
        writer.add_custom_alignment(metadata.get_int("general.alignment"))
    writer.add_file_type(recipe.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key in metadata:
        type_, element_type = metadata.type_of(key)
        if key in WRITTEN_ANEW or key.startswith(LEFT_OUT):
            continue
        if element_type is None:
            value = metadata.get_bytes(key) if type_ is ValueType.STRING else metadata[key]
            writer.add_key_value(key, value, gguf.GGUFValueType(int(type_)))
        elif items := _items(metadata[key]):
            writer.add_key_value(key, items, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(int(element_type)))


def _items(array: object) -> list[object]:
    if isinstance(array, StringArray):
        return [array.bytes_at(i) for i in range(len(array))]
    assert isinstance(array, np.ndarray)
    return list(array.tolist())


def _converted(file: GGUFFile, info: TensorInfo, type_: GGMLType) -> Bytes:
    """The tensor's bytes in another type, (rows, row_bytes), or as they are in its own."""
    data = read_tensor(file, info)
    refuse_invalid(file, info, data)
    rows = data.reshape(-1, info.row_bytes)
    if type_ is info.type:
        return rows
    num_columns = info.shape[-1]
    converted = np.empty((len(rows), type_.row_bytes(num_columns)), np.uint8)
    step = max(STEP_VALUES // num_columns, 1)
    for start in range(0, len(rows), step):
        values = dequantize(rows[start : start + step], info.type)
        with np.errstate(over="ignore"):
            blocks = encode(values.reshape(-1, type_.block_size), type_)
        converted[start : start + step] = blocks.reshape(len(values), -1)
    if find_invalid(converted, type_) is not None:
        path = str(file.paths[info.file_index])
        why = f"{path}: tensor {info.name!r} holds values too large for {type_.name}."
        raise ServiceError(Reason.MODEL_INVALID, why, metadata={"file": path})
    return converted
