"""Will it fit? A run's programs compiled from its settings alone, without data and without a parameter's value, for the
devices at hand or for a TPU slice that is not there, and what they would hold on a device."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax.checkpoints import find
from nanochat_jax.cli.device import describe_device, start_device
from nanochat_jax.cli.settings import HERE, inherit
from nanochat_jax.distributed import compile_only
from nanochat_jax.distributed.device_memory import (
    beside_arguments,
    bytes_on_device,
    device_memory,
    is_out_of_memory,
    parse_memory_error,
)
from nanochat_jax.distributed.mesh import make_mesh, row_axes
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files.paths import base_dir
from nanochat_jax.flags.stage import StageConfig
from nanochat_jax.inference.decode import GenerationPrograms
from nanochat_jax.inference.shapes import CONTINUATION_STEP, PROMPT_STEP, arrange_slots, padded_size
from nanochat_jax.model.cost import parameter_counts
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.model.loss import summed_token_loss, weighted_nll
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import scaling_laws
from nanochat_jax.train.plan import Plan
from nanochat_jax.train.start import Start, inherit_from

VOCABULARY = 32768  # where there is no tokenizer
PROMPT_TOKENS = 512  # of the longest prompt in RL, which only the data would tell


def start(cfg: StageConfig) -> list:
    """The devices that --preflight names, real or compile-only ones, printed.

    ValueError: no such devices, or no compiler for them."""
    if cfg.preflight == HERE:
        start_device(cfg.device_type)
        devices = jax.devices()
    else:
        devices = compile_only.devices(cfg.preflight)
    describe_device(make_mesh(cfg.mesh or "", devices), print0)
    return devices


def model_for(cfg: StageConfig, source: str, find_start: Callable[[], Start]) -> tuple[GPTConfig, StageConfig]:
    """(network, settings with what is inherited), from metadata alone; with --resume those of the run that goes on.

    Of a tag d<depth> that is not there, nanochat's model of this depth, said so. Errors as `find.find_model`."""
    if cfg.resume and (start := find_start()).resumed:
        return start.model_config(), start.cfg
    try:
        found = find.find_model(source, cfg.model_tag, cfg.model_step)
    except FileNotFoundError as e:
        depth = re.fullmatch(r"d(\d+)", cfg.model_tag or "")
        if not depth or cfg.model_step is not None:
            message = f"{e}; or name a depth to assume, such as --model-tag d20"
            raise FileNotFoundError(message) from None
        model = scaling_laws.config_of_depth(
            int(depth[1]),
            aspect_ratio=64,
            head_dim=128,
            window_pattern="SSSL",
            max_seq_len=cfg.max_seq_len or 2048,
            vocab_size=vocabulary(),
        )
        print0(f"NOTE: there is no {source} model {cfg.model_tag} here: nanochat's model of this depth is assumed")
        return model, inherit(cfg, {}, f"the {source} model", print0)
    cfg = inherit_from(cfg, find.peek_meta(found), source, print0)
    print0(f"Model: {found}")
    return find.load_config(found), cfg


def vocabulary() -> int:
    """Tokens of the tokenizer in the base directory, or as many as nanochat's has."""
    try:
        return Tokenizer.load(base_dir() / "tokenizer").vocab_size
    except FileNotFoundError:
        print0(f"NOTE: there is no tokenizer in {base_dir()}: a vocabulary of {VOCABULARY:,} is assumed")
        return VOCABULARY


class Rollouts(NamedTuple):
    """How many answers to how many prompts a step of RL draws."""

    prompts: int
    samples: int  # of each prompt
    slots: int  # answers that are decoded together
    new_tokens: int  # the most of an answer
    chunk: int = 16  # tokens between two visits of the host, as Engine has it


class Phase(NamedTuple):
    """Something that a run does, and what a device holds meanwhile."""

    name: str
    parts: dict[str, int]  # bytes; the total is their sum
    advice: str  # what to turn where it does not fit

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())


def update_phase(plan: Plan, extra: Mapping[str, int] | None = None) -> Phase:
    """The train step: what it is given, what is there beside it (`extra`), and what the compiler adds to both.

    The compiler tells one number; gradients are as large as the parameters, the loss is compiled by itself."""
    parts = dict(extra or {}) | state_bytes(plan) | {"batch": bytes_on_device(plan.abstract_batch)}
    given = sum(parts.values()) - sum((extra or {}).values())
    work = temporaries(plan.compile_train_step, given)
    loss = min(work, temporaries(lambda: compile_loss(plan), 0))
    gradients = min(work - loss, parts["parameters"])
    parts |= {"gradients": gradients, "loss": loss, "activations and the rest": work - gradients - loss}
    rows = plan.rows_per_device
    turns = [f"--device-batch-size (now {rows})"] * (rows > 1) + ["--max-seq-len"]
    turns += ["--remat block"] * (plan.remat != "block")
    return Phase("training", parts, f"lower {turns[0]}" + "".join(f", or try {turn}" for turn in turns[1:]))


def rollout_phase(plan: Plan, rollouts: Rollouts, extra: Mapping[str, int] | None = None) -> Phase:
    """The decode call with the largest cache, beside which the state stays where it is, and what else is there."""
    parts = dict(extra or {}) | state_bytes(plan)
    parts |= {"copy of the weights": weight_copy_bytes(plan), "cache": cache_bytes(plan, rollouts)}
    work = temporaries(lambda: compile_decode(plan, rollouts), parts["copy of the weights"] + parts["cache"])
    return Phase("rollouts", parts | {"work space": work}, f"lower --slots (now {rollouts.slots}) or --max-new-tokens")


def state_bytes(plan: Plan) -> dict[str, int]:
    """Bytes of a device's share of the parameters and of the rest of the state."""
    parameters = bytes_on_device(plan.abstract_state.params)
    return {"parameters": parameters, "optimizer": bytes_on_device(plan.abstract_state) - parameters}


def compile_loss(plan: Plan) -> jax.stages.Compiled:
    """The loss with its gradient, of one pass, by itself."""
    model, mesh = plan.model, plan.mesh
    batch = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in plan.abstract_batch.items()}
    x = jax.ShapeDtypeStruct((plan.batch.rows, plan.batch.T, model.n_embd), plan.dtype)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(row_axes(mesh)))
    head = plan.abstract_state.params["lm_head"]

    def loss(x, head, batch):
        return summed_token_loss(
            weighted_nll, x, head, batch["targets"], batch, cap=model.logit_cap, vocab_size=model.vocab_size
        )[0]

    with plan.scope():
        step = jax.jit(jax.grad(loss, (0, 1)), in_shardings=(rows, head.sharding, rows))
        return step.lower(x, jax.ShapeDtypeStruct(head.shape, head.dtype), batch).compile()


def decode_programs(plan: Plan, rollouts: Rollouts) -> GenerationPrograms:
    """As the engine has them; which tokens end an answer or call a tool changes no size."""
    return GenerationPrograms(
        plan.model,
        plan.mesh,
        ends=(0,),
        block=(1, 2),
        dtype=plan.dtype,
        chunk=rollouts.chunk,
        attention=plan.attention,
    )


def decode_sizes(plan: Plan, rollouts: Rollouts) -> tuple[int, int, int, int]:
    """Groups of rows of all devices, rows of each, tokens of a prompt and of a continuation that the caches hold."""
    shared, groups = arrange_slots(rollouts.prompts, rollouts.samples, rollouts.slots)
    groups = plan.mesh.size * padded_size(-(-groups // plan.mesh.size))
    continuation = padded_size(rollouts.new_tokens + rollouts.chunk, CONTINUATION_STEP)
    return groups, shared, padded_size(PROMPT_TOKENS, PROMPT_STEP), continuation


def compile_decode(plan: Plan, rollouts: Rollouts) -> jax.stages.Compiled:
    """The decode call with the largest cache."""
    params, programs = plan.abstract_state.params, decode_programs(plan, rollouts)
    with jax.set_mesh(plan.mesh):
        return programs.compile_decode(params, *decode_sizes(plan, rollouts))


def weight_copy_bytes(plan: Plan) -> int:
    """Bytes of the weights that rollouts read: whole, and matrices in the compute type."""
    params = jax.tree.leaves(plan.abstract_state.params)
    return sum(x.size * jnp.dtype(plan.dtype if x.ndim > 1 else x.dtype).itemsize for x in params)


def cache_bytes(plan: Plan, rollouts: Rollouts) -> int:
    """Bytes of a device's share of the largest cache, and of the smaller one that it grows from."""
    groups, shared, prompt, continuation = decode_sizes(plan, rollouts)
    programs = decode_programs(plan, rollouts)
    before = programs.cache_bytes(groups, shared, 0, continuation * 3 // 4)
    return (programs.cache_bytes(groups, shared, prompt, continuation) + before) // plan.mesh.size


def temporaries(compiled: Callable, given: int) -> int:
    """Bytes that the program of compiled() needs beside its arguments. Where the compiler refuses because the device is
    too small, by what it said, less what is `given`."""
    try:
        return beside_arguments(compiled())
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        asked, had = parse_memory_error(error)
        return max(0, (asked or had or 0) - given)


def report(plan: Plan, phases: Sequence[Phase], memory: int | None = None) -> int:
    """Print the table -> the exit code: 0 where all phases fit, else 1.

    memory: bytes of a device; default: what it tells."""
    device = plan.mesh.devices.flat[0]
    memory = device_memory(device) if memory is None else memory
    count = parameter_counts(plan.model)["total"]
    print0(
        f"\nPreflight: {count:,} parameters on {plan.mesh.size} x {device.device_kind} "
        f"({', '.join(f'{axis}={size}' for axis, size in plan.mesh.shape.items())}), nothing was run"
    )
    unit, name = (2**30, "GiB") if max(phase.total for phase in phases) >= 2**30 else (2**20, "MiB")
    for phase in phases:
        print0(f"\n{phase.name:26} {name} on a device")
        for part, size in phase.parts.items():
            print0(f"  {part:24} {size / unit:10.3f}")
        line = f"  {'total':24} {phase.total / unit:10.3f}"
        if memory is None:
            print0(f"{line}   (the device does not tell how much it has)")
            continue
        fits = phase.total <= memory
        print0(f"{line} of {memory / unit:.3f}: {'fits' if fits else f'DOES NOT FIT: {phase.advice}'}")
    return 0 if all(phase.total <= (memory or phase.total) for phase in phases) else 1
