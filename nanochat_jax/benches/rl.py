"""A step of RL on made-up rewards: answers to some prompts, packed into rows, and the update on them.

- tokens_per_second counts all generated tokens of whole calls of `generate`, prefill and tools included (median over
  the steps, after one that compiles). ms_per_decode_step is the time in the device's calls over the steps made there;
  host_share is the part of the time with no device at work.
- mbu is the fewest bytes that decoding must read (see `decoding`) over the time in the device's calls, prefill
  included, and over the vendor's memory bandwidth, null where that is not known; memory_share is the same over what a
  triad on large arrays reaches in this run.
- update_seconds is all between the last answer and the new parameters: packing, the train step, statistics.
- peak_memory_bytes is the device's own count, or on CPU what the largest program of generating needs by the compiler's.
"""

import time
from operator import truediv
from statistics import median
from typing import Any

import jax
import numpy as np

from nanochat_jax.benches.decoding import bytes_to_read, kv_tokens
from nanochat_jax.benches.rates import memory_rate
from nanochat_jax.benches.subject import Subject
from nanochat_jax.cli.device import peak_bandwidth, peak_flops
from nanochat_jax.cli.settings import require
from nanochat_jax.distributed.device_memory import beside_arguments
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.flags.bench import BenchConfig
from nanochat_jax.flags.rl import RLConfig
from nanochat_jax.inference.engine import Engine, GenerationStats
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.shapes import arrange_slots
from nanochat_jax.inference.tools import CALCULATOR_ALONE
from nanochat_jax.model.cost import flops_per_token
from nanochat_jax.model.gpt import abstract_gpt
from nanochat_jax.optim.schedules import rl_scalars
from nanochat_jax.rollouts.collector import make_group
from nanochat_jax.rollouts.objective import Objective
from nanochat_jax.rollouts.update import make_update, rl_batch_shape, rows_of, token_loss_of
from nanochat_jax.train.plan import make_plan
from nanochat_jax.train.start import fine_tuning_groups
from nanochat_jax.train.step import random_state

PROMPT_TOKENS = 150  # about those of GSM8K


def bench_rl(cfg: BenchConfig, subject: Subject) -> dict[str, Any]:
    """-> all numbers of a step. ValueError: the sizes do not fit together."""
    model, length = subject.config, cfg.prompt_tokens or PROMPT_TOKENS
    longest = length + cfg.decode_tokens
    require(
        longest <= model.sequence_len,
        f"--prompt-tokens={length} and --decode-tokens={cfg.decode_tokens} must fit into the context of "
        f"{model.sequence_len} together",
    )
    rl_cfg = RLConfig(
        examples_per_step=cfg.examples_per_step,
        num_samples=cfg.num_samples,
        device_batch_size=cfg.device_batch_size,
        dtype=cfg.dtype,
        attention=cfg.attention,
        remat=cfg.remat,
    )
    mesh, objective = make_mesh(cfg.mesh or "", n_embd=model.n_embd), Objective()
    plan = make_plan(
        rl_cfg,
        model,
        mesh,
        batch=rl_batch_shape(rl_cfg, mesh, longest, model.sequence_len),
        loss=token_loss_of(objective, "global"),
        scalars=tuple(rl_scalars(0, 1)),
        groups=fine_tuning_groups(rl_cfg, model, abstract_gpt(model)[1]),
        packed=True,
        logprobs=True,
    )
    device = mesh.devices.flat[0]
    engine = Engine(
        model,
        subject.tokenizer,
        mesh,
        dtype=plan.dtype,
        attention=plan.attention,
        slots=cfg.slots,
        chunk=cfg.chunk,
        tools=CALCULATOR_ALONE if cfg.tools else None,
    )
    sampling = SamplingParams(1.0 if cfg.temperature is None else cfg.temperature, cfg.top_k, cfg.decode_tokens)
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, 256, (cfg.examples_per_step, length), dtype=np.int32)
    shared, _ = arrange_slots(cfg.examples_per_step, cfg.num_samples, cfg.slots)
    runs: list[GenerationStats] = []
    updates, trained, bytes_read, compiles = [], [], [], []
    with plan.scope():
        update = make_update(plan, objective)
        state = random_state(model, plan.optimizer, plan.abstract_state, seed=0)
        state = state._replace(params=jax.tree.map(jax.device_put, subject.params, shardings_of(state.params)))
        for step in range((cfg.repeats or 3) + 1):
            answers = engine.generate(
                state.params, prompts, sampling, samples=cfg.num_samples, step=step, report=runs.append
            )
            keys = sum(kv_tokens(model, length, [len(s.tokens) for s in row], shared) for row in answers)
            bytes_read.append(bytes_to_read(engine, runs[-1].decode_steps, keys))
            compiles.append(engine.compiles)
            began = time.perf_counter()
            rewards = rng.integers(0, 2, (len(prompts), cfg.num_samples)).astype(float)
            groups = [  # answers that were cut count as judged, for those of random weights all are
                make_group(i, *one, rl_cfg.advantage, "keep") for i, one in enumerate(zip(prompts, answers, rewards))
            ]
            rows = rows_of(groups, plan, objective, "global", subject.tokenizer)
            state, metrics, _ = update(state, rows, rl_scalars(0, 1))
            trained.append(float(metrics.tokens))
            jax.block_until_ready(state)
            updates.append(time.perf_counter() - began)
    del state
    (warm_up, *timed), (_, *bytes_read) = runs, bytes_read
    steps, device_seconds = [run.decode_steps for run in timed], [run.seconds - run.host_seconds for run in timed]
    peak_memory = (device.memory_stats() or {}).get("peak_bytes_in_use") or max(
        program.memory_analysis().argument_size_in_bytes + beside_arguments(program)
        for program in engine.programs.compiled.values()
    )
    rate = median(map(truediv, bytes_read, device_seconds)) / mesh.size  # bytes a device reads in a second
    memory, bandwidth = memory_rate(), peak_bandwidth(device.device_kind)
    flops, update_seconds = peak_flops(device.device_kind), median(updates[1:])
    needed = plan.batch.tokens_per_step * flops_per_token(model, plan.batch.T)
    return {
        "seconds_per_step": median(run.seconds + update for run, update in zip(timed, updates[1:])),
        "rollout_seconds": median(run.seconds for run in timed),
        "update_seconds": update_seconds,
        "tokens_per_second": median(run.generated_tokens / run.seconds for run in timed),
        "ms_per_decode_step": 1e3 * median(map(truediv, device_seconds, steps)),
        "host_share": median(run.host_seconds / run.seconds for run in timed),
        "mbu": rate / bandwidth if bandwidth else None,
        "memory_share": rate / memory,
        "mb_per_decode_step": median(map(truediv, bytes_read, steps)) / 1e6,
        "memory_gb_per_second": memory / 1e9,
        "update_mfu": needed / update_seconds / flops / mesh.size if flops else None,
        "update_tokens": trained[-1],
        "batch": plan.batch,
        "compiles_after_warm_up": compiles[-1] - compiles[0],
        "compiles": compiles[0],
        "warm_up_seconds": warm_up.seconds,
        "warm_up_update_seconds": updates[0],
        "peak_memory_bytes": peak_memory,
        "generated_tokens": timed[-1].generated_tokens,
        "decode_steps": steps[-1],
        "attention": plan.attention,
        "remat": plan.remat,
        "devices": mesh.size,
        "dtype": plan.dtype.name,
    }


def shardings_of(tree: Any) -> Any:
    """Where each array of a tree lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
