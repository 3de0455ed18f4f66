"""The Generate calls that run, and the engine's events to each of them."""

from __future__ import annotations

from collections.abc import Sequence

from services.executor.generation import Generation
from services.executor.request import Event
from shared.errors import Reason, ServiceError

# Of all streams together: a message costs the server's one core 60 to 80 us, however many tokens it carries.
DELTAS_PER_SECOND = 5000


class Generations:
    """The running Generate calls, by the engine's id, and by caller and the caller's id."""

    def __init__(self) -> None:
        self._by_engine_id: dict[str, Generation] = {}
        self._by_request_id: dict[tuple[str, str], Generation] = {}

    def __len__(self) -> int:
        return len(self._by_engine_id)

    def delta_interval(self) -> float:
        """Seconds between the Deltas of a stream, so that all together are not more than the server can send."""
        return len(self._by_engine_id) / DELTAS_PER_SECOND

    def add(self, generation: Generation, takes_over: bool) -> None:
        """Register a call. One that resumes takes its request id over from a call of its caller's that has broken.

        Raises:
            ServiceError: REQUEST_ID_IN_USE.
        """
        older = self.find(generation.caller, generation.request_id)
        if older is not None:
            if not takes_over:
                raise ServiceError(
                    Reason.REQUEST_ID_IN_USE, f"request_id: {generation.request_id} is running", field="request_id"
                )
            older.fail(ServiceError(Reason.CANCELLED, "the request was resumed by another call"))
        self._by_request_id[generation.caller, generation.request_id] = generation
        self._by_engine_id[generation.request.request_id] = generation

    def remove(self, generation: Generation) -> None:
        """Forget a call that has ended."""
        self._by_engine_id.pop(generation.request.request_id, None)
        if self.find(generation.caller, generation.request_id) is generation:
            del self._by_request_id[generation.caller, generation.request_id]

    def find(self, caller: str, request_id: str) -> Generation | None:
        """The call that the caller knows as `request_id`."""
        return self._by_request_id.get((caller, request_id))

    def on_events(self, events: Sequence[Event]) -> None:
        """Give each event of a step to its call; events of calls that have ended are dropped."""
        for event in events:
            generation = self._by_engine_id.get(event.request_id)
            if generation is not None:
                generation.on_event(event)

    def fail_all(self, error: ServiceError) -> None:
        """End every call with an error."""
        for generation in list(self._by_engine_id.values()):
            generation.fail(error)
