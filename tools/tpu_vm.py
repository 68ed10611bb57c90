#!/usr/bin/env python3
"""Cloud TPU VMs, v4 to v6e: make one, run a command on all its workers, follow it, make the TPU again when it is lost.

tools/tpu_vm.py VERB [FLAGS] [-- COMMAND]

up      create, set up, run COMMAND and follow it; after a preemption all of that again, until COMMAND has ended
create  a TPU, after it was asked for
run     send the project, set it up and start COMMAND on all workers, without waiting for it
logs    the command's log on a worker; -f follows it
status  of the TPU, and of the command on each worker
ssh     to a worker; or COMMAND on one or, --worker all, on all of them
stop    COMMAND, by SIGTERM, so that it saves; the TPU stays and costs money; --machine stops the TPU too
delete  the TPU

Flags may stand in a TOML file, see configs/tpu/. COMMAND is run in the project's folder, as it stands after --: for a
line of shell write -- bash -c 'line'. `up` adds --resume where COMMAND is base, sft or rl of this project.
"""

import dataclasses
import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and sys.prefix == sys.base_prefix:  # not in the project's environment
    python = ROOT / ".venv/bin/python"
    if not python.exists():
        sys.exit("error: the launcher needs the project's environment: run tools/setup.sh first")
    os.execv(python, [str(python), *sys.argv])
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from tpu_vm.gcloud import Gcloud, Record, Unreachable, accelerator, check_names, last_error  # noqa: E402
from tpu_vm.machine import DEAD, HALTED, WORKER, Lost, Machine  # noqa: E402
from tpu_vm.up import Supervisor, resumed  # noqa: E402

from nanochat_jax.cli import main as cli_main  # noqa: E402
from nanochat_jax.cli import settings  # noqa: E402
from nanochat_jax.cli.settings import Maybe, require  # noqa: E402

VERBS = ("up", "create", "run", "logs", "status", "ssh", "stop", "delete")
WITHOUT_COMMAND = "what to run? Write it after --, such as -- .venv/bin/python -m nanochat_jax.sft"


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


def confirm(cfg: Settings, question: str) -> None:
    """ValueError: the answer is no, or there is nobody to ask."""
    if cfg.yes or cfg.dry_run:
        return
    require(sys.stdin.isatty(), f"{question} Nobody can answer here: --yes says so beforehand")
    require(input(f"{question} [y/N] ").strip().lower() in ("y", "yes"), "nothing was done")


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


class Launcher:
    """The verbs, on one TPU."""

    def __init__(self, cfg: Settings, sleep=time.sleep):
        check_names(cfg.name, cfg.zone, cfg.project)
        require(cfg.price in ("on-demand", "spot", "reserved"), f"--price={cfg.price}: on-demand, spot or reserved")
        require(re.fullmatch(r"\d+|all", cfg.worker) is not None, f"--worker={cfg.worker} must be a number, or all")
        for arg in (*cfg.create_arg, *cfg.ssh_arg):
            require(arg.startswith("--"), f"{arg!r} is no flag of gcloud: write --create-arg=--network=mine")
            require(not arg.startswith("--labels"), "--labels is this launcher's: how it knows what it created")
        self.cfg, self.sleep, self.recreates = cfg, sleep, False
        self.disk_place = disk_place(cfg)
        state = cfg.state_dir or Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "nanochat_jax/tpu_vm"
        file = f"{(cfg.project or 'default').replace(':', '_')}.{cfg.zone}.{cfg.name}.json"
        self.record = Record.load(state.expanduser().absolute() / file)
        self.record.dry_run = cfg.dry_run
        gcloud = Gcloud(cfg.zone, cfg.project, cfg.dry_run)
        times = {"poll_seconds": cfg.poll_seconds, "backoff_seconds": cfg.backoff_seconds}
        self.machine = Machine(gcloud, self.record, cfg.name, self.say, sleep, ssh_args=cfg.ssh_arg, **times)
        self.again = shlex.join(
            ["tools/tpu_vm.py", "VERB", "--name", cfg.name, "--zone", cfg.zone]
            + (["--project", cfg.project] if cfg.project else [])
        )

    def say(self, text: str) -> None:
        """With --dry-run as comments, so that all that is printed can be pasted."""
        print("# " + text.replace("\n", "\n# ") if self.cfg.dry_run else text, flush=True)

    def hint(self, verb: str) -> str:
        return self.again.replace("VERB", verb)

    # ---- to have a TPU

    def wanted(self):
        require(self.cfg.accelerator is not None, "--accelerator is needed, such as --accelerator v6e-8")
        return accelerator(self.cfg.accelerator, self.cfg.topology)

    def existing(self) -> dict | None:
        """The TPU of this name, if it is ours or --adopt says so. ValueError: it is somebody else's."""
        node = self.machine.describe_patiently()
        if not node:
            return None
        if not self.record.owns(node):
            require(
                self.cfg.adopt,
                f"there is a TPU named {self.cfg.name} already, which this launcher did not create: take another "
                "--name, or --adopt it, which allows it to be deleted and made again",
            )
            self.record.adopted = node["createTime"]
        return node

    def create(self, ask: bool = True) -> bool:
        """Have a READY TPU: the one that is there, or a new one -> whether it is new. A dead one of ours is deleted."""
        cfg, machine = self.cfg, self.machine
        wanted = self.wanted()
        machine.hosts = wanted.hosts
        while node := self.existing():
            if node["state"] == "STOPPED":
                machine.gcloud("compute", "tpus", "tpu-vm", "start", cfg.name, show=True, echo=True)
            elif node["state"] in DEAD:
                machine.delete()
                break
            elif node["state"] not in HALTED:
                machine.wait_until_ready()
                return False
            self.sleep(cfg.poll_seconds)
        runtime = cfg.version or wanted.runtime
        disk = (f"--data-disk=source={cfg.disk},mode=read-write",) if cfg.disk else ()
        require(not cfg.disk or wanted.hosts == 1, f"--disk: only one machine may write to it, not {wanted.hosts}")
        extra = (*disk, *cfg.create_arg)
        price = {
            "spot": "spot: may be taken away at any moment",
            "reserved": "reserved: of your reservation",
            "on-demand": "on demand: the full price",
        }[cfg.price]
        if ask:
            self.print_plan(wanted, runtime, price)
            confirm(cfg, "Create it?")
        machine.create(
            lambda: machine.create_args(wanted, runtime, cfg.price, cfg.queued, extra),
            cfg.queued,
            cfg.attempts,
        )
        return True

    def print_plan(self, wanted, runtime: str, price: str) -> None:
        cfg = self.cfg
        chips = f"{wanted.chips} chip{'s' * (wanted.chips > 1)} in {wanted.hosts} machine{'s' * (wanted.hosts > 1)}"
        place = f"{cfg.zone}, project {cfg.project or 'of gcloud'}"
        self.say(f"TPU {cfg.name} in {place}: {wanted.text}, {chips}, {runtime}")
        self.say(f"price class: {price}; paid as long as it exists, idle or not (cloud.google.com/tpu/pricing)")
        if cfg.queued:
            self.say("through a queued resource: it may come hours from now, and costs from then on")
        if self.recreates:
            self.say("made again after every preemption, without asking, until the command has ended")

    # ---- verbs

    def run(self, command: list[str]) -> int:
        env = environment(self.cfg)
        require(bool(command), WITHOUT_COMMAND)
        if not self.cfg.dry_run:
            self.machine.check_ready()
        self.machine.send(self.cfg.source)
        if self.disk_place:
            self.machine.mount(self.disk_place)
        self.machine.start(secrets.token_hex(4), env, command)
        self.say(f"started; follow it with {self.hint('logs')} -f")
        return 0

    def up(self, command: list[str]) -> int:
        """The command's exit code, when it has ended on all workers."""
        cfg = self.cfg
        require(bool(command), WITHOUT_COMMAND)
        require(
            cfg.base_dir is not None,
            "up needs --base-dir, a place that outlives the TPU: gs://bucket/folder, or a folder on a disk of its own",
        )
        env, command = environment(cfg), resumed(command)
        if cfg.base_dir.startswith("/") and not cfg.disk:
            self.say(f"note: {cfg.base_dir} must lie on a disk that outlives the TPU; its own is lost with it")
        self.recreates = True
        supervisor = Supervisor(cfg, self.machine, self.create, self.hint, self.say, self.sleep, self.disk_place)
        with self.record.alone():
            try:
                return supervisor.up(env, command)
            except KeyboardInterrupt:
                self.say(
                    f"\nleft alone: the TPU {cfg.name}, if it is there, and the command go on, and it costs money.\n"
                    f"watch again: the same command; stop paying: {self.hint('delete')}"
                )
                return 130
            except ValueError:
                if self.record.path.exists():
                    self.say(f"if the TPU is there, it costs money; delete it with {self.hint('delete')}")
                raise

    def status(self) -> int:
        node = self.machine.describe_patiently()
        for request in [self.machine.gcloud.describe("queued-resources", self.cfg.name)] if self.record.queued else []:
            self.say(f"queued resource: {request['state']['state'] if request else 'none'}")
        if not node:
            self.say(f"there is no TPU named {self.cfg.name} in {self.cfg.zone}")
            return 0 if self.cfg.dry_run else 1
        kind = node.get("acceleratorType", "")
        whose = "created here" if self.record.owns(node) else "not created here"
        health, since = node.get("health", ""), node.get("createTime", "?")
        self.say(f"{self.cfg.name}: {node['state']} {health} {kind}, {whose}, since {since}")
        found = self.machine.report() if node["state"] == "READY" else {}
        for worker in range(self.machine.hosts if found else 0):
            facts = found.get(worker)
            ended = f" with exit code {facts['exit_code']}" if facts and facts["state"] == "ended" else ""
            self.say(f"worker {worker}: {facts['state'] + ended if facts else 'does not answer'}")
        return 0

    def logs(self) -> int:
        """Follows over lost connections, from the byte where it was."""
        cfg, machine, place = self.cfg, self.machine, None
        require(cfg.worker != "all", "logs are of one worker, such as --worker 3")
        while True:
            machine.check_ready()
            found = machine.ask(f"{WORKER} report --tail {cfg.lines}", cfg.worker, timeout=180)
            if cfg.dry_run:
                machine.log_from(0, cfg.worker)
                return 0
            facts = next(iter(found.values()), None)
            if place is None:
                require(facts is not None, f"worker {cfg.worker} does not answer, or nothing was ever sent to it")
                run, place = facts["id"], facts["tail_at"]
            if facts is not None and (facts["id"] == run and facts["log_bytes"] > place):
                part = machine.log_from(place, cfg.worker)
                place += len(part)
                sys.stdout.buffer.write(part)
                sys.stdout.flush()
            if not cfg.follow or (facts is not None and (facts["state"] != "running" or facts["id"] != run)):
                return 0
            self.sleep(min(5, cfg.poll_seconds))

    def ssh(self, command: list[str]) -> int:
        head = ("compute", "tpus", "tpu-vm", "ssh", self.cfg.name, f"--worker={self.cfg.worker}", *self.cfg.ssh_arg)
        require(bool(command) or self.cfg.worker != "all", "--worker all needs a command, after --")
        line = self.machine.gcloud.argv(*head, *((f"--command={shlex.join(command)}",) if command else ()))
        if self.cfg.dry_run:
            print(shlex.join(line))
            return 0
        return subprocess.run(line).returncode

    def stop(self) -> int:
        if not self.cfg.dry_run:
            self.machine.check_ready()
        found = self.machine.stop_command(self.cfg.grace_seconds)
        for worker in range(0 if self.cfg.dry_run else self.machine.hosts):
            facts = found.get(worker, {"error": "does not answer"})
            self.say(f"worker {worker}: {facts.get('error') or facts['state']}")
        if self.cfg.machine:
            answer = self.machine.gcloud("compute", "tpus", "tpu-vm", "stop", self.cfg.name, show=True, echo=True)
            require(answer.code == 0, f"the TPU was not stopped and costs money: {last_error(answer.err)}")
        else:
            self.say(f"the TPU still costs money; delete it with {self.hint('delete')}")
        return 0

    def delete(self) -> int:
        node = self.existing()
        request = self.machine.describe_patiently("queued-resources") if self.record.queued else None
        if node is None and request is None and not self.cfg.dry_run:
            self.say(f"there is no TPU named {self.cfg.name} in {self.cfg.zone}")
        else:
            confirm(self.cfg, f"Delete the TPU {self.cfg.name} in {self.cfg.zone}, and all that lies on its own disks?")
            self.machine.delete()
        self.record.forget()
        return 0


def main(argv: list[str] | None = None, sleep=time.sleep) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    flags, command = ["--follow" if flag == "-f" else flag for flag in argv[:cut]], argv[cut + 1 :]
    verb = flags.pop(0) if flags and not flags[0].startswith("-") else None
    if verb is None:
        print(__doc__.strip() + "\n\nFLAGS: tools/tpu_vm.py up --help")
        return 0 if {"-h", "--help"} & set(flags) else 2
    require(verb in VERBS, f"{verb} is none of {', '.join(VERBS)}")
    require(not command or verb in ("up", "run", "ssh"), f"{verb} takes no command: drop what stands after --")
    cfg = settings.parse(Settings, flags, prog=f"tools/tpu_vm.py {verb}")
    launcher = Launcher(cfg, sleep)
    try:
        if verb in ("up", "run", "ssh"):
            return getattr(launcher, verb)(command)
        if verb == "create":
            launcher.create()
            launcher.say(f"{cfg.name} is READY and costs money until {launcher.hint('delete')}")
            return 0
        return getattr(launcher, verb)()
    except (Lost, Unreachable) as e:
        raise ValueError(str(e)) from e


if __name__ == "__main__":
    cli_main.run_stage(main, None)
