"""One stream's messages that wait to be sent: Deltas grow while they wait, and go out no more often than is due."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mxgpt.v1 import executor_pb2


@dataclass
class Pending:
    """A message that waits for the client to read what came before it."""

    response: Any  # GenerateResponse
    num_entries: int = 0  # its ids and log-probabilities, ids that are not sent included


class Outbox:
    """Messages in order, in the event loop of the server.

    Args:
        delta_interval: seconds that Deltas are apart now, at least.
    """

    def __init__(self, delta_interval: Callable[[], float]) -> None:
        self.num_unread = 0  # entries of all that is pending
        self._delta_interval = delta_interval
        self._last_time = 0.0  # of the last message taken
        self._due: asyncio.TimerHandle | None = None  # of the next Delta, while it gathers
        self._pending: deque[Pending] = deque()
        self._growing: dict[int, Pending] = {}  # by output, the Delta that takes what comes next
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._pending)

    async def wait(self) -> None:
        """Wait until something is to be looked at: a message that is due, or what `wake` was called for."""
        await self._wake.wait()
        self._wake.clear()

    def wake(self) -> None:
        """Let `wait` return at once."""
        self._wake.set()

    def put(self, response: Any, num_entries: int = 0) -> None:
        """Add a message that is complete; it goes out with what is sent next."""
        self._pending.append(Pending(response, num_entries))
        self.num_unread += num_entries

    def delta(self, index: int, channel: str, recipient: str) -> Pending:
        """The Delta of an output that takes what comes now, a new one if the last went out or is of another channel."""
        pending = self._growing.get(index)
        if pending is not None:
            delta = pending.response.delta
            if (delta.channel, delta.recipient) == (channel, recipient):
                return pending
        delta = executor_pb2.Delta(index=index, channel=channel, recipient=recipient)
        pending = self._growing[index] = Pending(executor_pb2.GenerateResponse(delta=delta))
        self._pending.append(pending)
        return pending

    def grow(self, pending: Pending, num_entries: int) -> None:
        """Count what was added to a Delta, and let it out: at once, or when the last message is long enough ago."""
        pending.num_entries += num_entries
        self.num_unread += num_entries
        if self._wake.is_set() or self._due is not None:
            return
        seconds = self._last_time + self._delta_interval() - time.monotonic()
        if seconds <= 0:
            self._wake.set()
        else:
            self._due = asyncio.get_running_loop().call_later(seconds, self._let_out)

    def take(self) -> Any:
        """The oldest message; nothing is added to it any more."""
        self._last_time = time.monotonic()
        pending = self._pending.popleft()
        self.num_unread -= pending.num_entries
        if pending.response.WhichOneof("event") == "delta" and self._growing[pending.response.delta.index] is pending:
            del self._growing[pending.response.delta.index]
        return pending.response

    def clear(self) -> None:
        """Drop all that was not taken."""
        if self._due is not None:
            self._due.cancel()
        self._pending.clear()
        self._growing.clear()

    def _let_out(self) -> None:
        self._due = None
        self._wake.set()
