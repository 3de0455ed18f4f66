"""What clients ask and are answered stays out of every log, at any level, unless the operator asks for it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mxgpt import Client, MxgptError, RetryPolicy
from mxgpt.v1 import executor_pb2, executor_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from shared.logs import set_up_logs
from tests.stack import Service

SECRET = "Zanzibar-Timbuktu"
ONCE = RetryPolicy(max_attempts=1)


class Logged:
    """The three services, logging at a level."""

    def __init__(self, model: Path, directory: Path, *options: str) -> None:
        options = ("--log-level", "DEBUG", *options)
        content = tuple(option for option in options if option == "--log-content")
        of_loader = tuple(option for option in options if option not in content)
        self.loader = Service("loader", "--socket", str(directory / "socket"), "--model", str(model), *of_loader)
        self.tokenizer = Service("tokenizer", "--loader", self.loader.address, *options)
        addresses = ("--loader", self.loader.address, "--tokenizer", self.tokenizer.address)
        self.executor = Service("executor", *addresses, *options)
        self.executor.wait_healthy()

    def stop(self) -> str:
        """Everything that was written, on stdout and stderr."""
        services = (self.executor, self.tokenizer, self.loader)
        for service in services:
            service.stop()
            service.joined()
        return "".join(service.text for service in services)


def ask_everything(logged: Logged) -> list[str]:
    """Prompts of every kind that hold the secret, served ones and such as may be refused; returns the answers."""
    answers = []
    with Client(logged.executor.address, retry=ONCE) as client:
        message = {"role": "user", "content": f"Spell {SECRET}"}
        for prompt, options in (
            (f"{SECRET} is", {}),
            ([message], {"temperature": 0}),
            ([message], {"tools": [{"name": "f", "description": SECRET, "parameters": {"type": "object"}}]}),
            (f"{SECRET} is", {"stop_strings": [SECRET], "request_id": "named"}),
            (f"{SECRET} is", {"prompt_logprobs": 1, "logprobs": 1}),
        ):
            answers.append(client.complete(prompt, max_tokens=12, ignore_eos=True, seed=3, **options).text)
        generation = client.generate(SECRET, max_tokens=500, ignore_eos=True)
        next(generation)
        generation.close()
        for prompt, options in (
            (SECRET, {"top_p": 7}),
            (SECRET, {"model": SECRET}),
            (SECRET * 3000, {}),
            ([{"role": SECRET, "content": SECRET}], {}),
            ([{"role": "assistant", "content": SECRET, "tool_calls": [{"name": SECRET, "arguments": SECRET}]}], {}),
            ([message], {"tools": [{"name": "f", "parameters": SECRET}]}),
            ([message], {"date": SECRET}),
            ([message], {"reasoning_effort": SECRET}),
        ):
            with contextlib.suppress(MxgptError):  # some templates take what others refuse
                client.complete(prompt, max_tokens=3, **options)
    break_rules(logged)
    return answers


def break_rules(logged: Logged) -> None:
    """Bytes that are no message, and text that is no UTF-8, with the secret in them."""
    good = executor_pb2.GenerateRequest(text=SECRET).SerializeToString()
    bad = good.replace(b"Zan", b"\xff\xfe\xfd")
    with grpc.insecure_channel(logged.executor.address) as channel:
        call = channel.unary_stream("/mxgpt.v1.ExecutorService/Generate")
        for request in (bad, good[:-1], b"\xff" + good):
            with pytest.raises(grpc.RpcError):
                next(call(request, timeout=60))
        stub: Any = executor_pb2_grpc.ExecutorServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            stub.Cancel(executor_pb2.CancelRequest(request_id=SECRET))
    with grpc.insecure_channel(logged.tokenizer.address) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        stub.Tokenize(tokenizer_pb2.TokenizeRequest(text=SECRET))
        with pytest.raises(grpc.RpcError):
            stub.Tokenize(tokenizer_pb2.TokenizeRequest(text=SECRET, model=SECRET))
        requests = iter([tokenizer_pb2.DetokenizeStreamRequest(model=SECRET)])
        with pytest.raises(grpc.RpcError):
            list(stub.DetokenizeStream(requests))


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_no_prompt_and_no_answer_is_logged(demo_gpt_oss: Path, tmp_path: Path, level: str) -> None:
    logged = Logged(demo_gpt_oss, tmp_path, "--log-level", level)
    answers = ask_everything(logged)
    written = logged.stop()
    assert "listening on" in written
    assert ("DEBUG" in written) == (level == "DEBUG")
    for piece in (SECRET, "Zanzibar", "Timbuktu"):
        assert piece not in written
    assert all(len(answer) > 8 and answer not in written and repr(answer)[1:-1] not in written for answer in answers)


def test_an_operator_may_ask_for_them(demo_gpt_oss: Path, tmp_path: Path) -> None:
    logged = Logged(demo_gpt_oss, tmp_path, "--log-content")
    with Client(logged.executor.address) as client:
        result = client.complete(f"{SECRET} is", max_tokens=12, ignore_eos=True, n=2, seed=3, request_id="named")
    written = logged.stop()
    assert f"request 'named' of '': prompt '{SECRET} is', ids {list(result.prompt_token_ids)}" in written
    for index, output in enumerate(result.outputs):
        assert f"request 'named': output {index} {output.text!r}, ids {list(output.token_ids)}" in written


@pytest.fixture
def logs_put_back() -> Iterator[None]:
    """The logging of the tests as it was, afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield
    root.handlers, root.level = handlers, level


@pytest.mark.usefixtures("logs_put_back")
@pytest.mark.parametrize("with_content", [False, True])
def test_what_an_exception_says_is_content_where_it_comes_from_is_not(
    capsys: pytest.CaptureFixture[str], with_content: bool
) -> None:
    set_up_logs("service", with_content=with_content)
    try:
        try:
            int(SECRET)
        except ValueError as error:
            raise KeyError(SECRET) from error
    except KeyError:
        logging.getLogger("somewhere").exception("it failed")
    written = capsys.readouterr().err
    assert (SECRET in written.replace("int(SECRET)", "")) == with_content
    assert written.index("ValueError") < written.index("KeyError"), "the cause comes first"
    assert "int(SECRET)" in written, "where it happened"
