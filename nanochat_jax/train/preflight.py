"""Will it fit? A run's programs compiled from its settings alone, without data and without a parameter's value, for the
devices at hand or for a TPU slice that is not there, and what they would hold on a device."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanochat_jax.checkpoints import find
from nanochat_jax.cli import settings as config
from nanochat_jax.cli.device import choose_attention, compute_dtype, describe_device, start_device
from nanochat_jax.distributed.device_memory import (
    asked_and_had,
    beside_arguments,
    bytes_on_device,
    device_memory,
    is_out_of_memory,
)
from nanochat_jax.distributed.mesh import make_mesh, row_axes, row_shards
from nanochat_jax.distributed.processes import print0
from nanochat_jax.distributed.sharding import batch_sharding
from nanochat_jax.files.paths import base_dir
from nanochat_jax.inference.decode import Programs
from nanochat_jax.inference.engine import OWN_STEP, PROMPT_STEP, arrange_slots, padded_size
from nanochat_jax.model.cost import parameter_counts
from nanochat_jax.model.gpt import GPTConfig, abstract_gpt
from nanochat_jax.model.loss import summed_token_loss, weighted_nll
from nanochat_jax.optim import groups as optim
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import scaling_laws
from nanochat_jax.train.remat import choose_remat
from nanochat_jax.train.run import Batches, Run
from nanochat_jax.train.step import abstract_state, make_train_step

FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
SLICES = {  # the number in a slice's name -> how its chips are laid out; v5p counts cores, two a chip
    "v5e": FLAT,
    "v6e": FLAT,
    "v5p": {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8"},
}
LIBTPU = {  # so that libtpu compiles on any machine, beside another process that does, and asks no server what it is on
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any; the topology's name decides
    "TPU_WORKER_HOSTNAMES": "localhost",
}
VOCABULARY = 32768  # where there is no tokenizer
PROMPT_TOKENS = 512  # of the longest prompt in RL, which only the data would tell


class Place(NamedTuple):
    """What to compile for."""

    name: str
    mesh: Mesh
    dtype: Any  # to compute in
    memory: int | None  # bytes of a device; None: it does not tell


def start(cfg: Any) -> Place:
    """The devices of --preflight, printed. ValueError: no such slice, or no compiler for it."""
    if cfg.preflight == config.HERE:
        start_device(cfg.device_type)
        devices = None
    else:
        devices = slice_devices(cfg.preflight)
    mesh = make_mesh(cfg.mesh or "", devices)
    describe_device(mesh, print0)
    device = mesh.devices.flat[0]
    return Place(cfg.preflight, mesh, compute_dtype(cfg.dtype, device.platform), device_memory(device))


def slice_devices(name: str) -> list:
    """Compile-only devices of the TPU slice v5e-8, v6e-8, v5p-8, ..., or of a topology as v5e:2x4.

    ValueError: an unknown name, or libtpu is not installed."""
    kind, _, size = name.replace("v5litepod", "v5e").partition("-")
    layout = SLICES.get(kind, {}).get(int(size) if size.isdecimal() else 0)
    known = ", ".join(f"{kind}-{{{','.join(map(str, sizes))}}}" for kind, sizes in SLICES.items())
    config.require(
        layout or re.fullmatch(r"(v5e|v5p|v6e):\d+(x\d+){1,2}", name),
        f"--preflight must name no device (then those at hand) or a TPU slice ({known}), got {name!r:.60}",
    )
    config.require(
        importlib.util.find_spec("libtpu"),
        f"--preflight {name} needs the TPU compiler, which runs on any machine: tools/setup.sh --extra aot",
    )
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # whatever else is here is left alone
    jax.config.update("jax_enable_compilation_cache", False)  # what it keeps cannot be read back without the devices
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(f"{kind}:{layout}" if layout else name, "tpu").devices)
    except Exception as e:  # libtpu's own, of several types
        raise ValueError(f"--preflight {name}: {str(e).splitlines()[0][:200]}") from e


def model_for(
    cfg: Any, source: str, inherited: Mapping[str, Any], open_run: Callable[[], Run]
) -> tuple[GPTConfig, Any]:
    """(network, settings with what is inherited), from metadata alone; with --resume those of the run that goes on.

    Of a tag d<depth> that is not there, nanochat's model of this depth, said so. Errors as `checkpoint.find_model`."""
    if cfg.resume and (run := open_run()).resumed:
        return GPTConfig(**run.record["model_config"]), run.cfg
    try:
        found = find.find_model(source, cfg.model_tag, cfg.model_step)
    except FileNotFoundError as e:
        depth = re.fullmatch(r"d(\d+)", cfg.model_tag or "")
        if not depth or cfg.model_step is not None:
            message = f"{e}; or name a depth to assume, such as --model-tag d20"
            raise FileNotFoundError(message) from None
        length = cfg.max_seq_len or 2048
        dials = {"aspect_ratio": 64, "head_dim": 128, "window_pattern": "SSSL"}
        model = scaling_laws.config_of_depth(int(depth[1]), **dials, max_seq_len=length, vocab_size=vocabulary())
        print0(f"NOTE: there is no {source} model {cfg.model_tag} here: nanochat's model of this depth is assumed")
        return model, config.inherit(cfg, {}, inherited, print0)
    meta = find.peek_meta(found)
    settings = meta.get("user_config")
    cfg = config.inherit(cfg, {**(settings if isinstance(settings, dict) else {}), **meta}, inherited, print0)
    print0(f"Model: {found}")
    return find.load_config(found), cfg


def vocabulary() -> int:
    """Tokens of the tokenizer in the base directory, or as many as nanochat's has."""
    try:
        return Tokenizer.load(base_dir() / "tokenizer").vocab_size
    except FileNotFoundError:
        print0(f"NOTE: there is no tokenizer in {base_dir()}: a vocabulary of {VOCABULARY:,} is assumed")
        return VOCABULARY


@dataclasses.dataclass(frozen=True)
class Batch:
    """Of the train step."""

    micro_batches: int
    rows: int  # of a pass, all devices together
    T: int
    fields: tuple[str, ...] = ()  # what the token loss reads beside the weights, float32


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Of RL: how many answers to how many prompts."""

    prompts: int
    samples: int
    slots: int
    new_tokens: int
    chunk: int = 16  # as Engine has it


class Compiler:
    """The programs of a run with this network at this place."""

    def __init__(self, cfg: Any, place: Place, model: GPTConfig, batch: Batch, *, packed: bool):
        mesh, dtype = make_mesh(cfg.mesh or "", list(place.mesh.devices.flat), model.n_embd), place.dtype
        self.place, self.model, self.batch = place._replace(mesh=mesh), model, batch
        rates = {"embedding_lr": 0.2, "unembedding_lr": 0.004, "matrix_lr": 0.02}  # any: sizes do not depend on them
        groups = optim.groups_in_use(optim.default_groups(model.n_embd, **rates), abstract_gpt(model)[1])
        self.tx = optim.make_optimizer(groups, dtype)
        self.state = abstract_state(model, self.tx, mesh, cfg.replicate)
        self.parameter_bytes, self.state_bytes = bytes_on_device(self.state.params), bytes_on_device(self.state)
        self.attention = choose_attention(cfg.attention, model, batch.T, mesh=mesh, dtype=dtype, packed=packed)
        rows = batch.rows // row_shards(mesh)
        self.remat, why = choose_remat(cfg.remat, model, self.state, dtype, rows, batch.T)
        print0(f"Rematerialisation: {self.remat} ({why})")

    def arrays(self) -> dict[str, Any]:
        """The train step's batch, abstract."""
        shape = (self.batch.micro_batches, self.batch.rows, self.batch.T)
        types = dict.fromkeys(("inputs", "targets", "document_start"), jnp.int32)
        types |= dict.fromkeys(("weights", *self.batch.fields), jnp.float32)
        rows = batch_sharding(self.place.mesh)
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in types.items()}

    def train_step(self, scalars: int = 2, token_loss: Callable = weighted_nll, **how: Any):
        """The compiled train step; `how` as for `make_train_step`."""
        names = ("lr_multiplier", "muon_momentum", "decay_multiplier")[:scalars]
        how |= {"dtype": self.place.dtype, "attention": self.attention, "remat": self.remat, "scheduled": names}
        with jax.set_mesh(self.place.mesh):
            step = make_train_step(self.model, self.tx, self.state, self.place.mesh, token_loss=token_loss, **how)
            numbers = [jax.ShapeDtypeStruct((), jnp.float32)] * scalars
            return step.lower(self.state, self.arrays(), *numbers).compile()

    def loss(self):
        """The compiled loss with its gradient, of one pass, by itself."""
        model, mesh = self.model, self.place.mesh
        batch = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in self.arrays().items()}
        shape = (self.batch.rows, self.batch.T, model.n_embd)
        x = jax.ShapeDtypeStruct(shape, self.place.dtype)
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(row_axes(mesh)))
        head = self.state.params["lm_head"]

        def loss(x, head, batch):
            how = {"cap": model.logit_cap, "vocab_size": model.vocab_size}
            return summed_token_loss(weighted_nll, x, head, batch["targets"], batch, **how)[0]

        with jax.set_mesh(mesh):
            step = jax.jit(jax.grad(loss, (0, 1)), in_shardings=(rows, head.sharding, rows))
            return step.lower(x, jax.ShapeDtypeStruct(head.shape, head.dtype), batch).compile()

    def programs(self, rollouts: Rollouts) -> Programs:
        how = {"dtype": self.place.dtype, "chunk": rollouts.chunk, "attention": self.attention}
        return Programs(self.model, self.place.mesh, ends=(0,), block=(1, 2), **how)

    def decode(self, rollouts: Rollouts):
        """The compiled decode call with the largest cache."""
        with jax.set_mesh(self.place.mesh):
            return self.programs(rollouts).compile_decode(self.state.params, *self.decode_sizes(rollouts))

    def decode_sizes(self, rollouts: Rollouts) -> tuple[int, int, int, int]:
        """Groups of rows of all devices, rows of each, tokens of a prompt part and of an own part."""
        shared, groups = arrange_slots(rollouts.prompts, rollouts.samples, rollouts.slots)
        groups = self.place.mesh.size * padded_size(-(-groups // self.place.mesh.size))
        own = padded_size(rollouts.new_tokens + rollouts.chunk, OWN_STEP)
        return groups, shared, padded_size(PROMPT_TOKENS, PROMPT_STEP), own

    def copy_bytes(self) -> int:
        """Of the weights that rollouts read: whole, and matrices in the compute type."""
        sizes = [(x.size, self.place.dtype if x.ndim > 1 else x.dtype) for x in jax.tree.leaves(self.state.params)]
        return sum(size * jnp.dtype(dtype).itemsize for size, dtype in sizes)

    def cache_bytes(self, rollouts: Rollouts) -> int:
        """Of a device's share of the largest cache, and of the smaller one that it grows from."""
        groups, shared, prompt, own = self.decode_sizes(rollouts)
        programs = self.programs(rollouts)
        before = programs.cache_bytes(groups, shared, 0, own * 3 // 4)
        return (programs.cache_bytes(groups, shared, prompt, own) + before) // self.place.mesh.size


@dataclasses.dataclass(frozen=True)
class Phase:
    """Something that a run does, and what a device holds meanwhile."""

    name: str
    parts: dict[str, int]  # bytes; the total is their sum
    advice: str  # what to turn where it does not fit

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def rows_fit(cfg: Any, place: Place, model: GPTConfig, batches: Batches, scalars: int = 2) -> int:
    """What --preflight of SFT and pretraining prints -> the exit code: 0 where it fits, else 1."""
    batch = Batch(batches.micro_batches, batches.rows_per_pass, cfg.max_seq_len)
    compiler = Compiler(cfg, place, model, batch, packed=cfg.document_mask)
    return report(compiler.place, model, [update_phase(compiler, {}, scalars=scalars)])


def update_phase(compiler: Compiler, extra: Mapping[str, int], **how: Any) -> Phase:
    """The train step: what it is given, what is there beside it (`extra`), and what the compiler adds to both.

    The compiler tells one number; gradients are as large as the parameters, the loss is compiled by itself."""
    parts = dict(extra) | {
        "parameters": compiler.parameter_bytes,
        "optimizer": compiler.state_bytes - compiler.parameter_bytes,
        "batch": bytes_on_device(compiler.arrays()),
    }
    work = temporaries(lambda: compiler.train_step(**how), sum(parts.values()) - sum(extra.values()))
    loss = min(work, temporaries(compiler.loss, 0))
    gradients = min(work - loss, compiler.parameter_bytes)
    parts |= {"gradients": gradients, "loss": loss, "activations and the rest": work - gradients - loss}
    rows = compiler.batch.rows // row_shards(compiler.place.mesh)
    turns = [f"--device-batch-size (now {rows})"] * (rows > 1) + ["--max-seq-len"]
    turns += ["--remat block"] * (compiler.remat != "block")
    return Phase("training", parts, f"lower {turns[0]}" + "".join(f", or try {turn}" for turn in turns[1:]))


def rollout_phase(compiler: Compiler, rollouts: Rollouts, extra: Mapping[str, int]) -> Phase:
    """The decode call with the largest cache, beside which the state stays where it is, and what else is there."""
    parts = dict(extra) | {
        "parameters": compiler.parameter_bytes,
        "optimizer": compiler.state_bytes - compiler.parameter_bytes,
    }
    parts |= {"copy of the weights": compiler.copy_bytes(), "cache": compiler.cache_bytes(rollouts)}
    work = temporaries(lambda: compiler.decode(rollouts), parts["copy of the weights"] + parts["cache"])
    return Phase("rollouts", parts | {"work space": work}, f"lower --slots (now {rollouts.slots}) or --max-new-tokens")


def temporaries(compiled: Callable, given: int) -> int:
    """Bytes that the program of compiled() needs beside its arguments. Where the compiler refuses because the device is
    too small, by what it said, less what is `given`."""
    try:
        return beside_arguments(compiled())
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        asked, had = asked_and_had(error)
        return max(0, (asked or had or 0) - given)


def report(place: Place, model: GPTConfig, phases: Sequence[Phase]) -> int:
    """Print the table -> the exit code: 0 where all phases fit, else 1."""
    device = place.mesh.devices.flat[0]
    count = parameter_counts(model)["total"]
    print0(
        f"\nPreflight: {count:,} parameters on {place.mesh.size} x {device.device_kind} "
        f"({', '.join(f'{axis}={size}' for axis, size in place.mesh.shape.items())}), nothing was run"
    )
    unit, name = (2**30, "GiB") if max(phase.total for phase in phases) >= 2**30 else (2**20, "MiB")
    for phase in phases:
        print0(f"\n{phase.name:26} {name} on a device")
        for part, size in phase.parts.items():
            print0(f"  {part:24} {size / unit:10.3f}")
        line = f"  {'total':24} {phase.total / unit:10.3f}"
        if place.memory is None:
            print0(f"{line}   (the device does not tell how much it has)")
            continue
        fits = phase.total <= place.memory
        print0(f"{line} of {place.memory / unit:.3f}: {'fits' if fits else f'DOES NOT FIT: {phase.advice}'}")
    return 0 if all(phase.total <= (place.memory or phase.total) for phase in phases) else 1
