"""GGUF files: what is read, what is refused and how it is said, shards, files that are none, files that change."""

import os
import struct
import time
import tracemalloc
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import StringArray, TensorInfo, check_unchanged, read_gguf, read_tensor
from shared.gguf_header import MAX_NUM_KEYS, MAX_NUM_TENSORS
from shared.gguf_metadata import ValueType
from shared.gguf_reader import MAX_HEADER_BYTES, MAX_NUM_STRINGS
from shared.quants import dequantize
from tests.gguf_files import (
    array_record,
    gguf_bytes,
    header,
    key_record,
    pad,
    string,
    tensor_record,
    typed_record,
    write_gguf,
)
from tests.loader_harness import is_open

F32 = GGMLType.F32
U64_MAX = (1 << 64) - 1


def refusal(tmp_path, data, reason=Reason.MODEL_INVALID):
    """The error that the bytes are refused with: it names the file, and its offset lies in the message."""
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    start = time.thread_time()
    with pytest.raises(ServiceError) as caught:
        read_gguf(path)
    assert time.thread_time() - start < 1
    error = caught.value
    assert error.reason is reason, error
    assert error.message.startswith(f"{path}: byte {error.metadata['offset']}: ")
    assert error.metadata["file"] == str(path)
    return SimpleNamespace(offset=int(error.metadata["offset"]), message=error.message.split(": ", 2)[2])


class TestReading:
    def test_every_value_type(self, tmp_path):
        metadata = {
            "uint8": np.uint8(255),
            "int8": np.int8(-128),
            "uint16": np.uint16(65535),
            "int16": np.int16(-32768),
            "uint32": np.uint32(4294967295),
            "int32": np.int32(-2147483648),
            "uint64": np.uint64(U64_MAX),
            "int64": np.int64(-(1 << 63)),
            "float32": np.float32(0.1),
            "float64": np.float64(0.1),
            "bool": np.bool_(True),
            "string": "naïve 日本 🎉",
            "empty": "",
        }
        file = read_gguf(write_gguf(tmp_path / "m.gguf", metadata))
        assert list(file.metadata) == list(metadata)
        assert dict(file.metadata) == metadata
        assert {type(value) for value in file.metadata.values()} == {int, float, bool, str}
        assert file.metadata["float32"] == float(np.float32(0.1))

    @pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "?"])
    def test_every_number_array(self, tmp_path, dtype):
        values = np.arange(-3, 4).astype(dtype)
        file = read_gguf(write_gguf(tmp_path / "m.gguf", {"pad": "x", "array": values, "none": values[:0]}))
        assert np.array_equal(file.metadata["array"], values)
        assert file.metadata["array"].dtype == values.dtype
        assert file.metadata["array"].flags.aligned
        assert file.metadata["none"].shape == (0,)

    @pytest.mark.parametrize("version", [2, 3])
    @pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
    def test_tensors(self, tmp_path, version, alignment):
        random = np.random.default_rng(0)
        values = {
            "a": random.normal(size=(3, 64)).astype(np.float32),
            "b": random.normal(size=(5,)).astype(np.float32),
            "c": random.normal(size=(2, 3, 4, 32)).astype(np.float32),
        }
        tensors = {"a": (values["a"], GGMLType.F16), "b": (values["b"], F32), "c": (values["c"], GGMLType.Q8_0)}
        path = write_gguf(tmp_path / "m.gguf", {"k": 1}, tensors, version=version, alignment=alignment)
        file = read_gguf(path)
        assert file.version == version
        assert file.paths == (path,)
        assert file.file_sizes == (path.stat().st_size,)
        assert list(file.tensors) == ["a", "b", "c"]
        assert file.data_starts[0] % alignment == 0
        for name, info in file.tensors.items():
            assert info.shape == values[name].shape
            assert info.num_elements == values[name].size
            assert info.offset % alignment == 0
            data = read_tensor(file, info)
            assert data.shape == (info.num_bytes,)
            decoded = dequantize(data.reshape(*info.shape[:-1], info.row_bytes), info.type)
            assert np.abs(decoded - values[name]).max() < 0.02
        assert file.tensors["a"].offset == file.data_starts[0]

    @pytest.mark.parametrize("type_", list(GGMLType), ids=lambda type_: type_.name)
    def test_every_tensor_type(self, tmp_path, type_):
        values = np.random.default_rng(1).normal(size=(4, 512)).astype(np.float32)
        file = read_gguf(write_gguf(tmp_path / "m.gguf", {}, {"t": (values, type_)}))
        info = file.tensors["t"]
        assert info == TensorInfo("t", (4, 512), type_, 0, file.data_starts[0], 4 * type_.row_bytes(512))

    def test_a_file_of_gguf_pys_writer(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt-oss")
        writer.add_context_length(131072)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_token_list(["a", "Ġb", "é"])
        writer.add_token_types([1, 1, 3])
        writer.add_bool("tokenizer.ggml.add_bos_token", False)
        values = np.arange(192, dtype=np.float32).reshape(3, 64)
        writer.add_tensor("f32", values)
        blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q5_1)
        writer.add_tensor("q5_1", blocks, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        file = read_gguf(tmp_path / "m.gguf")
        assert file.metadata.get_str("general.architecture") == "gpt-oss"
        assert file.metadata.get_int("gpt-oss.context_length") == 131072
        assert file.metadata.get_float("gpt-oss.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
        assert list(file.metadata.get_strings("tokenizer.ggml.tokens")) == ["a", "Ġb", "é"]
        assert file.metadata.get_ints("tokenizer.ggml.token_type").tolist() == [1, 1, 3]
        assert file.metadata.get_bool("tokenizer.ggml.add_bos_token") is False
        assert np.array_equal(read_tensor(file, file.tensors["f32"]).view(np.float32), values.ravel())
        assert np.array_equal(read_tensor(file, file.tensors["q5_1"]), blocks.ravel())

    names = st.text("abcdefgh._", min_size=1, max_size=12)
    values = st.one_of(
        st.integers(-(1 << 63), (1 << 32) - 1),
        st.floats(allow_nan=False, width=32),
        st.booleans(),
        st.text(max_size=40),
        st.lists(st.text(max_size=8), min_size=1, max_size=5),
    )

    @settings(max_examples=100, deadline=None)
    @given(
        st.dictionaries(names.filter(lambda name: name != "general.alignment"), values, max_size=8),
        st.dictionaries(names, st.tuples(st.integers(1, 3), st.integers(1, 2)), max_size=5),
    )
    def test_what_is_written_is_read(self, tmp_path_factory, metadata, shapes):
        tensors = {
            name: (np.full((rows, 32 * blocks), rows, np.float32), GGMLType.Q4_0)
            for name, (rows, blocks) in shapes.items()
        }
        file = read_gguf(write_gguf(tmp_path_factory.getbasetemp() / "any.gguf", metadata, tensors))
        found = {key: list(value) if isinstance(value, StringArray) else value for key, value in file.metadata.items()}
        assert found == metadata
        assert {name: info.shape for name, info in file.tensors.items()} == {
            name: values.shape for name, (values, _) in tensors.items()
        }

    def test_a_header_longer_than_one_read(self, tmp_path):
        tokens = [f"token {i} " + "x" * (i % 90) for i in range(40000)]
        numbers = np.arange(300000, dtype=np.int32)
        metadata = {"tokens": tokens, "numbers": numbers, "text": "y" * 1_500_000, "last": 7}
        path = write_gguf(tmp_path / "m.gguf", metadata, {"t": (np.ones((2, 32), np.float32), F32)})
        tracemalloc.start()
        file = read_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.5 * path.stat().st_size
        strings = file.metadata.get_strings("tokens")
        assert list(strings) == tokens
        assert [strings[i] for i in (0, 17, -1)] == [tokens[0], tokens[17], tokens[-1]]
        assert np.array_equal(file.metadata.get_ints("numbers"), numbers)
        assert file.metadata.get_str("text") == metadata["text"]
        assert file.metadata.get_int("last") == 7
        assert read_tensor(file, file.tensors["t"]).view(np.float32).tolist() == [1.0] * 64

    def test_of_a_file_only_the_header_is_kept(self, tmp_path):
        path = write_gguf(tmp_path / "m.gguf", {"k": 1}, {"t": (np.ones((1000, 1000), np.float32), F32)})
        tracemalloc.start()
        file = read_gguf(path)
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert file.tensors["t"].num_bytes == 4_000_000
        assert kept < 100_000


class TestStringArray:
    @pytest.fixture
    def strings(self, tmp_path):
        raw = [b"plain", b"", "日本".encode(), b"bad \xff\xfe byte", b"\xed\xa0\x80"]
        return read_gguf(write_gguf(tmp_path / "m.gguf", {"strings": raw})).metadata.get_strings("strings")

    def test_is_a_sequence(self, strings):
        assert len(strings) == 5
        assert strings[0] == "plain"
        assert strings[-3] == "日本"
        assert strings[1:3] == ["", "日本"]
        assert "日本" in strings
        with pytest.raises(IndexError):
            strings[5]

    def test_bytes_that_are_not_utf_8_are_replaced_and_can_be_had(self, strings):
        assert strings[3] == "bad \ufffd\ufffd byte"
        assert strings.bytes_at(3) == b"bad \xff\xfe byte"
        assert strings.bytes_at(-1) == b"\xed\xa0\x80"
        assert list(strings) == [strings[i] for i in range(5)]
        for text in strings:
            text.encode()  # can be sent anywhere: no surrogates


class TestGetters:
    @pytest.fixture
    def metadata(self, tmp_path):
        values = {
            "int": np.uint16(7),
            "negative": np.int8(-7),
            "float": 0.5,
            "nan": float("nan"),
            "bool": True,
            "text": "seven",
            "bytes": b"\xff",
            "ints": np.array([1, 2], np.uint64),
            "huge": np.array([1 << 63], np.uint64),
            "floats": np.array([0.5, 2]),
            "infinite": np.array([np.inf], np.float32),
            "strings": ["a", "b"],
            "bools": np.array([True]),
        }
        return read_gguf(write_gguf(tmp_path / "m.gguf", values)).metadata

    def test_right_types(self, metadata):
        assert metadata.get_int("int") == 7
        assert metadata.get_int("negative", minimum=-7, maximum=-7) == -7
        assert metadata.get_float("float") == 0.5
        assert metadata.get_bool("bool") is True
        assert metadata.get_str("text") == "seven"
        assert metadata.get_bytes("bytes") == b"\xff"
        assert metadata["bytes"] == "\ufffd"
        assert metadata.get_ints("ints").tolist() == [1, 2]
        assert metadata.get_ints("ints").dtype == np.int64
        assert metadata.get_floats("floats").tolist() == [0.5, 2]
        assert list(metadata.get_strings("strings")) == ["a", "b"]

    def test_defaults_are_for_missing_keys_only(self, metadata):
        assert metadata.get_int("none", 3, minimum=5) == 3
        assert metadata.get_float("none", 0.0) == 0.0
        assert metadata.get_bool("none", False) is False
        assert metadata.get_str("none", "") == ""
        with pytest.raises(ServiceError, match="text is STRING, not an integer"):
            metadata.get_int("text", 3)

    @pytest.mark.parametrize(
        ("getter", "key", "message"),
        [
            ("get_int", "none", "none is missing"),
            ("get_strings", "none", "none is missing"),
            ("get_int", "float", "float is FLOAT32, not an integer"),
            ("get_int", "bool", "bool is BOOL, not an integer"),
            ("get_int", "ints", "ints is ARRAY of UINT64, not an integer"),
            ("get_float", "int", "int is UINT16, not a float"),
            ("get_float", "nan", "nan is nan, not a finite number"),
            ("get_bool", "int", "int is UINT16, not a bool"),
            ("get_str", "int", "int is UINT16, not a string"),
            ("get_str", "strings", "strings is ARRAY of STRING, not a string"),
            ("get_str", "bytes", "bytes is not valid UTF-8"),
            ("get_bytes", "float", "float is FLOAT32, not a string"),
            ("get_strings", "text", "text is STRING, not an array of strings"),
            ("get_strings", "ints", "ints is ARRAY of UINT64, not an array of strings"),
            ("get_ints", "floats", "floats is ARRAY of FLOAT64, not an array of integers"),
            ("get_ints", "bools", "bools is ARRAY of BOOL, not an array of integers"),
            ("get_ints", "int", "int is UINT16, not an array of integers"),
            ("get_ints", "huge", "huge holds a value past the largest"),
            ("get_floats", "ints", "ints is ARRAY of UINT64, not an array of floats"),
            ("get_floats", "infinite", "infinite holds a value that is not a finite number"),
        ],
    )
    def test_refusals_name_file_and_key(self, metadata, getter, key, message):
        with pytest.raises(ServiceError) as caught:
            getattr(metadata, getter)(key)
        assert caught.value.reason is Reason.MODEL_INVALID
        assert str(metadata.path) in caught.value.message
        assert message in caught.value.message
        assert caught.value.metadata["key"] == key

    @pytest.mark.parametrize(("minimum", "maximum"), [(8, None), (None, 6), (8, 9)])
    def test_ranges(self, metadata, minimum, maximum):
        with pytest.raises(ServiceError, match="int is 7, outside"):
            metadata.get_int("int", minimum=minimum, maximum=maximum)


class TestHeaderRefusals:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "the file is empty"),
            (b"GG", "the magic number takes 4 bytes, but the file ends at byte 2"),
            (b"FUGG" + bytes(20), "not a GGUF file: it starts with b'FUGG'"),
            (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ],
    )
    def test_start(self, tmp_path, data, message):
        found = refusal(tmp_path, data)
        assert found.offset == 0
        assert message in found.message

    @pytest.mark.parametrize(
        ("version", "message"),
        [
            (0, "GGUF version 0 is not read"),
            (1, "GGUF version 1 is not read, only 2 and 3"),
            (4, "GGUF version 4 is not read"),
            (3 << 24, r"big-endian (GGUF version 3)"),
            (2 << 24, r"big-endian (GGUF version 2)"),
        ],
    )
    def test_version(self, tmp_path, version, message):
        found = refusal(tmp_path, header(version=version), Reason.FILE_VERSION_UNSUPPORTED)
        assert found.offset == 4
        assert message in found.message

    @pytest.mark.parametrize("count", [1, 1 << 32, 1 << 63, U64_MAX])
    def test_counts_beyond_the_bytes_left(self, tmp_path, count):
        assert refusal(tmp_path, header(num_tensors=count)).offset == 8
        assert refusal(tmp_path, header(num_keys=count)).offset == 16

    def test_counts_beyond_what_is_read(self, tmp_path):
        room = bytes(40 * MAX_NUM_TENSORS)
        assert "are more than" in refusal(tmp_path, header(num_tensors=MAX_NUM_TENSORS + 1) + room).message
        assert "are more than" in refusal(tmp_path, header(num_keys=MAX_NUM_KEYS + 1) + room).message

    @pytest.mark.parametrize("length", [100, 1 << 31, 1 << 32, 1 << 63, U64_MAX])
    def test_string_lengths_beyond_the_bytes_left(self, tmp_path, length):
        found = refusal(tmp_path, header([typed_record("key", ValueType.STRING, string("text", length))]))
        assert (found.offset, "takes" in found.message) == (24 + 11 + 4 + 8, True)
        strings = array_record("key", ValueType.STRING, 2, string("a") + string("bc", length))
        assert "array 'key' takes" in refusal(tmp_path, header([strings])).message

    @pytest.mark.parametrize("count", [5, 1 << 31, 1 << 61, (1 << 61) + 1, 1 << 63, U64_MAX])
    @pytest.mark.parametrize("type_", [ValueType.STRING, ValueType.UINT64, ValueType.INT32, ValueType.FLOAT64])
    def test_array_counts_beyond_the_bytes_left(self, tmp_path, type_, count):
        found = refusal(tmp_path, header([array_record("key", type_, count, bytes(16))]))
        assert found.offset == 24 + 11 + 4 + 4 + 8

    def test_more_strings_than_are_read(self, tmp_path):
        many = array_record("a", ValueType.STRING, MAX_NUM_STRINGS, bytes(8 * MAX_NUM_STRINGS))
        one = array_record("b", ValueType.STRING, 1, bytes(8))
        assert f"strings to {MAX_NUM_STRINGS + 1}" in refusal(tmp_path, header([many, one])).message

    def test_a_header_longer_than_is_read(self, tmp_path):
        """The file is sparse: it has the bytes that it claims."""
        path = tmp_path / "m.gguf"
        path.write_bytes(header([typed_record("key", ValueType.STRING, struct.pack("<Q", 1 << 30))]))
        os.truncate(path, 1 << 33)
        with pytest.raises(ServiceError, match=f"past the {MAX_HEADER_BYTES} that a header may have"):
            read_gguf(path)

    @pytest.mark.parametrize("type_", [13, 255, 1 << 31, (1 << 32) - 1])
    def test_unknown_value_types(self, tmp_path, type_):
        found = refusal(tmp_path, header([typed_record("key", type_, bytes(8))]))
        assert (found.offset, found.message) == (24 + 11, f"'key' has the unknown value type {type_}.")
        assert refusal(tmp_path, header([array_record("key", type_, 1, bytes(8))])).offset == 24 + 11 + 4

    def test_nested_arrays(self, tmp_path):
        inner = struct.pack("<IQ", ValueType.UINT8, 1) + b"\0"
        assert "array of arrays" in refusal(tmp_path, header([array_record("k", ValueType.ARRAY, 1, inner)])).message

    def test_empty_duplicate_long_and_foreign_keys(self, tmp_path):
        assert "a key is empty" in refusal(tmp_path, header([key_record("", 1)])).message
        assert "'k' is there twice" in refusal(tmp_path, header([key_record("k", 1), key_record("k", "a")])).message
        assert "may have 256" in refusal(tmp_path, header([key_record("k" * 257, 1)])).message
        found = refusal(tmp_path, header([typed_record(b"ke\xffy", 0, b"\0")]))
        assert (found.offset, found.message) == (24 + 8 + 2, "a key is not valid ASCII.")

    def test_bools_other_than_0_and_1(self, tmp_path):
        assert "holds 2 for a bool" in refusal(tmp_path, header([typed_record("k", ValueType.BOOL, b"\2")])).message
        found = refusal(tmp_path, header([array_record("k", ValueType.BOOL, 4, b"\0\1\0\xff")]))
        assert (found.offset, "holds 255" in found.message) == (24 + 9 + 4 + 12 + 3, True)

    @pytest.mark.parametrize("alignment", [0, 3, 33, (1 << 20) + 1, 1 << 21, 1 << 31])
    def test_alignment_values(self, tmp_path, alignment):
        found = refusal(tmp_path, header([key_record("general.alignment", np.uint32(alignment))]))
        assert f"general.alignment is {alignment}, not a power of two" in found.message

    def test_a_long_name_is_cut_in_messages(self, tmp_path):
        found = refusal(tmp_path, header([typed_record("k" * 250 + "\n", 99, b"")]))
        assert len(found.message) < 150

    def test_no_descriptor_is_left_open(self, tmp_path):
        for length in (0, 10, 30):
            refusal(tmp_path, header([key_record("k", "text")], num_tensors=1)[:length])
        assert not is_open(tmp_path / "hostile.gguf")


class TestTensorRefusals:
    def refused(self, tmp_path, *tensors, reason=Reason.MODEL_INVALID):
        return refusal(tmp_path, pad(header([], tensors)) + bytes(4096), reason)

    @pytest.mark.parametrize("num_dimensions", [0, 5, 8, 1 << 31, (1 << 32) - 1])
    def test_number_of_dimensions(self, tmp_path, num_dimensions):
        record = string("t") + struct.pack("<I", num_dimensions) + struct.pack("<8QIQ", *[1] * 8, F32, 0)
        found = self.refused(tmp_path, record)
        assert (found.offset, found.message) == (33, f"tensor 't' has {num_dimensions} dimensions, not 1 to 4.")

    @pytest.mark.parametrize("dimensions", [[0], [32, 0], [0, 1 << 63], [32, 1, 0, 1]])
    def test_dimensions_of_zero(self, tmp_path, dimensions):
        assert "at least 1" in self.refused(tmp_path, tensor_record("t", dimensions, F32, 0)).message

    @pytest.mark.parametrize("dimensions", [[1 << 63], [1 << 32, 1 << 31], [1 << 16] * 4, [U64_MAX] * 4])
    def test_products_past_2_63(self, tmp_path, dimensions):
        assert "product passes 2^63" in self.refused(tmp_path, tensor_record("t", dimensions, F32, 0)).message

    @pytest.mark.parametrize(
        ("number", "name"), [(10, "Q2_K"), (28, "F64"), (40, "NVFP4"), (4, "unknown"), (99, "unknown")]
    )
    def test_types(self, tmp_path, number, name):
        found = self.refused(tmp_path, tensor_record("t", [32], number, 0), reason=Reason.TENSOR_TYPE_UNSUPPORTED)
        assert (found.offset, found.message) == (45, f"tensor 't' is of type {name} ({number}), which is not served.")

    @pytest.mark.parametrize(("type_", "columns"), [(GGMLType.Q8_0, 33), (GGMLType.MXFP4, 16), (GGMLType.Q6_K, 2880)])
    def test_rows_that_are_not_whole_blocks(self, tmp_path, type_, columns):
        found = self.refused(tmp_path, tensor_record("t", [columns, 256], type_, 0))
        assert f"rows of {columns}, no multiple of {type_.name}'s block" in found.message

    def test_names(self, tmp_path):
        assert "name is empty" in self.refused(tmp_path, tensor_record("", [32], F32, 0)).message
        assert "may have 63" in self.refused(tmp_path, tensor_record("n" * 64, [32], F32, 0)).message
        assert "not valid UTF-8" in self.refused(tmp_path, tensor_record(b"\xff", [32], F32, 0)).message
        twice = [tensor_record("t", [32], F32, 0), tensor_record("t", [32], F32, 128)]
        assert "'t' is there twice" in self.refused(tmp_path, *twice).message
        path = write_gguf(tmp_path / "m.gguf", {}, {"n" * 63: (np.ones(32, np.float32), F32)})
        assert list(read_gguf(path).tensors) == ["n" * 63]

    @pytest.mark.parametrize("offset", [0, 32, 96, 160, 1 << 63, U64_MAX])
    def test_offsets_that_are_not_the_running_sum(self, tmp_path, offset):
        records = [tensor_record("a", [31], F32, 0), tensor_record("b", [32], F32, offset)]  # 124 bytes: 128 is next
        assert f"has offset {offset}, and 128 comes next" in self.refused(tmp_path, *records).message
        assert "and 0 comes next" in self.refused(tmp_path, tensor_record("a", [32], F32, 32)).message

    @pytest.mark.parametrize("missing", [1, 31, 127, 128])
    def test_tensors_that_end_past_the_file(self, tmp_path, missing):
        whole = gguf_bytes({"text": "x" * 200}, {"t": (np.ones(32, np.float32), F32)})
        found = refusal(tmp_path, whole[:-missing])
        assert found.message == f"the file ends here, and tensor 't' at byte {len(whole)}: it is cut off."

    def test_padding_after_the_last_tensor_may_be_missing(self, tmp_path):
        whole = gguf_bytes({}, {"t": (np.ones(31, np.float32), F32)})
        (tmp_path / "m.gguf").write_bytes(whole[:-4])
        assert read_gguf(tmp_path / "m.gguf").tensors["t"].num_bytes == 124


class TestWhatIsNoFile:
    def refused(self, path, reason):
        with pytest.raises(ServiceError) as caught:
            read_gguf(path)
        assert caught.value.reason is reason
        assert str(path) in caught.value.message
        return caught.value.message

    def test_missing(self, tmp_path):
        assert "No such file" in self.refused(tmp_path / "none.gguf", Reason.MODEL_NOT_FOUND)
        assert "Not a directory" in self.refused(write_gguf(tmp_path / "m", {}) / "x", Reason.MODEL_NOT_FOUND)

    def test_names_that_cannot_be(self, tmp_path):
        self.refused(tmp_path / ("n" * 300), Reason.MODEL_NOT_FOUND)
        self.refused(tmp_path / "null\0byte", Reason.MODEL_NOT_FOUND)
        self.refused(tmp_path / "surrogate\ud800", Reason.MODEL_NOT_FOUND)

    def test_a_directory(self, tmp_path):
        assert "a directory" in self.refused(tmp_path, Reason.MODEL_INVALID)

    def test_a_pipe_does_not_hang(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.gguf")
        assert "not a regular file" in self.refused(tmp_path / "pipe.gguf", Reason.MODEL_INVALID)

    @pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/urandom"])
    def test_a_device(self, device):
        assert "not a regular file" in self.refused(device, Reason.MODEL_INVALID)

    def test_no_permission(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)  # root may open anything
        assert "Permission denied" in self.refused(tmp_path / "m.gguf", Reason.MODEL_NOT_FOUND)

    def test_a_link_is_followed(self, tmp_path):
        write_gguf(tmp_path / "m.gguf", {"k": 1})
        (tmp_path / "link.gguf").symlink_to(tmp_path / "m.gguf")
        assert read_gguf(str(tmp_path / "link.gguf")).metadata.get_int("k") == 1


class TestFilesThatChange:
    @pytest.fixture
    def file(self, tmp_path):
        tensors = {"a": (np.ones((64, 64), np.float32), F32), "b": (np.ones((64, 64), np.float32), F32)}
        return read_gguf(write_gguf(tmp_path / "m.gguf", {"k": 1}, tensors))

    def test_unchanged(self, file):
        check_unchanged(file)

    @pytest.mark.parametrize("change", ["truncated", "written", "replaced"])
    def test_is_noticed(self, file, change):
        path = file.paths[0]
        if change == "truncated":
            os.truncate(path, path.stat().st_size - 1)
        elif change == "written":
            with path.open("r+b") as stream:
                stream.seek(-1, os.SEEK_END)
                stream.write(b"\1")
            os.utime(path, ns=(0, 0))
        else:
            copy = path.with_name("copy")
            copy.write_bytes(path.read_bytes())
            copy.replace(path)
        for action in (lambda: check_unchanged(file), lambda: read_tensor(file, file.tensors["a"])):
            with pytest.raises(ServiceError, match="the file has changed") as caught:
                action()
            assert caught.value.reason is Reason.MODEL_CHANGED

    def test_removed(self, file):
        file.paths[0].unlink()
        with pytest.raises(ServiceError) as caught:
            read_tensor(file, file.tensors["a"])
        assert caught.value.reason is Reason.MODEL_NOT_FOUND

    def test_truncated_while_its_header_is_read(self, tmp_path, monkeypatch):
        path = write_gguf(tmp_path / "m.gguf", {"text": "x" * 5_000_000})
        pread = os.pread

        def cut_and_read(descriptor, num_bytes, offset):
            if offset:
                os.truncate(path, offset)
            return pread(descriptor, num_bytes, offset)

        monkeypatch.setattr(os, "pread", cut_and_read)
        with pytest.raises(ServiceError, match="the file ends here") as caught:
            read_gguf(path)
        assert caught.value.reason is Reason.MODEL_CHANGED

    def test_truncated_while_a_tensor_is_read(self, file, monkeypatch):
        preadv = os.preadv

        def cut_and_read(descriptor, buffers, offset):
            if offset == file.tensors["b"].offset:
                os.truncate(file.paths[0], offset + 100)
            return preadv(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", cut_and_read)
        with pytest.raises(ServiceError, match="the file has changed") as caught:
            read_tensor(file, file.tensors["b"])
        assert caught.value.reason is Reason.MODEL_CHANGED

    def test_an_error_of_the_disk(self, file, monkeypatch):
        def fail(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        monkeypatch.setattr(os, "pread", fail)
        for action in (lambda: read_gguf(file.paths[0]), lambda: read_tensor(file, file.tensors["b"])):
            with pytest.raises(ServiceError, match="Input/output error") as caught:
                action()
            assert caught.value.reason is Reason.MODEL_INVALID


class TestShards:
    def write(self, folder, *, count=3, numbers=None, num_tensors=None, names=None):
        """Three shards of two tensors each; the first has the model's metadata."""
        paths = []
        for i in range(3):
            metadata = {
                "split.no": np.uint16(i if numbers is None else numbers[i]),
                "split.count": np.uint16(count),
                "split.tensors.count": np.int32(6 if num_tensors is None else num_tensors),
            }
            if i == 0:
                metadata["general.architecture"] = "gpt-oss"
            tensors = {
                name: (np.full((2, 32), 2 * i + j, np.float32), F32)
                for j, name in enumerate((names or ["ab", "cd", "ef"])[i])
            }
            paths.append(write_gguf(folder / f"model-{i + 1:05d}-of-00003.gguf", metadata, tensors))
        return paths

    def refused(self, path, reason=Reason.MODEL_INVALID):
        with pytest.raises(ServiceError) as caught:
            read_gguf(path)
        assert caught.value.reason is reason
        return caught.value.message

    def test_the_first_brings_its_siblings_in(self, tmp_path):
        paths = self.write(tmp_path)
        file = read_gguf(paths[0])
        assert file.paths == tuple(paths)
        assert file.metadata.get_str("general.architecture") == "gpt-oss"
        assert list(file.tensors) == list("abcdef")
        assert [info.file_index for info in file.tensors.values()] == [0, 0, 1, 1, 2, 2]
        assert len(file.data_starts) == len(file.file_sizes) == 3
        for i, info in enumerate(file.tensors.values()):
            assert read_tensor(file, info).view(np.float32).tolist() == [float(i)] * 64
        check_unchanged(file)

    def test_files_of_gguf_pys_writer(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "model", "gpt-oss", split_max_tensors=2)
        for i, name in enumerate("abcde"):
            writer.add_tensor(name, np.full((2, 32), i, np.float32))
        writer.write_header_to_file(tmp_path / "model.gguf")
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        file = read_gguf(tmp_path / "model-00001-of-00003.gguf")
        assert list(file.tensors) == list("abcde")
        assert read_tensor(file, file.tensors["e"]).view(np.float32)[0] == 4

    def test_another_shard_than_the_first_names_it(self, tmp_path):
        message = self.refused(self.write(tmp_path)[1])
        assert "split.no is 1: this is not the first shard, name model-00001-of-00003.gguf instead" in message

    def test_a_missing_shard(self, tmp_path):
        paths = self.write(tmp_path)
        paths[2].unlink()
        assert str(paths[2]) in self.refused(paths[0], Reason.MODEL_NOT_FOUND)

    def test_a_broken_shard_is_named(self, tmp_path):
        paths = self.write(tmp_path)
        paths[1].write_bytes(paths[1].read_bytes()[:-200])
        assert self.refused(paths[0]).startswith(f"{paths[1]}: byte ")

    def test_numbers_that_do_not_follow_the_names(self, tmp_path):
        paths = self.write(tmp_path, numbers=[0, 2, 1])
        assert f"{paths[1]}: " in self.refused(paths[0])
        assert "split.no is 2, not 1" in self.refused(paths[0])

    def test_counts_that_disagree(self, tmp_path):
        assert "split.count is 4" in self.refused(self.write(tmp_path, count=4)[0])
        assert "split.count is 65535" in self.refused(self.write(tmp_path, count=65535)[0])
        assert "split.tensors.count is 7, but the shards hold 6" in self.refused(self.write(tmp_path, num_tensors=7)[0])

    def test_a_tensor_in_two_shards(self, tmp_path):
        assert "tensor 'b' is in an earlier shard too" in self.refused(self.write(tmp_path, names=["ab", "bc", "d"])[0])

    def test_names_and_keys_that_disagree(self, tmp_path):
        renamed = self.write(tmp_path)[0].rename(tmp_path / "model.gguf")
        assert "must be named like NAME-00001-of-00003.gguf" in self.refused(renamed)
        keyless = write_gguf(tmp_path / "other-00001-of-00002.gguf", {"k": 1})
        assert "split.count is missing" in self.refused(keyless)

    def test_a_single_shard_is_a_plain_file(self, tmp_path):
        metadata = {"split.no": np.uint16(0), "split.count": np.uint16(1), "split.tensors.count": np.int32(0)}
        for name in ("model-00001-of-00001.gguf", "model.gguf"):
            assert len(read_gguf(write_gguf(tmp_path / name, metadata)).paths) == 1
