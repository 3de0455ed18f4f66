"""Generate over the three real services: what comes, in which order, and that company changes nothing."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from mxgpt.v1 import executor_pb2, executor_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from tests.calls import Collected, chat, collect, error_of, greedy
from tests.stack import Stack, until

PROMPTS = [
    "What is 12 + 30?",
    "What is 407 - 88?",
    "Sort these words: pear, apple, fig",
    "Write a haiku about the sea.",
    "Which day comes 3 days after Monday?",
    "Reverse these words: one, two, three",
]


@pytest.fixture(scope="module")
def stub(stack: Stack) -> Iterator[Any]:
    with grpc.insecure_channel(stack.executor.address) as channel:
        yield executor_pb2_grpc.ExecutorServiceStub(channel)


@pytest.fixture(scope="module")
def tokenizer(stack: Stack) -> Iterator[Any]:
    with grpc.insecure_channel(stack.tokenizer.address) as channel:
        yield tokenizer_pb2_grpc.TokenizerServiceStub(channel)


def run(stub: Any, request: Any) -> Collected:
    return collect(stub.Generate(request, timeout=60))


def stopping(**options: Any) -> Any:
    return executor_pb2.Stopping(**options)


def status(stub: Any) -> Any:
    return stub.GetStatus(executor_pb2.ExecutorServiceGetStatusRequest(), timeout=10)


def test_a_greedy_answer_and_its_accounts(stub: Any, tokenizer: Any) -> None:
    request = chat(PROMPTS[0], sampling=greedy(), request_id="mine")
    answer = run(stub, request)
    assert answer.started.request_id == "mine"
    assert answer.text(channel="final") == "42"
    finished = answer.finished[0]
    assert finished.reason == executor_pb2.FINISH_REASON_STOP
    assert finished.matched_stop == "<|return|>"
    assert finished.usage.num_prompt_tokens == len(answer.started.prompt_token_ids) > 0
    assert finished.usage.num_output_tokens == len(answer.token_ids())
    assert finished.timings.first_token_seconds > 0
    rendered = tokenizer.RenderChat(tokenizer_pb2.RenderChatRequest(chat=request.chat))
    assert list(answer.started.prompt_token_ids) == list(rendered.token_ids)


def test_text_is_the_decoding_of_the_ids_after_every_delta(stub: Any, tokenizer: Any) -> None:
    for prompt in ("Write a haiku about the sea.", "日本語で一から三まで数えて", "👩‍👩‍👧 café"):
        request = executor_pb2.GenerateRequest(
            text=prompt, sampling=executor_pb2.Sampling(temperature=1.5, seed=3), stopping=stopping(max_tokens=80)
        )
        text, token_ids = "", []
        for delta in run(stub, request).deltas:
            text += delta.text
            token_ids += delta.token_ids
            decoded = tokenizer.Detokenize(tokenizer_pb2.DetokenizeRequest(token_ids=token_ids)).text
            assert text == decoded


@pytest.mark.parametrize("sampling", [greedy(), executor_pb2.Sampling(temperature=1.2, top_p=0.95, seed=11)])
def test_sixteen_streams_give_what_each_gives_alone(stub: Any, sampling: Any) -> None:
    requests = []
    for number in range(16):
        request = chat(PROMPTS[number % len(PROMPTS)], sampling=sampling, stopping=stopping(max_tokens=60))
        request.sampling.repetition_penalty = 1.0 + 0.05 * (number % 3)
        request.chat.messages[0].content += " " * (number // len(PROMPTS))
        requests.append(request)
    alone = [run(stub, request) for request in requests]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda request: run(stub, request), requests))
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids() == other.token_ids()
        assert one.text() == other.text()


def test_a_seed_repeats_and_another_differs(stub: Any) -> None:
    def draw(seed: int) -> list[int]:
        sampling = executor_pb2.Sampling(temperature=3.0, seed=seed)
        return run(stub, chat(PROMPTS[3], sampling=sampling, stopping=stopping(max_tokens=40))).token_ids()

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_a_seed_that_the_server_picked_repeats_too(stub: Any) -> None:
    first = run(stub, chat(PROMPTS[3], stopping=stopping(max_tokens=30)))
    sampling = executor_pb2.Sampling(seed=first.started.seed)
    again = run(stub, chat(PROMPTS[3], sampling=sampling, stopping=stopping(max_tokens=30)))
    assert first.token_ids() == again.token_ids()


def test_n_outputs_have_draws_of_their_own(stub: Any) -> None:
    sampling = executor_pb2.Sampling(temperature=2.0, seed=1, n=4)
    answer = run(stub, chat(PROMPTS[3], sampling=sampling, stopping=stopping(max_tokens=24, ignore_eos=True)))
    assert sorted(answer.finished) == [0, 1, 2, 3]
    outputs = [tuple(answer.token_ids(index)) for index in range(4)]
    assert len(set(outputs)) == 4
    sampling.n = 1
    first = run(stub, chat(PROMPTS[3], sampling=sampling, stopping=stopping(max_tokens=24, ignore_eos=True)))
    assert tuple(first.token_ids()) == outputs[0]


def test_stop_strings_end_the_text_before_them(stub: Any) -> None:
    whole = run(stub, chat(PROMPTS[3], sampling=greedy())).text(channel="final")
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
    answer = run(stub, chat(PROMPTS[3], sampling=greedy(), stopping=stopping(stop_strings=["never there", stop])))
    assert answer.finished[0].reason == executor_pb2.FINISH_REASON_STOP_STRING
    assert answer.finished[0].matched_stop == stop
    assert stop not in answer.text()
    assert answer.text(channel="final") == whole[: whole.index(stop)]
    assert answer.finished[0].usage.num_output_tokens == len(answer.token_ids())


def test_stop_ids_and_bounds(stub: Any) -> None:
    whole = run(stub, chat(PROMPTS[3], sampling=greedy())).token_ids()
    stop = whole[6]
    answer = run(stub, chat(PROMPTS[3], sampling=greedy(), stopping=stopping(stop_token_ids=[stop])))
    assert answer.token_ids() == whole[: whole.index(stop) + 1]
    assert answer.finished[0].reason == executor_pb2.FINISH_REASON_STOP
    answer = run(stub, chat(PROMPTS[3], sampling=greedy(), stopping=stopping(max_tokens=5)))
    assert answer.token_ids() == whole[:5]
    assert answer.finished[0].reason == executor_pb2.FINISH_REASON_LENGTH
    longer = len(whole) + 5
    answer = run(stub, chat(PROMPTS[3], sampling=greedy(), stopping=stopping(min_tokens=longer, max_tokens=longer)))
    assert len(answer.token_ids()) == longer


def test_logprobs_of_outputs_and_prompts(stub: Any) -> None:
    output = executor_pb2.Output(logprobs=3, prompt_logprobs=2)
    answer = run(stub, chat(PROMPTS[0], sampling=greedy(), output=output, stopping=stopping(max_tokens=8)))
    entries = answer.logprobs()
    assert [entry.token.token_id for entry in entries] == answer.token_ids()
    for entry in entries:
        assert len(entry.top) == 3
        assert entry.top[0].token_id == entry.token.token_id
        assert entry.top[0].logprob >= entry.top[1].logprob >= entry.top[2].logprob
        assert entry.token.logprob <= 0
    scored = [entry for piece in answer.prompt_logprobs for entry in piece.logprobs]
    assert answer.prompt_logprobs[0].start == 1
    assert [entry.token.token_id for entry in scored] == list(answer.started.prompt_token_ids)[1:]


def test_text_alone_and_ids_alone(stub: Any) -> None:
    both = run(stub, chat(PROMPTS[0], sampling=greedy()))
    text = run(stub, chat(PROMPTS[0], sampling=greedy(), output=executor_pb2.Output(content="OUTPUT_CONTENT_TEXT")))
    ids = run(stub, chat(PROMPTS[0], sampling=greedy(), output=executor_pb2.Output(content="OUTPUT_CONTENT_TOKEN_IDS")))
    assert (text.text(), text.token_ids()) == (both.text(), [])
    assert (ids.text(), ids.token_ids()) == ("", both.token_ids())


@pytest.mark.parametrize(
    "sampling",
    [
        greedy(),
        executor_pb2.Sampling(temperature=1.3, seed=4, presence_penalty=0.5, frequency_penalty=0.3, n=2),
    ],
)
def test_a_resume_from_every_cut_goes_on_as_if_nothing_had_happened(stub: Any, sampling: Any) -> None:
    request = chat(
        PROMPTS[3],
        sampling=sampling,
        stopping=stopping(max_tokens=30, stop_strings=["\n\n"]),
        output=executor_pb2.Output(logprobs=1),
    )
    responses = list(stub.Generate(request, timeout=60))
    whole = collect(responses)
    for cut in range(1, len(responses) + 1):
        before = collect(responses[:cut])
        resumed = executor_pb2.GenerateRequest()
        resumed.CopyFrom(request)
        resumed.resume.digest = whole.started.digest
        resumed.resume.seed = whole.started.seed
        resumed.resume.prompt_token_ids.extend(whole.started.prompt_token_ids)
        for index in range(sampling.n or 1):
            ended = index in before.finished
            resumed.resume.outputs.add(index=index, token_ids=before.token_ids(index), finished=ended)
        after = run(stub, resumed)
        for index in range(sampling.n or 1):
            assert before.token_ids(index) + after.token_ids(index) == whole.token_ids(index)
            assert before.text(index) + after.text(index) == whole.text(index)
            if index not in before.finished:
                assert after.finished[index].reason == whole.finished[index].reason
                assert after.finished[index].usage.num_output_tokens == len(whole.token_ids(index))
        assert after.started.seed == whole.started.seed


def test_a_cancelled_call_leaves_at_once(stub: Any) -> None:
    until(lambda: status(stub).num_running == 0)  # of calls that were cancelled by other tests
    free_before = [group.num_free for group in status(stub).blocks]
    long = {"stopping": stopping(ignore_eos=True), "sampling": executor_pb2.Sampling(n=4)}
    calls = [stub.Generate(chat(PROMPTS[3], request_id=f"cancel-{number}", **long)) for number in range(4)]
    for call in calls:
        next(iter(call))
    until(lambda: status(stub).num_running == 16)
    for call in calls[:3]:
        call.cancel()
    stub.Cancel(executor_pb2.CancelRequest(request_id="cancel-3"))
    assert error_of(calls[3]).reason.name == "CANCELLED"
    until(lambda: status(stub).num_running == 0)
    assert [group.num_free for group in status(stub).blocks] == free_before


def test_a_deadline_ends_the_request(stub: Any) -> None:
    request = chat(PROMPTS[3], stopping=stopping(ignore_eos=True))
    assert error_of(stub.Generate(request, timeout=0.3)).reason.name == "DEADLINE"
    until(lambda: status(stub).num_running == 0)


def test_the_prefix_cache_is_told_and_changes_nothing(stub: Any) -> None:
    prompt = "Sort these words: " + ", ".join(["pear", "apple", "fig", "plum", "kiwi"] * 8)
    first = run(stub, chat(prompt, sampling=greedy(), stopping=stopping(max_tokens=20)))
    second = run(stub, chat(prompt, sampling=greedy(), stopping=stopping(max_tokens=20)))
    assert second.started.num_cached_tokens > 0
    assert second.token_ids() == first.token_ids()
    assert second.finished[0].usage.num_cached_tokens == second.started.num_cached_tokens
