"""Both clients against a real gRPC server that fails on demand."""

import asyncio
import itertools
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures

import grpc
import pytest

from mxgpt import AsyncClient, Client, FinishReason, MxgptError, RetryPolicy
from mxgpt.options import build_request
from shared.errors import Reason, ServiceError, invalid_field
from tests.scripted_executor import (
    ScriptedExecutor,
    break_at,
    fail_at,
    hold_at,
    messages,
    serve,
    whole_ids,
    whole_text,
)

NUM_TOKENS = 9
MANY_TOKENS = 1000  # more than come in any test
SECONDS = 60  # that something may take, however busy the machine is
QUICK = RetryPolicy(initial_backoff=0.01, max_backoff=0.05)
DRAINING = ServiceError(Reason.DRAINING, "stopping")


@pytest.fixture
def executor():
    scripted = ScriptedExecutor()
    server, scripted.address = serve(scripted)
    yield scripted
    server.stop(None)


@pytest.fixture(params=["blocking", "asyncio"])
def complete(request):
    """`complete(target, prompt, **options)` through either client; `client` has the client's own arguments."""

    def blocking(target, prompt, client=None, **options):
        with Client(target, retry=QUICK, **(client or {})) as opened:
            return opened.complete(prompt, max_tokens=NUM_TOKENS, **options)

    def in_asyncio(target, prompt, client=None, **options):
        async def run():
            async with AsyncClient(target, retry=QUICK, **(client or {})) as opened:
                return await opened.complete(prompt, max_tokens=NUM_TOKENS, **options)

        return asyncio.run(run())

    return blocking if request.param == "blocking" else in_asyncio


def test_pieces_and_result(executor):
    with Client(executor.address) as client:
        generation = client.generate("hello", n=2, logprobs=1, prompt_logprobs=0, max_tokens=NUM_TOKENS)
        pieces = list(generation)
        result = generation.result
    for index in range(2):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == whole_text(index, NUM_TOKENS) == result.outputs[index].text
    assert all(len(piece.logprobs) == len(piece.token_ids) for piece in pieces)
    assert pieces[0].logprobs[0].top[1][1] == -1.5
    assert (result.model, result.executor_id, result.seed, result.num_resumes) == ("fake", "one", 77, 0)
    assert result.finish_reason is FinishReason.LENGTH
    assert result.usage.num_output_tokens == NUM_TOKENS
    assert result.timings.decode_seconds == 0.5
    assert executor.num_cancelled == 0, "a stream read to its end is not cancelled"


def test_broken_at_every_message_goes_on_elsewhere(executor, complete):
    other = ScriptedExecutor(executor_id="two")
    server, address = serve(other)
    request_messages = messages(build_request("hello", {"max_tokens": NUM_TOKENS, "n": 2}))
    for number in [*range(len(request_messages)), -1]:
        executor.faults[:], other.faults[:] = [break_at(number)], []
        result = complete(f"{executor.address},{address}", "hello", n=2, logprobs=0)
        for index in range(2):
            assert result.outputs[index].text == whole_text(index, NUM_TOKENS)
            assert result.outputs[index].token_ids == whole_ids(index, NUM_TOKENS)
            assert len(result.outputs[index].logprobs) == NUM_TOKENS
    server.stop(None)


@pytest.mark.parametrize("code", ["UNAVAILABLE", "CANCELLED", "INTERNAL", "UNKNOWN"])
def test_statuses_of_broken_connections_are_resumed(executor, complete, code):
    executor.faults[:] = [break_at(3, grpc.StatusCode[code])]
    result = complete(executor.address, "hello", seed=3)
    assert (result.text, result.num_resumes) == (whole_text(0, NUM_TOKENS), 1)
    assert executor.requests[1].resume.seed == 3
    assert len(executor.requests[1].resume.outputs[0].token_ids) > 0


def test_many_breaks_in_a_row(executor, complete):
    executor.faults[:] = [break_at(number) for number in (0, 0, 3, 2, 0, 2, 1)]
    assert complete(executor.address, "hello").text == whole_text(0, NUM_TOKENS)


def test_one_break_is_one_resume_however_many_attempts_it_took(executor, complete):
    executor.faults[:] = [break_at(3), *(fail_at(0, DRAINING) for _ in range(5))]
    result = complete(executor.address, "hello")
    assert (result.text, result.num_resumes) == (whole_text(0, NUM_TOKENS), 1)
    assert len(executor.requests) == 7


def test_another_service_is_told_from_an_executor(complete):
    server = grpc.server(futures.ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    with pytest.raises(MxgptError, match="no executor, or an older one") as caught:
        complete(address, "hello")
    assert caught.value.status is grpc.StatusCode.UNIMPLEMENTED
    server.stop(None)


def test_a_stream_that_ends_early_in_good_order_is_resumed(executor, complete, monkeypatch):
    cut = itertools.chain([3], itertools.repeat(None))
    monkeypatch.setattr("tests.scripted_executor.messages", lambda *a: messages(*a)[: next(cut)])
    result = complete(executor.address, "hello")
    assert (result.text, result.num_resumes) == (whole_text(0, NUM_TOKENS), 1)


@pytest.mark.parametrize(
    "error",
    [DRAINING, ServiceError(Reason.QUEUE_FULL, "full", retry_after=0.05), ServiceError(Reason.STARTING, "soon")],
)
def test_refusals_before_the_first_token_are_tried_again(executor, complete, error):
    executor.faults[:] = [fail_at(0, error)]
    result = complete(executor.address, "hello")
    assert (result.text, result.num_resumes) == (whole_text(0, NUM_TOKENS), 0)
    assert executor.requests[0] == executor.requests[1]


@pytest.mark.parametrize("number", [0, 3])
def test_the_callers_errors_are_not_tried_again(executor, complete, number):
    executor.faults[:] = [fail_at(number, invalid_field("sampling.top_p", "must lie in (0, 1]"))]
    with pytest.raises(MxgptError) as caught:
        complete(executor.address, "hello")
    assert caught.value.status is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.reason, caught.value.field) == ("FIELD_INVALID", "sampling.top_p")
    assert len(executor.requests) == 1


def test_retry_info_reaches_the_caller(executor, complete):
    executor.faults[:] = [fail_at(0, ServiceError(Reason.QUEUE_FULL, "full", retry_after=30.0))]
    with pytest.raises(MxgptError) as caught:
        complete(executor.address, "hello", timeout=20.0)
    assert caught.value.retry_after == 30.0


@pytest.mark.parametrize(
    ("error", "num_attempts"),
    [(ServiceError(Reason.STARTING, "soon"), QUICK.max_attempts), (DRAINING, QUICK.max_resume_attempts)],
)
def test_attempts_are_bounded(executor, complete, error, num_attempts):
    executor.faults[:] = [fail_at(0, error) for _ in range(50)]
    with pytest.raises(MxgptError) as caught:
        complete(executor.address, "hello")
    assert caught.value.reason == error.reason.name
    assert len(executor.requests) == num_attempts


def test_executors_that_have_served_are_waited_for(executor):
    """For as many attempts as while they say that they stop: one that is missing is being restarted."""
    gone = [fail_at(0, ServiceError(Reason.EXECUTOR_UNAVAILABLE, "gone"))] * (QUICK.max_resume_attempts - 1)
    with Client(executor.address, retry=QUICK) as client:
        client.complete("hello", max_tokens=NUM_TOKENS)
        executor.faults[:] = gone
        assert client.complete("hello", max_tokens=NUM_TOKENS).num_resumes == 0

    async def run():
        async with AsyncClient(executor.address, retry=QUICK) as client:
            await client.list_models()  # as good as a generation
            executor.faults[:] = gone
            return await client.complete("hello", max_tokens=NUM_TOKENS)

    assert asyncio.run(run()).text == whole_text(0, NUM_TOKENS)


def test_a_restart_between_calls_is_not_noticed(executor):
    """Nobody listens for a second and a half, and the channel waits between its own attempts to connect."""
    server, address = serve(executor)
    with Client(address) as client, futures.ThreadPoolExecutor() as pool:
        client.list_models()
        server.stop(None).wait()
        waiting = pool.submit(client.complete, "hello", max_tokens=NUM_TOKENS)
        time.sleep(1.5)
        server, _ = serve(executor, address)
        assert waiting.result().text == whole_text(0, NUM_TOKENS)
    server.stop(None)


def test_text_alone_is_not_resumed(executor, complete):
    executor.faults[:] = [break_at(3)]
    with pytest.raises(MxgptError) as caught:
        complete(executor.address, "hello", content="text")
    assert caught.value.is_unavailable
    assert len(executor.requests) == 1


def test_nobody_there(complete):
    start = time.monotonic()
    with pytest.raises(MxgptError) as caught:
        complete("127.0.0.1:1", "hello")
    assert (caught.value.status, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "EXECUTOR_UNAVAILABLE")
    assert time.monotonic() - start < SECONDS, "nobody waits for who refuses connections"


def test_one_deadline_over_all_attempts(executor, complete):
    executor.delay = 0.2
    executor.faults[:] = [break_at(2), break_at(2), break_at(2)]
    start = time.monotonic()
    with pytest.raises(MxgptError) as caught:
        complete(executor.address, "hello", timeout=0.7)
    assert caught.value.reason in ("DEADLINE", "EXECUTOR_UNAVAILABLE")
    assert 0.4 < time.monotonic() - start < SECONDS
    assert len(executor.requests) <= 2, "the first attempt takes 0.4 s, and a third would begin after 0.8 s"


def test_the_clients_own_timeout_counts_where_the_call_has_none(executor, complete):
    executor.delay = 0.2
    with pytest.raises(MxgptError) as caught:
        complete(executor.address, "hello", client={"timeout": 0.5})
    assert caught.value.reason == "DEADLINE"


def test_calls_are_balanced(executor):
    other = ScriptedExecutor(executor_id="two")
    server, address = serve(other)
    with Client(f"{executor.address},localhost:{address.rpartition(':')[2]}", retry=QUICK) as client:
        deadline = time.monotonic() + SECONDS
        while not (executor.requests and other.requests) and time.monotonic() < deadline:
            client.complete("hello")
        executor.requests.clear()
        other.requests.clear()
        for _ in range(10):
            client.complete("hello")
    assert (len(executor.requests), len(other.requests)) == (5, 5)
    server.stop(None)


def test_a_stopped_executors_streams_go_on_elsewhere():
    """The server itself goes, in mid-stream: what the client sees is grpc's own doing."""
    stopped = threading.Event()
    first, second = (ScriptedExecutor(name, [hold_at(3, stopped)]) for name in ("one", "two"))
    (server, address), (other, other_address) = serve(first), serve(second)
    with Client(f"{address},{other_address}", retry=QUICK) as client:
        generation = client.generate("hello", max_tokens=NUM_TOKENS)
        pieces = [next(generation)]
        (server if first.requests else other).stop(None)
        stopped.set()
        pieces += generation
        assert "".join(piece.text for piece in pieces) == whole_text(0, NUM_TOKENS)
        assert generation.result.num_resumes == 1
    server.stop(None)
    other.stop(None)


@pytest.mark.parametrize("how", ["close", "with", "drop", "thread", "client"])
def test_closing_cancels_on_the_server(executor, how):
    executor.delay = 0.1
    with Client(executor.address) as client:
        generation = client.generate("hello", max_tokens=MANY_TOKENS)
        next(generation)
        if how == "close":
            generation.close()
        elif how == "with":
            with generation:
                pass
        elif how == "drop":
            del generation
        elif how == "client":
            client.close()
        else:
            threading.Timer(0.2, generation.close).start()
            with pytest.raises(MxgptError) as caught:
                list(generation)
            assert caught.value.status is grpc.StatusCode.CANCELLED
        assert executor.cancelled.wait(SECONDS)
    assert len(executor.requests) == 1, "and is not tried again"


@pytest.mark.parametrize("how", ["close", "task", "break"])
def test_closing_cancels_on_the_server_async(executor, how):
    executor.delay = 0.1

    async def run():
        async with AsyncClient(executor.address) as client:
            async with client.generate("hello", max_tokens=MANY_TOKENS) as generation:
                await anext(generation)
                if how == "close":
                    asyncio.get_running_loop().call_later(0.1, generation.close)
                    with pytest.raises(MxgptError) as caught:
                        await _read(generation)
                    assert caught.value.reason == "CANCELLED"
                elif how == "task":
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(_read(generation), 0.15)
            assert await asyncio.to_thread(executor.cancelled.wait, SECONDS)

    asyncio.run(run())
    assert len(executor.requests) == 1


async def _read(generation):
    async for _ in generation:
        pass


def test_close_before_the_first_piece_sends_nothing(executor):
    with Client(executor.address) as client:
        client.generate("hello").close()
    assert executor.requests == []


def test_keyboard_interrupt_cancels_on_the_server(executor):
    executor.delay = 0.1
    script = f"""
from mxgpt import Client
for piece in Client("{executor.address}").generate("hello", max_tokens={MANY_TOKENS}):
    print("piece", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) != 0
    process.stdout.close()
    assert executor.cancelled.wait(SECONDS)


def test_token_is_sent(executor, complete):
    complete(executor.address, "hello", client={"token": "secret"})
    assert executor.tokens_seen == ["Bearer secret"]


def test_unary_calls(executor):
    with Client(executor.address) as client:
        assert client.list_models()[0].name == "fake"
        assert client.status().executor_id == "one"
        assert client.cancel("some-id") == "one"

    async def run():
        async with AsyncClient(executor.address) as client:
            return await client.list_models(), await client.status(), await client.cancel("some-id")

    models, status, executor_id = asyncio.run(run())
    assert (models[0].name, status.executor_id, executor_id) == ("fake", "one", "one")


def test_a_name_in_a_list_that_does_not_resolve():
    with pytest.raises(ValueError, match="nowhere"):
        Client("127.0.0.1:1,nowhere.invalid:2")


def test_many_threads_share_a_client(executor):
    results = []
    with Client(executor.address) as client:
        threads = [
            threading.Thread(target=lambda: results.append(client.complete("hello", max_tokens=NUM_TOKENS).text))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [whole_text(0, NUM_TOKENS)] * 8


def test_an_error_passes_to_another_process_whole():
    error = MxgptError(
        grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "no such model.", retry_after=1.5, metadata={"a": "b"}
    )
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error))
