"""Jobs and the thread that owns the engine, with a tiny model, and the same over HTTP.

Run: python -m pytest tests/serving/test_worker.py
"""

import queue
import threading
import time

import httpx
import numpy as np
import pytest

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.tools import Tool, Toolbox
from nanochat_jax.serving.worker import EngineWorker, Failure, GenerationJob, Overloaded, ScoringJob
from tests.support import tiny
from tests.support.models import random_params, tiny_config
from tests.support.scripted import END, call, result, scripted_engine
from tests.support.serving import serving

CONFIG = tiny_config(vocab_size=265, padded_vocab=320, n_layer=1, windows=(-1,), sequence_len=64)
PARAMS = random_params(CONFIG)
SAMPLING = SamplingParams(temperature=0.8, top_k=40, max_new_tokens=12)
LONG = SamplingParams(temperature=0.8, top_k=40, max_new_tokens=400)


@pytest.fixture(scope="module")
def engine():
    return Engine(CONFIG, tiny.tokenizer(), make_mesh("data=1"), slots=4, chunk=4, context=500, alternatives=3)


@pytest.fixture
def worker(engine):
    worker = EngineWorker(engine, PARAMS, max_waiting=4)
    worker.start()
    yield worker
    worker.stop()


class Inbox:
    """What a job delivers."""

    def __init__(self):
        self.delivered = queue.SimpleQueue()

    def rest(self):
        """Tokens until the job is over."""
        tokens = []
        while True:
            what = self.delivered.get(timeout=60)
            assert not isinstance(what, Failure), what
            tokens += what.tokens
            if what.finished:
                return tokens


def job(seed=0, sampling=SAMPLING, ids=(1, 2, 3), choice=0, alternatives=False):
    inbox = Inbox()
    ids = np.asarray(ids, np.int32)
    return GenerationJob(ids, sampling, seed, choice, alternatives, inbox.delivered.put), inbox


def wait_until(holds):
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_jobs_of_many_threads_get_what_each_would_get_alone(engine, worker):
    alone, expected = engine.open_schedule(PARAMS), []
    for seed in range(8):
        alone.add(np.asarray([1, 2, 3], np.int32), SAMPLING, seed=seed)
        while active := alone.advance():
            (sample,) = active
        expected.append(sample.tokens)
    found = [None] * 8

    def ask(seed):
        one, inbox = job(seed)
        worker.submit([one])
        found[seed] = inbox.rest()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected and worker.open_jobs == 0
    assert len({tuple(tokens) for tokens in found}) == 8


def test_who_waits_for_a_tool_holds_up_nobody_and_may_be_cancelled(monkeypatch):
    """Three jobs whose tool answers when it is told to: a fourth one is answered meanwhile, one of the three goes."""
    answer = threading.Event()
    tools = Toolbox([Tool("late", lambda text: text.upper() if answer.wait(60) else None, 100.0)])
    script = [[[*call("late"), *[0] * 6, END]]] * 3 + [[[*[9] * 20, END]]]
    engine, params = scripted_engine(monkeypatch, script, slots=4, chunk=4, context=100, tools=tools)
    worker = EngineWorker(engine, params, max_waiting=4)
    worker.start()
    try:
        jobs = [job(sampling=LONG, ids=[1], choice=choice) for choice in range(3)]
        worker.submit([one for one, _ in jobs])
        wait_until(lambda: tools._threads == 3)
        other, inbox = job(sampling=LONG, ids=[1], choice=3)
        worker.submit([other])
        assert inbox.rest() == [9] * 20 + [END]
        worker.cancel([jobs[2][0]])
        wait_until(lambda: worker.open_jobs == 2)
        answer.set()
        for _, inbox in jobs[:2]:
            assert inbox.rest() == [*call("late"), *result("LATE"), END]
        assert jobs[0][1].delivered.empty()
    finally:
        answer.set()
        worker.stop()


def test_together_they_take_a_fraction_of_the_device_calls(worker):
    def calls(batches):
        before = worker._scheduler.decode_steps
        for batch in batches:
            jobs = [job(seed) for seed in batch]
            worker.submit([one for one, _ in jobs])
            for _, inbox in jobs:
                inbox.rest()
        return worker._scheduler.decode_steps - before

    assert calls([range(4)]) * 3 < calls([[0], [1], [2], [3]])


def test_a_job_beyond_the_bound_is_refused_and_a_cancelled_one_makes_room(worker):
    jobs = [job(seed, LONG)[0] for seed in range(8)]
    worker.submit(jobs)
    for too_many in ([job()[0]], [job()[0], job()[0]]):
        with pytest.raises(Overloaded):
            worker.submit(too_many)
    wait_until(lambda: worker.running == 4)
    worker.cancel(jobs)
    worker.cancel(jobs)
    wait_until(lambda: worker.open_jobs == 0 and worker.running == 0)
    one, inbox = job()
    worker.submit([one])
    assert inbox.rest()


def test_a_text_is_scored_between_the_calls_of_an_answer(engine, worker):
    running, _ = job(1, LONG)
    scores = queue.SimpleQueue()
    worker.submit([running, ScoringJob(np.asarray([9, 8, 7], np.int32), scores.put)])
    scored = scores.get(timeout=60)
    assert scored.logprobs.shape == (2,) and scored.likeliest.shape == (2, 3)
    assert (scored.likeliest_logprobs[:, 0] >= scored.logprobs).all()
    worker.cancel([running])


def test_a_model_that_breaks_fails_its_jobs_and_the_next_ones_are_served(engine, capsys):
    worker = EngineWorker(engine, PARAMS, max_waiting=4)
    good, worker._params = worker._params, {**worker._params, "wte": worker._params["wte"] * np.nan}
    worker._scheduler = engine.open_schedule(worker._params)
    worker._params = good  # from which it begins anew
    worker.start()
    one, inbox = job()
    worker.submit([one])
    failure = inbox.delivered.get(timeout=60)
    assert isinstance(failure, Failure) and "not finite" in failure.message
    one, inbox = job()
    worker.submit([one])
    assert inbox.rest()
    worker.stop()
    assert "FloatingPointError" in capsys.readouterr().err


def test_who_waits_when_the_server_ends_is_told(engine):
    worker = EngineWorker(engine, PARAMS, max_waiting=4)
    one, inbox = job(0, LONG)
    worker.submit([one])
    worker.start()
    worker.stop()
    while not isinstance(what := inbox.delivered.get(timeout=10), Failure):
        pass
    assert "has stopped" in what.message and not worker.alive
    late, inbox = job()
    worker.submit([late])
    assert isinstance(inbox.delivered.get(timeout=10), Failure) and worker.open_jobs == 0


def test_over_http_a_prompts_log_probabilities_are_the_generated_ones(worker):
    """An answer that is sent back as the end of the prompt has the log-probabilities that it was given."""
    with serving(worker) as url:
        body = {"prompt": [5, 6, 7], "max_tokens": 6, "logprobs": 2, "temperature": 0, "top_k": 0}
        (answer,) = httpx.post(url + "/v1/completions", json=body, timeout=60).json()["choices"]
        tokens = answer["logprobs"]["tokens"]
        ids = [int(token[-2:], 16) if token.startswith("bytes:") else ord(token) for token in tokens]  # none is special
        body = {"prompt": [5, 6, 7, *ids], "max_tokens": 1, "echo": True, "logprobs": 2, "temperature": 0}
        (echoed,) = httpx.post(url + "/v1/completions", json=body, timeout=60).json()["choices"]
        logprobs = echoed["logprobs"]
        assert logprobs["tokens"][3:-1] == tokens
        assert None not in logprobs["token_logprobs"]  # before the first one stands bos, which is not shown
        np.testing.assert_allclose(logprobs["token_logprobs"][3:-1], answer["logprobs"]["token_logprobs"], atol=1e-4)
        for number, likeliest in list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"]))[3:-1]:
            assert number == max(likeliest.values())  # exactly: so lm-evaluation-harness knows the likeliest token


def test_a_client_that_goes_away_frees_its_slot(worker):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400, "stream": True, "n": 4}
    with serving(worker) as url:
        with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
        wait_until(lambda: worker.running == 0 and worker.open_jobs == 0)
        again = httpx.post(url + "/v1/chat/completions", json=body | {"stream": False, "max_tokens": 4}, timeout=60)
        assert again.status_code == 200 and len(again.json()["choices"]) == 4
