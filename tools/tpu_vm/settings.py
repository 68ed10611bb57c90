"""The launcher's flags, and what they must be before gcloud is called."""

import dataclasses
import re
from pathlib import Path

from nanochat_jax.cli.settings import Maybe, require
from tools.tpu_vm.gcloud import check_names

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A TPU, and what to do with it."""

    config: Maybe[Path] = None  # TOML file of flags; flags on the command line win
    # the TPU
    name: str = "nanochat"  # of the TPU
    zone: Maybe[str] = None  # such as us-east5-b
    project: Maybe[str] = None  # Google Cloud project; default: gcloud's own
    accelerator: Maybe[str] = None  # v4-32, v5e-8, v5p-128, v6e-8, or a family (v4, v5e, v5p, v6e) with --topology
    topology: Maybe[str] = None  # such as 4x4x4
    version: Maybe[str] = None  # TPU software version; default: the one Google names for JAX
    price: str = "on-demand"  # on-demand, spot or reserved
    queued: bool = False  # wait in Google's queue (queued resources) instead of asking again and again
    create_arg: tuple[str, ...] = ()  # further flag of gcloud's create, such as --create-arg=--network=mine
    ssh_arg: tuple[str, ...] = ()  # further flag of gcloud's ssh and scp, such as --ssh-arg=--internal-ip
    # the command
    base_dir: Maybe[str] = None  # its NANOCHAT_BASE_DIR: gs://bucket/folder, or a folder on the workers
    disk: Maybe[str] = None  # persistent disk (projects/P/zones/Z/disks/D) for a TPU of one machine: at /mnt/disks/D
    env: tuple[str, ...] = ()  # NAME=VALUE for its environment, readable by others on the machine
    source: Path = ROOT  # the checkout that is sent: what git tracks, and what it does not ignore
    # how
    yes: bool = False  # create, and delete, without asking
    dry_run: bool = False  # print every gcloud command, run none
    adopt: bool = False  # treat a TPU of this name that others created as ours: `up` and `delete` may delete it
    delete_at_end: bool = False  # of `up`: delete the TPU when the command has ended, well or not
    retries: int = 0  # of `up`: how often a command that fails is started again
    attempts: int = 50  # to create a TPU while there is no capacity or quota, with 10 minutes between them at most
    poll_seconds: float = 20  # between two looks at a TPU or a command
    backoff_seconds: float = 15  # before the second attempt; doubles with every further one
    grace_seconds: float = 60  # of `stop`: from SIGTERM to SIGKILL
    machine: bool = False  # of `stop`: the TPU too, which only slices of one machine can; its disk still costs
    state_dir: Maybe[Path] = None  # records of the TPUs created; default: ~/.local/state/nanochat_jax/tpu_vm
    # what is shown
    worker: str = "0"  # of `logs` and `ssh`: a number; of `ssh` with a command also all
    follow: bool = False  # of `logs`: until the command has ended; also -f
    lines: int = 100  # of `logs`: how many of the last lines


def environment(cfg: Settings) -> tuple[str, ...]:
    """NAME=VALUE of the command. ValueError: not of that form, or a base directory where nothing would be kept."""
    for setting in cfg.env:
        valid = re.fullmatch(r"[A-Za-z_]\w*=.*", setting, re.DOTALL) is not None
        require(valid, f"--env={setting}: must be NAME=VALUE")
    if cfg.base_dir is None:
        return cfg.env
    place = cfg.base_dir
    valid = re.match(r"/|gs://[a-z0-9][-_.a-z0-9]*(/|$)", place) is not None
    require(valid, f"--base-dir={place} must be gs://bucket/folder or begin with /")
    return (*cfg.env, f"NANOCHAT_BASE_DIR={place}")


def disk_place(cfg: Settings) -> str | None:
    """Where --disk is mounted. ValueError: it is no disk, or the base directory does not lie on it."""
    if cfg.disk is None:
        return None
    named = re.fullmatch(r"projects/[-a-z0-9.:]+/zones/[-a-z0-9]+/disks/([a-z][-a-z0-9]*)", cfg.disk)
    require(named is not None, f"--disk={cfg.disk} must be such as projects/my-project/zones/us-east5-b/disks/my-disk")
    place = f"/mnt/disks/{named[1]}"
    on_it = cfg.base_dir is None or f"{cfg.base_dir}/".startswith(f"{place}/")
    require(on_it, f"--base-dir={cfg.base_dir} must lie on the disk, which is mounted at {place}")
    return place


def check(cfg: Settings) -> None:
    """ValueError: a flag that Google or gcloud would refuse, or take for another."""
    check_names(cfg.name, cfg.zone, cfg.project)
    require(cfg.price in ("on-demand", "spot", "reserved"), f"--price={cfg.price}: on-demand, spot or reserved")
    require(re.fullmatch(r"\d+|all", cfg.worker) is not None, f"--worker={cfg.worker} must be a number, or all")
    for arg in (*cfg.create_arg, *cfg.ssh_arg):
        require(arg.startswith("--"), f"{arg!r} is no flag of gcloud: write --create-arg=--network=mine")
        require(not arg.startswith("--labels"), "--labels is this launcher's: how it knows what it created")
