"""From a GenerateRequest to the engine's values: every field checked, every error naming its field."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mxgpt.v1 import executor_pb2
from services.executor.request import ResumedOutput, Sampling, Stopping
from shared.errors import Reason, ServiceError, invalid_field

MAX_REQUEST_ID_LENGTH = 128
MAX_PRIORITY = 100
MAX_TEMPERATURE = 100.0
MAX_REPETITION_PENALTY = 10.0
MAX_COUNT_PENALTY = 2.0
MAX_LOGIT_BIAS = 100.0
MAX_NUM_LOGIT_BIASES = 1024
MAX_NUM_OUTPUTS = 16
MAX_NUM_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 1024
MAX_NUM_STOP_TOKEN_IDS = 1024
MAX_NUM_LOGPROBS = 20


@dataclass(frozen=True)
class Limits:
    """What the served model allows."""

    digest: str
    vocab_size: int
    context_length: int
    eog_token_ids: frozenset[int]


def check_frame(request: Any, limits: Limits) -> None:
    """Check what does not depend on the prompt: ids, priority, input, output, constraint, resume's digest.

    Raises:
        ServiceError: FIELD_INVALID, NOT_BUILT or RESUME_DIGEST_MISMATCH, naming the field.
    """
    if len(request.request_id) > MAX_REQUEST_ID_LENGTH:
        raise invalid_field("request_id", f"at most {MAX_REQUEST_ID_LENGTH} characters, got {len(request.request_id)}")
    _check_range("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    form = request.constraint.WhichOneof("form")
    if form is not None:
        field = f"constraint.{form}"
        raise ServiceError(Reason.NOT_BUILT, f"{field}: constrained output is not built yet", field=field)
    if request.HasField("resume"):
        if request.resume.digest != limits.digest:
            raise ServiceError(
                Reason.RESUME_DIGEST_MISMATCH,
                f"resume.digest: the stream came from model {request.resume.digest or '(none)'}, "
                f"this executor serves {limits.digest}",
                field="resume.digest",
            )
    elif request.WhichOneof("input") is None:
        raise invalid_field("input", "one of text, token_ids and chat is required")
    for name in ("logprobs", "prompt_logprobs"):
        _check_range(f"output.{name}", getattr(request.output, name), 0, MAX_NUM_LOGPROBS)
    if request.output.content not in executor_pb2.OutputContent.values():
        raise invalid_field("output.content", f"unknown value {request.output.content}")


def check_prompt(prompt_token_ids: Sequence[int], limits: Limits, field: str) -> tuple[int, ...]:
    """The prompt as a tuple, not empty, inside the vocabulary, shorter than the context.

    Raises:
        ServiceError: PROMPT_EMPTY, TOKEN_ID_INVALID or CONTEXT_LENGTH_EXCEEDED.
    """
    num_tokens = len(prompt_token_ids)
    if num_tokens == 0:
        raise ServiceError(Reason.PROMPT_EMPTY, f"{field}: the prompt holds no token", field=field)
    if num_tokens >= limits.context_length:  # before the ids are looked at, of which a message may hold millions
        raise ServiceError(
            Reason.CONTEXT_LENGTH_EXCEEDED,
            f"{field}: the prompt has {num_tokens} tokens, "
            f"the context holds {limits.context_length} with room for at least one more",
            field=field,
            metadata={"num_prompt_tokens": str(num_tokens), "context_length": str(limits.context_length)},
        )
    prompt = tuple(prompt_token_ids)
    _check_ids(field, prompt, limits.vocab_size)
    return prompt


def sampling_from(request: Any, limits: Limits) -> Sampling:
    """The request's sampling, with defaults and a seed.

    Raises:
        ServiceError: FIELD_INVALID or TOKEN_ID_INVALID, naming the field and its range.
    """
    sampling = request.sampling
    defaults = Sampling(seed=_seed(request))
    values: dict[str, Any] = {}
    for name, lowest, highest in (
        ("temperature", 0.0, MAX_TEMPERATURE),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("repetition_penalty", 0.0, MAX_REPETITION_PENALTY),
        ("presence_penalty", -MAX_COUNT_PENALTY, MAX_COUNT_PENALTY),
        ("frequency_penalty", -MAX_COUNT_PENALTY, MAX_COUNT_PENALTY),
    ):
        value = getattr(sampling, name) if sampling.HasField(name) else getattr(defaults, name)
        exclusive = name in ("top_p", "repetition_penalty")
        _check_range(f"sampling.{name}", value, lowest, highest, exclusive)
        values[name] = value
    num_outputs = sampling.n if sampling.HasField("n") else 1
    _check_range("sampling.n", num_outputs, 1, MAX_NUM_OUTPUTS)
    return Sampling(
        seed=defaults.seed,
        top_k=sampling.top_k,
        logit_bias=_logit_bias(sampling.logit_bias, limits),
        num_outputs=num_outputs,
        **values,
    )


def stopping_from(request: Any, num_prompt_tokens: int, limits: Limits) -> Stopping:
    """The request's stopping, with max_tokens cut to what the context holds.

    Raises:
        ServiceError: FIELD_INVALID or TOKEN_ID_INVALID, naming the field and its range.
    """
    stopping = request.stopping
    room = limits.context_length - num_prompt_tokens
    max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else room
    if max_tokens < 1:
        raise invalid_field("stopping.max_tokens", "at least 1, got 0")
    if stopping.HasField("max_tokens") and stopping.min_tokens > max_tokens:
        raise invalid_field("stopping.min_tokens", f"at most max_tokens = {max_tokens}, got {stopping.min_tokens}")
    _check_range("stopping.stop_token_ids", len(stopping.stop_token_ids), 0, MAX_NUM_STOP_TOKEN_IDS)
    _check_ids("stopping.stop_token_ids", stopping.stop_token_ids, limits.vocab_size)
    return Stopping(
        max_tokens=min(max_tokens, room),
        min_tokens=min(stopping.min_tokens, room),
        stop_token_ids=frozenset(stopping.stop_token_ids),
        eog_token_ids=frozenset() if stopping.ignore_eos else limits.eog_token_ids,
    )


def stop_strings_from(request: Any) -> tuple[str, ...]:
    """The request's stop strings.

    Raises:
        ServiceError: FIELD_INVALID, naming the field.
    """
    stop_strings = tuple(request.stopping.stop_strings)
    _check_range("stopping.stop_strings", len(stop_strings), 0, MAX_NUM_STOP_STRINGS)
    for text in stop_strings:
        if not 1 <= len(text.encode()) <= MAX_STOP_STRING_BYTES:
            raise invalid_field("stopping.stop_strings", f"each from 1 to {MAX_STOP_STRING_BYTES} bytes")
    return stop_strings


def resumed_from(request: Any, num_prompt_tokens: int, num_outputs: int, limits: Limits) -> dict[int, ResumedOutput]:
    """What each output had sent, by output index.

    Raises:
        ServiceError: FIELD_INVALID, TOKEN_ID_INVALID or CONTEXT_LENGTH_EXCEEDED.
    """
    resumed: dict[int, ResumedOutput] = {}
    for output in request.resume.outputs:
        if output.index >= num_outputs or output.index in resumed:
            raise invalid_field("resume.outputs.index", f"each below n = {num_outputs} and once, got {output.index}")
        num_tokens = num_prompt_tokens + len(output.token_ids)
        if num_tokens > limits.context_length:
            raise ServiceError(
                Reason.CONTEXT_LENGTH_EXCEEDED,
                f"resume.outputs.token_ids: prompt and output have {num_tokens} tokens, "
                f"the context holds {limits.context_length}",
                field="resume.outputs.token_ids",
            )
        token_ids = tuple(output.token_ids)
        _check_ids("resume.outputs.token_ids", token_ids, limits.vocab_size)
        resumed[output.index] = ResumedOutput(token_ids, output.finished)
    return resumed


def _seed(request: Any) -> int:
    if request.HasField("resume"):
        return int(request.resume.seed)
    return int(request.sampling.seed) if request.sampling.HasField("seed") else secrets.randbits(64)


def _logit_bias(bias: Any, limits: Limits) -> dict[int, float]:
    _check_range("sampling.logit_bias", len(bias), 0, MAX_NUM_LOGIT_BIASES)
    _check_ids("sampling.logit_bias", bias, limits.vocab_size)
    for value in bias.values():
        _check_range("sampling.logit_bias", value, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    return dict(bias)


def _check_range(field: str, value: float, lowest: float, highest: float, exclusive: bool = False) -> None:
    inside = math.isfinite(value) and lowest <= value <= highest and not (exclusive and value == lowest)
    if not inside:
        bounds = f"above {lowest:g}, at most {highest:g}" if exclusive else f"from {lowest:g} to {highest:g}"
        raise invalid_field(field, f"must be {bounds}, got {value:g}")


def _check_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if token_id >= vocab_size:
            raise ServiceError(
                Reason.TOKEN_ID_INVALID,
                f"{field}: token id {token_id} is outside the vocabulary of {vocab_size}",
                field=field,
            )
