"""What a generation gives: pieces while it runs, a result when it has ended."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from mxgpt.v1 import executor_pb2 as pb


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, of the model's own distribution."""

    token_id: int  # drawn, or given in the prompt
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), best first


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of one output and their text, as whole characters."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # one for each id where asked for, else empty
    index: int  # of the output, from 0
    channel: str  # Harmony channel such as "analysis" or "final"; empty where there are none
    recipient: str  # Harmony recipient such as "functions.get_weather"; empty for the user


class FinishReason(enum.StrEnum):
    """Why an output ended."""

    STOP = "stop"  # an end-of-generation id or one of stop_token_ids
    LENGTH = "length"  # max_tokens, or the end of the context
    STOP_STRING = "stop_string"
    TOOL_CALL = "tool_call"
    UNSPECIFIED = "unspecified"  # a reason that this client does not know


@dataclass(frozen=True)
class Usage:
    """Tokens read and written for one output."""

    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt's, found in the prefix cache
    num_output_tokens: int


@dataclass(frozen=True)
class Timings:
    """Where the time of one output went on the executor that finished it, in seconds."""

    queue_seconds: float
    first_token_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Output:
    """One output of a generation."""

    index: int
    pieces: tuple[Piece, ...]
    finish_reason: FinishReason | None = None  # None while it runs
    matched_stop: str = ""
    usage: Usage | None = None
    timings: Timings | None = None

    @property
    def text(self) -> str:
        """All text, whatever its channel."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def content(self) -> str:
        """The answer: text of the final channel, or of none, to the user."""
        return "".join(p.text for p in self.pieces if p.channel in ("", "final") and not p.recipient)

    @property
    def thinking(self) -> str:
        """The reasoning: text of the analysis channel to nobody."""
        return "".join(p.text for p in self.pieces if p.channel == "analysis" and not p.recipient)

    @property
    def tool_calls(self) -> dict[str, str]:
        """Arguments by recipient, of the calls that the model made."""
        calls: dict[str, str] = {}
        for piece in self.pieces:
            if piece.recipient:
                calls[piece.recipient] = calls.get(piece.recipient, "") + piece.text
        return calls

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for piece in self.pieces for token_id in piece.token_ids)

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        return tuple(entry for piece in self.pieces for entry in piece.logprobs)


@dataclass(frozen=True)
class Result:
    """What has come of a generation: all of it, once every output has a finish reason."""

    request_id: str
    executor_id: str  # which executor served it last
    model: str
    digest: str  # of the model's files
    seed: int
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]  # of the prompt's tokens from the second on, where asked for
    outputs: tuple[Output, ...]
    num_resumes: int  # how often the stream broke and went on, at another executor or the same

    @property
    def text(self) -> str:
        """All text of the first output."""
        return self.outputs[0].text

    @property
    def content(self) -> str:
        """The first output's answer, without its reasoning."""
        return self.outputs[0].content

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first output ended."""
        return self.outputs[0].finish_reason

    @property
    def usage(self) -> Usage | None:
        """Tokens of the first output."""
        return self.outputs[0].usage

    @property
    def timings(self) -> Timings | None:
        """Times of the first output."""
        return self.outputs[0].timings


def piece_of(delta: pb.Delta) -> Piece:
    """The piece that a Delta carries."""
    return Piece(
        delta.text, tuple(delta.token_ids), logprobs_of(delta.logprobs), delta.index, delta.channel, delta.recipient
    )


def logprobs_of(entries: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities as the contract carries them."""
    return tuple(
        TokenLogprobs(e.token.token_id, e.token.logprob, tuple((t.token_id, t.logprob) for t in e.top)) for e in entries
    )


def output_of(index: int, pieces: Iterable[Piece], finished: pb.Finished | None) -> Output:
    """An output as far as it has come; `finished` is its last message, if that is here."""
    if finished is None:
        return Output(index, tuple(pieces))
    usage, timings = finished.usage, finished.timings
    return Output(
        index,
        tuple(pieces),
        _FINISH_REASONS.get(finished.reason, FinishReason.UNSPECIFIED),
        finished.matched_stop,
        Usage(usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_output_tokens),
        Timings(timings.queue_seconds, timings.first_token_seconds, timings.decode_seconds),
    )


_FINISH_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_STOP_STRING: FinishReason.STOP_STRING,
    pb.FINISH_REASON_TOOL_CALL: FinishReason.TOOL_CALL,
}
