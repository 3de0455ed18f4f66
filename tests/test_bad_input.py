"""Bad input gets one clear error, with its status and its stable reason, and peers that go away come back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mxgpt.v1 import executor_pb2, executor_pb2_grpc
from shared.errors import Reason, Status
from tests.calls import chat, collect, error_of, greedy
from tests.stack import Service, Stack, engine_of, running, until


@pytest.fixture(scope="module")
def stub(stack: Stack) -> Iterator[Any]:
    with grpc.insecure_channel(stack.executor.address) as channel:
        yield executor_pb2_grpc.ExecutorServiceStub(channel)


def ids(*token_ids: int) -> Any:
    return executor_pb2.TokenIds(ids=token_ids)


def request(**parts: Any) -> Any:
    return executor_pb2.GenerateRequest(**parts)


@pytest.mark.parametrize(
    ("bad", "reason", "words"),
    [
        (request(text="a", model="gpt-9"), Reason.MODEL_NOT_FOUND, "'gpt-9'"),
        (request(), Reason.FIELD_INVALID, "input"),
        (request(text=""), Reason.PROMPT_EMPTY, "text"),
        (request(token_ids=ids()), Reason.PROMPT_EMPTY, "token_ids"),
        (request(token_ids=ids(1, 2**31)), Reason.TOKEN_ID_INVALID, "2147483648"),
        (request(token_ids=ids(*[1] * 5000)), Reason.CONTEXT_LENGTH_EXCEEDED, "5000 tokens"),
        (request(text="word " * 9000), Reason.CONTEXT_LENGTH_EXCEEDED, "text"),
        (request(chat=executor_pb2.Chat()), Reason.FIELD_INVALID, "messages"),
        (request(text="a", sampling={"top_p": 0.0}), Reason.FIELD_INVALID, "sampling.top_p"),
        (request(text="a", sampling={"temperature": -1.0}), Reason.FIELD_INVALID, "sampling.temperature"),
        (request(text="a", stopping={"max_tokens": 0}), Reason.FIELD_INVALID, "stopping.max_tokens"),
        (request(text="a", constraint={"regex": "a+"}), Reason.NOT_BUILT, "constraint.regex"),
        (request(text="a", resume={"digest": "0" * 64}), Reason.RESUME_DIGEST_MISMATCH, "resume.digest"),
    ],
)
def test_each_mistake_has_its_reason(stub: Any, bad: Any, reason: Reason, words: str) -> None:
    error = error_of(stub.Generate(bad, timeout=20))
    assert (error.reason, error.status) == (reason, reason.status)
    assert words in error.message


def test_an_error_comes_with_its_status_code_for_clients_that_know_nothing_else(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request(text="a", constraint={"grammar": "root ::= 'a'"}), timeout=20))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_cancelling_what_does_not_run(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Cancel(executor_pb2.CancelRequest(request_id="nobody"), timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_request_id_in_use(stub: Any) -> None:
    long = {"stopping": {"ignore_eos": True}, "sampling": {"n": 16}}
    call = stub.Generate(chat("Write a haiku about the sea.", request_id="twice", **long))
    next(iter(call))
    assert error_of(stub.Generate(chat("hello", request_id="twice"), timeout=20)).reason is Reason.REQUEST_ID_IN_USE
    call.cancel()


def test_the_queue_is_bounded(demo_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "faults"))
    monkeypatch.setenv("MXGPT_FAULT", "slow")
    bounds = ["--max-running", "2", "--max-waiting", "1"]
    with running(demo_gpt2, executor_options=bounds) as stack, grpc.insecure_channel(stack.executor.address) as channel:
        stub = executor_pb2_grpc.ExecutorServiceStub(channel)
        endless = request(text="a", stopping={"ignore_eos": True}, sampling=greedy())
        running_calls = [stub.Generate(endless) for _ in range(2)]
        for call in running_calls:
            next(iter(call))
        waiting = stub.Generate(endless)
        until(lambda: _status(stub).num_waiting == 1)
        error = error_of(stub.Generate(endless, timeout=20))
        assert (error.reason, error.status) == (Reason.QUEUE_FULL, Status.RESOURCE_EXHAUSTED)
        assert error.retry_after is not None
        for call in (*running_calls, waiting):
            call.cancel()


def test_a_tokenizer_that_goes_away_and_comes_back(demo_gpt_oss: Path) -> None:
    """It comes back as another process, which is ready before: streams wait for a tokenizer, but not for long."""
    with running(demo_gpt_oss) as stack:
        directory = Path(stack.directory.name)
        tokenizers = [
            Service("tokenizer", "--loader", stack.loader.address, "--listen", f"unix:{directory / name}")
            for name in ("first", "second")
        ]
        (directory / "tokenizer").symlink_to("first")
        executor = stack.start_executor("--tokenizer", f"unix:{directory / 'tokenizer'}")
        try:
            for service in (*tokenizers, executor):
                service.wait_healthy()
            with grpc.insecure_channel(executor.address) as channel:
                _lose_the_tokenizer(executor, executor_pb2_grpc.ExecutorServiceStub(channel), *tokenizers, directory)
        finally:
            for service in (executor, *tokenizers):
                service.stop()


def _lose_the_tokenizer(executor: Service, stub: Any, first: Service, second: Service, directory: Path) -> None:
    prompt = chat("Write a haiku about the sea.", sampling=greedy(), stopping={"max_tokens": 60})
    whole = collect(stub.Generate(prompt, timeout=60))
    endless = chat("Write a haiku about the sea.", sampling=greedy(), stopping={"max_tokens": 900})
    endless.stopping.ignore_eos = True
    undisturbed = collect(stub.Generate(endless, timeout=60))
    call = stub.Generate(endless, timeout=60)
    begun = next(iter(call))
    executor.wait_health("mxgpt.tokenizer", serving=True)
    first.kill()
    error = error_of(stub.Generate(prompt, timeout=20))
    executor.wait_health("mxgpt.tokenizer", serving=False)
    assert (error.reason, error.status) == (Reason.TOKENIZER_UNAVAILABLE, Status.UNAVAILABLE)
    # Token ids need no tokenizer.
    bare = request(
        token_ids=ids(*whole.started.prompt_token_ids),
        sampling=greedy(),
        output={"content": "OUTPUT_CONTENT_TOKEN_IDS"},
    )
    assert collect(stub.Generate(bare, timeout=60)).token_ids() == whole.token_ids()
    (directory / "next").symlink_to(second.address.removeprefix("unix:"))
    os.replace(directory / "next", directory / "tokenizer")
    rest = collect([begun, *call])
    assert rest.token_ids() == undisturbed.token_ids()
    assert rest.text() == undisturbed.text()
    executor.wait_health("mxgpt.tokenizer", serving=True)
    assert collect(stub.Generate(prompt, timeout=60)).text() == whole.text()


def test_a_loader_that_goes_away_leaves_its_executors_serving(demo_gpt_oss: Path) -> None:
    with running(demo_gpt_oss) as stack, grpc.insecure_channel(stack.executor.address) as channel:
        stub = executor_pb2_grpc.ExecutorServiceStub(channel)
        prompt = chat("What is 12 + 30?", sampling=greedy())
        before = collect(stub.Generate(prompt, timeout=30))
        address = stack.loader.address
        stack.loader.kill()
        stack.executor.wait_health("mxgpt.loader", serving=False)
        stack.executor.wait_healthy()
        assert collect(stub.Generate(prompt, timeout=30)).text() == before.text()
        stack.loader = Service("loader", "--socket", stack.socket, "--model", str(stack.model), "--listen", address)
        stack.executor.wait_health("mxgpt.loader", serving=True)
        stack.loader.wait_healthy()
        until(lambda: "adopted" in stack.loader.text)
        assert collect(stub.Generate(prompt, timeout=30)).text() == before.text()


def test_an_executor_may_start_first(demo_gpt2: Path, tmp_path: Path) -> None:
    socket = str(tmp_path / "loader.sock")
    probe = Service("loader", "--socket", socket)
    loader_address = probe.address
    probe.stop()
    executor = Service("executor", "--loader", loader_address, "--tokenizer", "127.0.0.1:9")
    try:
        with grpc.insecure_channel(executor.address) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            error = error_of(stub.Generate(request(text="a"), timeout=20))
            assert error.status is Status.UNAVAILABLE
            assert error.reason in (Reason.STARTING, Reason.LOADER_UNAVAILABLE), "the second once it has tried"
            loader = Service("loader", "--socket", socket, "--model", str(demo_gpt2), "--listen", loader_address)
            try:
                executor.wait_health("mxgpt.loader", serving=True)
            finally:
                loader.stop()
    finally:
        assert executor.stop() == 0


def test_sigterm_lets_running_streams_finish_and_takes_no_new_ones(demo_gpt_oss: Path) -> None:
    """The engine stands still meanwhile, so that the stream does not finish before another is refused."""
    with (
        running(demo_gpt_oss, executor_options=["--drain-seconds", "100"]) as stack,
        grpc.insecure_channel(stack.executor.address) as channel,
    ):
        stub = executor_pb2_grpc.ExecutorServiceStub(channel)
        prompt = chat("Write a haiku about the sea.", sampling=greedy(), stopping={"max_tokens": 600})
        prompt.stopping.ignore_eos = True
        call = stub.Generate(prompt, timeout=100)
        first = next(iter(call))
        engine = engine_of(stack.executor)
        os.kill(engine, signal.SIGSTOP)
        codes: list[int] = []
        stopping = threading.Thread(target=lambda: codes.append(stack.executor.stop()))
        stopping.start()
        try:
            stack.executor.wait_health("", serving=False)
            error = error_of(stub.Generate(chat("hello", stopping={"max_tokens": 1}), timeout=60))
        finally:
            os.kill(engine, signal.SIGCONT)
        assert (error.reason, error.status) == (Reason.DRAINING, Status.UNAVAILABLE)
        assert len(collect([first, *call]).token_ids()) == 600
        stopping.join()
        assert codes == [0]


def _status(stub: Any) -> Any:
    return stub.GetStatus(executor_pb2.ExecutorServiceGetStatusRequest(), timeout=10)
