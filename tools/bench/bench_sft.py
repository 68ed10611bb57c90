"""Time the train step on random weights and random packed rows, and print one JSON line.

Seconds are medians of warm steps, each awaited. compile_seconds is tracing and compiling the step, without running it.
flops_per_second counts what `gpt.flops_per_token` counts, as nanochat does: min(window, T) keys for every query, from
which causality and documents are not subtracted; what is computed again is not added. mfu is that over the vendor's
peak. gflops_per_second is the same in other units; gflops_per_second_with_optimizer adds Muon's matrix products, five
times 4 s^2 l + 2 s^3 for each matrix of sides s <= l. matmul_gflops_per_second is what large square products reach in
this run, all devices together, in the step's type; matmul_share is gflops_per_second over it. peak_memory_bytes is the
device's own count, or on CPU the largest resident size of the process, compiler included. On a CPU with
Linux set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 first, as the stages advise.

python tools/bench/bench_sft.py                                    # the CPU yardstick: depth 4, width 256, T 512, B 8
python tools/bench/bench_sft.py --preset d20                       # nanochat's d20 on one accelerator, a document a row
python tools/bench/bench_sft.py --preset d20 --document-tokens 500 --batch-size 4 --accumulation 8
"""

import dataclasses
import json
import resource
import statistics
import sys
import time
from typing import Any, Literal

import jax
import numpy as np
from bench_device import (
    DEPTHS,
    choose_attention,
    compute_dtype,
    depth_shape,
    document_starts,
    facts,
    matmul_rate,
    model_config,
    parse,
)

from nanochat_jax.cli.device import peak_flops
from nanochat_jax.distributed.mesh import make_mesh, row_shards
from nanochat_jax.distributed.sharding import to_global
from nanochat_jax.model.cost import flops_per_token, parameter_counts
from nanochat_jax.optim.groups import default_groups, group_labels, make_optimizer
from nanochat_jax.optim.muon import POLAR_EXPRESS
from nanochat_jax.train.remat import choose_remat
from nanochat_jax.train.step import abstract_state, make_train_step, random_state

ROWS = {"d12": (16, 2), "d20": (8, 4), "d26": (4, 8)}  # 65,536 tokens a step: a device's share of nanochat's, of eight
PRESETS = {"cpu": {}} | {
    name: depth_shape(depth) | {"seq_len": 2048, "batch_size": ROWS[name][0], "accumulation": ROWS[name][1]}
    for name, depth in DEPTHS.items()
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time the SFT train step."""

    preset: Literal["cpu", "d12", "d20", "d26"] = "cpu"  # nanochat's model of this depth, for one device
    depth: int = 4
    width: int = 256
    head_dim: int = 64
    kv_heads: int = 0  # 0 = as many as query heads
    vocab_size: int = 4096
    seq_len: int = 512
    batch_size: int = 8  # rows per micro-batch, all devices together
    accumulation: int = 1
    document_tokens: int = 0  # mean length of the packed documents; 0 = one document a row
    window_pattern: str = "SSSL"
    steps: int = 12  # timed steps, after two that are not
    dtype: str = "auto"  # bfloat16 on accelerators, float32 on CPU
    attention: str = "auto"  # reference, chunked, mosaic_gpu, splash or cudnn; auto = the fastest here
    remat: str = "auto"  # computed again instead of kept: none, elementwise or block; auto = the least that fits
    mesh: str = ""


def random_batch(cfg: Bench, seed: int) -> dict[str, np.ndarray]:
    """Rows like SFT's: about half of the targets are trained."""
    rng = np.random.default_rng(seed)
    shape = (cfg.accumulation, cfg.batch_size, cfg.seq_len)
    return {
        "document_start": document_starts(rng, shape, cfg.document_tokens),
        "inputs": rng.integers(0, cfg.vocab_size, shape, dtype=np.int32),
        "targets": rng.integers(0, cfg.vocab_size, shape, dtype=np.int32),
        "weights": (rng.random(shape) < 0.5).astype(np.float32),
    }


def orthogonalisation_flops(params: Any) -> int:
    """Of Muon's matrix products in one step, every matrix once: X X^T, A A and the product with X in each iteration."""
    total = 0
    for leaf, group in zip(jax.tree.leaves(params), jax.tree.leaves(group_labels(params)), strict=True):
        if group == "matrix":
            short, long = sorted(leaf.shape)
            total += len(POLAR_EXPRESS) * (4 * short**2 * long + 2 * short**3)
    return total


def main(cfg: Bench) -> None:
    config = model_config(cfg, cfg.seq_len)
    mesh = make_mesh(cfg.mesh)
    if min(cfg.batch_size, cfg.accumulation, cfg.steps) < 1 or cfg.document_tokens < 0:
        raise ValueError("sizes must be above 0")
    if cfg.batch_size % row_shards(mesh):
        raise ValueError(f"--batch-size={cfg.batch_size} must be a multiple of {row_shards(mesh)} devices")
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name.endswith("backend_compile_duration") else None
    )
    device, dtype = mesh.devices.flat[0], compute_dtype(cfg.dtype)
    attention = choose_attention(cfg.attention, config, cfg.seq_len, mesh, dtype, packed=cfg.document_tokens > 0)
    with jax.set_mesh(mesh):
        groups = default_groups(cfg.width, embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02)
        tx = make_optimizer(groups, dtype)
        abstract = abstract_state(config, tx, mesh)
        rows = cfg.batch_size // row_shards(mesh)
        remat = choose_remat(cfg.remat, config, abstract, dtype, rows, cfg.seq_len).name
        state = random_state(config, tx, abstract, seed=0)
        step = make_train_step(config, tx, abstract, mesh, dtype=dtype, attention=attention, remat=remat)
        batches = [to_global(random_batch(cfg, seed), mesh) for seed in range(4)]
        began = time.perf_counter()
        step.lower(state, batches[0], np.float32(1.0), np.float32(0.9)).compile()  # the calls below find it compiled
        compile_seconds = time.perf_counter() - began
        seconds, losses = [], []
        began = time.perf_counter()
        for i in range(cfg.steps + 2):
            state, metrics = step(state, batches[i % 4], np.float32(1.0), np.float32(0.9))
            losses.append(float(metrics.loss))
            now = time.perf_counter()
            seconds.append(now - began)
            began = now
            if i == 0:
                after_first = len(compiled)
        compiles_after_step_1 = len(compiled) - after_first
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peak_memory = (device.memory_stats() or {}).get("peak_bytes_in_use", rss)
    del state, batches
    per_step = statistics.median(seconds[2:])
    tokens = cfg.accumulation * cfg.batch_size * cfg.seq_len
    flops = tokens * flops_per_token(config, cfg.seq_len)
    with_optimizer = flops + orthogonalisation_flops(abstract.params)
    matmul = matmul_rate(dtype) * mesh.size
    peak = peak_flops(device.device_kind)
    result = {
        "tokens_per_second": round(tokens / per_step, 1),
        "flops_per_second": round(flops / per_step),
        "mfu": round(flops / per_step / peak / mesh.size, 4) if peak else None,
        "gflops_per_second": round(flops / per_step / 1e9, 2),
        "gflops_per_second_with_optimizer": round(with_optimizer / per_step / 1e9, 2),
        "matmul_gflops_per_second": round(matmul / 1e9, 2),
        "matmul_share": round(flops / per_step / matmul, 4),
        "matmul_share_with_optimizer": round(with_optimizer / per_step / matmul, 4),
        "seconds_per_step": round(per_step, 4),
        "seconds_per_step_min_max": [round(min(seconds[2:]), 4), round(max(seconds[2:]), 4)],
        "compile_seconds": round(compile_seconds, 2),
        "compiles_after_step_1": compiles_after_step_1,
        "peak_memory_bytes": peak_memory,
        "final_loss": round(losses[-1], 4),
        "parameters": parameter_counts(config)["total"],
        "attention": attention,
        "remat": remat,
        "devices": mesh.size,
        "dtype": dtype.name,
        **facts(device),
        "settings": dataclasses.asdict(cfg),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    try:
        main(parse(Bench, PRESETS))
    except ValueError as e:
        sys.exit(f"error: {e}")
