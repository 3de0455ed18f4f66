"""The engine over the GPU: drawing there and overlapping steps give what the host draws from the same logits."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import pytest

from services.executor.engine import Engine
from services.executor.engine_config import EngineConfig
from services.executor.immediate import ImmediateRunner
from tests.cuda_device import open_device
from tests.engine_harness import make_request, run
from tests.test_cuda_models import load_cuda
from tests.tiny_models import TINY_GPT2, TINY_GPT_OSS, write_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

BLOCK_SIZE = 32


class HostRunner(ImmediateRunner):
    """The same model on the same GPU, its logits brought to the host and drawn from there, a step at a time."""

    def __init__(self, runner):
        self.runner = runner
        self.kv_groups, self.vocab_size = runner.kv_groups, runner.vocab_size

    def forward(self, batch):
        return self.runner.forward(batch)


@pytest.fixture(scope="module", params=[TINY_GPT2, TINY_GPT_OSS], ids=lambda config: config.architecture)
def runner(request, tmp_path_factory):
    device = open_device()
    path = write_model(tmp_path_factory.mktemp("model") / "model.gguf", request.param)
    yield load_cuda(device, path, num_sequences=16)
    device.close()


def make_engine(stepped, runner=None, **bounds):
    config = {"max_context": 100, "max_batch_tokens": 64, "max_running": 16, **bounds}
    return Engine(
        runner or stepped.runner, EngineConfig(num_blocks=stepped.num_blocks, block_size=BLOCK_SIZE, **config)
    )


REQUESTS = {
    "greedy": {},
    "temperature": {"sampling": {"temperature": 1.0, "seed": 2**63 + 5}},
    "cuts": {"sampling": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01}},
    "nucleus": {"sampling": {"temperature": 1.2, "top_p": 0.95, "min_p": 0.02}},
    "penalties": {
        "sampling": {
            "temperature": 0.7,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.4,
            "logit_bias": {5: 2.0, 9: -3.0},
        }
    },
    "greedy with penalties": {"sampling": {"repetition_penalty": 1.5}},
    "stops": {"stopping": {"stop_token_ids": frozenset(range(0, 250, 3)), "min_tokens": 12}},
    "logprobs": {"logprobs": 4, "sampling": {"temperature": 1.0}},
    "prompt_logprobs": {"prompt_logprobs": 2, "logprobs": 0},
}


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("num_prompt_tokens", [1, 50, 75])
def test_tokens_are_those_that_the_host_draws(runner, kind, num_prompt_tokens):
    """A request alone has the same shapes in the same order either way, so the same logits to the bit."""
    prompt = np.random.default_rng(num_prompt_tokens).integers(0, 250, num_prompt_tokens).tolist()
    request = make_request(prompt=prompt, max_tokens=24, **REQUESTS[kind])
    on_gpu = run(make_engine(runner), request)["a"]
    on_host = run(make_engine(runner, HostRunner(runner.runner)), request)["a"]
    assert on_gpu.error is None
    assert on_gpu.outputs == on_host.outputs
    assert on_gpu.prompt_logprobs == on_host.prompt_logprobs
    assert len(on_gpu.outputs[0].token_ids) > 0


def test_sixteen_streams_twice(runner):
    """Together with others, preempted, with several outputs: the same schedule gives the same tokens."""
    rng = random.Random(6)
    requests = []
    for number, kind in enumerate([*REQUESTS] * 2):
        prompt = rng.choices(range(250), k=rng.choice([3, 40, 70]))
        requests.append(make_request(str(number), prompt, rng.randint(5, 30), **REQUESTS[kind]))
    bounds = {"max_running": 12}
    first, again = (run(make_engine(runner, **bounds), *requests) for _ in range(2))
    assert all(transcript.error is None for transcript in first.values())
    assert {id_: one.outputs for id_, one in first.items()} == {id_: one.outputs for id_, one in again.items()}


def test_a_gpu_without_memory_is_no_matter_to_requests(runner, caplog):
    """Everything was allocated before; only graphs of new shapes come late, and steps do without them."""
    driver = pytest.importorskip("cuda.bindings.driver")
    requests = [make_request(str(number), [number, 7], 24, **REQUESTS[kind]) for number, kind in enumerate(REQUESTS)]
    expected = run(make_engine(runner), *requests)
    runner.runner.close()  # every shape is new again
    with filled_memory(), pytest.MonkeyPatch.context() as patch:
        # What a driver keeps in reserve may still hold a small graph.
        patch.setattr(driver, "cuGraphInstantiate", lambda *_: (driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None))
        found = run(make_engine(runner), *requests)
    runner.runner.close()  # what launches one by one
    assert "no GPU memory for a graph" in caplog.text
    assert {id_: one.outputs for id_, one in found.items()} == {id_: one.outputs for id_, one in expected.items()}
    assert all(transcript.error is None for transcript in found.values())


@contextmanager
def filled_memory():
    """All memory of the GPU is taken, to the last MiB."""
    cuda = pytest.importorskip("pycuda.driver")
    taken = []
    num_bytes = cuda.mem_get_info()[0]
    while num_bytes >= 1 << 20:
        try:
            taken.append(cuda.mem_alloc(num_bytes))
        except cuda.MemoryError:
            num_bytes //= 2
    try:
        yield
    finally:
        for memory in taken:
            memory.free()
