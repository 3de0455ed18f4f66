"""When a failed call is tried again, and after how long: pure, so that both clients share it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from mxgpt.errors import MxgptError, deadline_exceeded
from shared.errors import Reason


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently a call is tried again.

    Delays double from `initial_backoff` to `max_backoff`, each shortened by up to half at random, so that
    clients of one dead executor do not all come back at once. A server's own RetryInfo counts as a minimum.
    """

    max_attempts: int = 4  # in a row without a token, before the first token has come
    max_resume_attempts: int = 8  # the same after it, and before it of executors that are known: see `Executors`
    max_resumes: int = 32  # attempts to resume one stream in all: a prompt that kills executors comes to an end
    initial_backoff: float = 0.1  # seconds
    max_backoff: float = 5.0  # seconds

    def __post_init__(self) -> None:
        if min(self.max_attempts, self.max_resume_attempts) < 1 or self.max_resumes < 0:
            raise ValueError("a call takes at least one attempt")
        if not 0 <= self.initial_backoff <= self.max_backoff:
            raise ValueError("backoff runs from initial_backoff up to max_backoff, both at least 0")


@dataclass
class Executors:
    """Those behind one client's target. Its threads share it, and only ever set what is in it.

    known: one has served this client, or said that it stops. Whoever is missing then is being restarted, and the
        channel may take two seconds more to notice that it is back (`grpc.max_reconnect_backoff_ms`): worth more
        patience than an address where nobody ever answered.
    """

    known: bool = False


class Retries:
    """The attempts of one call, under one deadline.

    Args:
        policy: the bounds.
        executors: what its client knows of them, and learns from this call.
        timeout: seconds for all attempts and the waits between them; None for no limit.
        clock, uniform: time in seconds and a draw from [0, 1), for tests.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        executors: Executors,
        timeout: float | None,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._executors = executors
        self._clock = clock
        self._uniform = uniform
        self._deadline = None if timeout is None else clock() + timeout
        self._num_failures = 0  # in a row, without a token between them
        self._num_resume_attempts = 0
        self._is_resuming = False
        self._num_resumes = 0

    @property
    def num_resumes(self) -> int:
        """Breaks of the stream that it survived, however many attempts each took."""
        return self._num_resumes

    def remaining(self) -> float | None:
        """Seconds left, for the next attempt; None for no limit.

        Raises:
            MxgptError: DEADLINE_EXCEEDED when none are left.
        """
        if self._deadline is None:
            return None
        seconds = self._deadline - self._clock()
        if seconds <= 0:
            raise deadline_exceeded()
        return seconds

    def succeeded(self) -> None:
        """Note that something new has come."""
        self._executors.known = True
        self._num_failures = 0
        self._num_resumes += self._is_resuming
        self._is_resuming = False

    def delay_after(self, error: MxgptError, started: bool) -> float:
        """Seconds to wait before the next attempt.

        Args:
            error: how the last attempt ended.
            started: the first token has come, in this attempt or before.

        Raises:
            MxgptError: `error` itself where another attempt makes no sense or is one too many.
        """
        self._num_failures += 1
        if error.reason == Reason.DRAINING.name:
            self._executors.known = True
        is_patient = started or (self._executors.known and error.is_unavailable)
        limit = self._policy.max_resume_attempts if is_patient else self._policy.max_attempts
        if not self._is_passing(error) or self._num_failures >= limit:
            raise error
        if started:
            self._is_resuming = True
            self._num_resume_attempts += 1
            if self._num_resume_attempts > self._policy.max_resumes:
                raise error
        delay = self._backoff(error)
        left = self.remaining()
        if left is not None and delay >= left:
            raise error
        return delay

    def _is_passing(self, error: MxgptError) -> bool:
        """Whether another attempt, perhaps on another executor, may fare better."""
        if error.is_unavailable or error.reason in (Reason.QUEUE_FULL.name, Reason.KEY_LIMIT_REACHED.name):
            return True
        # The attempt before may not have left its executor yet, when its connection broke.
        return error.reason == Reason.REQUEST_ID_IN_USE.name and self._num_failures > 1

    def _backoff(self, error: MxgptError) -> float:
        doubled = self._policy.initial_backoff * 2.0 ** (self._num_failures - 1)
        delay = min(doubled, self._policy.max_backoff) * (1.0 - 0.5 * self._uniform())
        return max(delay, error.retry_after or 0.0)
