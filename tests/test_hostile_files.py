"""Files built after published flaws of other parsers, through the parser and through a loader that goes on serving."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mxgpt.v1 import loader_pb2
from services.tokenizer.backends import make_tokenizer
from services.tokenizer.servicer import MAX_TEXT_BYTES
from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import read_gguf
from shared.tokenizer_data import tokenizer_data_from_gguf
from tests.gguf_files import write_gguf
from tests.hostile_files import HostileFile, hostile_files, narrow_arrays
from tests.loader_harness import asynchronous, num_memfds, refusal, running_loader, write_gpt2, write_gpt_oss
from tests.tokenizer_files import GPT_4O, trained_tokenizer

FILES = list(hostile_files())


@pytest.mark.parametrize("file", FILES, ids=str)
def test_is_refused_with_its_place_and_at_once(tmp_path: Path, file: HostileFile) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(file.data)
    start = time.process_time()
    with pytest.raises(ServiceError) as caught:
        read_gguf(path)
    assert time.process_time() - start < 1
    assert caught.value.reason is Reason.MODEL_INVALID
    assert caught.value.message.startswith(f"{path}: byte {caught.value.metadata['offset']}: ")
    assert file.message in caught.value.message


def test_arrays_of_a_narrower_element_type_keep_their_values(tmp_path: Path) -> None:
    """After llama.cpp 26690, where one byte an element was read as four."""
    path = tmp_path / "narrow.gguf"
    path.write_bytes(narrow_arrays())
    metadata = read_gguf(path).metadata
    assert metadata.get_ints("tokenizer.ggml.token_type").tolist() == [1, 1, 1]
    with pytest.raises(ServiceError, match="ARRAY of INT8, not an array of floats"):
        metadata.get_floats("tokenizer.ggml.scores")
    with pytest.raises(ServiceError, match=r"tokenizer\.ggml\.merges is ARRAY of INT8, not an array of strings"):
        tokenizer_data_from_gguf(read_gguf(path), model="narrow", digest="")


def test_650_000_strings_take_well_under_a_second(tmp_path: Path) -> None:
    """A fix of another reader once made such headers slow to load; so do checks that copy what they check."""
    strings = [f"token{index}" for index in range(650_000)]
    path = write_gguf(tmp_path / "many.gguf", {"tokenizer.ggml.tokens": strings})
    start = time.process_time()
    assert len(read_gguf(path).metadata.get_strings("tokenizer.ggml.tokens")) == 650_000
    assert time.process_time() - start < 0.7


def test_a_text_of_as_many_tokens_as_bytes_keeps_them_all() -> None:
    """After CVE-2025-52566, where the number of a text's tokens was compared as a signed number with the room."""
    tokenizer = make_tokenizer(trained_tokenizer(GPT_4O).data(merges=(), add_bos_token=True))
    text = "\U0010ffff" * (MAX_TEXT_BYTES // 4)
    ids = tokenizer.encode(text, parse_special=True, add_special=True)
    assert len(ids) == MAX_TEXT_BYTES + 1, "without merges each byte is a token, and BOS is one more"
    assert tokenizer.decode(ids, special_tokens=False) == text


@pytest.mark.parametrize(
    ("type_", "blocks"),
    [
        (GGMLType.MXFP4, b"\xff" + bytes(16)),  # a scale of E8M0 that stands for NaN
        (GGMLType.Q8_0, b"\x00\x7c" + bytes(32)),  # an F16 scale of infinity
        (GGMLType.Q8_0, b"\x01\xfc" + bytes(32)),  # one that is NaN
    ],
)
@asynchronous
async def test_scales_that_are_no_numbers_are_refused_where_weights_are_read(
    tmp_path: Path, type_: GGMLType, blocks: bytes
) -> None:
    path = write_gpt_oss(tmp_path / "model.gguf")
    file = read_gguf(path)
    info = next(info for info in reversed(file.tensors.values()) if info.type is type_)
    with path.open("r+b") as stream:
        stream.seek(info.offset + info.num_bytes - len(blocks))
        stream.write(blocks)
    async with running_loader(tmp_path) as running:
        error = await refusal(running.stub.LoadModel(loader_pb2.LoadModelRequest(path=str(path))))
        assert error.reason is Reason.MODEL_INVALID
        assert info.name in error.message
        assert num_memfds() == 0


@asynchronous
async def test_a_loader_refuses_each_and_serves_on(tmp_path: Path) -> None:
    model = write_gpt2(tmp_path / "model.gguf")
    path = tmp_path / "hostile.gguf"
    async with running_loader(tmp_path, model) as running:
        num_before = num_memfds()
        for file in FILES:
            path.write_bytes(file.data)
            error = await refusal(running.stub.LoadModel(loader_pb2.LoadModelRequest(path=str(path))))
            assert error.reason is Reason.MODEL_INVALID, file
            assert str(path) in error.message, file
        assert num_memfds() == num_before
        (served,) = (await running.stub.ListModels(loader_pb2.ListModelsRequest())).models
        assert served.name == "model"
