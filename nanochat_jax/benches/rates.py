"""What a device reaches at its best, measured in the run that reports a share of it, on random numbers (zeros multiply
faster)."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from nanochat_jax.cli.device import cpu_name


def facts(device: jax.Device) -> dict[str, Any]:
    """What a number depends on beside the settings. large_pages: whether glibc asks the kernel for them."""
    found = {"device": device.device_kind}
    if device.platform == "cpu":
        found = {"device": cpu_name(), "large_pages": "hugetlb" in os.environ.get("GLIBC_TUNABLES", "")}
    return found | {"jax": jax.__version__, "python": platform.python_version()}


def seconds_per_call(call: Callable[[], Any], *, samples: int, least: float) -> list[float]:
    """Of warm calls of `call`, which starts work on the device and returns its results: `samples` samples, each of as
    many calls in a row as last `least` seconds, awaited together, so that dispatch hides behind the device."""

    def sample(calls):
        began = time.perf_counter()
        results = None
        for _ in range(calls):
            del results  # else two calls' results are alive at once
            results = call()
        jax.block_until_ready(results)
        return (time.perf_counter() - began) / calls

    sample(1)  # compiles
    calls = 1
    while (once := sample(calls)) * calls < least / 2:
        calls *= 2
    calls = max(1, round(least / once))
    return [sample(calls) for _ in range(samples)]


def matmul_rate(dtype: Any) -> float:
    """FLOP/s of one device in square matrix products, n = 8192 (2048 on CPU), in a chain: median of 5 samples."""
    n, length = (2048, 2) if jax.default_backend() == "cpu" else (8192, 8)
    x, w = (jax.random.normal(key, (n, n), dtype) for key in jax.random.split(jax.random.key(0)))
    w = w / n**0.5  # so that the product is as large as x
    chain = jax.jit(lambda x, w: jax.lax.fori_loop(0, length, lambda _, x: x @ w, x))
    return length * 2 * n**3 / statistics.median(seconds_per_call(lambda: chain(x, w), samples=5, least=0.3))


def memory_rate() -> float:
    """Bytes/s of one device's memory: a <- b + 0.5 a on float32 arrays of 1 GiB (128 MiB on CPU), two of them read and
    one written: median of 5 samples."""
    n = 1 << (25 if jax.default_backend() == "cpu" else 28)
    a, b = (jax.random.normal(key, (n,)) for key in jax.random.split(jax.random.key(0)))
    triad = jax.jit(lambda a, b: b + 0.5 * a, donate_argnums=0)

    def call():
        nonlocal a
        a = triad(a, b)
        return a

    return 3 * 4 * n / statistics.median(seconds_per_call(call, samples=5, least=0.3))
