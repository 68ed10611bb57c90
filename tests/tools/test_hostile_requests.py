"""The attack on a server, in its short form. Run: python -m pytest tests/tools/test_hostile_requests.py"""

import random

import pytest

from nanochat_jax.serving.app import make_app
from nanochat_jax.serving.http import PatientProtocol, serving
from tools.check import hostile_requests as hostile


def test_no_hostile_request_is_a_fault_of_the_server_or_leaves_something_behind(monkeypatch):
    monkeypatch.setattr(PatientProtocol, "header_seconds", 1.0)
    worker = hostile.tiny_worker()
    worker.start()
    with serving(make_app(worker, hostile.SETTINGS)) as url:
        found = hostile.attack(worker, int(url.rsplit(":", 1)[1]), count=120, seed=1, say=lambda line: None)
    worker.stop()
    assert found["faults"] == [] and sum(found["found"].values()) == 120
    assert {"200", "400", "404", "left"} <= {*found["found"]}


def test_an_attack_of_the_same_seed_is_the_same():
    first, second = ([hostile.hostile_request(random.Random(seed)) for seed in range(50)] for _ in range(2))
    assert first == second and len({*first}) == 50


@pytest.mark.parametrize("status", ["500", "none"])
def test_an_answer_of_500_and_no_answer_are_faults(monkeypatch, status):
    class Worker:
        open_jobs = running = 0

    def answer(port, seed):
        if status == "none":
            raise TimeoutError
        return status

    monkeypatch.setattr(hostile, "attack_once", answer)
    monkeypatch.setattr(hostile, "answer_to", lambda port, number: [])
    found = hostile.attack(Worker(), 0, count=2, seed=0, say=lambda line: None)
    assert found["faults"] == [f"request {n} got the answer {status}" for n in range(2)]
