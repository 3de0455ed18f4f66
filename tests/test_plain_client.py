"""Clients that have nothing of mxgpt: messages from what reflection answers, and a resume by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.calls import chat, collect
from tests.stack import ROOT, Stack, running

SERVICE = "mxgpt.v1.ExecutorService"


@pytest.fixture
def channel(stack: Stack) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(stack.executor.address) as channel:
        yield channel


def pool_from_reflection(channel: grpc.Channel, symbol: str) -> descriptor_pool.DescriptorPool:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    (response,) = stub.ServerReflectionInfo(iter([request]))
    pool = descriptor_pool.DescriptorPool()
    for serialized in response.file_descriptor_response.file_descriptor_proto:
        pool.Add(descriptor_pb2.FileDescriptorProto.FromString(serialized))
    return pool


def method(channel: grpc.Channel, pool: descriptor_pool.DescriptorPool, name: str) -> tuple[Any, Any]:
    """The callable of a method and the class of its request."""
    found = pool.FindServiceByName(SERVICE).methods_by_name[name]
    request_class = message_factory.GetMessageClass(found.input_type)
    response_class = message_factory.GetMessageClass(found.output_type)
    make = channel.unary_stream if found.server_streaming else channel.unary_unary
    call = make(
        f"/{SERVICE}/{name}",
        request_serializer=request_class.SerializeToString,
        response_deserializer=response_class.FromString,
    )
    return call, request_class


def test_reflection_alone_is_enough_to_generate(channel: grpc.Channel) -> None:
    pool = pool_from_reflection(channel, SERVICE)
    generate, request_class = method(channel, pool, "Generate")
    request = request_class(request_id="plain")
    request.chat.messages.add(role="user", content="What is 12 + 30?")
    request.sampling.temperature = 0.0
    request.stopping.max_tokens = 200
    responses = list(generate(request, timeout=60))
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) == {"delta"}
    started, finished = responses[0].started, responses[-1].finished
    assert started.request_id == "plain"
    assert finished.usage.num_prompt_tokens == len(started.prompt_token_ids)
    token_ids = [token_id for response in responses for token_id in response.delta.token_ids]
    assert finished.usage.num_output_tokens == len(token_ids)
    answer = "".join(response.delta.text for response in responses if response.delta.channel == "final")
    assert "42" in answer


def test_status_and_models_by_reflection(channel: grpc.Channel) -> None:
    pool = pool_from_reflection(channel, SERVICE)
    get_status, request_class = method(channel, pool, "GetStatus")
    status = get_status(request_class(), timeout=30)
    assert status.device == "cpu"
    assert {group.group for group in status.blocks} == {"full", "window"}
    list_models, request_class = method(channel, pool, "ListModels")
    (model,) = list_models(request_class(), timeout=30).models
    assert model.architecture == "gpt-oss"
    assert len(model.digest) == 64


def test_the_page_on_resuming_by_hand_holds(demo_gpt_oss: Path) -> None:
    """The client that docs/resume.md prints, word for word, over two executors of which one is killed."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "resume.md").read_text(), re.DOTALL)
    page: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, "docs/resume.md", "exec"), page)
    request = chat(
        "Write a haiku about the sea.",
        sampling={"temperature": 1.2, "seed": 5, "n": 2, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
        stopping={"max_tokens": 250, "ignore_eos": True, "stop_strings": ["\n\n\n"]},
        output={"logprobs": 1},
    )
    with running(demo_gpt_oss, num_executors=2) as stack:
        addresses = stack.address.split(",")
        quiet = collect(page["generate"](addresses, request))
        responses = []
        for response in page["generate"](addresses, request):
            responses.append(response)
            if len(responses) == 60:
                stack.executors[0].kill()
        whole = collect(responses)
    assert len(quiet.finished) == 2
    for index in range(2):
        assert whole.token_ids(index) == quiet.token_ids(index)
        assert whole.text(index) == quiet.text(index)
        assert whole.logprobs(index) == quiet.logprobs(index)
        assert whole.finished[index].reason == quiet.finished[index].reason
        assert whole.finished[index].usage.num_output_tokens == quiet.finished[index].usage.num_output_tokens
