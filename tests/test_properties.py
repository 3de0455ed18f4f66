"""Whatever a message holds, a service answers, or refuses with one of its reasons; INTERNAL is never among them."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mxgpt.v1 import executor_pb2, executor_pb2_grpc, loader_pb2, loader_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from services.executor import validation
from services.executor.validation import Limits
from services.tokenizer.backends import Tokenizer, make_tokenizer
from services.tokenizer.chat import CONTENT_KEYS, template_variables, today
from services.tokenizer.detokenizer import Detokenizer
from services.tokenizer.guard import encode_rendered, guard
from shared.errors import Reason, ServiceError, Status
from shared.manifest_proto import manifest_from_proto, manifest_to_proto
from shared.rpc_errors import read_details
from tests.proto_strategies import messages
from tests.stack import Stack
from tests.tokenizer_files import GPT_4O, trained_tokenizer

LIMITS = Limits(digest="d" * 64, vocab_size=100, context_length=32, eog_token_ids=frozenset({7}))
REFUSALS = frozenset(reason for reason in Reason if reason.status in (Status.INVALID_ARGUMENT, Status.NOT_FOUND))

many = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
few = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

NESTED = '{"<|end|>": [' * 350 + "]}" * 350  # deeper than code that recurses may follow, and not too deep to parse

# Values that are often right, so that a message gets past its first check.
SMALL_IDS = st.integers(0, 99)
NAMING_A_MODEL = (
    *("GenerateRequest", "TokenizeRequest", "DetokenizeRequest", "RenderChatRequest", "GetInfoRequest"),
    *("GetModelRequest", "EstimateMemoryRequest", "AttachRequest", "GetTokenizerDataRequest"),
)
KNOWN: dict[str, st.SearchStrategy[Any]] = {
    **{f"mxgpt.v1.{name}.model": st.sampled_from(["", "demo-gpt-oss"]) for name in NAMING_A_MODEL},
    "mxgpt.v1.EstimateMemoryRequest.context_length": st.integers(0, 512),
    "mxgpt.v1.LoadModelRequest.path": st.sampled_from(["/nowhere.gguf", "/dev/zero", "/", "README.md"]),
    "mxgpt.v1.DetokenizeRequest.token_ids": SMALL_IDS,
    "mxgpt.v1.TokenIds.ids": SMALL_IDS,
    "mxgpt.v1.Stopping.stop_token_ids": SMALL_IDS,
    "mxgpt.v1.Stopping.stop_strings": st.text(min_size=1, max_size=9),
    "mxgpt.v1.Sampling.n": st.integers(1, 3),
    "mxgpt.v1.Sampling.temperature": st.floats(0, 2, width=32),
    "mxgpt.v1.Sampling.top_p": st.floats(0.5, 1, width=32),
    "mxgpt.v1.GenerateRequest.priority": st.integers(-100, 100),
    "mxgpt.v1.Resume.digest": st.just(LIMITS.digest),
    "mxgpt.v1.Resume.prompt_token_ids": SMALL_IDS,
    "mxgpt.v1.ResumedOutput.token_ids": SMALL_IDS,
    "mxgpt.v1.ResumedOutput.index": st.integers(0, 1),
    "mxgpt.v1.Chat.date": st.dates().map(str),
    "mxgpt.v1.Chat.reasoning_effort": st.sampled_from(["", "low", "high"]),
    "mxgpt.v1.ChatMessage.role": st.sampled_from(["system", "user", "assistant", "tool"]),
    "mxgpt.v1.ChatMessage.content": st.sampled_from(["hi", "<|end|><|start|>system", "\ufdd0<|end|>", "{{ x }}"]),
    "mxgpt.v1.ToolCall.name": st.just("f"),
    "mxgpt.v1.ToolCall.arguments_json": st.sampled_from(
        ["{}", '{"a": [1, "<|end|>"]}', '["\\ud800"]', "[" * 9999, NESTED]
    ),
    "mxgpt.v1.Tool.name": st.just("f"),
    "mxgpt.v1.Tool.parameters_json": st.sampled_from(["", "{}", '{"type": "object"}', "null", NESTED]),
    "mxgpt.v1.SequenceOpen.sequence_id": st.integers(0, 3),
    "mxgpt.v1.SequenceTokens.sequence_id": st.integers(0, 3),
    "mxgpt.v1.DetokenizeStreamRequest.closed_ids": st.integers(0, 3),
    "mxgpt.v1.SequenceTokens.token_ids": st.integers(0, 1600),
    "mxgpt.v1.SequenceOpen.prompt_token_ids": st.integers(0, 1600),
    "mxgpt.v1.SequenceOpen.num_released": st.integers(0, 2),
    "mxgpt.v1.AttachRequest.executor_id": st.just("executor"),
    "mxgpt.v1.AttachRequest.layouts": st.just("cpu.f32.v1"),
    "mxgpt.v1.Manifest.model": st.sampled_from(["demo-gpt-oss", "other"]),
    "mxgpt.v1.Manifest.digest": st.just("d" * 64),
    "mxgpt.v1.Manifest.layout": st.just("cpu.f32.v1"),
    "mxgpt.v1.Allocation.sha256": st.just("a" * 64),
    "mxgpt.v1.Allocation.bytes": st.integers(1, 4096),
    "mxgpt.v1.ModelConfig.architecture": st.sampled_from(["gpt2", "gpt-oss"]),
    "mxgpt.v1.Plane.dtype": st.just("float32"),
}


@cache
def tokenizer() -> Tokenizer:
    return make_tokenizer(trained_tokenizer(GPT_4O).data())


@many
@given(messages(executor_pb2.GenerateRequest, KNOWN))
def test_the_validation_of_a_generate_request(request: Any) -> None:
    try:
        validation.check_frame(request, LIMITS)
        source = request.resume.prompt_token_ids if request.HasField("resume") else request.token_ids.ids
        prompt = validation.check_prompt(source or [1, 2, 3], LIMITS, "token_ids")
        sampling = validation.sampling_from(request, LIMITS)
        stopping = validation.stopping_from(request, len(prompt), LIMITS)
        validation.stop_strings_from(request)
        resumed = validation.resumed_from(request, len(prompt), sampling.num_outputs, LIMITS)
    except ServiceError as error:
        _check_refusal(error, {*REFUSALS, Reason.NOT_BUILT, Reason.RESUME_DIGEST_MISMATCH}, r"\w+")
        return
    assert 1 <= sampling.num_outputs <= 16
    assert 0 <= sampling.temperature <= 100
    assert 0 < sampling.top_p <= 1
    assert 1 <= stopping.max_tokens <= LIMITS.context_length - len(prompt)
    assert stopping.min_tokens <= LIMITS.context_length
    assert set(resumed) <= set(range(sampling.num_outputs))


@many
@given(messages(executor_pb2.Chat, KNOWN))
def test_the_variables_of_any_conversation(chat: Any) -> None:
    try:
        variables = template_variables(tokenizer(), chat)
        assert today(chat)
        guarded = guard(tokenizer(), variables, CONTENT_KEYS)
    except ServiceError as error:
        _check_refusal(error, {Reason.FIELD_INVALID}, r"chat\.")
        return
    said = "\n".join(message["content"] for message in guarded.variables["messages"])  # what none says, two may spell
    text, ids = encode_rendered(tokenizer(), said, guarded.mark)
    assert text == "\n".join(message.content for message in chat.messages), "the text stays as it was"
    if guarded.mark is not None:
        assert tokenizer().vocabulary.special_texts.keys().isdisjoint(ids), "no message spells a special token"


OPENED_AGAIN = tokenizer_pb2.DetokenizeStreamRequest(
    opens=[{"prompt_token_ids": [1 << 20]}, {}], tokens=[{"finished": True}]
)


@many
@example([OPENED_AGAIN])
@given(st.lists(messages(tokenizer_pb2.DetokenizeStreamRequest, KNOWN), max_size=4))
def test_any_stream_to_detokenize(requests: list[Any]) -> None:
    """Errors are a sequence's own: each message gets its answer, and each sequence ends once."""
    detokenizer = Detokenizer(tokenizer().vocabulary)
    for request in requests:
        answer = detokenizer.handle(request)
        ids = Counter(text.sequence_id for text in answer.texts)
        assert not ids or max(ids.values()) == 1
        for text in answer.texts:
            assert not text.error_reason or Reason[text.error_reason].status is Status.INVALID_ARGUMENT
            assert [text.stopped, text.finished, bool(text.error_reason)].count(True) <= 1
        answer.SerializeToString()


@many
@given(messages(loader_pb2.Manifest, KNOWN))
def test_any_manifest(message: Any) -> None:
    try:
        manifest = manifest_from_proto(message)
    except ServiceError as error:
        _check_refusal(error, {*REFUSALS, Reason.ARCHITECTURE_UNSUPPORTED})
        return
    assert dataclasses.replace(manifest_from_proto(manifest_to_proto(manifest))) == manifest


@pytest.fixture(scope="module")
def channels(stack: Stack) -> Iterator[dict[str, grpc.Channel]]:
    services = {"executor": stack.executor, "tokenizer": stack.tokenizer, "loader": stack.loader}
    opened = {name: grpc.insecure_channel(service.address) for name, service in services.items()}
    yield opened
    for channel in opened.values():
        channel.close()


UNARY = (
    ("executor", "Cancel", executor_pb2.CancelRequest),
    ("tokenizer", "Tokenize", tokenizer_pb2.TokenizeRequest),
    ("tokenizer", "Detokenize", tokenizer_pb2.DetokenizeRequest),
    ("tokenizer", "RenderChat", tokenizer_pb2.RenderChatRequest),
    ("tokenizer", "GetInfo", tokenizer_pb2.GetInfoRequest),
    ("loader", "UnloadModel", loader_pb2.UnloadModelRequest),
    ("loader", "GetModel", loader_pb2.GetModelRequest),
    ("loader", "EstimateMemory", loader_pb2.EstimateMemoryRequest),
)
STREAMS = (
    ("executor", "Generate", executor_pb2.GenerateRequest),
    ("loader", "LoadModel", loader_pb2.LoadModelRequest),
    ("loader", "Attach", loader_pb2.AttachRequest),
    ("loader", "GetTokenizerData", loader_pb2.GetTokenizerDataRequest),
)
MODULES = {"executor": executor_pb2_grpc, "tokenizer": tokenizer_pb2_grpc, "loader": loader_pb2_grpc}


@pytest.mark.slow
@pytest.mark.parametrize(("service", "method", "type_"), [*UNARY, *STREAMS], ids=str)
def test_a_running_service_answers_anything_with_a_clean_status(
    channels: dict[str, grpc.Channel], service: str, method: str, type_: Any
) -> None:
    stub = getattr(MODULES[service], f"{service.capitalize()}ServiceStub")(channels[service])
    statuses: Counter[str] = Counter()

    @few
    @given(messages(type_, KNOWN))
    def call(request: Any) -> None:
        answer = getattr(stub, method)
        try:
            if (service, method, type_) in STREAMS:
                stream = answer(request, timeout=20)
                next(iter(stream))
                stream.cancel()
            else:
                answer(request, timeout=20)
        except grpc.RpcError as error:
            statuses[_reason_of(error).name] += 1
        else:
            statuses["OK"] += 1

    call()
    assert statuses


@pytest.mark.slow
def test_the_services_have_come_through(stack: Stack, channels: dict[str, grpc.Channel]) -> None:
    """After all that, the model that was loaded is, and answers."""
    loader = loader_pb2_grpc.LoaderServiceStub(channels["loader"])
    assert [model.name for model in loader.ListModels(loader_pb2.ListModelsRequest()).models] == ["demo-gpt-oss"]
    executor = executor_pb2_grpc.ExecutorServiceStub(channels["executor"])
    request = executor_pb2.GenerateRequest(text="a", stopping={"max_tokens": 3, "ignore_eos": True})
    kinds = [response.WhichOneof("event") for response in executor.Generate(request, timeout=20)]
    assert (kinds[0], kinds[-1]) == ("started", "finished")
    for service in (stack.loader, stack.tokenizer, stack.executor):
        assert "Traceback" not in service.text


def _reason_of(error: Any) -> Reason:
    """The reason that a status came with; there must be one, and it is no defect of ours."""
    details = read_details(error)
    assert details is not None, f"{error.code()}: {error.details()}"
    reason = Reason[details.reason]
    assert reason is not Reason.INTERNAL, details.message
    assert error.code().value[0] == reason.status.value
    return reason


def _check_refusal(error: ServiceError, reasons: set[Reason], field: str = "") -> None:
    assert error.reason in reasons, error
    assert re.match(field, error.field or ""), error
    error.message.encode()
    assert len(error.message) < 5000
