"""Time the rollout engine on random weights and random prompts, and print one JSON line.

- tokens_per_second counts all generated tokens of whole calls of `generate`, prefill and tools included (median over
  the repeats, after one that compiles). ms_per_decode_step is the time in the device's calls over the steps made there;
  host_share is the part of the time with no device at work.
- peak_memory_bytes is the device's own count, or on CPU what the largest program needs by the compiler's count.
- mbu is the used share of memory bandwidth: the fewest bytes that decoding must read, over the time in the device's
  calls (prefill included) and over memory_gb_per_second, the rate of a triad on large arrays in this run. At each step
  every device reads the matrices of the blocks and lm_head once, in the compute type (of embeddings a step reads a few
  rows: left out); and for every layer and every token fed, the keys and values that it sees, min(position, window) + 1:
  those after the prompt for each sample, those of the prompt once for all samples of a group, that is max(over the
  longest sample, over all samples / rows of a group), the fewest that any order of the samples allows.

python tools/bench/bench_rollout.py                                               # the CPU yardstick
python tools/bench/bench_rollout.py --preset d20     # 256 slots, 16 prompts of 150 tokens x 16 samples x 256 new, tools
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from operator import truediv
from statistics import median
from typing import Literal

import jax
import numpy as np
from bench_device import DEPTHS, depth_shape, facts, memory_rate, model_config, parse
from flax import nnx

from nanochat_jax.cli.device import choose_attention, compute_dtype
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import require
from nanochat_jax.distributed.device_memory import beside_arguments
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.shapes import arrange_slots
from nanochat_jax.inference.tools import CALCULATOR_ALONE
from nanochat_jax.model.cost import parameter_counts
from nanochat_jax.model.gpt import GPT, GPTConfig
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer

PRESETS = {"cpu": {}} | {
    name: depth_shape(depth) | {"sequence_len": 2048, "prompt_tokens": 150, "new_tokens": 256}
    for name, depth in DEPTHS.items()
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time the rollout engine."""

    preset: Literal["cpu", "d12", "d20", "d26"] = "cpu"  # nanochat's model of this depth
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
    attention: str = "auto"  # of the prefill: reference, chunked, mosaic_gpu, triton, splash or cudnn
    mesh: str = ""


def tokenizer(size: int) -> Tokenizer:
    """Of `size` tokens: bytes, pairs of bytes, and the special ones."""
    ranks = [bytes([i]) for i in range(256)] + [bytes([i, j]) for i in range(256) for j in range(256)]
    ranks = ranks[: size - len(SPECIAL_TOKENS)]
    specials = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return Tokenizer("bench", r"\w+|\W", {token: i for i, token in enumerate(ranks)}, specials)


def random_params(config: GPTConfig) -> dict:
    """An untrained model's, with the zeros of an initial state replaced, so that every path counts."""

    def fresh():
        leaves, tree = jax.tree.flatten(nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(0)))))
        keys = jax.random.split(jax.random.key(0), len(leaves))
        return tree.unflatten(w + 0.02 * jax.random.normal(key, w.shape) for w, key in zip(leaves, keys))

    return jax.jit(fresh)()


def kv_tokens(config: GPTConfig, prompt: int, lengths: Sequence[int], shared: int) -> float:
    """Pairs of a layer and a key that must be read for one prompt's samples of these lengths, `shared` at a time.

    At step t a sample is at position P + t, P = prompt - 1 (the prompt's last token is fed first)."""
    P, steps = prompt - 1, np.arange(max(lengths))
    own, of_prompt = np.zeros(len(steps)), np.zeros(len(steps))  # of all layers, at each step
    for window in config.windows:
        reach = steps + P if window < 0 else np.minimum(window, steps + P)  # keys before the token's own
        own += np.minimum(reach, steps) + 1
        of_prompt += np.maximum(reach - steps, 0)
    own, of_prompt = np.cumsum(own), np.cumsum(of_prompt)
    last = np.asarray(lengths) - 1
    return own[last].sum() + max(of_prompt[-1], of_prompt[last].sum() / shared)


def main(cfg: Bench) -> None:
    sizes = (cfg.prompts, cfg.prompt_tokens, cfg.samples, cfg.repeats)
    require(min(sizes) >= 1, "sizes and counts must be at least 1")
    config, mesh = model_config(cfg, cfg.sequence_len), make_mesh(cfg.mesh)
    device, T = mesh.devices.flat[0], cfg.prompt_tokens + cfg.new_tokens
    dtype = compute_dtype(cfg.dtype, device.platform)
    say = partial(print, file=sys.stderr)
    # as in RL's training, whose backend the prefill has
    attention = choose_attention(cfg.attention, config, T, mesh=mesh, dtype=dtype, log=say, packed=True)
    engine = Engine(
        config,
        tokenizer(cfg.vocab_size),
        mesh,
        dtype=dtype,
        attention=attention,
        slots=cfg.slots,
        chunk=cfg.chunk,
        tools=CALCULATOR_ALONE if cfg.tools else None,
    )
    sampling = SamplingParams(cfg.temperature, cfg.top_k, cfg.new_tokens)
    params = engine.cast_params(random_params(config))
    prompts = np.random.default_rng(1).integers(0, 256, (cfg.prompts, cfg.prompt_tokens)).tolist()

    counts = parameter_counts(config)
    weight_bytes = (counts["matrices"] + counts["lm_head"]) * dtype.itemsize * mesh.size
    key_value_bytes = 2 * config.kv_dim * engine.programs.layout.dtype.itemsize
    shared, _ = arrange_slots(cfg.prompts, cfg.samples, cfg.slots)
    runs, bytes_read, compiles = [], [], []
    for step in range(cfg.repeats + 1):
        results = engine.generate(params, prompts, sampling, samples=cfg.samples, step=step, report=runs.append)
        keys = sum(kv_tokens(config, cfg.prompt_tokens, [len(s.tokens) for s in row], shared) for row in results)
        bytes_read.append(weight_bytes * runs[-1].decode_steps + key_value_bytes * keys)
        compiles.append(engine.compiles)
    (warmup, *timed), (_, *bytes_read) = runs, bytes_read
    steps, device_seconds = [run.decode_steps for run in timed], [run.seconds - run.host_seconds for run in timed]
    peak_memory = (device.memory_stats() or {}).get("peak_bytes_in_use") or max(
        program.memory_analysis().argument_size_in_bytes + beside_arguments(program)
        for program in engine.programs.compiled.values()
    )
    del params
    memory = memory_rate()
    result = {
        "tokens_per_second": round(median(run.generated_tokens / run.seconds for run in timed)),
        "ms_per_decode_step": round(1e3 * median(map(truediv, device_seconds, steps)), 3),
        "host_share": round(median(run.host_seconds / run.seconds for run in timed), 4),
        "mbu": round(median(map(truediv, bytes_read, device_seconds)) / memory / mesh.size, 4),
        "mb_per_decode_step": round(median(map(truediv, bytes_read, steps)) / 1e6, 2),
        "memory_gb_per_second": round(memory / 1e9, 2),
        "seconds": [round(run.seconds, 3) for run in timed],
        "compiles_after_warmup": compiles[-1] - compiles[0],
        "compiles": compiles[0],
        "warmup_seconds": round(warmup.seconds, 2),
        "peak_memory_bytes": peak_memory,
        "generated_tokens": timed[-1].generated_tokens,
        "decode_steps": steps[-1],
        "platform": device.platform,
        "devices": mesh.size,
        "machine": facts(device)["device"],
        **facts(device),
        **dataclasses.asdict(cfg),
        "dtype": dtype.name,
        "attention": attention,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run_stage(main, parse(Bench, PRESETS))
