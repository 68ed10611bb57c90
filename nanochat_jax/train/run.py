"""The start of a training run, the same for every stage: its settings, the folder, what is inherited or resumed."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout
from jax.sharding import Mesh

from nanochat_jax.checkpoints import find, integrity, store
from nanochat_jax.cli import settings as config
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.mesh import row_shards
from nanochat_jax.files import bucket
from nanochat_jax.files.paths import base_dir, kept_dir
from nanochat_jax.model.gpt import REMAT, GPTConfig
from nanochat_jax.optim import groups as optim
from nanochat_jax.optim import groups as optim_groups
from nanochat_jax.train import step as train
from nanochat_jax.train import step as train_step

SEEN_SECONDS = 60  # that a network's file system may take to show a new file to another machine


def check_settings(cfg: Any, rules: Iterable[tuple[str, bool, str]], ratios: Iterable[str], rates: Iterable[str]):
    """ValueError for the first of (field, whether it holds, what must hold) that does not, with what must hold of every
    stage's settings, and of those that are ratios or rates."""
    for name, holds, rule in (
        *rules,
        ("keep_checkpoints", cfg.keep_checkpoints >= 1, "at least 1"),
        ("seed", cfg.seed >= 0, "at least 0"),
        ("remat", cfg.remat in ("auto", *REMAT), f"auto, {', '.join(REMAT[:-1])} or {REMAT[-1]}"),
        ("eval_tokens", getattr(cfg, "eval_tokens", 1) >= 1, "at least 1 (--eval-every -1 measures nothing)"),
        *((name, 0 <= getattr(cfg, name) <= 1, "between 0 and 1") for name in ratios),
        *((name, 0 <= (getattr(cfg, name) or 0) <= 1000, "between 0 and 1000") for name in rates),
    ):
        if not holds:
            raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {getattr(cfg, name)}")


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
        size = getattr(cfg, name)
        config.require(0 < size < 2**31, f"--{name.replace('_', '-')} must be from 1 to 2147483647, got {size}")
    rows, T, total = cfg.device_batch_size * row_shards(mesh), cfg.max_seq_len, cfg.total_batch_size
    per_pass = rows * T
    if total % per_pass:
        nearest = max(1, round(total / per_pass)) * per_pass
        raise ValueError(
            f"--total-batch-size={total} must be a multiple of {per_pass:,} tokens (--device-batch-size="
            f"{cfg.device_batch_size} x --max-seq-len={T} x {row_shards(mesh)} devices that rows are split over); "
            f"nearest: {nearest}"
        )
    log(f"Tokens per micro-batch: {rows} x {T} = {per_pass:,}")
    log(f"Total batch size {total:,} => gradient accumulation steps: {total // per_pass}")
    return Batches(rows, total // per_pass, total)


@dataclasses.dataclass
class Run:
    """A run about to start or to go on. `load` and `start` it, in this order, when all that is cheap is checked."""

    cfg: Any  # resolved: nothing is left to inherit
    folder: Path  # of its checkpoints and metrics
    tokenizer_digest: str
    base: find.Found | None = None  # the model a new run starts from; None: random weights
    record: dict = dataclasses.field(default_factory=dict)  # meta of the checkpoint to go on from; {} for a new run
    model_config: GPTConfig | None = None  # from here on filled by `load`; pretraining sets the first two itself
    groups: optim.Groups = dataclasses.field(default_factory=dict)
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
        """The step after which earlier records of metrics.jsonl no longer count; None for a new run."""
        return self.first_step if self.resumed else None

    def load(self, log: Callable) -> None:
        """The network and the optimizer's groups; of a new run also the base model's arrays, on the host."""
        if self.resumed:
            self.model_config = GPTConfig(**self.record["model_config"])
            self.groups = optim_groups.groups_from(self.record["optimizer_groups"])
            return
        cfg = self.cfg
        self.model_config, self.params, _ = find.load_params(self.base)
        rates = {name: getattr(cfg, name) for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")}
        groups = optim.default_groups(self.model_config.n_embd, **rates, weight_decay=cfg.weight_decay or 0.0)
        self.groups = optim.scale_rates(optim.groups_in_use(groups, self.params), cfg.init_lr_frac)
        warm = find.load_optimizer(self.base, self.model_config, self.groups) if cfg.load_optimizer else None
        if warm:
            self.groups, self.optimizer = warm
            log("Loaded the base model's optimizer state (rates are this run's own)")
        elif cfg.load_optimizer:
            log("WARNING: the base model came without optimizer state, so it starts empty")
        if cfg.weight_decay is not None:
            self.groups["matrix"] = dataclasses.replace(self.groups["matrix"], weight_decay=cfg.weight_decay)

    @contextlib.contextmanager
    def start(self):
        """Take the folder, while entered: FileExistsError where another process trains in it. Only now are the
        checkpoints that --overwrite gives up deleted, and what killed saves left behind."""
        if processes.index():
            self._share()
            yield
            return
        here = bucket.local(self.folder)  # in a bucket there are no locks: see storage.Ownership
        here.mkdir(parents=True, exist_ok=True)
        lock = FileLock(here / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise FileExistsError(
                f"another process is training in {self.folder}: choose another folder with "
                f"{tag_flag(self.folder.parent)}"
            ) from None
        except NotImplementedError:  # a file system without locks
            pass
        try:
            integrity.sweep(self.folder)
            if not self.resumed:
                for step in claim(self.folder, False, self.cfg.overwrite):
                    integrity.discard(self.folder / str(step))
            self._share()
            yield
        finally:
            lock.release()

    def _share(self) -> None:
        """ValueError where a process does not see the folder of process 0: each writes its part of a checkpoint."""
        if processes.count() == 1:
            return
        sign = self.folder / ".shared"
        if not processes.index():
            sign.touch()
        processes.exchange("the run's folder", None)
        patience = time.monotonic() + SEEN_SECONDS
        while not (seen := sign.exists()) and time.monotonic() < patience:
            time.sleep(0.2)
        blind = [str(i) for i, saw in enumerate(processes.exchange("who sees it", seen)) if not saw]
        if not processes.index():
            sign.unlink()
        config.require(
            not blind,
            f"process {', '.join(blind)} does not see {self.folder} of process 0: set NANOCHAT_BASE_DIR to a file "
            "system that all machines share",
        )

    def initial_state(self, tx, like: train.TrainState) -> train.TrainState:
        """On the shardings of the abstract state `like`."""
        if self.resumed:
            return train_step.restore_state(self.folder / str(self.first_step), like)
        if self.base is None:
            return train.random_state(self.model_config, tx, like, self.cfg.seed)
        params = train.place(self.params, like.params)
        if self.optimizer is None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, like.opt_state)
            opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
        else:
            try:
                opt_state = train.place(optim.with_state_arrays(like.opt_state, self.optimizer), like.opt_state)
            except KeyError as e:
                message = f"the optimizer state of {self.base} has no {e}: start from an empty one, --load-optimizer 0"
                raise ValueError(message) from e
        self.params = self.optimizer = None  # the host's copies are no longer needed
        step, bad_steps = (train.place(np.int32(0), scalar) for scalar in (like.step, like.bad_steps))
        return train.TrainState(step, params, opt_state, bad_steps)

    def check_data(self, fingerprint: str) -> None:
        """A resumed run must see the data it began with, and all processes the same."""
        processes.agree("the data", {"data": fingerprint})
        if self.resumed and self.record["data"] != fingerprint:
            raise ValueError(
                f"--resume: the data of {self.folder} has changed since step {self.first_step}; restore the files, or "
                f"start another run with {tag_flag(self.folder.parent)}"
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
            "versions": store.versions(),
        }


def _jsonable(value: Any, whole: Callable[[Path], Path] = Path.absolute) -> Any:
    """A setting as JSON has it; whole: how a path becomes one that holds in any working directory."""
    if isinstance(value, tuple):
        return [_jsonable(v, whole) for v in value]
    return str(whole(Path(os.path.expanduser(value)))) if isinstance(value, Path) else value


def _from_json(value: Any, kind: Any) -> Any:
    """The setting of a field of this type that `_jsonable` has recorded."""
    if isinstance(value, list):
        return tuple(_from_json(v, kind) for v in value)
    return Path(value) if isinstance(value, str) and config.holds_paths(kind) else value


def open_run(
    cfg: Any, stage: str, tokenizer, harmless: set[str], inherited: dict, log: Callable, source: str = "base"
) -> Run:
    """Decide what this run is, from metadata alone: new from a model of the stage `source`, or the one in the output
    folder going on.

    FileExistsError: the folder holds checkpoints and neither --resume nor --overwrite was given. ValueError: a setting
    that would change the training of a run that goes on, or a model that does not fit the tokenizer.
    """
    found = None
    tag = cfg.output_tag or (cfg.run if cfg.run != "dummy" else None)
    if tag is None:
        found = find.find_model(source, cfg.model_tag, cfg.model_step)
        tag = f"d{find.peek_meta(found)['model_config']['n_layer']}"
    run = open_folder(cfg, stage, tag, tokenizer, harmless, log)
    if run.resumed:
        return check_agreement(run)
    found = found or find.find_model(source, cfg.model_tag, cfg.model_step)
    log(f"{source.upper() if source != 'base' else 'Base'} model: {found}")
    meta = find.peek_meta(found)
    check_tokenizer(tokenizer, meta)
    settings = meta.get("user_config")
    cfg = config.inherit(cfg, {**(settings if isinstance(settings, dict) else {}), **meta}, inherited, log)
    limit = 10 * meta["model_config"]["sequence_len"]
    fits = cfg.max_seq_len is None or cfg.max_seq_len <= limit
    config.require(fits, f"--max-seq-len={cfg.max_seq_len} must be at most {limit} for this model")
    return check_agreement(dataclasses.replace(run, cfg=cfg, base=found))


def check_agreement(run: Run) -> Run:
    """The run. ValueError: another process is about to start another one, or from something else."""
    facts = {"tokenizer": run.tokenizer_digest} | processes.compared_settings(dataclasses.asdict(run.cfg))
    if run.resumed:
        facts["checkpoint to resume"] = find.identity(find.Found(run.folder, run.first_step, True))
    if run.base:
        facts["model to start from"] = find.identity(run.base)
    processes.agree("the run", facts)
    return run


def open_folder(cfg: Any, stage: str, tag: str, tokenizer, harmless: set[str], log: Callable) -> Run:
    """The run that goes on in the folder <tag> of the stage, or a new one for it; errors as for `open_run`."""
    root = kept_dir() / store.SOURCES[stage]
    folder = root / tag
    otherwise = "" if stage == "base" else " (where it is not given, --run)"
    config.require(
        folder.resolve().parent == root.resolve(),
        f"{tag_flag(root)}{otherwise} must be the name of one folder, got {tag!r}",
    )
    bucket.check_name(folder)
    going_on = claim(folder, cfg.resume, cfg.overwrite) and cfg.resume
    step = integrity.newest_intact(folder, log) if going_on else None
    processes.agree("the folder", {f"the checkpoint to resume in {tag}": step})  # before Orbax makes processes wait
    if going_on:
        if step is None:
            raise ValueError(f"--resume: no checkpoint in {folder} is intact; --overwrite starts the run again")
        record = store.read_meta(folder / str(step))
        log(f"Resuming {folder} from step {step}")
        cfg = same_settings(cfg, record["user_config"], harmless, tag_flag(root), log)
        check_tokenizer(tokenizer, record)
        return Run(cfg, folder, tokenizer.digest(), record=record)
    if cfg.resume:
        log(f"Nothing to resume in {folder}: a new run")
    return Run(cfg, folder, tokenizer.digest())


def tag_flag(root: Path) -> str:
    """The flag that names a run's folder in `root`: in pretraining --model-tag, which later is the base model's."""
    return "--model-tag" if root.name == store.SOURCES["base"] else "--output-tag"


def claim(folder: Path, resume: bool, overwrite: bool) -> list[int]:
    """The checkpoints to go on from, or to give up; the folder is refused where it holds what must not be touched."""
    if any(folder.glob("model_*.pt")):
        raise FileExistsError(
            f"{folder} holds checkpoints of nanochat's own: choose another folder with {tag_flag(folder.parent)}"
        )
    config.require(not (resume and overwrite), "--resume and --overwrite contradict each other: give one of them")
    steps = integrity.steps(folder)
    if steps and not (resume or overwrite):
        raise FileExistsError(
            f"{folder} holds checkpoints of another run (steps {', '.join(map(str, steps))}): --resume goes on with "
            f"it, --overwrite deletes it, {tag_flag(folder.parent)} names another folder"
        )
    return steps


THIS_TIME = {  # never taken from a checkpoint
    *("resume", "overwrite", "config", "output_tag", "device_type", "mesh", "attention", "preflight"),
    *("coordinator", "num_processes", "process_id", "verbose"),
}


def same_settings(cfg: Any, saved: dict, harmless: set[str], tag: str, log: Callable) -> Any:
    """The settings of a run that goes on: the checkpoint's, but for harmless ones that the user gives anew.

    ValueError names the others that the user gives differently."""
    given = getattr(cfg, "given", frozenset())
    changed, restored = [], {}
    for field in dataclasses.fields(cfg):
        name, ours = field.name, getattr(cfg, field.name)
        if name in THIS_TIME or name not in saved:
            continue
        theirs = _from_json(saved[name], field.type)
        if _jsonable(ours, Path.resolve) == _jsonable(theirs, Path.resolve):
            continue
        flag, default, ours = f"--{name.replace('_', '-')}", ours == field.default, _jsonable(ours)
        if name not in given and default:
            restored[name] = theirs
            log(f"Inherited {name}={saved[name]} from the checkpoint")
        elif name in harmless:
            log(f"NOTE: {flag}={ours} overrides the checkpoint's value of {saved[name]}")
        else:
            changed.append(f"{flag} was {saved[name]} and is {ours}")
    if changed:
        raise ValueError(f"--resume goes on with the same run, but {'; '.join(changed)}; use another {tag}")
    return dataclasses.replace(cfg, **restored)


def check_tokenizer(tokenizer, meta: dict) -> None:
    """ValueError where the model was trained with another tokenizer, as far as its meta tells."""
    size = meta["model_config"]["vocab_size"]
    if tokenizer.vocab_size != size:
        raise ValueError(f"the tokenizer in {base_dir()} has {tokenizer.vocab_size} tokens, the model {size}")
    if meta.get("tokenizer", tokenizer.digest()) != tokenizer.digest():
        raise ValueError(f"the tokenizer in {base_dir()} is not the one that the model was trained with")
