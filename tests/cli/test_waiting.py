"""Long phases say what they are about; short ones say nothing."""

import time

import pytest

from nanochat_jax.cli import waiting
from nanochat_jax.cli.waiting import saying


def test_a_short_phase_says_nothing_and_a_long_one_when_it_begins_to_be_long_and_when_it_ends(monkeypatch):
    monkeypatch.setattr(waiting, "PATIENCE", 0.2)
    said = []
    with saying("thinking", said.append):
        pass
    time.sleep(0.3)
    assert said == []
    with saying("compiling", said.append):
        time.sleep(0.4)
        assert said == ["compiling ..."]
    (_, end) = said
    assert end.startswith("compiling: 0.") and end.endswith(" s")


def test_of_a_phase_that_fails_no_time_is_told(monkeypatch):
    monkeypatch.setattr(waiting, "PATIENCE", 0.05)
    said = []

    def fail():
        time.sleep(0.2)
        raise KeyError

    with pytest.raises(KeyError), saying("reading", said.append):
        fail()
    assert said == ["reading ..."]
