"""The engine over a model that a person can compute: what a request gets does not depend on what else runs."""

from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np
import pytest

from services.executor.engine import Engine
from services.executor.engine_config import EngineConfig
from services.executor.request import (
    FinishReason,
    OutputFinished,
    PromptScored,
    RequestFailed,
    RequestStarted,
    ResumedOutput,
    TokenDrawn,
)
from services.executor.step import FULL, WINDOW, DeviceLostError
from shared.errors import Reason, ServiceError
from tests.engine_harness import (
    Transcript,
    assert_as_expected,
    expected,
    make_engine,
    make_request,
    num_free,
    run,
    run_alone,
    step,
)
from tests.fake_runner import FakeRunner, LateRunner

SCARCE = {FULL: 20, WINDOW: 12}


def refusal(engine, request):
    with pytest.raises(ServiceError) as error:
        engine.submit(request)
    return error.value


# One request.


def test_a_request_gives_what_the_model_says():
    request = make_request(prompt=range(1, 20), max_tokens=12)
    assert_as_expected(run_alone(request), request)


@pytest.mark.parametrize("num_prompt_tokens", [1, 3, 4, 5, 16, 17, 40])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}])
def test_prompts_around_the_sizes_of_blocks_and_chunks(num_prompt_tokens, sampling):
    request = make_request(prompt=range(num_prompt_tokens), max_tokens=9, sampling=sampling)
    assert_as_expected(run_alone(request), request)


def test_events_come_in_order_and_once():
    engine = make_engine(max_batch_tokens=8)
    engine.submit(make_request(prompt=range(12), max_tokens=2))
    assert [[type(event) for event in engine.step()] for _ in range(3)] == [
        [RequestStarted],
        [TokenDrawn],
        [TokenDrawn, OutputFinished],
    ]
    assert not engine.has_work
    assert engine.step() == []


def test_max_tokens_ends_with_length():
    output = run_alone(make_request(max_tokens=3)).outputs[0]
    assert (output.reason, output.matched_token_id, output.num_output_tokens) == (FinishReason.LENGTH, None, 3)


def test_the_end_of_the_context_ends_with_length():
    request = make_request(prompt=range(10), max_tokens=1000)
    transcript = run_alone(request, max_context=16)
    assert_as_expected(transcript, request, max_context=16)
    assert transcript.outputs[0].num_output_tokens == 6


@pytest.mark.parametrize("kind", ["stop_token_ids", "eog_token_ids"])
def test_a_stop_id_is_sent_and_ends_the_output(kind):
    free = run_alone(make_request(max_tokens=8)).outputs[0].token_ids
    stop = free[4]
    request = make_request(max_tokens=8, stopping={kind: frozenset({stop})})
    output = run_alone(request).outputs[0]
    assert output.token_ids == free[: free.index(stop) + 1]
    assert (output.reason, output.matched_token_id) == (FinishReason.STOP, stop)


def test_a_stop_id_as_the_last_token_allowed_is_a_stop():
    free = run_alone(make_request(max_tokens=8)).outputs[0].token_ids
    request = make_request(max_tokens=1, stopping={"stop_token_ids": frozenset({free[0]})})
    assert run_alone(request).outputs[0].reason is FinishReason.STOP


def test_min_tokens_puts_stops_off():
    stops = frozenset(range(0, 40, 2))
    request = make_request(max_tokens=20, stopping={"stop_token_ids": stops, "min_tokens": 5})
    output = run_alone(request).outputs[0]
    assert not stops & set(output.token_ids[:5])
    assert_as_expected(run_alone(request), request)


def test_logprobs_come_with_each_token():
    request = make_request(max_tokens=5, logprobs=3, sampling={"temperature": 1.5, "logit_bias": {3: 9.0}})
    transcript = run_alone(request)
    assert_as_expected(transcript, request)
    assert [entry.token_id for entry in transcript.outputs[0].logprobs] == transcript.outputs[0].token_ids
    assert all(len(entry.top) == 3 for entry in transcript.outputs[0].logprobs)


def test_prompt_logprobs_come_in_pieces_that_join():
    request = make_request(prompt=range(30), prompt_logprobs=2, logprobs=0)
    engine = make_engine(max_scored_rows=7)
    engine.submit(request)
    events = [event for _ in range(5) for event in engine.step()]
    pieces = [event for event in events if isinstance(event, PromptScored)]
    assert [(piece.start, len(piece.logprobs)) for piece in pieces] == [(1, 7), (8, 7), (15, 7), (22, 7), (29, 1)]
    assert [len(piece.logprobs) <= 7 for piece in pieces] == [True] * 5
    assert tuple(entry for piece in pieces for entry in piece.logprobs) == tuple(expected(request).prompt_logprobs)


def test_a_prompt_of_one_token_has_nothing_to_score():
    request = make_request(prompt=[5], prompt_logprobs=2)
    assert_as_expected(run_alone(request), request)


def test_the_queue_is_timed_from_submission():
    seconds = itertools.count(100.0, 1.0)
    runner = FakeRunner()
    config = EngineConfig(max_context=64, num_blocks=runner.num_blocks, block_size=4)
    engine = Engine(runner, config, clock=lambda: next(seconds))
    engine.submit(make_request(max_tokens=3))  # 100
    assert engine.step()[0] == RequestStarted("a", 0, queue_seconds=1.0)  # 101


# Several outputs.


def test_outputs_share_the_prompt_and_draw_for_themselves():
    request = make_request(prompt=range(19), sampling={"temperature": 1.0, "num_outputs": 4}, prompt_logprobs=1)
    engine = make_engine()
    transcript = run(engine, request)["a"]
    assert_as_expected(transcript, request)
    assert len({tuple(output.token_ids) for output in transcript.outputs.values()}) == 4
    assert engine.status().num_cached_tokens == 3 * 16
    assert engine.status().num_prompt_tokens == 19 + 3 * 3


def test_other_outputs_start_when_the_whole_prompt_was_cached():
    engine = make_engine()
    run(engine, make_request("a", range(8), max_tokens=20))
    answer = expected(make_request("a", range(8), max_tokens=20)).outputs[0].token_ids
    resumed = {index: ResumedOutput(tuple(answer[:10])) for index in range(2)}
    engine.submit(make_request("b", range(8), max_tokens=20, sampling={"num_outputs": 2}, resumed=resumed))
    engine.step()
    assert {event.index for event in engine.step() if isinstance(event, TokenDrawn)} == {0, 1}


def test_one_output_can_be_dropped():
    request = make_request(sampling={"temperature": 1.0, "num_outputs": 3})
    engine = make_engine()
    engine.submit(request)
    transcript = Transcript()
    step(engine, {"a": transcript})
    step(engine, {"a": transcript})
    assert engine.cancel("a", 1)
    assert not engine.cancel("a", 1)
    assert not engine.cancel("a", 7)
    num_before = len(transcript.outputs[1].token_ids)
    while engine.has_work:
        step(engine, {"a": transcript})
    wanted = expected(request)
    assert {index: transcript.outputs[index] for index in (0, 2)} == {0: wanted.outputs[0], 2: wanted.outputs[2]}
    assert len(transcript.outputs[1].token_ids) == num_before
    assert transcript.outputs[1].reason is None


def test_the_first_output_can_be_dropped_while_it_computes_and_scores_the_prompt():
    request = make_request(prompt=range(30), sampling={"temperature": 1.0, "num_outputs": 2}, prompt_logprobs=0)
    engine = make_engine(max_scored_rows=8)
    engine.submit(request)
    transcript = Transcript()
    step(engine, {"a": transcript})
    assert engine.cancel("a", 0)
    while engine.has_work:
        step(engine, {"a": transcript})
    wanted = expected(request)
    assert transcript.prompt_logprobs == wanted.prompt_logprobs
    assert transcript.outputs == {1: wanted.outputs[1]}


# Requests together.


def mixed_requests(rng, count, vocab_size=40):
    """Requests of every kind; many prompts share a prefix."""
    stem = [rng.randrange(vocab_size) for _ in range(30)]
    return [_mixed_request(rng, str(number), stem, vocab_size) for number in range(count)]


def _mixed_request(rng, request_id, stem, vocab_size):
    prompt = stem[: rng.choice([0, 0, 7, 16, 23, 30])] + rng.choices(range(vocab_size), k=rng.randint(1, 8))
    sampling = {"seed": rng.randrange(2**64), "temperature": rng.choice([0.0, 0.0, 0.7, 1.5])}
    for name, value in {
        "top_k": 5,
        "top_p": 0.8,
        "min_p": 0.1,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {rng.randrange(vocab_size): 3.0},
        "num_outputs": rng.randint(2, 4),
    }.items():
        if rng.random() < 0.25:
            sampling[name] = value
    stopping = {}
    if rng.random() < 0.5:
        stopping = {"eog_token_ids": frozenset({1, 2}), "min_tokens": rng.choice([0, 3])}
    resumed = {}
    if rng.random() < 0.3:
        for index in range(sampling.get("num_outputs", 1)):
            token_ids = tuple(rng.choices(range(vocab_size), k=rng.choice([0, 1, 5, 12])))
            resumed[index] = ResumedOutput(token_ids, finished=rng.random() < 0.2)
    return make_request(
        request_id,
        prompt,
        max_tokens=rng.randint(1, 20),
        stopping=stopping,
        sampling=sampling,
        logprobs=rng.choice([None, None, 2]),
        prompt_logprobs=rng.choice([None, None, None, 1]),
        priority=rng.choice([0, 0, 0, 1, -1]),
        resumed=resumed,
    )


@pytest.mark.parametrize("seed", range(3))
def test_sixteen_requests_together_are_each_as_alone(seed):
    requests = mixed_requests(random.Random(seed), 16)
    transcripts = run(make_engine(max_running=16, max_batch_tokens=24), *requests)
    for request in requests:
        assert_as_expected(transcripts[request.request_id], request)
        assert transcripts[request.request_id].outputs == run_alone(request).outputs


@pytest.mark.parametrize("make_runner", [FakeRunner, LateRunner])
@pytest.mark.parametrize("seed", range(12))
def test_random_traces(seed, make_runner):
    trace(seed, make_runner)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(100, 1100, 100))
def test_a_thousand_random_traces_of_overlapping_steps(first):
    for seed in range(first, first + 100):
        trace(seed, LateRunner)


@pytest.mark.parametrize("make_runner", [FakeRunner, LateRunner])
@pytest.mark.parametrize("seed", range(8))
def test_random_traces_with_steps_that_break(seed, make_runner):
    trace(seed, make_runner, break_rate=0.05)


def trace(seed, make_runner=FakeRunner, break_rate=0.0):
    """Submits, cancels, scarce blocks: every invariant after every step, every survivor as alone."""
    rng = random.Random(seed)
    runner = make_runner(window=rng.choice([1, 3, 6, 9]), num_blocks=SCARCE)
    engine = make_engine(runner, max_batch_tokens=12, max_running=6, max_scored_rows=5)
    waiting = mixed_requests(rng, 25)
    requests, transcripts, cancelled, dropped = {}, {}, set(), set()
    while waiting or engine.has_work:
        while waiting and rng.random() < 0.4:
            request = waiting.pop()
            engine.submit(request)
            requests[request.request_id], transcripts[request.request_id] = request, Transcript()
        if transcripts and rng.random() < 0.03:
            request_id = rng.choice(sorted(transcripts))
            if engine.cancel(request_id):
                cancelled.add(request_id)
                engine.check_integrity()
                transcripts[request_id].add = _refuse
        if transcripts and rng.random() < 0.03:
            request_id = rng.choice(sorted(transcripts))
            if engine.cancel(request_id, index := rng.randrange(2)):
                dropped.add((request_id, index))
                engine.check_integrity()
        if rng.random() < break_rate:
            runner.next_error = rng.choice([MemoryError, RuntimeError])("as told")
        step(engine, transcripts)
    failed = {request_id for request_id, transcript in transcripts.items() if transcript.error is not None}
    assert bool(failed) == bool(break_rate)
    assert not engine.is_broken
    for request_id in transcripts.keys() - cancelled - failed:
        assert_survivors_as_expected(transcripts[request_id], requests[request_id], runner, dropped)
    assert num_free(engine) == SCARCE
    status = engine.status()
    assert (status.num_running, status.num_waiting) == (0, 0)
    assert status.num_cached_tokens > 0
    return status.num_preemptions


def assert_survivors_as_expected(transcript, request, runner, dropped):
    """As expected, but for outputs dropped on the way: of those a beginning may have come."""
    wanted = expected(request, runner)
    assert transcript.error is None
    for index, output in wanted.outputs.items():
        found = transcript.outputs.get(index)
        if (request.request_id, index) not in dropped:
            assert found == output
        elif found is not None:
            assert found.token_ids == output.token_ids[: len(found.token_ids)]
            assert found.reason is None
    num_scored = len(transcript.prompt_logprobs)
    is_cut = all(
        (request.request_id, index) in dropped or not wanted.outputs[index].token_ids for index in wanted.outputs
    )
    assert transcript.prompt_logprobs == wanted.prompt_logprobs[: num_scored if is_cut else None]


def test_random_traces_preempt():
    """The traces above are worth something only if blocks do run out in them."""
    assert sum(trace(seed) for seed in range(12, 16)) > 3


def _refuse(event):
    raise AssertionError(f"{event} after the request was cancelled")


def test_blocks_that_run_out_change_nothing():
    engine = make_engine(FakeRunner(num_blocks=SCARCE), max_batch_tokens=12, max_running=6)
    requests = [make_request(str(number), [number] * 9, max_tokens=30) for number in range(6)]
    transcripts = run(engine, *requests)
    assert engine.status().num_preemptions > 1
    for request in requests:
        assert_as_expected(transcripts[request.request_id], request)


def test_a_step_of_nothing_but_recomputation_draws_nothing_twice():
    engine = make_engine(FakeRunner(num_blocks=SCARCE), max_running=3)
    requests = [
        make_request(str(number), range(number, 20 + number), max_tokens=30, prompt_logprobs=0) for number in range(3)
    ]
    transcripts = run(engine, *requests)
    assert engine.status().num_preemptions > 0
    for request in requests:
        assert_as_expected(transcripts[request.request_id], request)


def test_a_prompt_seen_before_comes_from_the_cache():
    engine = make_engine()
    first = make_request("a", range(22))
    second = make_request("b", [*range(20), 30, 31])
    assert run(engine, first)["a"].started.num_cached_tokens == 0
    transcript = run(engine, second)["b"]
    assert transcript.started.num_cached_tokens == 20
    assert_as_expected(transcript, second)
    assert engine.status().num_cached_tokens == 20
    assert engine.status().num_prompt_tokens == 22 + 2


def test_prompt_logprobs_do_without_the_cache():
    engine = make_engine()
    run(engine, make_request("a", range(22)))
    request = make_request("b", range(22), prompt_logprobs=1)
    transcript = run(engine, request)["b"]
    assert transcript.started.num_cached_tokens == 0
    assert_as_expected(transcript, request)


# Resume.


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "frequency_penalty": 0.5, "presence_penalty": 0.2}])
@pytest.mark.parametrize("num_received", [0, 1, 5, 11])
def test_a_resumed_output_goes_on_as_it_would_have(sampling, num_received):
    request = make_request(prompt=range(9), max_tokens=12, sampling=sampling, logprobs=1)
    whole = run_alone(request).outputs[0]
    resumed = dataclasses.replace(request, resumed={0: ResumedOutput(tuple(whole.token_ids[:num_received]))})
    rest = run_alone(resumed).outputs[0]
    assert rest.token_ids == whole.token_ids[num_received:]
    assert rest.logprobs == whole.logprobs[num_received:]
    assert (rest.reason, rest.num_output_tokens) == (whole.reason, 12)


def test_resumed_outputs_that_have_ended_finish_at_once_and_finished_ones_stay_silent():
    request = make_request(
        max_tokens=6,
        sampling={"temperature": 1.0, "num_outputs": 4},
        stopping={"stop_token_ids": frozenset({9}), "min_tokens": 2},
        resumed={
            0: ResumedOutput((4, 5, 9)),  # a stop
            1: ResumedOutput((1, 2, 3, 4, 5, 6)),  # max_tokens
            2: ResumedOutput((9,)),  # a stop that min_tokens puts off: it goes on
            3: ResumedOutput((9, 9), finished=True),
        },
    )
    transcript = run_alone(request)
    assert_as_expected(transcript, request)
    assert transcript.outputs[0].reason is FinishReason.STOP
    assert transcript.outputs[0].matched_token_id == 9
    assert transcript.outputs[1].reason is FinishReason.LENGTH
    assert len(transcript.outputs[2].token_ids) > 0
    assert 3 not in transcript.outputs


def test_a_request_that_has_ended_as_a_whole_is_started_and_finished_without_a_step():
    engine = make_engine()
    request = make_request(
        max_tokens=2, sampling={"num_outputs": 2}, resumed={0: ResumedOutput((4, 5)), 1: ResumedOutput((), True)}
    )
    engine.submit(request)
    assert engine.has_work
    events = engine.step()
    assert [type(event) for event in events] == [RequestStarted, OutputFinished]
    assert events[1].num_output_tokens == 2
    assert not engine.has_work
    assert engine.status().num_steps == 0
    engine.submit(request)
    assert engine.cancel("a")
    assert engine.step() == []


def test_dropping_the_last_output_that_runs_still_tells_the_ones_that_had_ended():
    engine = make_engine()
    engine.submit(make_request(max_tokens=2, sampling={"num_outputs": 2}, resumed={0: ResumedOutput((4, 5))}))
    assert engine.cancel("a", 1)
    engine.check_integrity()
    assert [type(event) for event in engine.step()] == [RequestStarted, OutputFinished]
    assert not engine.has_work


# Cancelling and failing.


def test_a_cancelled_request_is_gone_with_its_blocks():
    engine = make_engine()
    whole = num_free(engine)
    other = make_request("b", range(5))
    engine.submit(make_request("a", range(30), max_tokens=20, sampling={"num_outputs": 3}))
    engine.submit(other)
    transcripts = {"a": Transcript(), "b": Transcript()}
    for _ in range(3):
        step(engine, transcripts)
    assert engine.cancel("a")
    engine.check_integrity()
    assert not engine.cancel("a")
    assert not engine.cancel("never there")
    transcripts["a"].add = _refuse
    while engine.has_work:
        step(engine, transcripts)
    assert_as_expected(transcripts["b"], other)
    assert num_free(engine) == whole


def test_a_waiting_request_can_be_cancelled():
    engine = make_engine(max_running=1)
    engine.submit(make_request("a"))
    engine.submit(make_request("b"))
    engine.step()
    assert engine.status().num_waiting == 1
    assert engine.cancel("b")
    assert engine.status().num_waiting == 0


def test_a_step_that_breaks_fails_its_requests_and_no_other():
    runner = FakeRunner()
    runner.fails_at = 2
    engine = make_engine(runner, max_running=2)
    whole = num_free(engine)
    requests = [make_request(str(number), range(10 * number, 10 * number + 9)) for number in range(3)]
    transcripts = run(engine, *requests)
    for request_id in "01":
        assert transcripts[request_id].error.reason is Reason.INTERNAL
        assert transcripts[request_id].error.metadata["reference"] in transcripts[request_id].error.message
    assert_as_expected(transcripts["2"], requests[2])
    assert num_free(engine) == whole
    # Nothing that the broken step wrote, or that its requests had written, is found again.
    again = run(engine, requests[0])["0"]
    assert again.started.num_cached_tokens == 0
    assert_as_expected(again, requests[0])


def test_a_request_whose_step_breaks_fails_once_with_all_its_outputs():
    runner = FakeRunner()
    runner.fails_at = 3
    engine = make_engine(runner)
    engine.submit(make_request(sampling={"num_outputs": 3}))
    engine.step()
    engine.step()
    assert [type(event) for event in engine.step()] == [RequestFailed]
    assert not engine.has_work
    engine.check_integrity()


def test_a_runner_that_gives_other_rows_fails_the_step():
    runner = FakeRunner()
    runner.forward = lambda batch: np.zeros((7, runner.vocab_size), np.float32)
    assert run_alone(make_request(), runner).error.reason is Reason.INTERNAL


def test_a_step_that_lacks_memory_fails_its_largest_request_and_the_others_go_on():
    runner = FakeRunner()
    runner.max_slice = 7
    engine = make_engine(runner)
    whole = num_free(engine)
    others = [make_request(str(number), [number] * 5, sampling={"num_outputs": 2}) for number in range(3)]
    transcripts = run(engine, others[0], make_request("large", range(12)), *others[1:])
    error = transcripts["large"].error
    assert error.reason is Reason.KV_EXHAUSTED
    assert error.metadata["reference"] in error.message
    for request in others:
        assert_as_expected(transcripts[request.request_id], request)
    assert num_free(engine) == whole
    assert not engine.is_broken


def test_a_runner_that_fails_once_is_not_given_up():
    runner = FakeRunner()
    runner.fails_at = 2
    engine = make_engine(runner)
    assert run(engine, make_request())["a"].error.reason is Reason.INTERNAL
    assert not engine.is_broken
    assert_as_expected(run(engine, make_request())["a"], make_request())


def test_a_runner_that_fails_for_good_is_given_up_once_its_requests_have_been_told():
    runner = FakeRunner()
    runner.fails_from = 3
    engine = make_engine(runner)
    engine.submit(make_request())
    engine.step()
    engine.step()
    assert not engine.is_broken
    assert [type(event) for event in engine.step()] == [RequestFailed]
    assert engine.is_broken


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "num_outputs": 2}])
@pytest.mark.parametrize("prompt_logprobs", [None, 1])
def test_logits_that_are_not_numbers_fail_their_request_alone(sampling, prompt_logprobs):
    runner = FakeRunner()
    runner.nan_token_id = 33
    bad = make_request("bad", [1, 2, 33], sampling=sampling, prompt_logprobs=prompt_logprobs)
    good = make_request("good", [1, 2, 3], sampling={"logit_bias": {33: -100.0}})
    engine = make_engine(runner)
    transcripts = run(engine, bad, good)
    assert transcripts["bad"].error.reason is Reason.INTERNAL
    assert_as_expected(transcripts["good"], good)


def test_prompt_rows_that_are_not_numbers_fail_the_request():
    runner = FakeRunner()
    runner.nan_token_id = 33
    assert run_alone(make_request(prompt=[1, 33, 2], prompt_logprobs=1), runner).error.reason is Reason.INTERNAL
    assert run_alone(make_request(prompt=[1, 33, 2]), runner).error is None


# Steps that overlap.


def test_the_next_step_is_launched_before_a_token_is_known():
    runner = LateRunner()
    engine = make_engine(runner)
    request = make_request(max_tokens=4)
    engine.submit(request)
    assert engine.step() == []
    assert [len(engine.step()) for _ in range(4)] == [2, 1, 1, 2]
    # No row for the token that max_tokens makes the last.
    assert [batch.token_ids.tolist() for batch in runner.launched] == [[1, 2, 3], [-1], [-1], [-1]]
    assert not engine.has_work


def test_a_stop_id_leaves_one_row_that_nobody_reads():
    free = run_alone(make_request(max_tokens=8)).outputs[0].token_ids
    runner = LateRunner()
    engine = make_engine(runner)
    request = make_request(max_tokens=8, stopping={"stop_token_ids": frozenset({free[2]})})
    assert_as_expected(run(engine, request)["a"], request)
    assert len(runner.batches) == free.index(free[2]) + 2
    assert engine.status().num_output_tokens == free.index(free[2]) + 1


def test_an_id_cancelled_and_used_again_gets_nothing_of_the_step_that_still_runs():
    engine = make_engine(LateRunner())
    engine.submit(make_request("a", [5, 6, 7]))
    engine.step()
    assert engine.cancel("a")
    assert engine.has_work  # the step is still to be collected
    other = make_request("a", [8, 9])
    assert_as_expected(run(engine, other)["a"], other)
    assert not engine.has_work


def test_a_step_that_breaks_late_fails_its_requests_and_no_other():
    runner = LateRunner()
    runner.fails_at = 3
    engine = make_engine(runner, max_running=2)
    whole = num_free(engine)
    requests = [make_request(str(number), range(10 * number, 10 * number + 9)) for number in range(3)]
    transcripts = run(engine, *requests)
    for request_id in "01":
        assert transcripts[request_id].error.reason is Reason.INTERNAL
    assert_as_expected(transcripts["2"], requests[2])
    assert num_free(engine) == whole
    again = run(engine, requests[0])["0"]
    assert again.started.num_cached_tokens == 0
    assert_as_expected(again, requests[0])


def test_a_device_that_is_lost_ends_the_engine():
    runner = LateRunner()
    engine = make_engine(runner)
    engine.submit(make_request())
    engine.step()

    def lose():
        raise DeviceLostError("gone")

    runner.collect = lose
    with pytest.raises(DeviceLostError):
        engine.step()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "num_outputs": 2}])
def test_logits_that_are_not_numbers_fail_their_request_alone_late(sampling):
    runner = LateRunner()
    runner.nan_token_id = 33
    bad = make_request("bad", [1, 2, 33], sampling=sampling)
    good = make_request("good", [1, 2, 3], sampling={"logit_bias": {33: -100.0}})
    transcripts = run(make_engine(runner), bad, good)
    assert transcripts["bad"].error.reason is Reason.INTERNAL
    assert_as_expected(transcripts["good"], good)


def test_the_scores_of_a_prompt_go_on_when_the_output_that_computes_it_is_dropped_in_a_running_step():
    request = make_request(prompt=range(30), sampling={"temperature": 1.0, "num_outputs": 2}, prompt_logprobs=0)
    engine = make_engine(LateRunner(), max_scored_rows=8)
    engine.submit(request)
    transcript = Transcript()
    step(engine, {"a": transcript})
    step(engine, {"a": transcript})
    assert engine.cancel("a", 0)
    while engine.has_work:
        step(engine, {"a": transcript})
    wanted = expected(request)
    assert transcript.prompt_logprobs == wanted.prompt_logprobs
    assert transcript.outputs == {1: wanted.outputs[1]}


# Refusals.


def test_refusals_name_their_reason():
    engine = make_engine()
    assert refusal(engine, make_request(prompt=[])).reason is Reason.PROMPT_EMPTY
    assert refusal(engine, make_request(prompt=[1, 40])).reason is Reason.TOKEN_ID_INVALID
    assert refusal(engine, make_request(prompt=[-1])).reason is Reason.TOKEN_ID_INVALID
    assert refusal(engine, make_request(sampling={"logit_bias": {40: 1.0}})).reason is Reason.TOKEN_ID_INVALID
    assert refusal(engine, make_request(resumed={0: ResumedOutput((40,))})).reason is Reason.TOKEN_ID_INVALID
    assert refusal(engine, make_request(resumed={1: ResumedOutput((1,))})).reason is Reason.FIELD_INVALID
    assert refusal(engine, make_request(prompt=[1] * 64)).reason is Reason.CONTEXT_LENGTH_EXCEEDED
    assert not engine.has_work
    engine.check_integrity()


def test_an_id_in_use_is_refused_until_it_is_free():
    engine = make_engine()
    engine.submit(make_request())
    assert refusal(engine, make_request()).reason is Reason.REQUEST_ID_IN_USE
    engine.cancel("a")
    engine.submit(make_request())


def test_a_request_that_could_never_fit_is_refused_alone():
    engine = make_engine(FakeRunner(num_blocks={FULL: 6, WINDOW: 6}))
    other = make_request("b", range(20), max_tokens=5)
    error = refusal(engine, make_request(prompt=range(20), max_tokens=6))
    assert error.reason is Reason.KV_EXHAUSTED
    assert "full" in error.message
    assert_as_expected(run(engine, other)["b"], other)


def test_a_request_that_just_fits_runs_beside_others():
    engine = make_engine(FakeRunner(num_blocks={FULL: 6, WINDOW: 6}))
    requests = [make_request(str(number), range(number, 20 + number), max_tokens=5) for number in range(4)]
    transcripts = run(engine, *requests)
    for request in requests:
        assert_as_expected(transcripts[request.request_id], request)


def test_the_queue_counts_sequences():
    engine = make_engine(max_running=2, max_waiting=3)
    engine.submit(make_request("a", sampling={"num_outputs": 4}))
    error = refusal(engine, make_request("b", sampling={"num_outputs": 2}))
    assert error.reason is Reason.QUEUE_FULL
    assert error.retry_after > 0
    engine.submit(make_request("c"))
    assert refusal(engine, make_request("d")).reason is Reason.QUEUE_FULL
    assert refusal(engine, make_request("e", sampling={"num_outputs": 6})).reason is Reason.FIELD_INVALID
    engine.cancel("a")
    engine.submit(make_request("d"))
    engine.check_integrity()


def test_a_group_without_blocks_is_refused():
    with pytest.raises(ServiceError) as error:
        Engine(FakeRunner(), EngineConfig(max_context=8, num_blocks={FULL: 4}))
    assert error.value.field == "num_blocks"


# Status.


def test_status_counts():
    engine = make_engine(max_running=2)
    for request_id in "abc":
        engine.submit(make_request(request_id, range(6), max_tokens=4))
    assert engine.status().num_waiting == 3
    engine.step()
    status = engine.status()
    assert (status.num_running, status.num_waiting, status.num_steps) == (2, 1, 1)
    assert (status.num_prompt_tokens, status.num_output_tokens) == (12, 2)
    assert {usage.group: usage.num_blocks - usage.num_free for usage in status.blocks} == {FULL: 4, WINDOW: 4}
    while engine.has_work:
        engine.step()
    status = engine.status()
    assert status.num_output_tokens == 12
    assert status.num_cached_tokens == 4
    assert [usage.num_free for usage in status.blocks] == [usage.num_blocks for usage in status.blocks]
    assert all(0 < usage.num_cached <= usage.num_free for usage in status.blocks)
