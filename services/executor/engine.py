"""The engine: requests in, events out, step after step.

It is single-threaded: `submit`, `cancel` and `status` are called between steps. A runner on a device computes a step
while the engine takes in the one before it and plans the next: the host never stands between two steps.
`docs/decisions/002` tells why it schedules and samples as it does, `021` how steps overlap.
"""

from __future__ import annotations

import itertools
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable

from services.executor.admission import check_queue, check_request, max_tokens
from services.executor.blocks import BlockManager
from services.executor.engine_config import EngineConfig
from services.executor.engine_status import EngineStatus
from services.executor.outcome import Outcome, read_result
from services.executor.plan import Plan, Share, probe
from services.executor.request import (
    Event,
    FinishReason,
    OutputFinished,
    PromptScored,
    Request,
    RequestFailed,
    RequestStarted,
    ResumedOutput,
    TokenDrawn,
)
from services.executor.scheduler import Scheduler
from services.executor.sequence import ActiveRequest, Sequence
from services.executor.step import DeviceLostError, Runner
from shared.errors import Reason, ServiceError, invalid_field

log = logging.getLogger(__name__)


class Engine:
    """Runs requests together on one runner.

    Events of a request come in this order: RequestStarted; then PromptScored, TokenDrawn and OutputFinished, the
    last once for each output that was not resumed as finished. Or RequestFailed ends it at any point.

    Args:
        runner: the model; its KV blocks are numbered as `config` counts them.
        config: how much to take on.
        clock: seconds, for the times that events tell.
    """

    def __init__(self, runner: Runner, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        for group in runner.kv_groups:
            if group.name not in config.num_blocks:
                raise invalid_field("num_blocks", f"lacks the group {group.name}")
        self._runner = runner
        self._config = config
        self._clock = clock
        self._blocks = BlockManager(runner.kv_groups, config.block_size, config.num_blocks, runner.depth)
        self._scheduler = Scheduler(config, self._blocks)
        self._requests: dict[str, ActiveRequest] = {}
        self._ended: list[ActiveRequest] = []  # submitted with nothing left to run
        self._in_flight: deque[tuple[Plan, float]] = deque()  # steps launched, oldest first, and when
        self._arrivals = itertools.count()
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._is_doubtful = False  # a step broke: the runner is to be checked
        self.is_broken = False  # it does not run a single token any more: deliver the events, then end

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests or self._in_flight)

    def submit(self, request: Request) -> None:
        """Take a request; what comes of it comes from `step`.

        Raises:
            ServiceError: REQUEST_ID_IN_USE, PROMPT_EMPTY, TOKEN_ID_INVALID, FIELD_INVALID,
                CONTEXT_LENGTH_EXCEEDED, KV_EXHAUSTED or QUEUE_FULL; the engine is then as before.
        """
        if request.request_id in self._requests:
            raise ServiceError(Reason.REQUEST_ID_IN_USE, f"a request with the id {request.request_id} is running")
        check_request(request, self._config, self._blocks, self._runner.vocab_size)
        check_queue(request, self._config, len(self._scheduler.running) + len(self._scheduler.waiting))
        active = ActiveRequest(request, next(self._arrivals), self._clock())
        for index in range(request.sampling.num_outputs):
            resumed = request.resumed.get(index, ResumedOutput())
            if not resumed.finished:
                self._open(active, index, resumed.token_ids)
        self._requests[request.request_id] = active
        for sequence in active.sequences.values():
            self._scheduler.add(sequence)
        if not active.sequences:
            self._ended.append(active)

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        """Drop a request, or one of its outputs, at once: its blocks are free and no event follows for it.

        Returns:
            Whether there was anything to drop.
        """
        active = self._requests.get(request_id)
        if active is None:
            return False
        if index is None:
            self._drop(active)
            return True
        if index not in active.sequences:
            return False
        self._retire(active.sequences[index])
        return True

    def step(self) -> list[Event]:
        """Launch the next step, then take in the oldest that runs, unless the runner can hold one more.

        Raises:
            DeviceLostError: nothing can be run any more.
        """
        step_time = self._clock()
        events = self._tell_ended(step_time)
        plan = self._scheduler.schedule()
        assert plan is not None or self._in_flight or not self._requests, "sequences wait, and none can run"
        if plan is not None:
            events += self._launch(plan, step_time)
        if self._in_flight and (plan is None or len(self._in_flight) >= self._runner.depth):
            events += self._collect()
        if self._is_doubtful:
            events += self._check_runner()
        return events

    def status(self) -> EngineStatus:
        """What the engine is doing now."""
        scheduler = self._scheduler
        return EngineStatus(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            blocks=self._blocks.usage(),
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_output_tokens=self._num_output_tokens,
            num_preemptions=scheduler.num_preemptions,
        )

    def check_integrity(self) -> None:
        """Assert every invariant between steps; for tests and for finding defects."""
        self._scheduler.check_integrity()
        sequences = [sequence for active in self._requests.values() for sequence in active.sequences.values()]
        scheduled = self._scheduler.running + self._scheduler.waiting
        assert set(map(id, sequences)) == set(map(id, scheduled)), "requests and scheduler disagree"
        assert len(scheduled) == len(sequences), "a sequence is scheduled twice"
        for active in self._requests.values():
            assert active.sequences or active in self._ended, "a request without sequences stays"
        self._blocks.check_integrity(scheduled)

    def _open(self, active: ActiveRequest, index: int, resumed_token_ids: tuple[int, ...]) -> None:
        """Make an output's sequence, unless what was resumed has ended already."""
        sequence = Sequence(
            active,
            index,
            resumed_token_ids,
            max_tokens(active.request, self._config),
            self._runner.vocab_size,
            len(self._runner.kv_groups),
            self._config.block_size,
        )
        ending = sequence.ending()
        if ending is None:
            active.sequences[index] = sequence
        else:
            active.ended.append(_finished(sequence, ending))

    def _tell_ended(self, step_time: float) -> list[Event]:
        """Start and end the requests that had nothing left to run."""
        events: list[Event] = []
        for active in self._ended:
            self._start(active, step_time, events)
            del self._requests[active.request.request_id]
        self._ended.clear()
        return events

    def _launch(self, plan: Plan, step_time: float) -> list[Event]:
        """Give a step to the runner."""
        try:
            self._runner.launch(plan.batch, plan.draws)
        except DeviceLostError:
            raise
        except MemoryError:  # the others' shares are launched again
            return self._fail_step([max(plan.shares, key=_num_tokens)], Reason.KV_EXHAUSTED)
        except Exception:
            return self._fail_step(plan.shares)
        self._scheduler.launch(plan)
        self._in_flight.append((plan, step_time))
        return []

    def _collect(self) -> list[Event]:
        """Take in what the oldest step gave."""
        plan, step_time = self._in_flight.popleft()
        self._scheduler.collect(plan)
        try:
            outcomes = read_result(plan, self._runner.collect())
        except DeviceLostError:
            raise
        except Exception:
            return self._fail_step(plan.shares)
        self._num_steps += 1
        events = self._fail_unsound(outcomes)
        for outcome in outcomes:
            if self._concerns(outcome):
                self._deliver(outcome, step_time, events)
        return events

    def _concerns(self, outcome: Outcome) -> bool:
        """Whether anybody still waits for what a sequence's rows gave: it may have ended, or been dropped, since."""
        sequence = outcome.share.sequence
        active = sequence.active
        if self._requests.get(active.request.request_id) is not active:
            return False
        # Scores of the prompt are the request's: the next output goes on after them.
        return active.sequences.get(sequence.index) is sequence or outcome.share.num_scored_rows > 0

    def _deliver(self, outcome: Outcome, step_time: float, events: list[Event]) -> None:
        """Take what one sequence's rows gave into its state and tell it."""
        sequence = outcome.share.sequence
        active = sequence.active
        if sequence.seat is not None:  # else its blocks were taken from it while the step ran
            self._advance(sequence, outcome.share.num_tokens)
        if not active.is_started:
            self._start(active, step_time, events)
        if outcome.scores:
            events.append(PromptScored(active.request.request_id, outcome.share.first_scored + 1, outcome.scores))
        if outcome.token_id is None or active.sequences.get(sequence.index) is not sequence:
            return
        sequence.append(outcome.token_id)
        self._num_output_tokens += 1
        events.append(TokenDrawn(active.request.request_id, sequence.index, outcome.token_id, outcome.logprobs))
        ending = sequence.ending()
        if ending is not None:
            self._retire(sequence)
            events.append(_finished(sequence, ending))

    def _advance(self, sequence: Sequence, num_tokens: int) -> None:
        num_prompt_left = sequence.num_prompt_tokens - sequence.num_computed
        if num_prompt_left > 0:
            self._num_prompt_tokens += min(num_tokens, num_prompt_left)
        if num_tokens >= num_prompt_left:
            sequence.active.is_prompt_computed = True
        sequence.num_computed += num_tokens
        self._blocks.advance(sequence)

    def _start(self, active: ActiveRequest, step_time: float, events: list[Event]) -> None:
        active.is_started = True
        queue_seconds = step_time - active.submit_time
        events.append(RequestStarted(active.request.request_id, active.num_cached_tokens, queue_seconds))
        events.extend(active.ended)

    def _retire(self, sequence: Sequence) -> None:
        """Take an output out of the engine, and with the last one its request."""
        active = sequence.active
        self._scheduler.remove(sequence)
        del active.sequences[sequence.index]
        if active.sequences:
            return
        if active.ended and not active.is_started:  # cancelled before it was told that other outputs had ended
            self._ended.append(active)
        else:
            del self._requests[active.request.request_id]

    def _drop(self, active: ActiveRequest, is_sound: bool = True) -> None:
        """Take a whole request out of the engine."""
        for sequence in active.sequences.values():
            self._scheduler.remove(sequence, is_sound)
        if active in self._ended:
            self._ended.remove(active)
        del self._requests[active.request.request_id]

    def _fail_step(self, shares: list[Share], reason: Reason = Reason.INTERNAL) -> list[Event]:
        """Fail the requests of a step that broke, or those of its shares that it broke for."""
        self._is_doubtful = True
        reference = uuid.uuid4().hex[:12]
        log.exception("a step failed, reference %s", reference)
        what = "the model failed" if reason is Reason.INTERNAL else "memory ran out"
        actives = [share.sequence.active for share in shares]
        running = [active for active in actives if self._requests.get(active.request.request_id) is active]
        return self._fail(running, f"{what} in a step of this request, reference {reference}", reference, reason)

    def _check_runner(self) -> list[Event]:
        """After a step that broke: see whether a single token still runs, on blocks that hold nothing."""
        events: list[Event] = []
        while self._in_flight:
            events += self._collect()
        self._is_doubtful = False
        tables = self._blocks.spare_tables()  # the requests that failed have left some, unless they were gone already
        if tables is not None:
            plan = probe(tables)
            try:
                self._runner.launch(plan.batch, plan.draws)
                self._runner.collect()
            except Exception:
                log.exception("not even a single token runs any more; giving up")
                self.is_broken = True
        return events

    def _fail_unsound(self, outcomes: list[Outcome]) -> list[Event]:
        """Fail the requests whose logits can't be drawn from."""
        unsound = [outcome for outcome in outcomes if not outcome.is_sound and self._concerns(outcome)]
        actives = [outcome.share.sequence.active for outcome in unsound]
        if not actives:
            return []
        reference = uuid.uuid4().hex[:12]
        ids = [active.request.request_id for active in actives]
        log.error("logits of requests %s are not finite, reference %s", ids, reference)
        return self._fail(actives, f"the model's logits are not finite, reference {reference}", reference)

    def _fail(
        self, actives: list[ActiveRequest], message: str, reference: str, reason: Reason = Reason.INTERNAL
    ) -> list[Event]:
        events: list[Event] = []
        for active in dict.fromkeys(actives):
            self._drop(active, is_sound=False)
            error = ServiceError(reason, message, metadata={"reference": reference})
            events.append(RequestFailed(active.request.request_id, error))
        return events


def _num_tokens(share: Share) -> int:
    return share.num_tokens


def _finished(sequence: Sequence, ending: tuple[FinishReason, int | None]) -> OutputFinished:
    reason, matched_token_id = ending
    request_id = sequence.active.request.request_id
    return OutputFinished(request_id, sequence.index, reason, sequence.num_output_tokens, matched_token_id)
