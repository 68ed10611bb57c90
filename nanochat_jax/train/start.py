"""The start of a training run: which run it is, decided from metadata alone, and then the state of its first step.

A run is a folder <stage's checkpoints>/<tag>. It is either new, from a model of another stage or from random weights,
or it goes on from the newest intact checkpoint in its folder. Nothing here changes a file before `hold_folder`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from filelock import Timeout

from nanochat_jax.checkpoints import find, integrity, store
from nanochat_jax.checkpoints.ownership import Lock, Token, own
from nanochat_jax.cli.device import attention_record
from nanochat_jax.cli.settings import (
    AUTO,
    BEST,
    flag,
    inherit,
    recorded_settings,
    require,
    resumed_settings,
    values_of,
)
from nanochat_jax.data.packing import PACKING
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.device_memory import bytes_on_device, check_room
from nanochat_jax.files import bucket
from nanochat_jax.files.paths import output_dir
from nanochat_jax.flags.stage import StageConfig
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.optim.groups import (
    Groups,
    default_groups,
    groups_from_meta,
    groups_in_use,
    scale_rates,
    with_state_arrays,
)
from nanochat_jax.train.base_model import base_model, check_written_tokenizer, write_tokenizer
from nanochat_jax.train.plan import Plan
from nanochat_jax.train.step import TrainState, place, random_state, restore_state

SEEN_SECONDS = 60  # that a network's file system may take to show a new file to another machine


@dataclasses.dataclass(frozen=True)
class Start:
    """A run that is about to begin or to go on."""

    cfg: Any  # the stage's settings: nothing is left to inherit
    folder: Path  # of its checkpoints and metrics
    tokenizer_digest: str
    base: find.Found | None = None  # the model that a new run starts from; None: random weights, or a run that goes on
    record: dict = dataclasses.field(default_factory=dict)  # meta of the checkpoint to go on from; {} for a new run

    @property
    def resumed(self) -> bool:
        """Whether the run goes on from a checkpoint."""
        return bool(self.record)

    @property
    def first_step(self) -> int:
        """Steps that are done already."""
        return self.record.get("step", 0)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint to go on from."""
        return self.folder / str(self.first_step)

    def model_config(self) -> GPTConfig:
        """The network, of a run that goes on or starts from a model; no parameter is read."""
        return GPTConfig(**self.record["model_config"]) if self.resumed else find.load_config(self.base)

    def recorded_groups(self) -> Groups | None:
        """The optimizer's groups that a fine-tuning run goes on with; None for a new run."""
        return groups_from_meta(self.record["optimizer_groups"]) if self.resumed else None

    def recorded_attention(self) -> dict | None:
        """What the checkpoint says of the run's attention; None for a new run, or where an earlier version wrote it."""
        return self.record.get("attention")

    def check_data(self, fingerprint: str) -> None:
        """ValueError where a run that goes on does not see the data it began with, or a process sees other data."""
        processes.agree("the data", {"data": fingerprint})
        if not self.resumed:
            return
        packing, otherwise = self.record.get("packing"), f"start another run with {tag_flag(self.folder.parent)}"
        if packing not in (None, PACKING):
            raise ValueError(
                f"--resume: the rows of {self.folder} are packed by the rules number {packing}, this version of "
                f"nanochat_jax has number {PACKING}, which make other rows: go on with the version that began the run, "
                f"or {otherwise}"
            )
        if self.record.get("data") != fingerprint:
            what = f"has changed since step {self.first_step}; restore the files"
            if packing is None:  # checkpoints of before it was recorded have other hashes of the same data
                what = "is recorded by an earlier version of nanochat_jax, in a way that this one cannot compare; go on"
                what += " with that version"
            raise ValueError(f"--resume: the data of {self.folder} {what}, or {otherwise}")

    def stretches(
        self, total: int, steady_until: Callable[[int, int], int], name: str, log: Callable
    ) -> list[list[int]]:
        """The stretches [first step, last] of the run, each with a schedule of its own; the last one ends at `total`.

        A run that goes on with another total gets a new stretch, which is possible where it has ended, or while its
        rates have not begun to fall. steady_until: (first, last) of a stretch -> the step from which they fall. name:
        of the setting that `total` comes from, for the ValueError where it is not possible. log: is told of several."""
        if not self.resumed:
            return [[0, total]]
        found = [
            list(stretch) for stretch in self.record.get("stretches") or [[0, self.record.get("total_steps", total)]]
        ]
        (first, last), done = found[-1], self.first_step
        if total == last:
            return _told(found, log)
        steady = steady_until(first, last)
        if total <= done or not (done == last or done <= steady):
            where = f"before step {steady}, from which its rates fall, or " if steady > first else ""
            raise ValueError(
                f"{flag(name)}: the run in {self.folder} has {done} of {last} steps and cannot be made one of {total}: "
                f"it can be made longer {where}when it has ended, at step {last}"
            )
        return _told([*found[:-1], *([[first, done]] if done > first else []), [done, total]], log)

    def recorded(self, plan: Plan, total_steps: int) -> dict:
        """What every checkpoint of the run records, beside its step and its place in the data."""
        return {
            "model_config": dataclasses.asdict(plan.model),
            "user_config": recorded_settings(dataclasses.replace(self.cfg, remat=plan.remat)),
            "optimizer_groups": {name: dataclasses.asdict(group) for name, group in plan.groups.items()},
            "tokenizer": self.tokenizer_digest,
            "attention": attention_record(plan.attention, plan.mesh),
            "total_steps": total_steps,
            "versions": store.versions(),
            "packing": PACKING,
        } | ({"started_from": self.started_from} if self.started_from else {})

    @property
    def started_from(self) -> str | None:
        """What --base stood for when the run began, of the hub with its commit; None where it was not given."""
        return self.record.get("started_from") if self.resumed else self.base and self.base.base and self.base.base.name


def _told(stretches: list[list[int]], log: Callable) -> list[list[int]]:
    """The stretches of a run, of which `log` is told where there are several."""
    if stretches[:-1]:
        steps = ", ".join(f"{first} to {last}" for first, last in stretches)
        log(f"Stretches of the run, each with its own schedule: steps {steps}")
    return stretches


# ------------------------------------------------------------------------------------------------- from metadata alone
def find_start(cfg: StageConfig, stage: str, tokenizer, log: Callable, source: str = "base") -> Start:
    """The run of a stage that starts from a model of the stage `source`: a new one, or the one in its folder.

    FileExistsError: the folder holds checkpoints and neither --resume nor --overwrite was given. ValueError: a setting
    that would change the training of a run that goes on, or a model that does not fit the tokenizer.
    """
    found = None
    tag = cfg.output_tag or (cfg.run if cfg.run != "dummy" else None)
    if tag is None:
        try:
            found = base_model(cfg, source)
            tag = f"d{find.peek_meta(found)['model_config']['n_layer']}"
        except FileNotFoundError:
            tags = find.tags_by_time(output_dir() / store.SOURCES[stage]) if cfg.resume else []
            if len(tags) != 1:
                raise
            tag = tags[0]  # of a run from a model that --base named and the base directory does not have
    start = find_run(cfg, stage, tag, tokenizer, log)
    if start.resumed:
        return check_agreement(start)
    found = found or base_model(cfg, source)
    source = found.source
    log(f"{source.upper() if source != 'base' else 'Base'} model: {found}")
    require(
        found.folder.resolve() != start.folder.resolve(),
        f"{found} is the model to start from: choose another folder for this run with --output-tag",
    )
    meta = find.peek_meta(found)
    check_written_tokenizer(found)
    find.check_tokenizer(tokenizer, meta, found)
    cfg = dataclasses.replace(cfg, source=source, model_tag=found.tag, model_step=found.step)
    cfg = inherit_from(cfg, meta, source, log)
    limit = 10 * meta["model_config"]["sequence_len"]
    fits = cfg.max_seq_len is None or cfg.max_seq_len <= limit
    require(fits, f"--max-seq-len={cfg.max_seq_len} must be at most {limit} for this model")
    return check_agreement(dataclasses.replace(start, cfg=cfg, base=found))


def find_run(cfg: StageConfig, stage: str, tag: str, tokenizer, log: Callable) -> Start:
    """The run that goes on in the folder <tag> of the stage, or a new one for it; errors as for `find_start`."""
    root = output_dir() / store.SOURCES[stage]
    folder = root / tag
    otherwise = "" if stage == "base" else " (where it is not given, --run)"
    require(
        folder.resolve().parent == root.resolve(),
        f"{tag_flag(root)}{otherwise} must be the name of one folder, got {tag!r}",
    )
    bucket.check_name(folder)
    going_on = bool(claim(folder, cfg.resume, cfg.overwrite) and cfg.resume)
    processes.agree("the folder", {f"checkpoints to resume from in {tag}": going_on})  # before Orbax makes them wait
    step = integrity.newest_intact(folder, log) if going_on else None
    if going_on:
        if step is None:
            raise ValueError(f"--resume: no checkpoint in {folder} is intact; --overwrite starts the run again")
        record = store.read_meta(folder / str(step))
        log(f"Resuming {folder} from step {step}")
        if changed := changed_versions(record.get("versions")):
            log(f"NOTE: since then versions have changed ({changed}): what follows may differ in the last bits")
        if getattr(cfg, "model_step", None) == BEST:  # which one that was is recorded
            cfg = dataclasses.replace(cfg, model_step=None, given=cfg.given - {"model_step"})
        cfg = resumed_settings(cfg, record["user_config"], tag_flag(root), log)
        find.check_tokenizer(tokenizer, record)
        return Start(cfg, folder, tokenizer.digest(), record=record)
    if cfg.resume:
        tags = find.tags_by_time(root)
        require(
            cfg.resume == AUTO,
            f"--resume: {folder} has no checkpoint to go on from; the runs that have some, the newest first: "
            f"{', '.join(tags) or 'none'}; name one with {tag_flag(root)}{otherwise}, or give --resume=auto, which "
            "begins a run that is not there",
        )
        log(f"Nothing to resume in {folder}: a new run")
    return Start(cfg, folder, tokenizer.digest())


def changed_versions(recorded: Any) -> str:
    """Each package whose version is another one than in a checkpoint's record, such as "jax 0.11.1 to 0.12.0"."""
    recorded = recorded if isinstance(recorded, dict) else {}
    now = store.versions()
    return ", ".join(f"{n} {recorded.get(n, '?')} to {now[n]}" for n in now if recorded.get(n) != now[n])


def inherit_from(cfg: StageConfig, meta: dict, source: str, log: Callable) -> StageConfig:
    """The settings with what they inherit from the meta of a model of the stage `source`."""
    settings = meta.get("user_config")
    return inherit(cfg, {**(settings if isinstance(settings, dict) else {}), **meta}, f"the {source} model", log)


def check_agreement(start: Start) -> Start:
    """The run. ValueError: another process is about to start another one, or from something else."""
    facts = {"tokenizer": start.tokenizer_digest} | processes.compared_settings(values_of(start.cfg))
    if start.resumed:
        facts["checkpoint to resume"] = find.identity(find.Found(start.folder, start.first_step, True))
    if start.base:
        facts["model to start from"] = find.identity(start.base)
    processes.agree("the run", facts)
    return start


def tag_flag(root: Path) -> str:
    """The flag that names a run's folder in `root`: in pretraining --model-tag, which later is the base model's."""
    return "--model-tag" if root.name == store.SOURCES["base"] else "--output-tag"


def claim(folder: Path, resume: str | None, overwrite: bool) -> list[int]:
    """The checkpoints to go on from, or to give up; the folder is refused where it holds what must not be touched."""
    if any(folder.glob("model_*.pt")):
        raise FileExistsError(
            f"{folder} holds checkpoints of nanochat's own: choose another folder with {tag_flag(folder.parent)}"
        )
    require(not (resume and overwrite), "--resume and --overwrite contradict each other: give one of them")
    steps = integrity.steps(folder)
    if steps and not (resume or overwrite):
        raise FileExistsError(
            f"{folder} holds checkpoints of another run (steps {', '.join(map(str, steps))}): --resume goes on with "
            f"it, --overwrite deletes it, {tag_flag(folder.parent)} names another folder"
        )
    return steps


# ----------------------------------------------------------------------------------------------------------- the folder
@contextlib.contextmanager
def hold_folder(start: Start) -> Iterator[Lock | Token | None]:
    """While it is entered, the run's folder is this run's alone, which process 0 can check with what is given; the
    others get None. FileExistsError where another process trains in it.

    Only now are the checkpoints that --overwrite gives up deleted, and what killed saves left behind."""
    if processes.index():
        _check_shared(start.folder)
        yield None
        return
    try:
        owner = own(start.folder)
    except Timeout:
        raise FileExistsError(
            f"another process is training in {start.folder}: choose another folder with {tag_flag(start.folder.parent)}"
        ) from None
    try:
        integrity.sweep(start.folder)
        if not start.resumed:
            for step in claim(start.folder, None, start.cfg.overwrite):
                integrity.discard(start.folder / str(step))
        write_tokenizer(start.base)
        _check_shared(start.folder)
        yield owner
    finally:
        owner.release()


def _check_shared(folder: Path) -> None:
    """ValueError where a process does not see the folder of process 0: each writes its part of a checkpoint."""
    if processes.count() == 1:
        return
    sign = folder / ".shared"
    if not processes.index():
        sign.touch()
    processes.exchange("the run's folder", None)
    patience = time.monotonic() + SEEN_SECONDS
    while not (seen := sign.exists()) and time.monotonic() < patience:
        time.sleep(0.2)
    blind = [str(i) for i, saw in enumerate(processes.exchange("who sees it", seen)) if not saw]
    if not processes.index():
        sign.unlink()
    require(
        not blind,
        f"process {', '.join(blind)} does not see {folder} of process 0: set NANOCHAT_BASE_DIR to a file "
        "system that all machines share",
    )


# ---------------------------------------------------------------------------------------------------- the first state
class Initial(NamedTuple):
    """What the first step needs: the plan with the optimizer's groups in force, and the state on the devices."""

    plan: Plan
    state: TrainState


def fine_tuning_groups(cfg: Any, model: GPTConfig, abstract_params: Any) -> Groups:
    """The optimizer's groups of a stage that starts from a model, with this run's rates times --init-lr-frac."""
    groups = default_groups(
        model.n_embd,
        embedding_lr=cfg.embedding_lr,
        unembedding_lr=cfg.unembedding_lr,
        matrix_lr=cfg.matrix_lr,
        scalar_lr=cfg.scalar_lr,
        weight_decay=cfg.weight_decay or 0.0,
    )
    return scale_rates(groups_in_use(groups, abstract_params), cfg.init_lr_frac)


def initial_state(start: Start, plan: Plan, log: Callable) -> Initial:
    """The state of the run's first step: from its checkpoint, from the model it starts from, or drawn from --seed.

    The plan comes back with the optimizer's groups in force: after a warm start the betas and the decay are those of
    the model's optimizer, the rates the plan's. ValueError: the optimizer state of the model lacks something, or a
    device is too small by far."""
    activation = plan.rows_per_device * plan.batch.T * plan.model.n_embd * jnp.dtype(plan.dtype).itemsize
    check_room(
        "the parameters, the optimizer's state and one activation",
        bytes_on_device(plan.abstract_state) + activation,
        plan.mesh.local_devices[0],
        "--device-batch-size or --max-seq-len, or use more devices",
    )
    if start.resumed:
        with plan.scope():
            return Initial(plan, restore_state(start.checkpoint, plan.abstract_state))
    if start.base is None:
        with plan.scope():
            return Initial(plan, random_state(plan.model, plan.optimizer, plan.abstract_state, start.cfg.seed))
    cfg, arrays = start.cfg, None
    _, params, _ = find.load_params(start.base)
    if cfg.load_optimizer and (warm := find.load_optimizer(start.base, plan.model, plan.groups)):
        groups, arrays = warm
        log(f"Loaded the optimizer state of the {start.cfg.source} model (rates are this run's own)")
        if cfg.weight_decay is not None:
            groups["matrix"] = dataclasses.replace(groups["matrix"], weight_decay=cfg.weight_decay)
        plan = dataclasses.replace(plan, groups=groups)
    elif cfg.load_optimizer:
        log(f"WARNING: the {start.cfg.source} model came without optimizer state, so it starts empty")
    like, tx = plan.abstract_state, plan.optimizer
    with plan.scope():
        params = place(params, like.params)
        if arrays is None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, like.opt_state)
            opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
        else:
            try:
                opt_state = place(with_state_arrays(like.opt_state, arrays), like.opt_state)
            except KeyError as e:
                raise ValueError(
                    f"the optimizer state of {start.base} has no {e}: start from an empty one, --load-optimizer 0"
                ) from e
        step, bad_steps = (place(np.int32(0), scalar) for scalar in (like.step, like.bad_steps))
        return Initial(plan, TrainState(step, params, opt_state, bad_steps))
