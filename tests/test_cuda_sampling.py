"""Drawing on the GPU against the numpy sampler: the same logits give the same tokens, whatever is asked for."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from services.executor.philox import uniform
from services.executor.request import Sampling, Stopping
from services.executor.sampling import OutputSampler, draw_tokens
from services.executor.step import Draws
from tests.cuda_device import download, open_device, upload

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

GPT_OSS_VOCAB = 201_088
NUM_SEATS = 70  # past what is weighed at once
CANARY = -12345


@pytest.fixture(scope="module")
def device():
    from services.executor.cuda.kernels import modules_of
    from tests.tiny_models import TINY_GPT2

    device = open_device()
    modules = modules_of(TINY_GPT2, [])
    device.load({module: modules[module] for module in modules if module.source in ("sample", "nucleus")})
    yield device
    device.close()


class Bench:
    """A sampler on the device, and rows of logits to draw from."""

    def __init__(self, device, vocab_size, num_seats=NUM_SEATS):
        from services.executor.cuda.sampling import CudaSampler

        self.device, self.vocab_size, self.num_seats = device, vocab_size, num_seats
        self.sampler = CudaSampler(device, vocab_size, num_seats + 1, num_seats + 1, num_seats)
        device.upload(self.sampler.token_ids, np.full(num_seats + 1, CANARY, np.int32))
        device.upload(self.sampler._last_tokens, np.full(num_seats, CANARY, np.int32))
        device.synchronize()

    def draw(self, logits, samplers, seats, starts=None):
        """The tokens of rows of logits, (num_rows, vocab_size), None where they can't be drawn from."""
        device, sampler, num_rows = self.device, self.sampler, len(logits)
        draws = Draws(
            rows=np.arange(num_rows, dtype=np.int32),
            samplers=samplers,
            seats=np.array(seats, np.int32),
            token_indices=np.array([one.num_tokens for one in samplers], np.int32),
            starts=range(num_rows) if starts is None else starts,
            wanted=np.empty(0, np.int32),
        )
        sampler.take_seats(draws)
        rows = sampler.rows(draws)
        on_device = upload(device, logits)
        sampler.take_best(on_device, upload(device, draws.seats), 0, num_rows)
        if len(rows):
            sampler.draw(on_device, upload(device, rows.view(np.int32)), rows)
        token_ids = download(device, sampler.token_ids, num_rows + 1, np.int32)
        assert token_ids[-1] == CANARY
        return [None if token_id < 0 else token_id for token_id in token_ids[:-1].tolist()]


def make_rows(rng, vocab_size, num_rows):
    """Rows of every kind: normal, flat, peaked, with ties, with ids that can't be drawn, and some not finite."""
    rows = 3 * rng.standard_normal((num_rows, vocab_size), np.float32)
    for index, row in enumerate(rows):
        kind = index % 8
        if kind == 1:
            row[:] = 1.5
        elif kind == 2:
            row[rng.integers(vocab_size)] += 30
        elif kind == 3:
            row[:] = np.round(row)
        elif kind == 4:
            row[rng.random(vocab_size) < 0.5] = -np.inf
        elif kind == 5:
            row[:] = np.where(rng.random(vocab_size) < 0.5, np.float32(0.0), np.float32(-0.0))
        elif kind == 6 and index % 3 == 0:
            row[rng.integers(vocab_size)] = [np.nan, np.inf][index % 2]
        elif kind == 7 and index % 5 == 0:
            row[:] = -np.inf
    return rows


def make_sampler(rng, vocab_size, **given):
    """A sampler of every kind, with a past."""
    sampling = {"seed": rng.randrange(2**64), "temperature": rng.choice([0.0, 0.3, 1.0, 1.0, 2.5, 100.0, 1e-3])}
    for name, values in {
        "top_k": [1, 2, 5, 50, 150, 300, vocab_size],
        "top_p": [0.95, 0.5, 0.1, 1e-6, 0.999],
        "min_p": [0.05, 0.5, 1.0],
        "repetition_penalty": [1.3, 0.7],
        "presence_penalty": [0.5, -0.3],
        "frequency_penalty": [0.37, -0.2],
        "logit_bias": [{rng.randrange(vocab_size): rng.uniform(-5, 5) for _ in range(20)}],
    }.items():
        if rng.random() < 0.3:
            sampling[name] = rng.choice(values)
    stops = [rng.randrange(vocab_size) for _ in range(3)] if rng.random() < 0.8 else range(min(vocab_size, 2000))
    stopping = Stopping(200, min_tokens=rng.choice([0, 0, 6]), stop_token_ids=frozenset(stops))
    prompt = [rng.randrange(vocab_size) for _ in range(20)]
    sampler = OutputSampler(Sampling(**(sampling | given)), stopping, rng.randrange(16), vocab_size, prompt)
    for _ in range(rng.choice([0, 3, 12])):
        sampler.observe(rng.randrange(vocab_size))
    return sampler


@pytest.mark.parametrize(
    ("vocab_size", "num_rounds"),
    [(1, 2), (2, 4), (7, 10), (1000, 10), (1024, 10), (1025, 10), (2049, 10), (50257, 5), (GPT_OSS_VOCAB, 6)],
)
def test_tokens_are_those_of_the_numpy_sampler(device, vocab_size, num_rounds):
    bench = Bench(device, vocab_size)
    rng = random.Random(vocab_size)
    num_sound = 0
    for round_ in range(num_rounds):
        logits = make_rows(np.random.default_rng((vocab_size, round_)), vocab_size, NUM_SEATS)
        samplers = [make_sampler(rng, vocab_size) for _ in range(NUM_SEATS)]
        expected = draw_tokens(logits, samplers)
        found = bench.draw(logits, samplers, rng.sample(range(NUM_SEATS), NUM_SEATS))
        for row, (sampler, token_id) in enumerate(zip(samplers, found, strict=True)):
            assert token_id == expected[row], f"row {row} of round {round_}, {sampler.sampling}, {sampler.num_tokens}"
        num_sound += NUM_SEATS - expected.count(None)
    assert num_sound > 0.8 * num_rounds * NUM_SEATS


@pytest.mark.parametrize("vocab_size", [50, 3001])
def test_what_the_device_remembers(device, vocab_size):
    """Twenty tokens in a row, the device told of none of them: penalties, min_tokens and indices go on."""
    rng = random.Random(3)
    bench = Bench(device, vocab_size, 16)
    samplers = [make_sampler(rng, vocab_size, frequency_penalty=0.4, repetition_penalty=1.1) for _ in range(15)]
    seats = rng.sample(range(16), 15)
    random_rows = np.random.default_rng(4)
    for step in range(20):
        logits = 2 * random_rows.standard_normal((15, vocab_size), np.float32)
        expected = draw_tokens(logits, samplers)
        assert bench.draw(logits, samplers, seats, starts=range(15) if step == 0 else ()) == expected
        for sampler, token_id in zip(samplers, expected, strict=True):
            sampler.observe(token_id)
    last_tokens = download(device, bench.sampler._last_tokens, 16, np.int32)
    assert last_tokens[seats].tolist() == expected
    (free,) = set(range(16)) - set(seats)
    assert last_tokens[free] == CANARY
    counts = download(device, bench.sampler._counts, (16, vocab_size), np.uint32)
    assert not counts[free].any()
    for seat, sampler in zip(seats, samplers, strict=True):
        assert (counts[seat][sampler.seen.ids] & 0x7FFFFFFF).tolist() == sampler.seen.counts.tolist()
        assert np.count_nonzero(counts[seat]) == len(sampler.seen.ids)


def test_a_seat_taken_again_remembers_nothing(device):
    bench = Bench(device, 40, 2)
    rng = random.Random(5)
    logits = np.random.default_rng(6).standard_normal((2, 40), np.float32)
    for _ in range(10):
        samplers = [make_sampler(rng, 40, presence_penalty=2.0, temperature=0.0) for _ in range(2)]
        assert bench.draw(logits, samplers, [1, 0]) == draw_tokens(logits, samplers)


def test_uniform_numbers_are_philox_to_the_last_digits(device):
    """Two ids, the border between them put just below and just above the number that is to be drawn."""
    bench = Bench(device, 2, 2)
    logits = np.zeros((2, 2), np.float32)
    for seed in [0, 1, 2**64 - 1, *(random.Random(7).randrange(2**64) for _ in range(100))]:
        number = uniform(seed, 3, 0)
        border = math.log(1 / number - 1)
        samplers = [
            OutputSampler(Sampling(seed=seed, logit_bias={1: border + shift}), Stopping(9), 3, 2, ())
            for shift in (-1e-12, 1e-12)
        ]
        assert draw_tokens(logits, samplers) == [0, 1]
        assert bench.draw(logits, samplers, [0, 1]) == [0, 1]


def test_rows_that_draw_nothing_are_left_alone(device):
    bench = Bench(device, 3000, 8)
    logits = np.random.default_rng(8).standard_normal((8, 3000), np.float32)
    seats = np.array([2, -1, 5, -1, -1, 0, -1, -1], np.int32)
    bench.sampler.take_best(upload(device, logits), upload(device, seats), 0, 8)
    expected = np.where(seats < 0, -1, logits.argmax(axis=1))
    assert download(device, bench.sampler.token_ids, 8, np.int32).tolist() == expected.tolist()
    last_tokens = download(device, bench.sampler._last_tokens, 8, np.int32)
    assert last_tokens[seats[seats >= 0]].tolist() == expected[seats >= 0].tolist()
    assert (last_tokens[[1, 3, 4, 6, 7]] == CANARY).all()
    ids = upload(device, np.array([7, -1 - 5, 9, -1 - 0, CANARY, 3], np.int32))
    bench.sampler.resolve(ids, 4)
    resolved = download(device, ids, 6, np.int32).tolist()
    assert resolved == [7, expected[2], 9, expected[5], CANARY, 3]


def test_the_same_draw_gives_the_same_token(device):
    bench = Bench(device, GPT_OSS_VOCAB, 16)
    rng = random.Random(9)
    logits = make_rows(np.random.default_rng(10), GPT_OSS_VOCAB, 16)
    samplers = [make_sampler(rng, GPT_OSS_VOCAB) for _ in range(16)]
    first = bench.draw(logits, samplers, range(16))
    assert all(bench.draw(logits, samplers, range(16)) == first for _ in range(3))
