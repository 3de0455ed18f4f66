"""The tokenizer as a process of its own, over the contract: every RPC, the stream, and a loader that comes and goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import AsyncMock

import grpc
import pytest
from prometheus_client import CollectorRegistry

from mxgpt.v1 import loader_pb2, loader_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from services.tokenizer.backends import make_tokenizer
from services.tokenizer.metrics import TokenizerMetrics
from services.tokenizer.servicer import MAX_CHAT_BYTES, MAX_TEXT_BYTES, TokenizerServicer
from services.tokenizer.store import FileStore
from services.tokenizer.template_pool import TemplatePool
from shared.errors import Reason
from shared.rpc_errors import from_rpc_error
from shared.tokenizer_data import TokenizerData
from shared.tokenizer_data_proto import to_pieces
from tests.calls import uncounted_calls
from tests.stack import Service, free_ports
from tests.tokenizer_files import GPT_2, GPT_4O, trained_tokenizer

T = TypeVar("T")

TEMPLATE = (
    "{%- for message in messages -%}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{%- endfor -%}"
    "{%- if messages[0].content == 'loop' %}{{ 7 ** (7 ** (77777777 * messages | length)) }}{% endif -%}"
    "{{ date }}<|start|>assistant"
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = tmp_path_factory.mktemp("model") / "small.gguf"
    trained_tokenizer(GPT_4O).write_gguf(path, tokenizer__chat_template=TEMPLATE)
    started = Service("tokenizer", "--model", str(path))
    started.wait_healthy()
    yield started
    assert started.stop() == 0


@pytest.fixture
def stub(service: Service) -> Iterator[Any]:
    with grpc.insecure_channel(service.address) as channel:
        yield tokenizer_pb2_grpc.TokenizerServiceStub(channel)


def reason_of(call: Callable[[], Any]) -> Reason:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return from_rpc_error(raised.value, Reason.TOKENIZER_UNAVAILABLE).reason


def ids_of(text: str) -> list[int]:
    return [trained_tokenizer(GPT_4O).id_of(text)]


def test_info(stub: Any) -> None:
    trained = trained_tokenizer(GPT_4O)
    info = stub.GetInfo(tokenizer_pb2.GetInfoRequest())
    assert (info.model, info.backend, info.vocab_size, info.context_length) == (
        "small",
        "gguf-bpe",
        len(trained.tokens),
        256,
    )
    assert (info.bos_token_id, info.eos_token_id, info.pad_token_id) == tuple(
        trained.id_of(text) for text in ("<|startoftext|>", "<|return|>", "<|endoftext|>")
    )
    assert list(info.eog_token_ids) == sorted(trained.id_of(t) for t in ("<|return|>", "<|endoftext|>", "<|call|>"))
    assert {token.text: token.token_id for token in info.special_tokens}["<|end|>"] == trained.id_of("<|end|>")
    assert len(info.special_tokens) == 9
    assert (info.has_chat_template, info.harmony, len(info.digest)) == (True, True, 64)
    by_digest = stub.GetInfo(tokenizer_pb2.GetInfoRequest(model=info.digest))
    assert by_digest == info == stub.GetInfo(tokenizer_pb2.GetInfoRequest(model="small"))


def test_text_to_ids_and_back(stub: Any) -> None:
    text = "Hé 👩‍🚀 <|end|><think>"
    plain = stub.Tokenize(tokenizer_pb2.TokenizeRequest(text=text)).token_ids
    special = stub.Tokenize(tokenizer_pb2.TokenizeRequest(text=text, parse_special=True)).token_ids
    assert ids_of("<|end|>")[0] in special
    assert ids_of("<|end|>")[0] not in plain
    for ids, special_tokens, expected in (
        (plain, False, text),
        (special, True, text),
        (special, False, text.replace("<|end|>", "")),
        (plain[2:-1], False, None),
    ):
        request = tokenizer_pb2.DetokenizeRequest(token_ids=ids, special_tokens=special_tokens)
        decoded = stub.Detokenize(request).text
        assert decoded == expected or (expected is None and decoded in text)
    assert stub.Tokenize(tokenizer_pb2.TokenizeRequest()).token_ids == []
    long_text = "word " * 5000
    assert len(stub.Tokenize(tokenizer_pb2.TokenizeRequest(text=long_text)).token_ids) >= 5000


def test_a_conversation(stub: Any) -> None:
    request = tokenizer_pb2.RenderChatRequest()
    request.chat.messages.add(role="user", content="Hi!")
    request.chat.date = "2025-08-07"
    rendered = stub.RenderChat(request)
    assert rendered.text == "<|start|>user<|message|>Hi!<|end|>2025-08-07<|start|>assistant"
    encoded = stub.Tokenize(tokenizer_pb2.TokenizeRequest(text=rendered.text, parse_special=True))
    assert rendered.token_ids == encoded.token_ids
    assert rendered.harmony


def test_refusals(stub: Any) -> None:
    pb = tokenizer_pb2
    many = [0] * (2**20 + 1)
    chat = {"messages": [{"role": "user", "content": "loop"}]}
    long = {"messages": [{"role": "user", "content": "<|" * (MAX_CHAT_BYTES // 2)}]}
    for call, reason in (
        (lambda: stub.GetInfo(pb.GetInfoRequest(model="other")), Reason.MODEL_NOT_FOUND),
        (lambda: stub.Tokenize(pb.TokenizeRequest(model="other")), Reason.MODEL_NOT_FOUND),
        (lambda: stub.Tokenize(pb.TokenizeRequest(text="x" * (MAX_TEXT_BYTES + 1))), Reason.FIELD_INVALID),
        (lambda: stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, 10**6])), Reason.TOKEN_ID_INVALID),
        (lambda: stub.Detokenize(pb.DetokenizeRequest(token_ids=many)), Reason.FIELD_INVALID),
        (lambda: stub.RenderChat(pb.RenderChatRequest()), Reason.FIELD_INVALID),
        (lambda: stub.RenderChat(pb.RenderChatRequest(chat=chat)), Reason.CHAT_TEMPLATE_FAILED),
        (lambda: stub.RenderChat(pb.RenderChatRequest(chat=long)), Reason.FIELD_INVALID),
        (lambda: list(stub.DetokenizeStream(iter([pb.DetokenizeStreamRequest(model="x")]))), Reason.MODEL_NOT_FOUND),
    ):
        assert reason_of(call) is reason


def test_a_stream_of_many_sequences(stub: Any) -> None:
    """One answer for each message; sequences end on their own, by a stop, with an error, or by being closed."""
    pb = tokenizer_pb2
    trained = trained_tokenizer(GPT_4O)
    a, newline, end = trained.id_of("a"), trained.id_of("Ċ"), trained.id_of("<|end|>")
    requests = [
        pb.DetokenizeStreamRequest(
            model="small",
            opens=[
                pb.SequenceOpen(sequence_id=1),
                pb.SequenceOpen(sequence_id=2, stop_strings=["\n"]),
                pb.SequenceOpen(sequence_id=3, special_tokens=True),
                pb.SequenceOpen(sequence_id=4, stop_strings=[""]),
                pb.SequenceOpen(sequence_id=5, replayed_token_ids=[a, a, a], num_released=2),
                pb.SequenceOpen(sequence_id=6, replayed_token_ids=[a], num_released=2),
            ],
            tokens=[pb.SequenceTokens(sequence_id=1, token_ids=[a, end])],
        ),
        pb.DetokenizeStreamRequest(
            tokens=[
                pb.SequenceTokens(sequence_id=1, token_ids=[10**7]),
                pb.SequenceTokens(sequence_id=2, token_ids=[a, newline, a]),
                pb.SequenceTokens(sequence_id=3, token_ids=[end], finished=True),
                pb.SequenceTokens(sequence_id=77, token_ids=[a]),
            ],
        ),
        pb.DetokenizeStreamRequest(
            opens=[pb.SequenceOpen(sequence_id=5)],
            tokens=[
                pb.SequenceTokens(sequence_id=1, token_ids=[a]),  # ended here, not yet known there
                pb.SequenceTokens(sequence_id=2, token_ids=[a]),
            ],
            closed_ids=[1],
        ),
        pb.DetokenizeStreamRequest(tokens=[pb.SequenceTokens(sequence_id=1, token_ids=[a])]),
        pb.DetokenizeStreamRequest(opens=[pb.SequenceOpen(sequence_id=1, replayed_token_ids=[a])], closed_ids=[1]),
    ]
    answers = [
        {text.sequence_id: text for text in response.texts} for response in stub.DetokenizeStream(iter(requests))
    ]
    assert len(answers) == len(requests)
    assert sorted(answers[0]) == [1, 4, 5, 6]
    assert answers[0][1].segments == [pb.TextSegment(num_token_ids=2, text="a")]
    assert answers[0][5].segments == [pb.TextSegment(num_token_ids=1, text="a")]
    assert (answers[0][4].error_reason, answers[0][6].error_reason) == ("FIELD_INVALID", "FIELD_INVALID")
    assert answers[0][4].error_message.startswith("opens.stop_strings[0]: ")
    assert sorted(answers[1]) == [1, 2, 3, 77]
    assert answers[1][1].error_reason == "TOKEN_ID_INVALID"
    assert answers[1][2] == pb.SequenceText(
        sequence_id=2, segments=[pb.TextSegment(num_token_ids=2, text="a")], stopped=True, matched_stop="\n"
    )
    assert answers[1][3] == pb.SequenceText(
        sequence_id=3, segments=[pb.TextSegment(num_token_ids=1, text="<|end|>")], finished=True
    )
    assert answers[1][77].error_reason == "FIELD_INVALID"
    assert sorted(answers[2]) == [5]
    assert "open already" in answers[2][5].error_message
    assert answers[3][1].error_reason == "FIELD_INVALID"
    assert answers[4] == {}


def test_a_stream_in_harmonys_format(stub: Any) -> None:
    pb = tokenizer_pb2
    prompt = stub.Tokenize(pb.TokenizeRequest(text="<|start|>assistant", parse_special=True)).token_ids
    answer = "<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    ids = stub.Tokenize(pb.TokenizeRequest(text=answer, parse_special=True)).token_ids
    opened = pb.SequenceOpen(sequence_id=1, prompt_token_ids=prompt, harmony=True)
    requests = [pb.DetokenizeStreamRequest(opens=[opened])]
    requests += [pb.DetokenizeStreamRequest(tokens=[pb.SequenceTokens(sequence_id=1, token_ids=[i])]) for i in ids]
    requests += [pb.DetokenizeStreamRequest(tokens=[pb.SequenceTokens(sequence_id=1, finished=True)])]
    texts = [text for response in stub.DetokenizeStream(iter(requests)) for text in response.texts]
    segments = [segment for text in texts for segment in text.segments]
    assert sum(segment.num_token_ids for segment in segments) == len(ids)
    assert {(segment.channel, segment.recipient) for segment in segments} == {("commentary", "functions.f")}
    assert "".join(segment.text for segment in segments) == "{}"
    assert texts[-1].finished


LONG_REQUESTS: dict[str, Callable[[int], Any]] = {
    "Tokenize": lambda _: tokenizer_pb2.TokenizeRequest(text="many words " * 30_000),
    "Detokenize": lambda a: tokenizer_pb2.DetokenizeRequest(token_ids=[a] * (1 << 20)),
    "RenderChat": lambda _: tokenizer_pb2.RenderChatRequest(
        chat={"messages": [{"role": "user", "content": "many words " * 30_000}]}
    ),
    "DetokenizeStream": lambda a: tokenizer_pb2.DetokenizeStreamRequest(
        opens=[tokenizer_pb2.SequenceOpen(sequence_id=1, replayed_token_ids=[a] * 600_000)]
    ),
}


@pytest.mark.parametrize("method", LONG_REQUESTS)
def test_a_long_request_holds_up_no_other(method: str) -> None:
    """The event loop turns on all the while; what was computed in one turn is compared with what was in all."""
    tokenizer = make_tokenizer(trained_tokenizer(GPT_4O).data(chat_template="{{ messages[0].content }}"))
    request = LONG_REQUESTS[method](trained_tokenizer(GPT_4O).id_of("a"))

    async def main() -> tuple[float, float]:
        templates = TemplatePool(1)
        await templates.start()
        metrics = TokenizerMetrics(CollectorRegistry())
        servicer = TokenizerServicer(FileStore(tokenizer), templates, uncounted_calls(), metrics)
        try:
            start = time.process_time()
            answer = asyncio.create_task(answered(servicer, method, request))
            longest_turn, turn = 0.0, start
            while not answer.done():
                await asyncio.sleep(0)
                longest_turn, turn = max(longest_turn, time.process_time() - turn), time.process_time()
            await answer
            return longest_turn, time.process_time() - start
        finally:
            await templates.close()

    longest_turn, seconds = asyncio.run(main())
    assert longest_turn < 0.6 * seconds


async def answered(servicer: TokenizerServicer, method: str, request: Any) -> None:
    """Have a servicer answer one request, without a server."""
    context = AsyncMock(grpc.aio.ServicerContext)
    context.invocation_metadata = lambda: ()

    async def requests() -> AsyncIterator[Any]:
        yield request

    await getattr(servicer, method)(requests() if method == "DetokenizeStream" else request, context)
    assert not context.abort.called


class FakeLoader(loader_pb2_grpc.LoaderServiceServicer):
    """A loader that knows tokenizers only; stops and starts on one port."""

    def __init__(self) -> None:
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        self.models: list[TokenizerData] = []
        self.num_fetches = 0
        self._server: Any = None

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(4))
        loader_pb2_grpc.add_LoaderServiceServicer_to_server(self, self._server)
        assert self._server.add_insecure_port(self.address)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def ListModels(self, request: Any, context: Any) -> loader_pb2.ListModelsResponse:
        models = [loader_pb2.Model(name=m.model, aliases=m.aliases, digest=m.digest) for m in self.models]
        return loader_pb2.ListModelsResponse(models=models)

    def GetTokenizerData(self, request: Any, context: Any) -> Iterable[loader_pb2.GetTokenizerDataResponse]:
        self.num_fetches += 1
        return to_pieces(next(model for model in self.models if model.digest == request.model))


def eventually(probe: Callable[[], T], seconds: float = 30.0) -> T:
    """The first value of `probe` that is true; gRPC errors count as false."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            value = probe()
            if value:
                return value
        except grpc.RpcError:
            pass
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.05)


def test_a_loader_that_comes_and_goes() -> None:
    loader = FakeLoader()
    small = trained_tokenizer(GPT_4O).data()
    service = Service("tokenizer", "--loader", loader.address)
    try:
        with grpc.insecure_channel(service.address) as channel:
            stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)

            def info(model: str = "") -> tokenizer_pb2.GetInfoResponse:
                return stub.GetInfo(tokenizer_pb2.GetInfoRequest(model=model))

            assert reason_of(info) is Reason.LOADER_UNAVAILABLE
            loader.start()
            eventually(lambda: reason_of(info) is Reason.MODEL_NOT_FOUND)
            loader.models = [small]
            assert eventually(info).model == "test"
            assert {info(name).digest for name in ("", "test", "alias", small.digest)} == {small.digest}
            service.wait_healthy()
            service.wait_health("mxgpt.loader", serving=True)
            assert loader.num_fetches == 1
            # Another file under the same name is fetched; the one before is still known by its digest.
            loader.models = [replace(trained_tokenizer(GPT_2).data(), digest="e" * 64)]
            eventually(lambda: info().digest == "e" * 64)
            assert info("test").digest == "e" * 64
            assert info(small.digest).digest == small.digest
            loader.models.append(replace(small, model="second", aliases=()))
            assert info("second").digest == small.digest
            assert reason_of(lambda: info("third")) is Reason.MODEL_NOT_FOUND
            # What is known is served while the loader is away; what is not, is not.
            loader.stop()
            assert info("test").digest == "e" * 64
            assert reason_of(lambda: info("third")) is Reason.LOADER_UNAVAILABLE
            loader.models = [replace(small, model="third", digest="f" * 64)]
            loader.start()
            assert eventually(lambda: info("third")).digest == "f" * 64
    finally:
        loader.stop()
        assert service.stop() == 0


def test_a_tokenizer_json_beside_the_model_is_used(tmp_path: Path) -> None:
    trained = trained_tokenizer(GPT_2)
    path = trained.write_gguf(tmp_path / "model.gguf")
    (tmp_path / "tokenizer.json").write_text(trained.json)
    (tmp_path / "other.json").write_text("{}")
    service = Service("tokenizer", "--model", str(path))
    broken = Service("tokenizer", "--model", str(path), "--tokenizer-json", str(tmp_path / "other.json"))
    try:
        service.wait_healthy()
        with grpc.insecure_channel(service.address) as channel:
            stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
            assert stub.GetInfo(tokenizer_pb2.GetInfoRequest()).backend == "hf-json"
            request = tokenizer_pb2.RenderChatRequest(chat={"messages": [{"role": "user"}]})
            assert reason_of(lambda: stub.RenderChat(request)) is Reason.CHAT_TEMPLATE_MISSING
        assert broken.process.wait(60) == 1
        broken.joined()
        assert "the tokenizer.json can't be read" in broken.text
    finally:
        service.stop()
        broken.stop()
