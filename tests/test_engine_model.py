"""The engine over real models: sixteen streams at once give, each, the bits that they give alone."""

from __future__ import annotations

import random

import pytest

from services.executor.engine import Engine
from services.executor.engine_config import EngineConfig
from services.executor.runner import NumpyRunner
from services.executor.weights import Weights
from shared.gguf import read_gguf
from shared.gpt_config import GPTConfig
from shared.layout import FLOAT32_BUDGET
from tests.engine_harness import make_request, run
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS, write_model

BLOCK_SIZE = 16


@pytest.fixture(scope="module", params=[TINY_GPT2, TINY_GPT_OSS], ids=lambda config: config.architecture)
def make_engine(request, tmp_path_factory):
    """Makes engines over one random model: make_engine(num_blocks, **bounds)."""
    path = write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", request.param)
    file = read_gguf(path)
    config = GPTConfig.from_gguf(file)
    weights = Weights.from_gguf(file, config, FLOAT32_BUDGET)

    def make(num_blocks, **bounds):
        groups = {"full": num_blocks, "window": num_blocks}
        runner = NumpyRunner(config, weights, BLOCK_SIZE, groups)
        return Engine(runner, EngineConfig(max_context=160, num_blocks=groups, block_size=BLOCK_SIZE, **bounds))

    return make


def streams():
    """Sixteen requests: greedy and seeded, short and long, some with a prefix in common, some with two outputs."""
    rng = random.Random(4)
    stem = rng.choices(range(250), k=50)
    for number in range(16):
        prompt = stem[: rng.choice([0, 20, 50])] + rng.choices(range(250), k=rng.choice([1, 5, 30]))
        sampling = {"seed": rng.randrange(2**64), "temperature": [0.0, 1.0][number % 2]}
        if number % 4 == 3:
            sampling |= {"top_p": 0.9, "repetition_penalty": 1.1, "num_outputs": 2}
        yield make_request(str(number), prompt, rng.randint(20, 60), sampling=sampling, logprobs=1)


def test_sixteen_streams_are_each_as_alone(make_engine):
    requests = list(streams())
    crowded = make_engine(24, max_batch_tokens=24, max_running=16)
    together = run(crowded, *requests)
    assert crowded.status().num_preemptions > 0
    assert crowded.status().num_cached_tokens > 0
    for request in requests:
        alone = run(make_engine(10), request)[request.request_id]
        assert together[request.request_id].error is None
        assert together[request.request_id].outputs == alone.outputs  # tokens and log-probabilities, bit for bit


def test_prompt_logprobs_do_not_depend_on_the_pieces(make_engine):
    request = make_request(prompt=list(streams())[1].prompt_token_ids[:40], prompt_logprobs=2, max_tokens=2)
    whole = run(make_engine(10), request)["a"]
    pieces = run(make_engine(10, max_scored_rows=7), request)["a"]
    assert len(whole.prompt_logprobs) == len(request.prompt_token_ids) - 1
    assert pieces.prompt_logprobs == whole.prompt_logprobs


def test_a_conversation_goes_on_from_the_cache(make_engine):
    engine = make_engine(20)
    first = make_request("a", range(40), max_tokens=20)
    answer = run(engine, first)["a"].outputs[0].token_ids
    second = make_request("b", [*range(40), *answer, 7, 8, 9], max_tokens=10)
    cached = run(engine, second)["b"]
    assert cached.started.num_cached_tokens == 48
    assert cached.outputs == run(make_engine(20), second)["b"].outputs
