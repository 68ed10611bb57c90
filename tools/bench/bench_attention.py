"""Time every attention backend that this device has, and print one JSON line for each case, and a table to stderr.

FLOPs are those of the visible (query, key) pairs, and of no other: 4 H for a pair and head forward (scores, values),
10 H backward (scores again, and the gradients of p, q, k and v), 14 H for both. `flops_per_second` is that over the
time; `dense_causal_flops_per_second` is what the same rows without window and documents would count over the same time:
the speed as it looks to the model. `share` is flops_per_second over matmul_flops_per_second, what large square products
reach in this run in the same type.

forward gives the output only, as evaluation does; backward starts from what the forward pass of training kept; both is
one program that gives the output and the gradients of q, k and v. Seconds are per call, medians of samples of many
calls, on an accelerator each on other numbers than the one before. A backend that refuses a case, and a part that
fails, leave their sentence. Packed rows hold documents of random lengths, --document-tokens in the mean, the same for
all backends.

python tools/bench/bench_attention.py             # T 2048 and 8192, heads of 64 and 128; on CPU a quarter of the tokens
python tools/bench/bench_attention.py --quick     # a check that it runs
python tools/bench/bench_attention.py --backends mosaic_gpu cudnn --seq-lens 2048 --head-dims 128
"""

import dataclasses
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from nanochat_jax.benches.rates import facts, matmul_rate, seconds_per_call
from nanochat_jax.benches.subject import document_starts
from nanochat_jax.cli.device import compute_dtype
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import require
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.model.attention import NAMES, AttentionShapes, attention, choose_attention_backend, first_key

PER_PAIR = {"forward": 4, "backward": 10, "both": 14}  # FLOPs, times the head size
INPUTS = 1 if jax.default_backend() == "cpu" else 4  # sets of arrays that calls take in turn
QUICK = {  # sizes that only show that everything runs
    "seq_lens": (256,),
    "windows": (64,),
    "tokens": 512,
    "width": 128,
    "group": 1,
    "samples": 2,
    "document_tokens": 60,
    "sample_seconds": 0.01,
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time attention backends."""

    backends: tuple[str, ...] = NAMES
    seq_lens: tuple[int, ...] = (2048, 8192)
    head_dims: tuple[int, ...] = (64, 128)
    windows: tuple[int, ...] = (512, -1)  # -1 = no limit
    tokens: int = 0  # of all rows of a call; 0 = 32768, on CPU 8192
    width: int = 0  # heads times their size; 0 = 2048, on CPU 256
    group: int = 1  # query heads that share a kv head
    document_tokens: int = 500  # mean length of the packed documents
    samples: int = 5
    sample_seconds: float = 0.1  # that a sample lasts at least, as many calls as that takes
    dtype: str = "auto"  # bfloat16 on accelerators, float32 on CPU
    seed: int = 0
    quick: bool = False  # a check that everything runs: of the flags above backends and head-dims stay in force


@dataclasses.dataclass(frozen=True)
class Case:
    """What one line is about."""

    backend: str
    packed: bool
    window: int
    T: int
    H: int
    B: int
    N: int
    K: int


def cases(cfg: Bench) -> list[Case]:
    """The grid. ValueError: sizes that do not fit together."""
    cpu = jax.default_backend() == "cpu"
    tokens, width = cfg.tokens or (8192 if cpu else 32768), cfg.width or (256 if cpu else 2048)
    sizes = (*cfg.seq_lens, *cfg.head_dims, cfg.group, cfg.samples, cfg.document_tokens, tokens, width)
    holds = min(sizes) >= 1 and min(cfg.sample_seconds, cfg.seed) >= 0 and min(cfg.windows, default=0) >= -1
    require(holds, "sizes must be above 0, windows at least 0, or -1 for no limit")
    for H in cfg.head_dims:
        fits = width % (H * cfg.group) == 0
        require(fits, f"--width={width} must be a multiple of heads of {H} times --group={cfg.group}")
    for name in cfg.backends:
        require(name in NAMES, f"--backends must be of {', '.join(NAMES)}, got {name!r:.60}")
    grid = itertools.product(cfg.seq_lens, cfg.head_dims, (False, True), cfg.windows, cfg.backends)
    return [
        Case(name, packed, window, T, H, max(1, tokens // T), width // H, width // H // cfg.group)
        for T, H, packed, window, name in grid
    ]


def k_starts(cfg: Bench, case: Case) -> np.ndarray:
    """int32 [INPUTS,B,T]: the first key of every query."""
    rng = np.random.default_rng(cfg.seed)
    shape = (INPUTS, case.B, case.T)
    starts = document_starts(rng, shape, cfg.document_tokens if case.packed else 0)
    return np.asarray(first_key(starts, np.arange(case.T, dtype=np.int32)[None, None], case.window))


def programs(case: Case, arrays: list[list[jax.Array]]) -> dict[str, Callable[[], Any]]:
    """Part -> a call that starts it on the next of the sets of q, k, v, k_start and the output's gradient."""

    def attend(q, k, v, k_start):
        return attention(q, k, v, k_start, window=case.window, impl=case.backend)

    def pulled(q, k, v, k_start):
        return jax.vjp(lambda q, k, v: attend(q, k, v, k_start), q, k, v)

    def both(q, k, v, k_start, dy):
        y, pull = pulled(q, k, v, k_start)
        return y, *pull(dy)

    turns = {part: itertools.cycle(range(INPUTS)) for part in PER_PAIR}
    forward, with_residuals, both = jax.jit(attend), jax.jit(pulled), jax.jit(both)
    backward = jax.jit(lambda pull, dy: pull(dy))
    pulls = []

    def run_backward():
        if not pulls:  # here, so that it does not hold memory before
            pulls.extend(with_residuals(*a[:4])[1] for a in arrays)
        i = next(turns["backward"])
        return backward(pulls[i], arrays[i][4])

    return {
        "forward": lambda: forward(*arrays[next(turns["forward"])][:4]),
        "both": lambda: both(*arrays[next(turns["both"])]),
        "backward": run_backward,
    }


def draw(cfg: Bench, case: Case, dtype: Any) -> list[list[jax.Array]]:
    """Sets of q [B,T,N,H], k and v [B,T,K,H], k_start [B,T] and the output's gradient [B,T,N,H]."""
    sets = []
    for i, k_start in enumerate(k_starts(cfg, case)):
        keys = jax.random.split(jax.random.key(cfg.seed + i), 4)
        heads = (case.N, case.K, case.K, case.N)
        q, k, v, dy = (jax.random.normal(key, (case.B, case.T, n, case.H), dtype) for key, n in zip(keys, heads))
        sets.append([q, k, v, jnp.asarray(k_start), dy])
    return sets


def measure(cfg: Bench, case: Case, dtype: Any, matmul: float) -> dict[str, Any]:
    """Of one case: for every part the seconds of a call, their least and most, and rates."""
    k_start = k_starts(cfg, case).astype(np.int64)
    seen = int((np.arange(case.T) - k_start + 1).sum()) / INPUTS  # of a call, in the mean
    dense = case.B * case.T * (case.T + 1) / 2
    result = {"visible_pairs": round(seen), "dense_causal_pairs": round(dense)}
    for part, call in programs(case, draw(cfg, case, dtype)).items():
        try:
            seconds = seconds_per_call(call, samples=cfg.samples, least=cfg.sample_seconds)
        except Exception as e:  # most often no memory for the scores of `reference`: the next may fit
            result[part] = {"error": f"{type(e).__name__}: {' '.join(str(e).split()):.200}"}
            continue
        median = statistics.median(seconds)
        rate = PER_PAIR[part] * case.H * case.N / median
        result[part] = {
            "seconds": float(f"{median:.4g}"),
            "seconds_min_max": [float(f"{x:.4g}") for x in (min(seconds), max(seconds))],
            "flops_per_second": round(rate * seen),
            "dense_causal_flops_per_second": round(rate * dense),
            "share": round(rate * seen / matmul, 4),
        }
    return result


@functools.cache  # a kernel is tried once for all cases with these heads
def refusal(backend: str, packed: bool, shapes: AttentionShapes, dtype: np.dtype) -> str | None:
    """Why the backend cannot do it, as a sentence, or None."""
    try:
        choose_attention_backend(backend, make_mesh("data=1,model=1"), dtype, shapes, packed=packed)
    except ValueError as e:
        return str(e).partition("cannot be used: ")[2] or str(e)
    return None


def main(cfg: Bench) -> None:
    cfg = dataclasses.replace(cfg, **QUICK) if cfg.quick else cfg
    grid, dtype, device = cases(cfg), compute_dtype(cfg.dtype), jax.devices()[0]
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    matmul = matmul_rate(dtype)
    common = {"matmul_flops_per_second": round(matmul), "dtype": dtype.name, **facts(device)}
    lines = []
    for case in grid:
        line = dataclasses.asdict(case)
        shapes = AttentionShapes(case.N, case.K, case.H, cfg.windows, max(cfg.seq_lens))
        if why := refusal(case.backend, case.packed, shapes, dtype):
            line["refused"] = why
        else:
            line |= measure(cfg, case, dtype, matmul)
        lines.append(line)
        print(json.dumps(line | common | {"settings": dataclasses.asdict(cfg)}), flush=True)
    report(console, lines, common)
    ran = any("seconds" in line.get(part, {}) for line in lines for part in PER_PAIR)
    require(ran, "no backend ran: see what was refused and what failed above")


def report(console: Console, lines: list[dict], common: dict[str, Any]) -> None:
    """The table, and once each sentence of what did not run."""
    unit, name = (1e12, "TFLOP/s") if common["matmul_flops_per_second"] > 1e13 else (1e9, "GFLOP/s")
    rate = common["matmul_flops_per_second"] / unit
    title = f"{common['device']}, {common['dtype']}, jax {common['jax']}: matrix products reach {rate:.1f} {name}"
    table = Table(title=title, caption=f"{name} of visible pairs, and in brackets dense causal ones over the same time")
    for column in ("T", "H", "rows", "window", "backend", *PER_PAIR, "share of both"):
        table.add_column(column, no_wrap=True)
    for line in lines:
        if "refused" in line:
            continue
        found = [line.get(part, {}) for part in PER_PAIR]
        keys = ("flops_per_second", "dense_causal_flops_per_second")
        parts = ["{:.1f} ({:.1f})".format(*(x[key] / unit for key in keys)) if "seconds" in x else "-" for x in found]
        share = f"{line['both']['share']:.0%}" if "share" in line.get("both", {}) else "-"
        rows, window = "packed" if line["packed"] else "dense", "full" if line["window"] < 0 else str(line["window"])
        table.add_row(str(line["T"]), str(line["H"]), rows, window, line["backend"], *parts, share)
    console.print(table)
    failed = [line.get(part, {}).get("error") for line in lines for part in PER_PAIR]
    for sentence in filter(None, dict.fromkeys([line.get("refused") for line in lines] + failed)):
        console.print(sentence, style="yellow", markup=False, highlight=False)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Bench))
