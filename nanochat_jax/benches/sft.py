"""The train step of SFT and pretraining, on random packed rows.

- Seconds are medians of warm steps, each awaited. compile_seconds is tracing and compiling the step, not running it.
- flops_per_second counts what `model.cost.flops_per_token` counts, as nanochat does: min(window, T) keys for every
  query, from which causality and documents are not subtracted; what is computed again is not added. mfu is that over
  the vendor's peak, gflops_per_second the same in other units; gflops_per_second_with_optimizer adds Muon's matrix
  products, five times 4 s^2 l + 2 s^3 for each matrix of sides s <= l.
- matmul_gflops_per_second is what large square products reach in this run, all devices together, in the step's type;
  matmul_share is gflops_per_second over it.
- peak_memory_bytes is the device's own count, or on CPU the largest resident size of the process, compiler included.

On a CPU with Linux set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 first, as the stages advise.
"""

import dataclasses
import resource
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.benches.rates import matmul_rate
from nanochat_jax.benches.subject import document_starts
from nanochat_jax.cli.device import peak_flops
from nanochat_jax.distributed.mesh import make_mesh, row_shards
from nanochat_jax.distributed.sharding import to_global
from nanochat_jax.flags.bench import BenchConfig
from nanochat_jax.flags.stage import StageConfig
from nanochat_jax.model.cost import flops_per_token, parameter_counts
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.optim.groups import default_groups, group_labels
from nanochat_jax.optim.muon import POLAR_EXPRESS
from nanochat_jax.train.plan import BatchShape, Plan, TokenLoss, make_plan
from nanochat_jax.train.row_stages import row_batch_shape
from nanochat_jax.train.step import random_state

STEPS = 12  # timed, after two that are not


def plan_of(cfg: BenchConfig, model: GPTConfig, mesh: Mesh) -> Plan:
    """What a stage with these sizes compiles. ValueError: sizes do not fit together."""
    one_pass = cfg.device_batch_size * row_shards(mesh) * model.sequence_len
    tokens = one_pass if cfg.total_batch_size == -1 else cfg.total_batch_size
    sizes = dataclasses.replace(cfg, max_seq_len=model.sequence_len, total_batch_size=tokens)
    return make_plan(
        StageConfig(dtype=cfg.dtype, attention=cfg.attention, remat=cfg.remat),
        model,
        mesh,
        batch=row_batch_shape(sizes, mesh),
        loss=TokenLoss(),
        scalars=("lr_multiplier", "muon_momentum"),
        groups=default_groups(model.n_embd, embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02),
        packed=cfg.document_tokens > 0,
    )


def random_batch(cfg: BenchConfig, vocab_size: int, shape: BatchShape, seed: int) -> dict[str, np.ndarray]:
    """Rows like SFT's: about half of the targets are trained."""
    rng = np.random.default_rng(seed)
    return {
        "document_start": document_starts(rng, shape, cfg.document_tokens),
        "inputs": rng.integers(0, vocab_size, shape, dtype=np.int32),
        "targets": rng.integers(0, vocab_size, shape, dtype=np.int32),
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


def bench_sft(cfg: BenchConfig, model: GPTConfig) -> dict[str, Any]:
    """-> all numbers of the train step. ValueError: the sizes do not fit together."""
    plan = plan_of(cfg, model, make_mesh(cfg.mesh or "", n_embd=model.n_embd))
    mesh, device = plan.mesh, plan.mesh.devices.flat[0]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name.endswith("backend_compile_duration") else None
    )
    began = time.perf_counter()
    train_step = plan.compile_train_step()
    compile_seconds = time.perf_counter() - began
    with plan.scope():
        state = random_state(model, plan.optimizer, plan.abstract_state, seed=0)
    batches = [to_global(random_batch(cfg, model.vocab_size, plan.batch, seed), mesh) for seed in range(4)]
    seconds, losses = [], []
    for i in range((cfg.repeats or STEPS) + 2):
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
    flops = tokens * flops_per_token(model, plan.batch.T)
    with_optimizer = flops + orthogonalization_flops(plan.abstract_state.params)
    matmul = matmul_rate(plan.dtype) * mesh.size
    peak = peak_flops(device.device_kind)
    return {
        "tokens_per_second": tokens / per_step,
        "flops_per_second": flops / per_step,
        "mfu": flops / per_step / peak / mesh.size if peak else None,
        "gflops_per_second": flops / per_step / 1e9,
        "gflops_per_second_with_optimizer": with_optimizer / per_step / 1e9,
        "matmul_gflops_per_second": matmul / 1e9,
        "matmul_share": flops / per_step / matmul,
        "matmul_share_with_optimizer": with_optimizer / per_step / matmul,
        "seconds_per_step": per_step,
        "seconds_per_step_min_max": [min(seconds[2:]), max(seconds[2:])],
        "compile_seconds": compile_seconds,
        "compiles_after_step_1": compiles_after_step_1,
        "peak_memory_bytes": peak_memory,
        "final_loss": losses[-1],
        "batch": plan.batch,
        "parameters": parameter_counts(model)["total"],
        "attention": plan.attention,
        "remat": plan.remat,
        "devices": mesh.size,
        "dtype": plan.dtype.name,
    }
