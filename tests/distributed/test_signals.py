"""Measurements that a signal ends are given up by all processes together. Signals that end a run: train/test_loop.py.

Run: python -m pytest tests/distributed/test_signals.py
"""

import pytest

from nanochat_jax.distributed import processes
from nanochat_jax.distributed.signals import Interrupted, collect


def test_what_processes_compute_is_collected_as_json():
    assert collect("x", lambda: (1, 2)) == [[1, 2]] and collect("x", lambda: None) == [None]


def test_an_interrupted_process_lets_the_others_know_and_all_are_interrupted(monkeypatch):
    exchanged = []
    monkeypatch.setattr(processes, "exchange", lambda what, value: exchanged.append((what, value)) or [[1], value])

    def interrupt():
        raise Interrupted

    assert collect("answers", lambda: 2) == [1, 2]
    with pytest.raises(Interrupted):
        collect("answers", interrupt)
    assert exchanged == [("answers", [2]), ("answers", None)]
    monkeypatch.setattr(processes, "exchange", lambda what, value: [value, None])
    with pytest.raises(Interrupted):
        collect("answers", lambda: 2)
