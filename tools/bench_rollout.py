"""Time the rollout engine on random weights and random prompts, and print one JSON line.

tokens_per_second counts all generated tokens of whole calls of `generate`, prefill and tools included (median over the
repeats, after one that compiles). ms_per_decode_step is the time in the device's calls over the steps made there.
peak_memory_bytes is the device's own count, or on CPU what the largest program needs by the compiler's count.

python tools/bench_rollout.py                                                # the CPU yardstick
python tools/bench_rollout.py --depth 12 --width 768 --head-dim 128 --vocab-size 32768 --prompts 32 --new-tokens 256
"""

import dataclasses
import json
import platform
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from nanochat_jax.common import cpu_name
from nanochat_jax.engine import Engine, Sampling
from nanochat_jax.gpt import GPT, GPTConfig, window_sizes
from nanochat_jax.sharding import make_mesh
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time the rollout engine."""

    depth: int = 4
    width: int = 256
    head_dim: int = 64
    kv_heads: int = 0  # 0 = as many as query heads
    vocab_size: int = 4096
    sequence_len: int = 512
    window_pattern: str = "SSSL"
    prompts: int = 16
    prompt_tokens: int = 100
    samples: int = 16  # per prompt
    new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 50
    slots: int = 256
    chunk: int = 16
    tools: bool = True
    repeats: int = 3
    dtype: str = "auto"  # bfloat16 on accelerators, float32 on CPU
    mesh: str = ""


def tokenizer(size: int) -> Tokenizer:
    """Of `size` tokens: bytes, pairs of bytes, and the special ones."""
    ranks = [bytes([i]) for i in range(256)] + [bytes([i, j]) for i in range(256) for j in range(256)]
    ranks = ranks[: size - len(SPECIAL_TOKENS)]
    specials = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return Tokenizer("bench", r"\w+|\W", {token: i for i, token in enumerate(ranks)}, specials)


def random_params(config: GPTConfig) -> dict:
    """An untrained model's, with the zeros of an initial state replaced, so that every path counts."""
    params = nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda w: w + jnp.asarray(rng.normal(0, 0.02, w.shape), jnp.float32), params)


def main(cfg: Bench) -> None:
    if min(cfg.depth, cfg.width, cfg.head_dim, cfg.prompts, cfg.prompt_tokens, cfg.repeats) < 1:
        raise ValueError("sizes and counts must be at least 1")
    if cfg.width % cfg.head_dim:
        raise ValueError(f"--width={cfg.width} must be a multiple of --head-dim={cfg.head_dim}")
    heads = cfg.width // cfg.head_dim
    config = GPTConfig(
        sequence_len=cfg.sequence_len,
        vocab_size=cfg.vocab_size,
        padded_vocab=-(-cfg.vocab_size // 64) * 64,
        n_layer=cfg.depth,
        n_head=heads,
        n_kv_head=cfg.kv_heads or heads,
        n_embd=cfg.width,
        windows=window_sizes(cfg.window_pattern, cfg.depth, cfg.sequence_len),
    )
    cpu = jax.default_backend() == "cpu"
    dtype = {"auto": "float32" if cpu else "bfloat16"}.get(cfg.dtype, cfg.dtype)
    mesh = make_mesh(cfg.mesh)
    engine = Engine(
        config, tokenizer(cfg.vocab_size), mesh, dtype=dtype, slots=cfg.slots, chunk=cfg.chunk, tools=cfg.tools
    )
    engine.load(random_params(config))
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, 256, (cfg.prompts, cfg.prompt_tokens)).tolist()
    sampling = Sampling(cfg.temperature, cfg.top_k, cfg.new_tokens)

    runs = []
    for step in range(cfg.repeats + 1):
        engine.generate(prompts, sampling, samples=cfg.samples, step=step)
        runs.append(engine.stats)
    warmup, *timed = runs

    def median(value):
        return statistics.median(value(run) for run in timed)

    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    result = {
        "tokens_per_second": round(median(lambda s: s["generated_tokens"] / s["seconds"])),
        "ms_per_decode_step": round(median(lambda s: 1e3 * (s["seconds"] - s["host_seconds"]) / s["decode_steps"]), 3),
        "host_share": round(median(lambda s: s["host_seconds"] / s["seconds"]), 4),
        "compiles_after_warmup": timed[-1]["compiles"] - warmup["compiles"],
        "compiles": warmup["compiles"],
        "warmup_seconds": round(warmup["seconds"], 2),
        "peak_memory_bytes": memory.get("peak_bytes_in_use") or engine.peak_memory,
        "generated_tokens": timed[-1]["generated_tokens"],
        "decode_steps": timed[-1]["decode_steps"],
        "platform": device.platform,
        "devices": mesh.size,
        "machine": cpu_name() if cpu else device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        **dataclasses.asdict(cfg),
        "dtype": dtype,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Bench))
    except ValueError as e:
        sys.exit(f"error: {e}")
