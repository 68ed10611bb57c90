"""Which attention backend is the fastest on a device: the work that is timed, the timing, and what is kept of it.

Nothing here knows the table of backends; select.py does.
"""

import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.files import bucket
from nanochat_jax.files.paths import write_atomically
from nanochat_jax.model.attention.reference import first_key

ROUNDS = 5  # the most; in each, every backend is timed once, so that a slow moment of the machine meets all
BUDGET = 2.0  # seconds after which no further round begins
TIMED_TOKENS = 16384  # the most of a timed pass
DOCUMENTS = 4  # of a row, where rows may hold several
TIE = 1.05  # within it, the order of the candidates decides, so that noise does not


class Work(NamedTuple):
    """What is timed: the attention of all layers in a device's share of a pass."""

    rows: int  # fewer are timed where they have more than TIMED_TOKENS
    T: int  # tokens of a row
    heads: tuple[int, int, int]  # query heads, kv heads, their size
    windows: tuple[int, ...]  # of the layers in turn
    dtype: str
    packed: bool  # a row holds several documents
    training: bool  # backward too


def first_keys(T: int, window: int, packed: bool) -> jax.Array:
    """k_start int32 [1,T] of a row of equal documents, one or DOCUMENTS, with this window (-1: none)."""
    position = jnp.arange(T, dtype=jnp.int32)[None]
    length = -(-T // DOCUMENTS) if packed else T
    return first_key(position // length * length, position, window)


def attention_pass(attend: Callable, work: Work, device: jax.Device) -> Callable[[], None]:
    """A function that does the work once on the device and returns when it is done. All is compiled here.

    attend(q, k, v, k_start, scale, window): a backend, for one device."""
    N, K, H = work.heads
    rows = max(1, min(work.rows, TIMED_TOKENS // work.T))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((rows, work.T, n, H), np.float32).astype(work.dtype) for n in (N, K, K, N)]
    arrays = jax.device_put(arrays, device)

    def layer(window, q, k, v, dy, k_start):
        def forward(q, k, v):
            return attend(q, k, v, k_start, H**-0.5, window)

        if not work.training:
            return forward(q, k, v)
        y, pull = jax.vjp(forward, q, k, v)
        return y, *pull(dy)

    programs = {}
    for window in dict.fromkeys(work.windows):
        k_start = jax.device_put(np.repeat(first_keys(work.T, window, work.packed), rows, 0), device)
        compiled = jax.jit(partial(layer, window)).lower(*arrays, k_start).compile()
        programs[window] = partial(compiled, *arrays, k_start)

    def run() -> None:
        for window in work.windows:
            last = programs[window]()
        jax.block_until_ready(last)  # a device runs its programs one after the other

    return run


def time_backends(attends: Mapping[str, Callable], work: Work, device: jax.Device) -> dict[str, float]:
    """Median seconds of the work with each backend; one that cannot do it, such as for want of memory, is left out."""
    runs = {}
    for name, attend in attends.items():
        try:
            runs[name] = attention_pass(attend, work, device)
            runs[name]()
        except Exception:  # a compiler or a driver may raise anything
            runs.pop(name, None)
    return median_seconds(runs)


def median_seconds(
    runs: Mapping[str, Callable[[], None]], clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The median time of a call of each function, in rounds. What a first call does once must be done already."""
    found, begun = {name: [] for name in runs}, clock()
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = clock()
            run()
            found[name].append(clock() - start)
        if clock() - begun > BUDGET:
            break
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def fastest(seconds: Mapping[str, float]) -> str:
    """The first name whose time is at most TIE times the least."""
    limit = TIE * min(seconds.values())
    return next(name for name, taken in seconds.items() if taken <= limit)


def table(seconds: Mapping[str, float]) -> list[str]:
    """A line for each backend, the fastest first."""
    least = min(seconds.values())
    return [
        f"attention {name}: {1e3 * taken:.2f} ms a pass, {taken / least:.2f} of the fastest"
        for name, taken in sorted(seconds.items(), key=lambda item: item[1])
    ]


def recall(key: Mapping[str, Any]) -> dict[str, float] | None:
    """What `keep` kept under this key, in JAX's folder of compiled programs; None where there is nothing, or nothing
    that can be read."""
    try:
        kept = json.loads(_file(key).read_bytes())
        seconds = {name: float(taken) for name, taken in kept["seconds"].items()}
        usable = kept["key"] == json.loads(json.dumps(key)) and seconds.keys() <= set(key["backends"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return seconds if usable and all(0 < taken < float("inf") for taken in seconds.values()) else None


def keep(key: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    """Keep the times of key["backends"] for later runs, as far as there is a place for them that can be written."""
    with contextlib.suppress(OSError):  # then they are measured again
        write_atomically(_file(key), json.dumps({"key": key, "seconds": seconds}, indent=1).encode())


def _file(key: Mapping[str, Any]) -> Any:
    """OSError: JAX keeps no compiled programs."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        raise FileNotFoundError("there is no folder of compiled programs")
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return bucket.as_path(folder) / "attention" / f"{name}.json"
