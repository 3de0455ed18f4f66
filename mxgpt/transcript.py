"""What has come of one generation over all its attempts, and how to ask for the rest: no network, no clock.

Invariants: an id, once received, is asked for never again and given to the caller exactly once; outputs that
have finished stay finished; every attempt after Started continues the same model (digest), prompt and seed.
"""

from __future__ import annotations

import grpc

from mxgpt.errors import MxgptError
from mxgpt.results import Piece, Result, TokenLogprobs, logprobs_of, output_of, piece_of
from mxgpt.v1 import executor_pb2 as pb

_MAX_OUTPUTS = 16  # of a request, by the contract


class Transcript:
    """The messages of one generation.

    `next_request` begins an attempt; `receive` takes each of its messages. An attempt may end anywhere.
    """

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request = request
        wanted = request.sampling.n if request.sampling.HasField("n") else 1
        self._num_outputs = min(max(wanted, 1), _MAX_OUTPUTS)  # the server refuses other numbers
        self._has_ids = request.output.content != pb.OUTPUT_CONTENT_TEXT
        self._started: pb.Started | None = None  # of the first attempt that came so far
        self._executor_id = ""
        self._attempt_started = False
        self._pieces: list[list[Piece]] = [[] for _ in range(self._num_outputs)]
        self._finished: list[pb.Finished | None] = [None] * self._num_outputs
        self._prompt_logprobs: list[TokenLogprobs] = []  # of prompt positions 1, 2, ...

    @property
    def has_started(self) -> bool:
        """Something has come, so that another attempt must be a resume."""
        return self._started is not None

    @property
    def is_finished(self) -> bool:
        """Every output has ended."""
        return all(finished is not None for finished in self._finished)

    @property
    def can_go_on(self) -> bool:
        """Another attempt loses nothing.

        It would where text was asked for without ids, or if prompt log-probabilities, which a resumed stream
        does not carry, were still to come after tokens.
        """
        return not self._has_given or (self._has_ids and self._has_prompt_logprobs)

    def next_request(self) -> pb.GenerateRequest:
        """The request for the next attempt: the caller's own, and once there is something to keep, with `resume`."""
        assert self.can_go_on
        self._attempt_started = False
        if not (self._has_ids and self._has_prompt_logprobs):
            self._started = None
            self._prompt_logprobs.clear()
        if self._started is None:
            return self._request
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        request.resume.digest = self._started.digest
        request.resume.prompt_token_ids.extend(self._started.prompt_token_ids)
        request.resume.seed = self._started.seed
        request.resume.outputs.extend(self._resumed_output(index) for index in range(self._num_outputs))
        request.output.ClearField("prompt_logprobs")
        return request

    def receive(self, response: pb.GenerateResponse) -> Piece | None:
        """Take one message; returns the piece that it brings the caller, if any.

        Raises:
            MxgptError: INTERNAL for a message that breaks the contract's order.
        """
        event = response.WhichOneof("event")
        if event == "started":
            self._on_started(response.started)
        elif not self._attempt_started:
            raise _broken_contract("a message came before Started")
        elif event == "delta":
            return self._on_delta(response.delta)
        elif event == "finished":
            self._finished[self._running(response.finished.index)] = response.finished
        elif event == "prompt_logprobs":
            self._on_prompt_logprobs(response.prompt_logprobs)
        return None  # an event that this client does not know is none of its business

    def result(self, num_resumes: int = 0) -> Result:
        """All that has come so far."""
        started = self._started or pb.Started()
        return Result(
            request_id=started.request_id,
            executor_id=self._executor_id,
            model=started.model,
            digest=started.digest,
            seed=started.seed,
            prompt_token_ids=tuple(started.prompt_token_ids),
            prompt_logprobs=tuple(self._prompt_logprobs),
            outputs=tuple(output_of(i, self._pieces[i], self._finished[i]) for i in range(self._num_outputs)),
            num_resumes=num_resumes,
        )

    def _on_started(self, started: pb.Started) -> None:
        if self._attempt_started:
            raise _broken_contract("Started came twice")
        if self._started is None:
            self._started = started
        elif (started.digest, started.seed) != (self._started.digest, self._started.seed):
            raise _broken_contract("the stream was resumed with another model or seed")
        self._attempt_started = True
        self._executor_id = started.executor_id

    def _on_delta(self, delta: pb.Delta) -> Piece:
        piece = piece_of(delta)
        self._pieces[self._running(delta.index)].append(piece)
        return piece

    def _on_prompt_logprobs(self, message: pb.PromptLogprobs) -> None:
        if message.start != len(self._prompt_logprobs) + 1:
            raise _broken_contract("prompt log-probabilities came out of order")
        self._prompt_logprobs.extend(logprobs_of(message.logprobs))

    @property
    def _has_given(self) -> bool:
        """The caller has been given something, which can't be taken back."""
        return any(self._pieces) or any(finished is not None for finished in self._finished)

    @property
    def _has_prompt_logprobs(self) -> bool:
        """All that were asked for are here."""
        wanted = len(self._started.prompt_token_ids) - 1 if self._started is not None else 0
        return not self._request.output.HasField("prompt_logprobs") or len(self._prompt_logprobs) >= wanted

    def _running(self, index: int) -> int:
        if index >= self._num_outputs:
            raise _broken_contract(f"output {index} was not asked for")
        if self._finished[index] is not None:
            raise _broken_contract(f"output {index} went on after its end")
        return index

    def _resumed_output(self, index: int) -> pb.ResumedOutput:
        token_ids = [token_id for piece in self._pieces[index] for token_id in piece.token_ids]
        return pb.ResumedOutput(index=index, token_ids=token_ids, finished=self._finished[index] is not None)


def _broken_contract(message: str) -> MxgptError:
    return MxgptError(grpc.StatusCode.INTERNAL, "", f"the server broke the contract: {message}")
