"""Generate calls as tests make them: the raw contract, collected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from mxgpt.v1 import executor_pb2
from shared.calls import Calls
from shared.errors import Reason, ServiceError
from shared.rpc_errors import from_rpc_error
from shared.tracing import NoTracing


@dataclass
class Collected:
    """Everything that a stream brought."""

    started: Any = None
    deltas: list[Any] = field(default_factory=list)
    finished: dict[int, Any] = field(default_factory=dict)
    prompt_logprobs: list[Any] = field(default_factory=list)

    def text(self, index: int = 0, channel: str | None = None) -> str:
        return "".join(delta.text for delta in self.deltas if delta.index == index and channel in (None, delta.channel))

    def token_ids(self, index: int = 0) -> list[int]:
        return [token_id for delta in self.deltas if delta.index == index for token_id in delta.token_ids]

    def logprobs(self, index: int = 0) -> list[Any]:
        return [entry for delta in self.deltas if delta.index == index for entry in delta.logprobs]


def uncounted_calls() -> Calls:
    """What a test's own servicer needs, where nobody asks for its figures."""
    return Calls("test", "mxgpt.v1.TestService", CollectorRegistry(), NoTracing())


def chat(content: str, **options: Any) -> Any:
    """A request with one user message."""
    message = executor_pb2.ChatMessage(role="user", content=content)
    return executor_pb2.GenerateRequest(chat=executor_pb2.Chat(messages=[message]), **options)


def greedy(**options: Any) -> Any:
    return executor_pb2.Sampling(temperature=0.0, **options)


def collect(responses: Iterable[Any]) -> Collected:
    """Read a stream to its end, checking its order: one Started first, Deltas, one Finished an output."""
    collected = Collected()
    for response in responses:
        kind = response.WhichOneof("event")
        if kind == "started":
            assert collected.started is None, "Started twice"
            collected.started = response.started
        assert collected.started is not None, f"{kind} before Started"
        if kind == "delta":
            assert response.delta.index not in collected.finished, "a Delta after Finished"
            collected.deltas.append(response.delta)
        elif kind == "finished":
            assert response.finished.index not in collected.finished, "Finished twice"
            collected.finished[response.finished.index] = response.finished
        elif kind == "prompt_logprobs":
            collected.prompt_logprobs.append(response.prompt_logprobs)
    return collected


def error_of(call: Iterable[Any], unreachable: Reason = Reason.EXECUTOR_UNAVAILABLE) -> ServiceError:
    """The error that a stream ends with; `unreachable` where no server answered."""
    with pytest.raises(grpc.RpcError) as caught:
        for _ in call:
            pass
    return from_rpc_error(caught.value, unreachable)
