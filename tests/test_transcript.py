"""The resume state machine, cut at every point."""

import grpc
import pytest

from mxgpt import FinishReason, MxgptError
from mxgpt.options import build_request
from mxgpt.transcript import Transcript
from mxgpt.v1 import executor_pb2 as pb
from tests.scripted_executor import DIGEST, PROMPT_IDS, messages, whole_ids, whole_text

NUM_TOKENS = 9


def _request(**options) -> pb.GenerateRequest:
    return build_request("hello", {"max_tokens": NUM_TOKENS, **options})


def _run(request: pb.GenerateRequest, cuts: tuple[int, ...]) -> tuple[Transcript, list]:
    """Attempts that end after so many messages each, and a last one that does not; and the pieces given out."""
    transcript, pieces = Transcript(request), []
    for cut in (*cuts, None):
        if transcript.is_finished:
            break
        for response in messages(transcript.next_request())[:cut]:
            piece = transcript.receive(response)
            if piece is not None:
                pieces.append(piece)
    return transcript, pieces


@pytest.mark.parametrize("num_outputs", [1, 2, 3])
def test_cut_anywhere_twice_loses_and_repeats_nothing(num_outputs):
    request = _request(n=num_outputs, seed=5, logprobs=1, prompt_logprobs=1)
    num_messages = len(messages(request))
    whole, _ = _run(request, ())
    for first in range(num_messages + 1):
        for second in range(num_messages + 1):
            transcript, pieces = _run(request, (first, second))
            assert transcript.is_finished
            result = transcript.result()
            for index in range(num_outputs):
                own = [piece for piece in pieces if piece.index == index]
                assert tuple(i for piece in own for i in piece.token_ids) == whole_ids(index, NUM_TOKENS)
                assert "".join(piece.text for piece in own) == whole_text(index, NUM_TOKENS)
                assert result.outputs[index].text == whole_text(index, NUM_TOKENS)
                assert len(result.outputs[index].logprobs) == NUM_TOKENS
                assert result.outputs[index].finish_reason is FinishReason.LENGTH
            assert result.prompt_logprobs == whole.result().prompt_logprobs
            assert len(result.prompt_logprobs) == len(PROMPT_IDS) - 1


def test_after_every_message_the_text_is_that_of_the_ids():
    request = _request(n=2)
    transcript = Transcript(request)
    for response in messages(transcript.next_request()):
        transcript.receive(response)
        for index, output in enumerate(transcript.result().outputs):
            assert output.text == whole_text(index, len(output.token_ids))


def test_resume_carries_what_had_come():
    request = _request(n=2, seed=5, prompt_logprobs=0)
    transcript = Transcript(request)
    answer = messages(request)
    last = next(i for i, message in enumerate(answer) if message.WhichOneof("event") == "finished")
    for response in answer[: last + 1]:
        transcript.receive(response)
    ended = answer[last].finished.index
    resume = transcript.next_request().resume
    assert (resume.digest, tuple(resume.prompt_token_ids), resume.seed) == (DIGEST, PROMPT_IDS, 5)
    assert [output.finished for output in resume.outputs] == [index == ended for index in range(2)]
    assert tuple(resume.outputs[ended].token_ids) == whole_ids(ended, NUM_TOKENS)
    assert not transcript.next_request().output.HasField("prompt_logprobs"), "all of them had come"
    assert transcript.next_request().sampling.seed == request.sampling.seed, "the rest of the request stays"


def test_before_anything_came_the_request_goes_out_unchanged():
    request = _request()
    assert Transcript(request).next_request() == request


def test_picked_seed_is_kept():
    request = _request()
    transcript = Transcript(request)
    transcript.receive(messages(request)[0])
    assert not request.sampling.HasField("seed")
    assert transcript.next_request().resume.seed == 77


def test_text_alone_cannot_go_on():
    request = _request(content="text")
    transcript = Transcript(request)
    assert transcript.can_go_on
    for response in messages(request)[:1]:
        transcript.receive(response)
    assert transcript.can_go_on, "nothing has reached the caller"
    assert transcript.next_request() == request
    for response in messages(request)[:2]:
        transcript.receive(response)
    assert not transcript.can_go_on


def test_prompt_logprobs_cut_short_start_again_or_not_at_all():
    request = _request(prompt_logprobs=1)
    answer = messages(request)
    transcript = Transcript(request)
    for response in answer[:2]:
        transcript.receive(response)
    assert transcript.next_request() == request, "half of them came, no token: from the beginning"
    for response in (answer[0], answer[1], answer[3]):
        transcript.receive(response)
    assert not transcript.can_go_on, "tokens came before the other half: the rest would be lost"


def _delta(index: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(index=index, text="x", token_ids=[1]))


def _finished(index: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.Finished(index=index, reason=pb.FINISH_REASON_STOP))


STARTED = pb.GenerateResponse(started=pb.Started(digest=DIGEST, seed=1))


@pytest.mark.parametrize(
    "responses",
    [
        [_delta(0)],
        [STARTED, STARTED],
        [STARTED, _delta(1)],
        [STARTED, _finished(0), _delta(0)],
        [STARTED, _finished(0), _finished(0)],
        [STARTED, pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(start=2))],
        [STARTED, pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(start=0))],
    ],
    ids=["no Started", "Started twice", "output not asked for", "Delta after end", "two ends", "gap", "token 0"],
)
def test_broken_contract_is_an_error(responses):
    transcript = Transcript(_request())
    for response in responses[:-1]:
        transcript.receive(response)
    with pytest.raises(MxgptError, match="broke the contract") as caught:
        transcript.receive(responses[-1])
    assert caught.value.status is grpc.StatusCode.INTERNAL


def test_resume_by_another_model_is_an_error():
    transcript = Transcript(_request())
    transcript.receive(STARTED)
    transcript.next_request()
    with pytest.raises(MxgptError, match="another model"):
        transcript.receive(pb.GenerateResponse(started=pb.Started(digest="e2" * 32, seed=1)))


def test_channels_of_an_output():
    transcript = Transcript(_request())
    transcript.receive(STARTED)
    for channel, recipient, text in (
        ("analysis", "", "hm "),
        ("final", "", "An"),
        ("commentary", "functions.f", '{"a": 1}'),
        ("final", "", "swer"),
    ):
        delta = pb.Delta(text=text, token_ids=[1], channel=channel, recipient=recipient)
        transcript.receive(pb.GenerateResponse(delta=delta))
    output = transcript.result().outputs[0]
    assert (output.content, output.thinking) == ("Answer", "hm ")
    assert output.tool_calls == {"functions.f": '{"a": 1}'}
    assert output.finish_reason is None
