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
line of shell write -- bash -c 'line'. `up` adds --resume=auto where COMMAND is base, sft or rl of this project.
"""

import functools
import os
import secrets
import shlex
import subprocess
import sys
import time
from pathlib import Path

from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.settings import require
from tools.tpu_vm.gcloud import Accelerator, Gcloud, Record, Unreachable, accelerator, last_error
from tools.tpu_vm.machine import DEAD, HALTED, WORKER, Lost, Machine
from tools.tpu_vm.settings import Settings, check, disk_place, environment
from tools.tpu_vm.up import Supervisor, resumed

VERBS = ("up", "create", "run", "logs", "status", "ssh", "stop", "delete")
WITH_COMMAND = ("up", "run", "ssh")
WITHOUT_COMMAND = "what to run? Write it after --, such as -- .venv/bin/python -m nanochat_jax.sft"
PRICES = {
    "spot": "spot: may be taken away at any moment",
    "reserved": "reserved: of your reservation",
    "on-demand": "on demand: the full price",
}


def confirm(cfg: Settings, question: str) -> None:
    """ValueError: the answer is no, or there is nobody to ask."""
    if cfg.yes or cfg.dry_run:
        return
    require(sys.stdin.isatty(), f"{question} Nobody can answer here: --yes says so beforehand")
    require(input(f"{question} [y/N] ").strip().lower() in ("y", "yes"), "nothing was done")


class Launcher:
    """The verbs, on one TPU."""

    def __init__(self, cfg: Settings, sleep=time.sleep):
        check(cfg)
        self.cfg, self.sleep, self.disk_place = cfg, sleep, disk_place(cfg)
        state = cfg.state_dir or Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "nanochat_jax/tpu_vm"
        file = f"{(cfg.project or 'default').replace(':', '_')}.{cfg.zone}.{cfg.name}.json"
        self.record = Record.load(state.expanduser().absolute() / file, cfg.dry_run)
        self.machine = Machine(
            Gcloud(cfg.zone, cfg.project, cfg.dry_run),
            self.record,
            cfg.name,
            self.say,
            sleep,
            poll_seconds=cfg.poll_seconds,
            backoff_seconds=cfg.backoff_seconds,
            ssh_args=cfg.ssh_arg,
        )

    def say(self, text: str) -> None:
        """With --dry-run as comments, so that all that is printed can be pasted."""
        print("# " + text.replace("\n", "\n# ") if self.cfg.dry_run else text, flush=True)

    def hint(self, verb: str) -> str:
        """The command line of another verb for this TPU."""
        project = ["--project", self.cfg.project] if self.cfg.project else []
        return shlex.join(["tools/tpu_vm.py", verb, "--name", self.cfg.name, "--zone", self.cfg.zone, *project])

    # ---- to have a TPU

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

    def create(self, ask: bool = True, recreates: bool = False) -> bool:
        """Have a READY TPU: the one that is there, or a new one -> whether it is new. A dead one of ours is deleted.

        ask: say what it will be, and whether it is made again after preemptions (`recreates`), and ask."""
        cfg, machine = self.cfg, self.machine
        require(cfg.accelerator is not None, "--accelerator is needed, such as --accelerator v6e-8")
        wanted = accelerator(cfg.accelerator, cfg.topology)
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
        if ask:
            self.print_plan(wanted, runtime, recreates)
            confirm(cfg, "Create it?")
        extra = (*disk, *cfg.create_arg)
        machine.create(
            lambda: machine.create_args(wanted, runtime, cfg.price, cfg.queued, extra), cfg.queued, cfg.attempts
        )
        return True

    def print_plan(self, wanted: Accelerator, runtime: str, recreates: bool) -> None:
        cfg = self.cfg
        chips = f"{wanted.chips} chip{'s' * (wanted.chips > 1)} in {wanted.hosts} machine{'s' * (wanted.hosts > 1)}"
        place = f"{cfg.zone}, project {cfg.project or 'of gcloud'}"
        self.say(f"TPU {cfg.name} in {place}: {wanted.text}, {chips}, {runtime}")
        paid = "paid as long as it exists, idle or not (cloud.google.com/tpu/pricing)"
        self.say(f"price class: {PRICES[cfg.price]}; {paid}")
        if cfg.queued:
            self.say("through a queued resource: it may come hours from now, and costs from then on")
        if recreates:
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
        create = functools.partial(self.create, recreates=True)
        supervisor = Supervisor(cfg, self.machine, create, self.hint, self.say, self.sleep, self.disk_place)
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
        if self.record.queued:
            request = self.machine.gcloud.describe("queued-resources", self.cfg.name)
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
    """The launcher's command line -> its exit code. ValueError: a sentence for the user."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    flags, command = ["--follow" if flag == "-f" else flag for flag in argv[:cut]], argv[cut + 1 :]
    verb = flags.pop(0) if flags and not flags[0].startswith("-") else None
    if verb is None:
        print(__doc__.strip() + "\n\nFLAGS: tools/tpu_vm.py up --help")
        return 0 if {"-h", "--help"} & set(flags) else 2
    require(verb in VERBS, f"{verb} is none of {', '.join(VERBS)}")
    require(not command or verb in WITH_COMMAND, f"{verb} takes no command: drop what stands after --")
    cfg = parse(Settings, flags, prog=f"tools/tpu_vm.py {verb}")
    launcher = Launcher(cfg, sleep)
    try:
        if verb in WITH_COMMAND:
            return getattr(launcher, verb)(command)
        if verb == "create":
            launcher.create()
            launcher.say(f"{cfg.name} is READY and costs money until {launcher.hint('delete')}")
            return 0
        return getattr(launcher, verb)()
    except (Lost, Unreachable) as e:
        raise ValueError(str(e)) from e
