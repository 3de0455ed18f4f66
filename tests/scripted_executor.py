"""A small executor for tests of clients: real gRPC, a made-up model, and faults on demand.

The model is a function: token t of output i is known in advance, so that a test can say what must come whatever
breaks. It honours `resume` as the contract has it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field

import grpc

from mxgpt.v1 import executor_pb2 as pb
from mxgpt.v1 import executor_pb2_grpc as pb_grpc
from shared.errors import ServiceError
from shared.rpc_errors import DETAILS_KEY, error_details, status_code

DIGEST = "d1" * 32
WORDS = ("some ", "words ", "and ", "ünïcödé ", "🙂 ", "", "日本 ")
PROMPT_IDS = (5, 6, 7, 8)


def token_id(index: int, position: int) -> int:
    return (31 * index + 7 * position) % 1000


def token_text(index: int, position: int) -> str:
    return WORDS[(3 * index + position) % len(WORDS)]


def whole_text(index: int, num_tokens: int) -> str:
    return "".join(token_text(index, position) for position in range(num_tokens))


def whole_ids(index: int, num_tokens: int) -> tuple[int, ...]:
    return tuple(token_id(index, position) for position in range(num_tokens))


def messages(request: pb.GenerateRequest, executor_id: str = "one") -> list[pb.GenerateResponse]:
    """Everything that a sound executor sends for a request, one to three tokens a Delta, outputs in turn."""
    num_tokens = request.stopping.max_tokens or 10
    num_outputs = request.sampling.n or 1
    resumed = {output.index: output for output in request.resume.outputs}
    seed = request.resume.seed if request.HasField("resume") else request.sampling.seed or 77
    started = pb.Started(
        request_id=request.request_id or "made-up",
        executor_id=executor_id,
        model="fake",
        digest=DIGEST,
        seed=seed,
        prompt_token_ids=PROMPT_IDS,
    )
    answer = [pb.GenerateResponse(started=started)]
    if request.output.HasField("prompt_logprobs") and not request.HasField("resume"):
        answer += [_prompt_logprobs(1, 2), _prompt_logprobs(3, 1)]
    running = {i for i in range(num_outputs) if not (i in resumed and resumed[i].finished)}
    for index in running & set(resumed):
        assert tuple(resumed[index].token_ids) == whole_ids(index, len(resumed[index].token_ids))
    positions = {i: len(resumed[i].token_ids) if i in resumed else 0 for i in running}
    step = 0
    while running:
        for index in sorted(running):
            step += 1
            end = min(positions[index] + 1 + (step + index) % 3, num_tokens)
            if end > positions[index]:
                answer.append(_delta(request, index, positions[index], end))
            positions[index] = end
            if end == num_tokens:
                running.remove(index)
                answer.append(_finished(index, num_tokens))
    return answer


@dataclass
class ScriptedExecutor(pb_grpc.ExecutorServiceServicer):
    """Answers with `messages`; `faults` are taken one a call, and may cut it short."""

    executor_id: str = "one"
    faults: list[Callable[[int, grpc.ServicerContext], None]] = field(default_factory=list)
    delay: float = 0.0  # seconds before each message
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    tokens_seen: list[str] = field(default_factory=list)  # authorization of each call
    num_cancelled: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.tokens_seen.append(dict(context.invocation_metadata()).get("authorization", ""))
        fault = self.faults.pop(0) if self.faults else None
        ended = threading.Event()
        context.add_callback(lambda: None if ended.is_set() else self._on_cancelled())
        for number, message in enumerate(messages(request, self.executor_id)):
            if fault is not None:
                fault(number, context)
            deadline = time.monotonic() + self.delay
            while time.monotonic() < deadline and context.is_active():
                time.sleep(0.01)
            if not context.is_active():
                return
            yield message
        if fault is not None:
            fault(-1, context)
        ended.set()

    def Cancel(self, request: pb.CancelRequest, context: grpc.ServicerContext) -> pb.CancelResponse:
        return pb.CancelResponse(executor_id=self.executor_id)

    def ListModels(
        self, request: pb.ExecutorServiceListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ExecutorServiceListModelsResponse:
        return pb.ExecutorServiceListModelsResponse(models=[self._model()])

    def GetStatus(
        self, request: pb.ExecutorServiceGetStatusRequest, context: grpc.ServicerContext
    ) -> pb.ExecutorServiceGetStatusResponse:
        return pb.ExecutorServiceGetStatusResponse(executor_id=self.executor_id, model=self._model(), device="cpu")

    def _on_cancelled(self) -> None:
        self.num_cancelled += 1
        self.cancelled.set()

    def _model(self) -> pb.ServedModel:
        return pb.ServedModel(
            name="fake", aliases=["f"], digest=DIGEST, architecture="gpt2", context_length=1024, vocab_size=1000
        )


def fail_at(number: int, error: ServiceError) -> Callable[[int, grpc.ServicerContext], None]:
    """A fault: the error instead of message `number`; -1 is the end of the stream."""

    def fault(at: int, context: grpc.ServicerContext) -> None:
        if at == number:
            context.set_trailing_metadata(((DETAILS_KEY, error_details(error)),))
            context.abort(status_code(error.status), error.message)

    return fault


def break_at(number: int, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> Callable:
    """A fault as a broken connection looks to the client: a status without details."""

    def fault(at: int, context: grpc.ServicerContext) -> None:
        if at == number:
            context.abort(code, "connection reset")

    return fault


def hold_at(number: int, goes_on: threading.Event) -> Callable[[int, grpc.ServicerContext], None]:
    """A fault: message `number` does not come before the event is set; a call that ends meanwhile is let go."""

    def fault(at: int, context: grpc.ServicerContext) -> None:
        while at == number and context.is_active() and not goes_on.wait(0.01):
            pass

    return fault


def serve(executor: ScriptedExecutor, address: str = "127.0.0.1:0", **server: object) -> tuple[grpc.Server, str]:
    """Start it; returns the server and its address."""
    grpc_server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_ExecutorServiceServicer_to_server(executor, grpc_server)
    credentials = server.get("credentials")
    if credentials is not None:
        port = grpc_server.add_secure_port(address, credentials)
    else:
        port = grpc_server.add_insecure_port(address)
    grpc_server.start()
    return grpc_server, f"127.0.0.1:{port}"


def _delta(request: pb.GenerateRequest, index: int, start: int, end: int) -> pb.GenerateResponse:
    ids = [token_id(index, position) for position in range(start, end)]
    delta = pb.Delta(index=index, text="".join(token_text(index, p) for p in range(start, end)))
    if request.output.content != pb.OUTPUT_CONTENT_TEXT:
        delta.token_ids.extend(ids)
    if request.output.HasField("logprobs"):
        delta.logprobs.extend(_logprobs(i) for i in ids)
    return pb.GenerateResponse(delta=delta)


def _finished(index: int, num_tokens: int) -> pb.GenerateResponse:
    usage = pb.Usage(num_prompt_tokens=len(PROMPT_IDS), num_output_tokens=num_tokens)
    timings = pb.Timings(queue_seconds=0.1, first_token_seconds=0.2, decode_seconds=0.5)
    finished = pb.Finished(index=index, reason=pb.FINISH_REASON_LENGTH, usage=usage, timings=timings)
    return pb.GenerateResponse(finished=finished)


def _prompt_logprobs(start: int, count: int) -> pb.GenerateResponse:
    entries = [_logprobs(PROMPT_IDS[position]) for position in range(start, start + count)]
    return pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(start=start, logprobs=entries))


def _logprobs(of: int) -> pb.TokenLogprobs:
    top = [pb.TokenLogprob(token_id=of, logprob=-0.5), pb.TokenLogprob(token_id=of + 1, logprob=-1.5)]
    return pb.TokenLogprobs(token=pb.TokenLogprob(token_id=of, logprob=-0.5), top=top)
