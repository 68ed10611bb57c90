"""Bits per byte on batches that come one after the other; the values themselves are checked in tests/golden.

Run: python -m pytest tests/evals/test_bits_per_byte.py
"""

import numpy as np
import pytest

from nanochat_jax.distributed.signals import Interrupted
from nanochat_jax.evals.bits_per_byte import make_bits_per_byte
from tests.support.models import random_batch, random_params, tiny_config

CONFIG = tiny_config(n_layer=1, windows=(-1,))
BATCHES = [{name: leaf[0] for name, leaf in random_batch(CONFIG, B=2, seed=seed).items()} for seed in range(5)]


@pytest.fixture(scope="module")
def bits_per_byte():
    return make_bits_per_byte(CONFIG, np.arange(CONFIG.vocab_size) % 4)


def test_a_check_between_the_batches_does_not_change_the_number(bits_per_byte):
    params, checks = random_params(CONFIG), []
    assert bits_per_byte(params, BATCHES, lambda: checks.append(None)) == bits_per_byte(params, iter(BATCHES))
    assert len(checks) == len(BATCHES)


def test_an_interrupt_after_a_batch_leaves_one_more_on_the_devices(bits_per_byte):
    left = iter(BATCHES)

    def interrupt():
        raise Interrupted

    with pytest.raises(Interrupted):
        bits_per_byte(random_params(CONFIG), left, interrupt)
    assert len(list(left)) == len(BATCHES) - 2
