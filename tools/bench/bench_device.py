"""What the benches beside it share: the model of their flags, timing, and what this device reaches at its best.

A rate is measured in the run that reports a share of it, on random numbers (zeros multiply faster).
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tyro

from nanochat_jax.cli.device import cpu_name
from nanochat_jax.cli.settings import require
from nanochat_jax.model.gpt import GPTConfig, window_sizes
from nanochat_jax.train.scaling_laws import config_of_depth

DEPTHS = {"d12": 12, "d20": 20, "d26": 26}


def depth_shape(depth: int) -> dict[str, Any]:
    """Flags of nanochat's model of this depth: width 64 a layer, heads of 128, vocabulary 32768, windows SSSL."""
    sizes = {"head_dim": 128, "window_pattern": "SSSL", "vocab_size": 32768}
    model = config_of_depth(depth, aspect_ratio=64, max_seq_len=2048, **sizes)
    return sizes | {"depth": depth, "width": model.n_embd}


def parse[T](cls: type[T], presets: Mapping[str, dict[str, Any]]) -> T:
    """Settings from the command line: flag > --preset > default. `cls` has a field `preset`."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset")
    name = finder.parse_known_args()[0].preset
    return tyro.cli(cls, default=cls(preset=name, **presets[name]) if name in presets else cls())


def model_config(cfg: Any, sequence_len: int) -> GPTConfig:
    """Of depth, width, head_dim, kv_heads (0: as many as query heads), vocab_size and window_pattern.

    ValueError names the flags that do not fit together."""
    sizes = (cfg.depth, cfg.width, cfg.head_dim, cfg.vocab_size, sequence_len)
    require(min(sizes) >= 1 and cfg.kv_heads >= 0, "sizes must be above 0")
    require(cfg.width % cfg.head_dim == 0, f"--width={cfg.width} must be a multiple of --head-dim={cfg.head_dim}")
    heads = cfg.width // cfg.head_dim
    kv_heads = cfg.kv_heads or heads
    require(heads % kv_heads == 0, f"--kv-heads={kv_heads} must divide the {heads} query heads")
    return GPTConfig(
        sequence_len=sequence_len,
        vocab_size=cfg.vocab_size,
        padded_vocab=-(-cfg.vocab_size // 64) * 64,
        n_layer=cfg.depth,
        n_head=heads,
        n_kv_head=kv_heads,
        n_embd=cfg.width,
        windows=window_sizes(cfg.window_pattern, cfg.depth, sequence_len),
    )


def document_starts(rng: np.random.Generator, shape: tuple[int, ...], mean: int) -> np.ndarray:
    """int32 [...,T]: where each token's document begins, in rows packed with documents of random lengths around `mean`
    (a border before every token with probability 1 / mean); 0: one document a row."""
    if not mean:
        return np.zeros(shape, np.int32)
    borders = rng.random(shape) < 1 / mean
    return np.maximum.accumulate(np.where(borders, np.arange(shape[-1]), 0), -1).astype(np.int32)


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
