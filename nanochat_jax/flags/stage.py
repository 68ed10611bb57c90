"""The settings that base, sft and rl have in common."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from nanochat_jax.cli.settings import (
    AUTO,
    DEVICES,
    EVALUATION,
    RUN,
    Maybe,
    Preflight,
    Resume,
    at_least,
    one_of,
    setting,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The settings that base, sft and rl have in common."""

    run: str = setting("dummy", 'name of the run; "dummy" = no wandb', resume="free", group=RUN)
    device_type: str = setting("auto", "auto, cuda, tpu or cpu", resume="own", group=DEVICES)
    dtype: str = setting(
        "auto",
        "compute type: float32 or bfloat16; auto = bfloat16 on GPU and TPU, for wide models on CPUs with AMX",
        group=DEVICES,
    )
    attention: str = setting(
        "auto",
        "backend by name, see docs/training.md; auto = the fastest that passes a trial here",
        resume="own",
        group=DEVICES,
    )
    remat: str = setting(
        "auto",
        "computed again instead of kept: none, elementwise or block; auto = the least that fits",
        one_of("auto", "none", "elementwise", "block"),
        resume="free",
        group=DEVICES,
    )
    preflight: Preflight = setting(
        None, "compile only and say whether it fits: here, or on v5e-8, h100, a100-8, ...", resume="own", group=DEVICES
    )
    mesh: Maybe[str] = setting(
        None,
        "devices by axis, as data=4,model=2 or replica=2,data=4; default: by width and number",
        resume="own",
        group=DEVICES,
    )
    replicate: bool = setting(
        False,
        "whole parameters on every device, instead of shards over data (for small models)",
        resume="free",
        group=DEVICES,
    )
    verbose: bool = setting(
        False,
        "print the parameters by kind, how each is split over the devices, and the time of every attention backend",
        resume="own",
        group=DEVICES,
    )
    coordinator: Maybe[str] = setting(
        None,
        "of several processes: HOST:PORT where process 0 listens (TPU, SLURM, MPI: found)",
        resume="own",
        group=DEVICES,
    )
    num_processes: Maybe[int] = setting(None, "how many there are", resume="own", group=DEVICES)
    process_id: Maybe[int] = setting(None, "which one this is, from 0", resume="own", group=DEVICES)
    resume: Resume = setting(
        None,
        "go on from the newest intact checkpoint of this run; auto = begin it where there is none",
        one_of("run", AUTO, words="given alone, or as --resume=auto"),
        resume="own",
        group=RUN,
    )
    output_dir: Maybe[Path] = setting(
        None,
        "base directory that the run, its caches and downloads are written to; default: the one that is read",
        resume="own",
        group=RUN,
    )
    keep_checkpoints: int = setting(
        2, "how many checkpoints of the run stay on disk", at_least(1), resume="free", group=EVALUATION
    )
    save_patience: float = setting(
        600.0,
        "seconds that a run's last save is tried again before it gives up",
        at_least(0),
        resume="free",
        group=EVALUATION,
    )
    overwrite: bool = setting(
        False, "delete the checkpoints that an earlier run left in the folder", resume="own", group=RUN
    )
    config: Maybe[Path] = setting(None, "TOML file of flags; flags on the command line win", resume="own", group=RUN)
    # names of the settings that the user gave, here or in the file
    given: Annotated[frozenset[str], tyro.conf.Suppress] = dataclasses.field(default=frozenset(), compare=False)
