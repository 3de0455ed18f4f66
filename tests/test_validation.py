"""Every value out of its range is refused, by a reason that stays and a message that names the field."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mxgpt.v1 import executor_pb2
from services.executor import validation
from services.executor.request import ResumedOutput, Sampling
from services.executor.validation import Limits
from shared.errors import Reason, ServiceError

LIMITS = Limits(digest="d1", vocab_size=100, context_length=32, eog_token_ids=frozenset({7}))


def request(**parts: Any) -> Any:
    made = executor_pb2.GenerateRequest(text="hello")
    for path, value in parts.items():
        message: Any = made
        *parents, name = path.split("__")
        for parent in parents:
            message = getattr(message, parent)
        if isinstance(value, dict):
            getattr(message, name).update(value)
        elif isinstance(value, (list, tuple)):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return made


def validate(made: Any, num_prompt_tokens: int = 5) -> None:
    validation.check_frame(made, LIMITS)
    sampling = validation.sampling_from(made, LIMITS)
    validation.stopping_from(made, num_prompt_tokens, LIMITS)
    validation.stop_strings_from(made)
    validation.resumed_from(made, num_prompt_tokens, sampling.num_outputs, LIMITS)


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("sampling.temperature", [0.0, 1e-30, 100.0], [-0.01, 100.1, math.nan, math.inf]),
        ("sampling.top_p", [1e-6, 1.0], [0.0, -0.5, 1.0001, math.nan]),
        ("sampling.min_p", [0.0, 1.0], [-0.1, 1.1, math.nan]),
        ("sampling.repetition_penalty", [0.01, 10.0], [0.0, -1.0, 10.1, math.inf]),
        ("sampling.presence_penalty", [-2.0, 2.0], [-2.1, 2.1, math.nan]),
        ("sampling.frequency_penalty", [-2.0, 2.0], [-2.1, 2.1, math.nan]),
        ("sampling.n", [1, 16], [0, 17]),
        ("sampling.top_k", [0, 1, 2**32 - 1], []),
        ("sampling.seed", [0, 2**64 - 1], []),
        ("sampling.logit_bias", [{99: 100.0}, {0: -100.0}], [{1: 100.1}, {1: math.nan}]),
        ("stopping.max_tokens", [1, 2**32 - 1], [0]),
        ("stopping.stop_strings", [["a"] * 16, ["x" * 1024]], [["a"] * 17, ["x" * 1025], [""], ["é" * 513]]),
        ("output.logprobs", [0, 20], [21]),
        ("output.prompt_logprobs", [0, 20], [21]),
        ("output.content", [0, 1, 2, 3], [9]),
        ("priority", [-100, 100], [-101, 101]),
        ("request_id", ["x" * 128], ["x" * 129]),
    ],
)
def test_ranges(field: str, good: list[Any], bad: list[Any]) -> None:
    path = field.replace(".", "__")
    for value in good:
        validate(request(**{path: value}))
    for value in bad:
        with pytest.raises(ServiceError) as caught:
            validate(request(**{path: value}))
        assert caught.value.reason is Reason.FIELD_INVALID
        assert caught.value.field == field
        assert field in caught.value.message


def test_zero_is_a_value_and_unset_is_the_default() -> None:
    unset = validation.sampling_from(request(), LIMITS)
    assert (unset.temperature, unset.top_p, unset.top_k, unset.num_outputs) == (1.0, 1.0, 0, 1)
    assert validation.sampling_from(request(sampling__temperature=0.0), LIMITS).temperature == 0.0
    assert validation.sampling_from(request(sampling__seed=0), LIMITS).seed == 0
    seeds = {validation.sampling_from(request(), LIMITS).seed for _ in range(20)}
    assert len(seeds) == 20


def test_unset_fields_keep_the_defaults_of_the_engine() -> None:
    made = validation.sampling_from(request(sampling__seed=3), LIMITS)
    assert made == Sampling(seed=3)


@pytest.mark.parametrize("form", ["json_schema", "regex", "grammar"])
def test_constraints_are_not_built(form: str) -> None:
    made = request(**{f"constraint__{form}": "x"})
    with pytest.raises(ServiceError) as caught:
        validate(made)
    assert (caught.value.reason, caught.value.field) == (Reason.NOT_BUILT, f"constraint.{form}")


def test_an_input_is_required() -> None:
    with pytest.raises(ServiceError, match="input"):
        validate(executor_pb2.GenerateRequest())


def test_ids_outside_the_vocabulary() -> None:
    for made in (
        request(sampling__logit_bias={100: 1.0}),
        request(stopping__stop_token_ids=[100]),
        request(resume__digest="d1", resume__outputs=[executor_pb2.ResumedOutput(token_ids=[1, 100])]),
    ):
        with pytest.raises(ServiceError, match="token id 100 is outside the vocabulary of 100") as caught:
            validate(made)
        assert caught.value.reason is Reason.TOKEN_ID_INVALID
    with pytest.raises(ServiceError) as caught:
        validation.check_prompt([1, 100], LIMITS, "token_ids")
    assert (caught.value.reason, caught.value.field) == (Reason.TOKEN_ID_INVALID, "token_ids")


def test_prompts_empty_and_too_long() -> None:
    with pytest.raises(ServiceError) as caught:
        validation.check_prompt([], LIMITS, "text")
    assert caught.value.reason is Reason.PROMPT_EMPTY
    assert validation.check_prompt([1] * 31, LIMITS, "text") == (1,) * 31
    with pytest.raises(ServiceError, match="32 tokens") as caught:
        validation.check_prompt([1] * 32, LIMITS, "text")
    assert caught.value.reason is Reason.CONTEXT_LENGTH_EXCEEDED


def test_max_tokens_is_cut_to_the_context_and_eog_ids_to_the_request() -> None:
    assert validation.stopping_from(request(), 30, LIMITS).max_tokens == 2
    assert validation.stopping_from(request(stopping__max_tokens=1000), 30, LIMITS).max_tokens == 2
    assert validation.stopping_from(request(), 5, LIMITS).eog_token_ids == frozenset({7})
    assert validation.stopping_from(request(stopping__ignore_eos=True), 5, LIMITS).eog_token_ids == frozenset()
    with pytest.raises(ServiceError, match=r"stopping\.min_tokens"):
        validation.stopping_from(request(stopping__max_tokens=3, stopping__min_tokens=4), 5, LIMITS)


def test_resume_brings_its_seed_and_its_outputs() -> None:
    made = request(resume__digest="d1", resume__seed=9, sampling__n=3)
    made.resume.outputs.add(index=2, token_ids=[4, 5], finished=True)
    validation.check_frame(made, LIMITS)
    assert validation.sampling_from(made, LIMITS).seed == 9
    assert validation.resumed_from(made, 5, 3, LIMITS) == {2: ResumedOutput((4, 5), True)}
    with pytest.raises(ServiceError, match=r"resume\.outputs\.index"):
        validation.resumed_from(made, 5, 2, LIMITS)
    with pytest.raises(ServiceError) as caught:
        validation.resumed_from(made, 31, 3, LIMITS)
    assert caught.value.reason is Reason.CONTEXT_LENGTH_EXCEEDED


def test_a_resume_from_another_model() -> None:
    with pytest.raises(ServiceError) as caught:
        validate(request(resume__digest="d2"))
    assert (caught.value.reason, caught.value.field) == (Reason.RESUME_DIGEST_MISMATCH, "resume.digest")
