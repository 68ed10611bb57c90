"""Measurements that a signal ends are given up by all processes together. Signals that end a run: train/test_loop.py.

Run: python -m pytest tests/distributed/test_signals.py
"""

import pytest

from nanochat_jax.distributed import processes
from nanochat_jax.distributed.signals import FailedTogether, Interrupted, collect


def test_what_processes_compute_is_collected_as_json():
    assert collect("x", lambda: (1, 2)) == [[1, 2]] and collect("x", lambda: None) == [None]


def test_an_interrupted_process_lets_the_others_know_and_all_are_interrupted(monkeypatch):
    exchanged = []
    monkeypatch.setattr(processes, "exchange", lambda what, value: exchanged.append((what, value)) or [[1, ""], value])

    def interrupt():
        raise Interrupted

    assert collect("answers", lambda: 2) == [1, 2]
    with pytest.raises(Interrupted):
        collect("answers", interrupt)
    assert exchanged == [("answers", [2, ""]), ("answers", None)]
    monkeypatch.setattr(processes, "exchange", lambda what, value: [value, None])
    with pytest.raises(Interrupted):
        collect("answers", lambda: 2)


def test_an_error_of_one_of_several_processes_is_one_on_all(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "exchange", lambda what, value: [value, [None, "answers: a judge is broken"]])
    with pytest.raises(FailedTogether, match="a judge is broken"):
        collect("answers", lambda: 1)

    def fail():
        raise OSError("the disk is gone")

    monkeypatch.setattr(processes, "exchange", lambda what, value: [[1, ""], value])
    with pytest.raises(FailedTogether, match=r"answers: OSError: the disk is gone \(process 0\)") as raised:
        collect("answers", fail)
    assert isinstance(raised.value.__cause__, OSError)
    monkeypatch.setattr(processes, "count", lambda: 1)
    with pytest.raises(OSError, match="the disk is gone"):
        collect("answers", fail)
