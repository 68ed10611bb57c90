"""Time the train step on random weights and random packed rows, and print one JSON line.

Seconds are medians of warm steps, each awaited. compile_seconds is tracing and compiling the step, without running it.
flops_per_second counts what `gpt.flops_per_token` counts, as nanochat does. peak_memory_bytes is the device's own
count, or on CPU the largest resident size of the process, compiler included.

python tools/bench_sft.py                                          # the CPU yardstick: depth 4, width 256, T 512, B 8
python tools/bench_sft.py --depth 12 --width 768 --head-dim 128 --vocab-size 32768 --seq-len 2048 --batch-size 16
"""

import dataclasses
import json
import platform
import resource
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from nanochat_jax.common import cpu_name, peak_flops
from nanochat_jax.gpt import GPT, GPTConfig, flops_per_token, parameter_counts, window_sizes
from nanochat_jax.optim import default_groups, make_optimizer
from nanochat_jax.sharding import make_mesh, to_global
from nanochat_jax.train import abstract_state, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time the SFT train step."""

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
    mesh: str = ""


def random_batch(cfg: Bench, seed: int) -> dict[str, np.ndarray]:
    """Rows like SFT's: about half of the targets are trained."""
    rng = np.random.default_rng(seed)
    shape = (cfg.accumulation, cfg.batch_size, cfg.seq_len)
    starts = np.zeros(shape, np.int32)
    if cfg.document_tokens:
        borders = rng.random(shape) < 1 / cfg.document_tokens
        starts = np.maximum.accumulate(np.where(borders, np.arange(cfg.seq_len), 0), -1).astype(np.int32)
    return {
        "inputs": rng.integers(0, cfg.vocab_size, shape, dtype=np.int32),
        "targets": rng.integers(0, cfg.vocab_size, shape, dtype=np.int32),
        "weights": (rng.random(shape) < 0.5).astype(np.float32),
        "document_start": starts,
    }


def check(cfg: Bench, rows_at_once: int) -> None:
    """Exit with a sentence where these settings cannot be built."""
    heads = cfg.width // cfg.head_dim
    for holds, sentence in (
        (min(cfg.depth, cfg.width, cfg.head_dim, cfg.seq_len, cfg.batch_size, cfg.steps) > 0, "sizes must be above 0"),
        (cfg.width % cfg.head_dim == 0, f"--width={cfg.width} must be a multiple of --head-dim={cfg.head_dim}"),
        (heads % (cfg.kv_heads or heads) == 0, f"--kv-heads={cfg.kv_heads} must divide the {heads} query heads"),
        (
            cfg.batch_size % rows_at_once == 0,
            f"--batch-size={cfg.batch_size} must be a multiple of {rows_at_once} devices",
        ),
    ):
        if not holds:
            sys.exit(f"error: {sentence}")


def main(cfg: Bench) -> None:
    mesh = make_mesh(cfg.mesh)
    check(cfg, mesh.shape["data"])
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name.endswith("backend_compile_duration") else None
    )
    config = GPTConfig(
        sequence_len=cfg.seq_len,
        vocab_size=cfg.vocab_size,
        padded_vocab=-(-cfg.vocab_size // 64) * 64,
        n_layer=cfg.depth,
        n_head=cfg.width // cfg.head_dim,
        n_kv_head=cfg.kv_heads or cfg.width // cfg.head_dim,
        n_embd=cfg.width,
        windows=window_sizes(cfg.window_pattern, cfg.depth, cfg.seq_len),
    )
    device = jax.devices()[0]
    dtype = jnp.dtype(("float32" if device.platform == "cpu" else "bfloat16") if cfg.dtype == "auto" else cfg.dtype)
    with jax.set_mesh(mesh):
        groups = default_groups(cfg.width, embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02)
        tx = make_optimizer(groups, dtype)
        abstract = abstract_state(config, tx, mesh)

        def fresh():
            params = nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(0))))
            return init_state(params, tx)

        state = jax.jit(fresh, out_shardings=jax.tree.map(lambda a: a.sharding, abstract))()
        step = make_train_step(config, tx, abstract, mesh, dtype=dtype)
        batches = [to_global(random_batch(cfg, seed), mesh) for seed in range(4)]
        began = time.perf_counter()
        step.lower(state, batches[0], np.float32(1.0), np.float32(0.9)).compile()  # the calls below find it compiled
        compile_seconds = time.perf_counter() - began
        seconds, losses = [], []
        began = time.perf_counter()
        for i in range(cfg.steps + 2):
            state, metrics = step(state, batches[i % 4], np.float32(1.0), np.float32(0.9))
            losses.append(float(metrics["loss"]))
            now = time.perf_counter()
            seconds.append(now - began)
            began = now
            if i == 0:
                after_first = len(compiled)
        memory = device.memory_stats() or {}
    per_step = statistics.median(seconds[2:])
    tokens = cfg.accumulation * cfg.batch_size * cfg.seq_len
    flops = tokens * flops_per_token(config, cfg.seq_len)
    peak = peak_flops(device.device_kind)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = {
        "tokens_per_second": round(tokens / per_step, 1),
        "flops_per_second": round(flops / per_step),
        "mfu": round(flops / per_step / peak / mesh.size, 4) if peak else None,
        "seconds_per_step": round(per_step, 4),
        "seconds_per_step_min_max": [round(min(seconds[2:]), 4), round(max(seconds[2:]), 4)],
        "compile_seconds": round(compile_seconds, 2),
        "compiles_after_step_1": len(compiled) - after_first,
        "peak_memory_bytes": memory.get("peak_bytes_in_use", rss),
        "final_loss": round(losses[-1], 4),
        "parameters": parameter_counts(config)["total"],
        "device": cpu_name() if device.platform == "cpu" else device.device_kind,
        "devices": mesh.size,
        "dtype": dtype.name,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "settings": dataclasses.asdict(cfg),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main(tyro.cli(Bench))
    except ValueError as e:
        sys.exit(f"error: {e}")
