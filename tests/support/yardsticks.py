"""What benchmarks compare with, made short for tests."""

import math

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax.benches import rates


def shorten_yardsticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run as they are, but in two short samples, and their large arrays hold ones: random numbers and repetitions
    take seconds, and change nothing that is promised about the output."""
    normal, timed = jax.random.normal, rates.seconds_per_call

    def briefly(call, *, samples, least):
        return timed(call, samples=min(samples, 2), least=min(least, 0.01))

    def drawn(key, shape, *dtype):
        return jnp.ones(shape, *dtype) if math.prod(shape) >= 1 << 20 else normal(key, shape, *dtype)

    monkeypatch.setattr(rates, "seconds_per_call", briefly)
    monkeypatch.setattr(jax.random, "normal", drawn)
