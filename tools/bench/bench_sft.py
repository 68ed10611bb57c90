"""Time the train step on random weights and random packed rows, and print one JSON line.

- Seconds are medians of warm steps, each awaited. compile_seconds is tracing and compiling the step, not running it.
- flops_per_second counts what `model.cost.flops_per_token` counts, as nanochat does: min(window, T) keys for every
  query, from which causality and documents are not subtracted; what is computed again is not added. mfu is that over
  the vendor's peak, gflops_per_second the same in other units; gflops_per_second_with_optimizer adds Muon's matrix
  products, five times 4 s^2 l + 2 s^3 for each matrix of sides s <= l.
- matmul_gflops_per_second is what large square products reach in this run, all devices together, in the step's type;
  matmul_share is gflops_per_second over it.
- peak_memory_bytes is the device's own count, or on CPU the largest resident size of the process, compiler included.

On a CPU with Linux set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 first, as the stages advise.

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
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from bench_device import DEPTHS, depth_shape, document_starts, facts, matmul_rate, model_config, parse
from jax.sharding import Mesh

from nanochat_jax.cli.device import peak_flops
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import require
from nanochat_jax.distributed.mesh import make_mesh, row_shards
from nanochat_jax.distributed.sharding import to_global
from nanochat_jax.flags.stage import StageConfig
from nanochat_jax.model.cost import flops_per_token, parameter_counts
from nanochat_jax.optim.groups import default_groups, group_labels
from nanochat_jax.optim.muon import POLAR_EXPRESS
from nanochat_jax.train.plan import BatchShape, Plan, TokenLoss, make_plan
from nanochat_jax.train.step import random_state

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
    attention: str = "auto"  # reference, chunked, mosaic_gpu, triton, splash or cudnn
    remat: str = "auto"  # computed again instead of kept: none, elementwise or block; auto = the least that fits
    mesh: str = ""


def plan_of(cfg: Bench, mesh: Mesh) -> Plan:
    """What a stage with these sizes compiles; what is chosen for it goes to stderr. ValueError: sizes do not fit."""
    model, shards = model_config(cfg, cfg.seq_len), row_shards(mesh)
    require(min(cfg.batch_size, cfg.accumulation, cfg.steps) >= 1 and cfg.document_tokens >= 0, "sizes must be above 0")
    require(cfg.batch_size % shards == 0, f"--batch-size={cfg.batch_size} must be a multiple of {shards} devices")
    return make_plan(
        StageConfig(dtype=cfg.dtype, attention=cfg.attention, remat=cfg.remat),
        model,
        mesh,
        batch=BatchShape(cfg.accumulation, cfg.batch_size, cfg.seq_len),
        loss=TokenLoss(),
        scalars=("lr_multiplier", "muon_momentum"),
        groups=default_groups(cfg.width, embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02),
        packed=cfg.document_tokens > 0,
        log=partial(print, file=sys.stderr),
    )


def random_batch(cfg: Bench, shape: BatchShape, seed: int) -> dict[str, np.ndarray]:
    """Rows like SFT's: about half of the targets are trained."""
    rng = np.random.default_rng(seed)
    return {
        "document_start": document_starts(rng, shape, cfg.document_tokens),
        "inputs": rng.integers(0, cfg.vocab_size, shape, dtype=np.int32),
        "targets": rng.integers(0, cfg.vocab_size, shape, dtype=np.int32),
        "weights": (rng.random(shape) < 0.5).astype(np.float32),
    }


def orthogonalization_flops(params: Any) -> int:
    """Of Muon's matrix products in one step, every matrix once: X X^T, A A and the product with X in each iteration."""
    total = 0
    for leaf, group in zip(jax.tree.leaves(params), jax.tree.leaves(group_labels(params)), strict=True):
        if group == "matrix":
            short, long = sorted(leaf.shape)
            total += len(POLAR_EXPRESS) * (4 * short**2 * long + 2 * short**3)
    return total


def main(cfg: Bench) -> None:
    plan = plan_of(cfg, make_mesh(cfg.mesh))
    model, mesh, device = plan.model, plan.mesh, plan.mesh.devices.flat[0]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name.endswith("backend_compile_duration") else None
    )
    began = time.perf_counter()
    train_step = plan.compile_train_step()
    compile_seconds = time.perf_counter() - began
    with plan.scope():
        state = random_state(model, plan.optimizer, plan.abstract_state, seed=0)
    batches = [to_global(random_batch(cfg, plan.batch, seed), mesh) for seed in range(4)]
    seconds, losses = [], []
    for i in range(cfg.steps + 2):
        began = time.perf_counter()
        state, metrics = train_step(state, batches[i % 4], np.float32(1.0), np.float32(0.9))
        losses.append(float(metrics.loss))
        seconds.append(time.perf_counter() - began)
        if i == 0:
            after_first = len(compiled)
    compiles_after_step_1 = len(compiled) - after_first
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak_memory = (device.memory_stats() or {}).get("peak_bytes_in_use", rss)
    del state, batches
    per_step = statistics.median(seconds[2:])
    tokens = plan.batch.tokens_per_step
    flops = tokens * flops_per_token(model, cfg.seq_len)
    with_optimizer = flops + orthogonalization_flops(plan.abstract_state.params)
    matmul = matmul_rate(plan.dtype) * mesh.size
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
        "parameters": parameter_counts(model)["total"],
        "attention": plan.attention,
        "remat": plan.remat,
        "devices": mesh.size,
        "dtype": plan.dtype.name,
        **facts(device),
        "settings": dataclasses.asdict(cfg),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run_stage(main, parse(Bench, PRESETS))
