"""The start of a training run, the same for every stage: the device, the folder, what is inherited or resumed."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax import checkpoint, config, optim, train
from nanochat_jax.attention import missing_kernel
from nanochat_jax.common import base_dir, cpu_name, peak_flops, process_index
from nanochat_jax.gpt import GPTConfig

PLATFORMS = {"auto": None, "": None, "cuda": "cuda", "gpu": "cuda", "tpu": "tpu", "cpu": "cpu"}


def start_device(device_type: str) -> None:
    """Choose JAX's platform and start it; ValueError says what to use or install instead."""
    if device_type == "mps":
        raise ValueError("--device-type=mps: JAX has no maintained backend for Apple's GPUs; use --device-type=cpu")
    if device_type not in PLATFORMS:
        raise ValueError(f"--device-type must be one of auto, cuda, tpu, cpu, got {device_type!r}")
    if PLATFORMS[device_type]:
        jax.config.update("jax_platforms", PLATFORMS[device_type])
    jax.config.update("jax_compilation_cache_dir", str(base_dir() / "compilation_cache"))
    try:
        jax.devices()
    except RuntimeError as e:
        extra = {"cuda": "tools/setup.sh --extra cuda13", "gpu": "tools/setup.sh --extra cuda13"}
        fix = extra.get(device_type, "tools/setup.sh --extra tpu" if device_type == "tpu" else "the JAX installation")
        raise ValueError(f"--device-type={device_type} cannot be started, see {fix}: {str(e).splitlines()[0]}") from e


def compute_dtype(name: str) -> jnp.dtype:
    """The --dtype in force: auto is float32 on CPU and bfloat16 elsewhere."""
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype must be auto, float32 or bfloat16, got {name!r}")
    automatic = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(automatic if name == "auto" else name)


def describe_device(mesh: Mesh, log: Callable) -> float | None:
    """Print the device and what it lacks -> peak bf16 FLOP/s of the whole mesh, None where it is unknown."""
    device = mesh.devices.flat[0]
    name = cpu_name() if device.platform == "cpu" else device.device_kind
    flops = peak_flops(name)
    kind = {"cpu": "CPU", "tpu": "TPU"}.get(device.platform, "GPU")
    log(f"{kind}: {name} | Peak FLOPS (BF16): {f'{flops:.2e}' if flops else 'unknown'} | devices: {mesh.size}")
    if why := missing_kernel(device.platform):
        log(f"WARNING: {why}")
    return flops * mesh.size if flops else None


@dataclasses.dataclass(frozen=True)
class Batches:
    """How a step's tokens are split."""

    rows_per_pass: int  # rows of one forward and backward pass, all devices together
    micro_batches: int
    tokens_per_step: int

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_pass * self.micro_batches


def plan_batches(cfg: Any, mesh: Mesh, log: Callable) -> Batches:
    """Gradient accumulation from the sizes in force; ValueError where they do not fit together."""
    for name in ("max_seq_len", "device_batch_size", "total_batch_size"):
        config.require(
            getattr(cfg, name) > 0, f"--{name.replace('_', '-')} must be at least 1, got {getattr(cfg, name)}"
        )
    rows, T, total = cfg.device_batch_size * mesh.shape["data"], cfg.max_seq_len, cfg.total_batch_size
    per_pass = rows * T
    if total % per_pass:
        nearest = max(1, round(total / per_pass)) * per_pass
        raise ValueError(
            f"--total-batch-size={total} must be a multiple of {per_pass:,} tokens (--device-batch-size="
            f"{cfg.device_batch_size} x --max-seq-len={T} x {mesh.shape['data']} devices on the data axis); "
            f"nearest: {nearest}"
        )
    log(f"Tokens per micro-batch: {rows} x {T} = {per_pass:,}")
    log(f"Total batch size {total:,} => gradient accumulation steps: {total // per_pass}")
    return Batches(rows, total // per_pass, total)


@dataclasses.dataclass
class Run:
    """A run about to start or to go on."""

    cfg: Any  # resolved: nothing is left to inherit
    folder: Path  # of its checkpoints and metrics
    model_config: GPTConfig
    groups: optim.Groups
    tokenizer_digest: str
    metrics_exist: bool
    record: dict = dataclasses.field(default_factory=dict)  # meta of the checkpoint to go on from; {} for a new run
    params: Any = None  # of the base model, for a new run
    optimizer: Any = None  # optim.state_arrays to start with, or None

    @property
    def resumed(self) -> bool:
        return bool(self.record)

    @property
    def first_step(self) -> int:
        return self.record.get("step", 0)

    @property
    def first_row(self) -> int:
        return self.record.get("rows_consumed", 0)

    @property
    def smoothed_loss(self) -> tuple[float, float]:
        return tuple(self.record.get("smoothed_loss", (0.0, 0.0)))

    @property
    def resumed_at(self) -> int | None:
        """The step after which earlier records of metrics.jsonl no longer count."""
        return self.first_step if self.resumed or self.metrics_exist else None

    def initial_state(self, tx, like: train.TrainState) -> train.TrainState:
        """On the shardings of the abstract state `like`."""
        if self.resumed:
            return checkpoint.restore_state(self.folder / str(self.first_step), like)
        params = train.place(self.params, like.params)
        if self.optimizer is None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, like.opt_state)
            opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
        else:
            opt_state = train.place(optim.with_state_arrays(like.opt_state, self.optimizer), like.opt_state)
        self.params = self.optimizer = None  # the host's copies are no longer needed
        step, bad_steps = (train.place(np.int32(0), scalar) for scalar in (like.step, like.bad_steps))
        return train.TrainState(step, params, opt_state, bad_steps)

    def check_data(self, fingerprint: str) -> None:
        """A resumed run must see the conversations it began with."""
        if self.resumed and self.record["data"] != fingerprint:
            raise ValueError(
                f"--resume: the data of {self.folder} has changed since step {self.first_step}; restore the files, or "
                "start another run with --output-tag"
            )

    def meta(self, total_steps: int) -> dict:
        """What every checkpoint of the run records, beside its place in the data."""
        settings = {k: _jsonable(v) for k, v in dataclasses.asdict(self.cfg).items()}
        return {
            "model_config": dataclasses.asdict(self.model_config),
            "user_config": settings,
            "optimizer_groups": {name: dataclasses.asdict(group) for name, group in self.groups.items()},
            "tokenizer": self.tokenizer_digest,
            "total_steps": total_steps,
            "versions": checkpoint.versions(),
        }


def _jsonable(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_jsonable(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def open_run(cfg: Any, stage: str, tokenizer, harmless: set[str], inherited: dict, log: Callable) -> Run:
    """Decide what this run is: new from the base model, or the one in the output folder going on.

    FileExistsError: the folder holds checkpoints and neither --resume nor --overwrite was given. ValueError: a setting
    that would change the training of a run that goes on, or a model that does not fit the tokenizer.
    """
    found = None
    tag = cfg.output_tag or (cfg.run if cfg.run != "dummy" else None)
    if tag is None:
        found = checkpoint.find_model("base", cfg.model_tag, cfg.model_step)
        tag = f"d{checkpoint.peek_meta(found)['model_config']['n_layer']}"
    folder = base_dir() / checkpoint.SOURCES[stage] / tag
    steps = claim(folder, cfg.resume, cfg.overwrite)
    metrics_exist = (folder / "metrics.jsonl").exists()
    if steps:
        step = checkpoint.newest_intact(folder, log)
        if step is None:
            raise ValueError(f"--resume: no checkpoint in {folder} is intact; --overwrite starts the run again")
        record = checkpoint.read_meta(folder / str(step))
        cfg = same_settings(cfg, record["user_config"], harmless)
        check_tokenizer(tokenizer, record, record["model_config"]["vocab_size"])
        log(f"Resuming {folder} from step {step}")
        return Run(
            cfg=cfg,
            folder=folder,
            model_config=GPTConfig(**record["model_config"]),
            groups=checkpoint.groups_from(record["optimizer_groups"]),
            tokenizer_digest=tokenizer.digest(),
            metrics_exist=metrics_exist,
            record=record,
        )
    if cfg.resume:
        log(f"Nothing to resume in {folder}: a new run")
    found = found or checkpoint.find_model("base", cfg.model_tag, cfg.model_step)
    log(f"Base model: {found}")
    model_config, params, meta = checkpoint.load_params(found)
    check_tokenizer(tokenizer, meta, model_config.vocab_size)
    cfg = config.inherit(cfg, {**meta.get("user_config", {}), **meta}, inherited, log)
    limit = 10 * model_config.sequence_len
    config.require(cfg.max_seq_len <= limit, f"--max-seq-len={cfg.max_seq_len} must be at most {limit} for this model")
    rates = {name: getattr(cfg, name) for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")}
    groups = optim.default_groups(model_config.n_embd, **rates, weight_decay=cfg.weight_decay or 0.0)
    groups, arrays = optim.scale_rates(groups, cfg.init_lr_frac), None
    if cfg.load_optimizer:
        warm = checkpoint.load_optimizer(found, model_config, groups)
        if warm:
            groups, arrays = warm
            log("Loaded the base model's optimizer state (rates are this run's own)")
        else:
            log("WARNING: the base model came without optimizer state, so it starts empty")
    if cfg.weight_decay is not None:
        groups["matrix"] = dataclasses.replace(groups["matrix"], weight_decay=cfg.weight_decay)
    return Run(
        cfg=cfg,
        folder=folder,
        model_config=model_config,
        groups=groups,
        tokenizer_digest=tokenizer.digest(),
        metrics_exist=metrics_exist,
        params=params,
        optimizer=arrays,
    )


def claim(folder: Path, resume: bool, overwrite: bool) -> list[int]:
    """Steps to resume from; the folder is refused where it holds what this run must not touch."""
    if any(folder.glob("model_*.pt")):
        raise FileExistsError(f"{folder} holds checkpoints of nanochat's own: choose another folder with --output-tag")
    steps = checkpoint.sealed_steps(folder)
    if steps and resume and overwrite:
        raise ValueError("--resume and --overwrite contradict each other: give one of them")
    if steps and not (resume or overwrite):
        raise FileExistsError(
            f"{folder} holds checkpoints of another run (steps {', '.join(map(str, steps))}): --resume goes on with "
            "it, --overwrite deletes it, --output-tag names another folder"
        )
    if overwrite and process_index() == 0:
        for step in steps:
            shutil.rmtree(folder / str(step))
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    return steps if resume else []


def same_settings(cfg: Any, saved: dict, harmless: set[str]) -> Any:
    """The settings of a run that goes on: inherited ones as they were resolved, others unchanged or harmless."""
    typed = {k: _jsonable(v) for k, v in dataclasses.asdict(cfg).items()}
    resolved = {name: saved[name] for name, value in typed.items() if value is None and name in saved}
    changed = [
        f"--{name.replace('_', '-')} was {saved[name]} and is {typed[name]}"
        for name in typed
        if name in saved and name not in harmless and name not in resolved and typed[name] != saved[name]
    ]
    if changed:
        raise ValueError(f"--resume goes on with the same run, but {'; '.join(changed)}; use another --output-tag")
    return dataclasses.replace(cfg, **resolved)


def check_tokenizer(tokenizer, meta: dict, vocab_size: int) -> None:
    """ValueError where the model was trained with another tokenizer, as far as its meta tells."""
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(f"the tokenizer in {base_dir()} has {tokenizer.vocab_size} tokens, the model {vocab_size}")
    if meta.get("tokenizer", tokenizer.digest()) != tokenizer.digest():
        raise ValueError(f"the tokenizer in {base_dir()} is not the one that the model was trained with")
