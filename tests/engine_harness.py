"""Runs requests on an engine to their end, and computes by itself what each should give."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.executor.engine import Engine
from services.executor.engine_config import EngineConfig
from services.executor.request import (
    FinishReason,
    OutputFinished,
    PromptScored,
    Request,
    RequestFailed,
    RequestStarted,
    ResumedOutput,
    Sampling,
    Stopping,
    TokenDrawn,
)
from services.executor.sampling import OutputSampler, score
from services.executor.step import FULL, WINDOW
from tests.fake_runner import FakeRunner, fake_logits


@dataclass
class Output:
    """What came for one output."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    reason: FinishReason | None = None
    matched_token_id: int | None = None
    num_output_tokens: int | None = None


@dataclass
class Transcript:
    """What came for one request; `add` asserts the order that the engine promises."""

    started: RequestStarted | None = None
    outputs: dict[int, Output] = field(default_factory=dict)
    prompt_logprobs: list = field(default_factory=list)
    error: object = None

    def add(self, event):
        assert self.error is None, "an event after RequestFailed"
        if isinstance(event, RequestStarted):
            assert self.started is None, "started twice"
            self.started = event
        elif isinstance(event, RequestFailed):
            self.error = event.error
        else:
            assert self.started is not None, "an event before RequestStarted"
            self._add_result(event)

    def _add_result(self, event):
        if isinstance(event, PromptScored):
            assert event.start == len(self.prompt_logprobs) + 1
            self.prompt_logprobs.extend(event.logprobs)
            return
        output = self.outputs.setdefault(event.index, Output())
        assert output.reason is None, "an event after OutputFinished"
        if isinstance(event, TokenDrawn):
            output.token_ids.append(event.token_id)
            output.logprobs.append(event.logprobs)
        else:
            assert isinstance(event, OutputFinished)
            output.reason, output.matched_token_id = event.reason, event.matched_token_id
            output.num_output_tokens = event.num_output_tokens


def make_request(request_id="a", prompt=(1, 2, 3), max_tokens=8, stopping=None, sampling=None, **fields):
    """A request, greedy unless `sampling` says otherwise."""
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=Sampling(**{"seed": 1, "temperature": 0.0, **(sampling or {})}),
        stopping=Stopping(max_tokens=max_tokens, **(stopping or {})),
        **fields,
    )


def make_engine(runner=None, **bounds):
    """An engine over the fake model, small enough that everything runs short."""
    runner = runner or FakeRunner()
    config = {"max_context": 64, "max_batch_tokens": 16, "max_running": 8, "max_waiting": 64, **bounds}
    return Engine(runner, EngineConfig(num_blocks=runner.num_blocks, block_size=runner.block_size, **config))


def run(engine, *requests):
    """Submit, then step until idle; transcripts by request id."""
    for request in requests:
        engine.submit(request)
    transcripts = {request.request_id: Transcript() for request in requests}
    while engine.has_work:
        step(engine, transcripts)
    return transcripts


def step(engine, transcripts):
    for event in engine.step():
        transcripts[event.request_id].add(event)
    engine.check_integrity()


def run_alone(request, runner=None, **bounds):
    """The request's transcript on an idle engine of its own."""
    return run(make_engine(runner, **bounds), request)[request.request_id]


def num_free(engine):
    return {usage.group: usage.num_free for usage in engine.status().blocks}


def expected(request, runner=None, max_context=64):
    """The transcript that the fake model's mathematics gives, without engine, blocks or batches."""
    runner = runner or FakeRunner()
    transcript = Transcript(started=None)
    for index in range(request.sampling.num_outputs):
        resumed = request.resumed.get(index, ResumedOutput())
        if not resumed.finished:
            transcript.outputs[index] = _expected_output(request, index, resumed.token_ids, runner, max_context)
    is_run = any(output.token_ids for output in transcript.outputs.values())
    if request.prompt_logprobs is not None and is_run:
        ids = request.prompt_token_ids
        for position in range(1, len(ids)):
            logits = fake_logits(ids[:position], runner.window, runner.vocab_size)
            transcript.prompt_logprobs.append(score(logits, ids[position], request.prompt_logprobs))
    return transcript


def _expected_output(request, index, resumed_token_ids, runner, max_context):
    prompt, stopping = request.prompt_token_ids, request.stopping
    max_tokens = min(stopping.max_tokens, max_context - len(prompt))
    sampler = OutputSampler(request.sampling, stopping, index, runner.vocab_size, prompt)
    ids, output = list(resumed_token_ids), Output()
    for token_id in ids:
        sampler.observe(token_id)
    while True:
        if ids and ids[-1] in stopping.stop_token_ids | stopping.eog_token_ids and len(ids) > stopping.min_tokens:
            output.reason, output.matched_token_id = FinishReason.STOP, ids[-1]
        elif len(ids) >= max_tokens:
            output.reason = FinishReason.LENGTH
        if output.reason is not None:
            output.num_output_tokens = len(ids)
            return output
        logits = fake_logits([*prompt, *ids], runner.window, runner.vocab_size)
        token_id = int(logits.argmax()) if sampler.takes_argmax else sampler.draw(logits)
        sampler.observe(token_id)
        ids.append(token_id)
        output.token_ids.append(token_id)
        wants = request.logprobs is not None
        output.logprobs.append(score(logits, token_id, request.logprobs) if wants else None)


def assert_as_expected(transcript, request, runner=None, max_context=64):
    wanted = expected(request, runner, max_context)
    assert transcript.error is None
    assert transcript.outputs == wanted.outputs
    assert transcript.prompt_logprobs == wanted.prompt_logprobs


FEW_BLOCKS = {FULL: 14, WINDOW: 14}
