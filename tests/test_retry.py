"""When the clients try again."""

import grpc
import pytest

from mxgpt import MxgptError, RetryPolicy
from mxgpt.retry import Executors, Retries
from shared.channel import CHANNEL_OPTIONS

BROKEN = MxgptError(grpc.StatusCode.UNAVAILABLE, "EXECUTOR_UNAVAILABLE", "gone")
STOPPING = MxgptError(grpc.StatusCode.UNAVAILABLE, "DRAINING", "stopping")
FULL = MxgptError(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "full", retry_after=0.7)
LIMITED = MxgptError(grpc.StatusCode.RESOURCE_EXHAUSTED, "KEY_LIMIT_REACHED", "all calls run", retry_after=0.9)
IN_USE = MxgptError(grpc.StatusCode.FAILED_PRECONDITION, "REQUEST_ID_IN_USE", "in use")
INVALID = MxgptError(grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID", "no")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _retries(
    timeout: float | None = None, clock: Clock | None = None, executors: Executors | None = None, **policy
) -> Retries:
    return Retries(RetryPolicy(**policy), executors or Executors(), timeout, clock or Clock(), uniform=lambda: 0.0)


def test_delays_double_up_to_the_longest():
    retries = _retries(max_attempts=7, initial_backoff=0.1, max_backoff=1.0)
    delays = [retries.delay_after(BROKEN, started=False) for _ in range(6)]
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])


def test_the_last_attempt_raises_its_own_error():
    retries = _retries(max_attempts=2)
    retries.delay_after(BROKEN, started=False)
    with pytest.raises(MxgptError) as caught:
        retries.delay_after(BROKEN, started=False)
    assert caught.value is BROKEN


def test_an_executor_that_stops_is_worth_more_attempts():
    """A balancer may send a call to it again and again until it has noticed."""
    retries = _retries(max_attempts=2, max_resume_attempts=4)
    for _ in range(3):
        retries.delay_after(STOPPING, started=False)
    with pytest.raises(MxgptError) as caught:
        retries.delay_after(STOPPING, started=False)
    assert caught.value is STOPPING


@pytest.mark.parametrize("learnt", ["by this call", "by another"])
def test_known_executors_are_worth_more_attempts(learnt):
    """They are being restarted, or the channel has not noticed yet that they are back."""
    executors = Executors()
    if learnt == "by another":
        _retries(executors=executors).succeeded()
    retries = _retries(executors=executors, max_attempts=2, max_resume_attempts=4)
    retries.delay_after(STOPPING if learnt == "by this call" else BROKEN, started=False)
    for _ in range(2):
        retries.delay_after(BROKEN, started=False)
    with pytest.raises(MxgptError) as caught:
        retries.delay_after(BROKEN, started=False)
    assert caught.value is BROKEN


def test_known_executors_that_are_full_are_asked_no_more_often_than_others():
    retries = _retries(executors=Executors(known=True), max_attempts=2, max_resume_attempts=4)
    retries.delay_after(FULL, started=False)
    with pytest.raises(MxgptError):
        retries.delay_after(FULL, started=False)


def test_known_executors_are_waited_for_longer_than_a_channel_takes_to_notice_them():
    channel_seconds = dict(CHANNEL_OPTIONS)["grpc.max_reconnect_backoff_ms"] / 1e3 * 1.2  # gRPC's own jitter: 20 %
    retries = Retries(RetryPolicy(), Executors(known=True), None, Clock(), uniform=lambda: 1.0)
    waits = [retries.delay_after(BROKEN, started=False) for _ in range(RetryPolicy().max_resume_attempts - 1)]
    assert sum(waits) > 2 * channel_seconds


def test_a_token_starts_the_count_again_but_not_that_of_resumes():
    retries = _retries(max_resume_attempts=2, max_resumes=5)
    for _ in range(5):
        retries.delay_after(BROKEN, started=True)
        retries.succeeded()
    with pytest.raises(MxgptError):
        retries.delay_after(BROKEN, started=True)


def test_a_break_survived_counts_once_whatever_it_took():
    retries = _retries(max_resume_attempts=8)
    retries.delay_after(BROKEN, started=False)
    retries.succeeded()
    assert retries.num_resumes == 0, "nothing had come that could be resumed"
    for _ in range(7):
        retries.delay_after(BROKEN, started=True)
    assert retries.num_resumes == 0, "not survived yet"
    for _ in range(3):
        retries.succeeded()
    assert retries.num_resumes == 1
    retries.delay_after(BROKEN, started=True)
    retries.succeeded()
    assert retries.num_resumes == 2


def test_errors_of_the_request_are_not_tried_again():
    with pytest.raises(MxgptError) as caught:
        _retries().delay_after(INVALID, started=False)
    assert caught.value is INVALID


def test_the_servers_own_delay_is_a_minimum():
    assert _retries().delay_after(FULL, started=False) == 0.7
    assert _retries().delay_after(LIMITED, started=False) == 0.9


def test_id_in_use_passes_only_after_a_break():
    with pytest.raises(MxgptError):
        _retries().delay_after(IN_USE, started=False)
    retries = _retries()
    retries.delay_after(BROKEN, started=True)
    assert retries.delay_after(IN_USE, started=True) > 0


def test_one_deadline_over_all_attempts():
    clock = Clock()
    retries = _retries(timeout=1.0, clock=clock)
    assert retries.remaining() == 1.0
    clock.now = 0.95
    with pytest.raises(MxgptError) as caught:
        retries.delay_after(BROKEN, started=False)
    assert caught.value is BROKEN, "no time for another attempt: the real cause is told"
    clock.now = 1.0
    with pytest.raises(MxgptError) as caught:
        retries.remaining()
    assert caught.value.reason == "DEADLINE"


@pytest.mark.parametrize("policy", [{"max_attempts": 0}, {"initial_backoff": 9.0}, {"max_resumes": -1}])
def test_policy_checks_itself(policy):
    with pytest.raises(ValueError, match=r"attempt|backoff"):
        RetryPolicy(**policy)
