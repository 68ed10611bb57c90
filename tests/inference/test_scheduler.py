"""Prompts that come and go while others are decoded: each gets what it would get alone.

Run: python -m pytest tests/inference/test_scheduler.py
"""

import dataclasses

import numpy as np
import pytest

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.scoring import Scorer
from nanochat_jax.inference.shapes import coarse_size
from tests.support import tiny
from tests.support.models import random_params, tiny_config

CONFIG = tiny_config(vocab_size=265, padded_vocab=320, n_layer=2, windows=(7, -1))  # a ring that turns
PARAMS = random_params(CONFIG)
SAMPLING = SamplingParams(temperature=0.8, top_k=40, max_new_tokens=20)


@pytest.fixture(scope="module")
def engine():
    """Four slots, calls of four tokens; caches of 64, 256 and 384 tokens."""
    return Engine(CONFIG, tiny.tokenizer(), make_mesh("data=1"), slots=4, chunk=4, context=300, alternatives=3)


def ids(n, seed=0):
    return np.random.default_rng([n, seed]).integers(0, 256, n).astype(np.int32)


def finish(scheduler):
    """number -> sample, of all that are not over."""
    done = {}
    while active := scheduler.advance():
        done |= {sample.prompt: sample for sample in active if sample.finished}
    return done


JOBS = [
    (ids(3), SAMPLING, 1),
    (ids(90), dataclasses.replace(SAMPLING, temperature=0.0), 2),  # the prompt cache grows
    (ids(5), dataclasses.replace(SAMPLING, max_new_tokens=80, top_k=0, top_p=0.7), 2**40 + 3),  # the other one
    (ids(1), SAMPLING, 4),
    (ids(17), dataclasses.replace(SAMPLING, max_new_tokens=7), 5),
    (ids(3), SAMPLING, 6),
]


@pytest.fixture(scope="module")
def alone(engine):
    """The samples of the jobs, one after the other."""
    scheduler, found = engine.open_schedule(PARAMS), {}
    for prompt, sampling, seed in JOBS:
        scheduler.add(prompt, sampling, seed=seed)
        found |= finish(scheduler)
    return [found[number] for number in range(len(JOBS))]


def test_a_prompt_alone_gets_what_generate_gives_it(engine, alone):
    prompt, sampling, seed = JOBS[0]
    ((expected,),) = engine.generate(PARAMS, [prompt], sampling, seed=seed)
    np.testing.assert_array_equal(alone[0].tokens, expected.tokens)
    np.testing.assert_allclose(alone[0].logprobs, expected.logprobs, atol=1e-5)


def test_prompts_that_join_later_get_what_they_would_get_alone(engine, alone):
    scheduler = engine.open_schedule(PARAMS)
    numbers, done = [], {}
    for prompt, sampling, seed in JOBS:
        numbers.append(scheduler.add(prompt, sampling, seed=seed))
        done |= {sample.prompt: sample for sample in scheduler.advance() if sample.finished}
    done |= finish(scheduler)
    assert numbers == [0, 1, 2, 3, 4, 5] == sorted(done)
    for number, expected in zip(numbers, alone):
        np.testing.assert_array_equal(done[number].tokens, expected.tokens)
        np.testing.assert_allclose(done[number].logprobs, expected.logprobs, atol=1e-5)


def test_who_is_cancelled_frees_its_slot_and_disturbs_nobody(engine, alone):
    scheduler = engine.open_schedule(PARAMS)
    long = dataclasses.replace(SAMPLING, max_new_tokens=250)
    doomed = [scheduler.add(ids(4, n), long, seed=n) for n in range(6)]  # two of them wait
    kept = scheduler.add(*JOBS[0][:2], seed=JOBS[0][2])
    scheduler.advance()
    assert (scheduler.running, len(scheduler.waiting)) == (4, 3)
    for number in (*doomed, *doomed, 999):  # also twice, and one that there is not
        scheduler.cancel(number)
    assert (scheduler.running, len(scheduler.waiting)) == (0, 1)
    (sample,) = finish(scheduler).values()
    assert sample.prompt == kept
    np.testing.assert_array_equal(sample.tokens, alone[0].tokens)


def test_caches_grow_with_what_is_in_them_and_shrink_again(engine):
    scheduler = engine.open_schedule(PARAMS)

    def columns():
        return scheduler.prompt_cache[1][0].shape[2], scheduler.continuation[1][0].shape[2]

    assert columns() == (64, 64)
    scheduler.add(ids(100), dataclasses.replace(SAMPLING, max_new_tokens=6), seed=0)
    scheduler.add(ids(2), dataclasses.replace(SAMPLING, max_new_tokens=90, temperature=0.0), seed=0)
    scheduler.advance()
    assert columns() == (256, 64)
    finish(scheduler)
    assert columns() == (64, 64) and scheduler.group_prompt == [None] * 4 and not scheduler.waiting


def test_thousands_of_prompts_leave_nothing_behind(engine):
    scheduler = engine.open_schedule(PARAMS)
    for n in range(2000):
        scheduler.cancel(scheduler.add(ids(2), SAMPLING, seed=n))
    before = engine.compiles
    assert finish(scheduler) == {} and not scheduler.waiting and engine.compiles == before


def test_alternatives_are_the_likeliest_tokens_of_the_training_forward(engine):
    scheduler = engine.open_schedule(PARAMS)
    wanted = scheduler.add(ids(9), SAMPLING, seed=1, alternatives=True)
    other = scheduler.add(ids(9), SAMPLING, seed=2)
    done = finish(scheduler)
    assert done[other].alternatives == [] and len(done[wanted].alternatives) == len(done[wanted].tokens)
    scores = Scorer(engine, 3)(engine.cast_params(PARAMS), [*ids(9), *done[wanted].tokens])
    likeliest, logprobs = (np.stack(x) for x in zip(*done[wanted].alternatives))
    np.testing.assert_array_equal(likeliest, scores.likeliest[8:])
    np.testing.assert_allclose(logprobs, scores.likeliest_logprobs[8:], atol=1e-4)
    np.testing.assert_allclose(done[wanted].policy_logprobs, scores.logprobs[8:], atol=1e-4)


def test_coarse_sizes_are_few():
    assert {coarse_size(n, 3072) for n in range(3000)} == {64, 256, 1024, 3072}
    assert {coarse_size(n, 96, 2) for n in range(97)} == {64, 96}
