"""One Generate call's buffer: it merges, it is bounded, it ends once, and nothing of it stays behind."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest

from services.executor import generation as module
from services.executor.generation import Form, Generation, Origin
from services.executor.request import (
    FinishReason,
    Logprobs,
    OutputFinished,
    PromptScored,
    Request,
    RequestStarted,
    Sampling,
    Stopping,
    TokenDrawn,
)
from shared.errors import Reason, ServiceError

IDS_ALONE = Form(text=False, token_ids=True, stop_strings=(), harmony=False, special_tokens=False)  # needs no tokenizer


class Engine:
    """Draws tokens for a call by hand, and notes which outputs the call has cancelled."""

    def __init__(self, num_outputs: int = 1) -> None:
        self.cancelled: list[int | None] = []
        request = Request("7", (1, 2, 3), Sampling(seed=1, num_outputs=num_outputs), Stopping(max_tokens=100))
        no_pipe: Any = None
        self.generation = Generation(
            request=request,
            request_id="mine",
            caller="",
            origin=Origin("executor", "model", "digest"),
            form=IDS_ALONE,
            vocabulary=None,
            pipe=no_pipe,
            cancel=self.cancelled.append,
            on_finished=lambda _finished, _num_resumed: None,
            delta_interval=lambda: 0.0,
        )
        self.generation.on_event(RequestStarted("7", 0, 0.0))

    def draw(self, index: int, token_id: int, logprobs: Logprobs | None = None) -> None:
        self.generation.on_event(TokenDrawn("7", index, token_id, logprobs))

    def finish(self, index: int) -> None:
        self.generation.on_event(OutputFinished("7", index, FinishReason.LENGTH, 1))

    def read(self) -> tuple[list[Any], ServiceError | None]:
        """What a client that reads now would get, and the error at its end."""

        async def main() -> tuple[list[Any], ServiceError | None]:
            responses = []
            try:
                async for response in self.generation.responses():
                    responses.append(response)
            except ServiceError as error:
                return responses, error
            return responses, None

        return asyncio.run(main())


def test_what_a_slow_client_has_not_read_goes_out_in_one_delta_an_output() -> None:
    engine = Engine(num_outputs=2)
    for number in range(50):
        engine.draw(0, number)
        engine.draw(1, 100 + number)
    engine.finish(0)
    engine.finish(1)
    responses, error = engine.read()
    assert error is None
    assert [response.WhichOneof("event") for response in responses] == [
        "started",
        "delta",
        "delta",
        "finished",
        "finished",
    ]
    assert list(responses[1].delta.token_ids) == list(range(50))
    assert list(responses[2].delta.token_ids) == list(range(100, 150))


@pytest.mark.parametrize(("num_top", "num_kept"), [(None, 64), (6, 8)])
def test_a_client_that_lags_too_far_behind_is_given_up(
    monkeypatch: pytest.MonkeyPatch, num_top: int | None, num_kept: int
) -> None:
    """An entry for each id, and one for each log-probability."""
    monkeypatch.setattr(module, "MAX_UNREAD", 64)
    engine = Engine()
    logprobs = None if num_top is None else Logprobs(5, -1.0, tuple((i, -1.0) for i in range(num_top)))
    for _ in range(num_kept):
        engine.draw(0, 5, logprobs)
    assert engine.cancelled == []
    for _ in range(10):
        engine.draw(0, 5, logprobs)
    assert engine.cancelled == [None], "told at once, and once"
    engine.finish(0)  # under way when it was cancelled
    responses, error = engine.read()
    assert error is not None
    assert error.reason is Reason.CLIENT_STALLED
    assert sum(len(response.delta.token_ids) for response in responses) == num_kept + 1
    assert all(response.WhichOneof("event") != "finished" for response in responses)


def test_scores_of_a_prompt_go_out_as_they_come_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNREAD", 64)
    engine = Engine()
    scores = tuple(Logprobs(5, -1.0, ((5, -1.0), (6, -2.0))) for _ in range(10))  # four entries each

    async def read() -> list[str | None]:
        responses = engine.generation.responses()
        engine.generation.on_event(PromptScored("7", 1, scores))
        return [(await anext(responses)).WhichOneof("event") for _ in range(2)]

    assert asyncio.run(asyncio.wait_for(read(), 60.0)) == ["started", "prompt_logprobs"], "before the first token"
    for start in (11, 21):
        assert engine.cancelled == []
        engine.generation.on_event(PromptScored("7", start, scores))
    assert engine.cancelled == [None]
    _, error = engine.read()
    assert error is not None
    assert error.reason is Reason.CLIENT_STALLED


def test_a_call_that_fails_rids_the_engine_of_it_at_once() -> None:
    """Not only when its client has read what is pending: by an id, by another call that resumes it, by a drain."""
    engine = Engine()
    engine.draw(0, 1)
    engine.generation.fail(ServiceError(Reason.CANCELLED, "by its id"))
    assert engine.cancelled == [None]


def test_a_client_that_reads_may_get_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNREAD", 64)
    engine = Engine()

    async def read() -> int:
        num_ids = 0
        responses = engine.generation.responses()
        for number in range(100):
            for _ in range(10):
                engine.draw(0, number)
            if number == 0:
                await anext(responses)  # Started
            num_ids += len((await anext(responses)).delta.token_ids)
        return num_ids

    assert asyncio.run(read()) == 1000


def test_a_stream_that_has_finished_is_not_failed_as_well() -> None:
    engine = Engine()
    engine.draw(0, 1)
    engine.finish(0)
    engine.generation.fail(ServiceError(Reason.CANCELLED, "too late"))
    responses, error = engine.read()
    assert error is None
    assert responses[-1].WhichOneof("event") == "finished"


def test_nothing_of_a_call_that_failed_waits_for_the_garbage_collector() -> None:
    """Its error's traceback leads back to it: what a stalled client had not read would stay for minutes."""
    engine = Engine()
    engine.draw(0, 1)
    engine.generation.fail(ServiceError(Reason.CLIENT_STALLED, "stalled"))
    gc.disable()
    try:
        engine.read()
        engine.generation.close()
        alive = weakref.ref(engine.generation)
        del engine
        assert alive() is None
    finally:
        gc.enable()
