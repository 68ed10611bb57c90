"""`tools/tpu_vm.py up`: have a TPU, start the command on all workers, follow it, and decide what its end means.

A preemption, a machine that started anew and a SIGTERM are interruptions: the command goes on, with --resume=auto. Any
other exit code than 0 is the command's own failure, and ends `up` after --retries.
"""

import dataclasses
import itertools
import re
import secrets
import shlex
import sys
from collections.abc import Callable

from nanochat_jax.cli.settings import require
from nanochat_jax.distributed.coordinator import LOST_EXIT_CODE
from tools.tpu_vm.gcloud import Unreachable
from tools.tpu_vm.machine import DEAD, HALTED, Lost, Machine, Unanswered, numbers
from tools.tpu_vm.settings import Settings

STAGE = re.compile(r"nanochat_jax\.(base|sft|rl)")
# exit codes of a stage that SIGTERM made save and end, and of one that lost another process
AGAIN = {128 + 15, LOST_EXIT_CODE}
KILLED = 128 + 9
MISSED = 5  # polls in a row without an answer of every worker, after which the TPU counts as lost
MOST_RESTARTS = 10  # on one machine
MOST_SILENT = 3  # machines in a row whose workers never answered: something is wrong with ssh


def resumed(command: list[str]) -> list[str]:
    """The command with --resume=auto, which begins or goes on, where it is a stage of ours."""
    stage = any(flag == "-m" and STAGE.fullmatch(module) for flag, module in itertools.pairwise(command))
    given = any(word.split("=")[0] == "--resume" for word in command)
    return [*command, "--resume=auto"] if stage and not given else command


@dataclasses.dataclass(frozen=True)
class Supervisor:
    """Has the command of `up` run to its end, on one TPU after the other."""

    cfg: Settings
    machine: Machine
    create: Callable[[bool], bool]  # makes sure of a READY TPU, asking the user if so said -> whether it is new
    hint: Callable[[str], str]  # verb of the launcher -> its command line
    say: Callable[[str], None]
    sleep: Callable[[float], None]
    disk: str | None  # where an attached disk is mounted

    def up(self, env: tuple[str, ...], command: list[str]) -> int:
        """The command's exit code. ValueError: it cannot be started, or gcloud refuses."""
        ask, failures, silent = True, 0, 0
        while True:
            try:
                new = self.create(ask)
                ask = False
                self.begin(env, command, new)
                silent = 0
                outcome, code = self.run_to_end(env, command)
            except Unanswered as e:
                silent += 1
                require(silent < MOST_SILENT, f"{e}, on {silent} machines in a row: does {self.hint('ssh')} work?")
                self.say(f"{e}: the TPU is deleted and made again")
                self.machine.delete()
                continue
            except Lost as e:
                ask = False
                self.say(f"lost: {e}")
                continue
            if outcome == "halted":
                self.say("somebody stopped the command or the TPU: up ends here")
                return 1
            if outcome == "unreachable":
                self.say("out of reach: the TPU is deleted and made again")
                self.machine.delete()
            elif outcome == "failed" and failures < self.cfg.retries:
                failures += 1
                self.say(f"starting it again: {failures} of {self.cfg.retries} retries")
            else:
                return self.finish(code)

    def finish(self, code: int) -> int:
        if self.cfg.delete_at_end:
            self.machine.delete()
            self.machine.record.forget()
        else:
            self.say(f"the TPU {self.cfg.name} still costs money; delete it with {self.hint('delete')}")
        if self.cfg.dry_run:
            self.say("after a preemption, as often as one comes, and then all of the above again:")
            self.machine.delete()
        return code

    def begin(self, env: tuple[str, ...], command: list[str], new: bool) -> None:
        """Start the command, unless it runs already: an `up` that was ended goes on.

        Lost: the TPU went away meanwhile. ValueError: another command runs.
        """
        found = {} if new or self.cfg.dry_run else self.machine.report()
        alive = {worker: facts for worker, facts in found.items() if facts["state"] == "running"}
        record = self.machine.record
        ours = record.command == command and all(facts["id"] == record.run for facts in alive.values())
        require(ours or not alive, f"another command is running; end it with {self.hint('stop')}")
        if len(alive) == self.machine.hosts:
            self.say(f"the command is running already: {shlex.join(command)}")
            return
        if alive:  # an `up` was ended while it started the command
            self.machine.stop_command(self.cfg.grace_seconds)
        self.machine.send(self.cfg.source)
        if self.disk:
            self.machine.mount(self.disk)
        self.start(env, command)

    def start(self, env: tuple[str, ...], command: list[str]) -> None:
        record = self.machine.record
        record.run, record.command = secrets.token_hex(4), command
        record.save()
        self.say(f"running on all workers: {shlex.join(command)}")
        self.machine.start(record.run, env, command)

    def run_to_end(self, env: tuple[str, ...], command: list[str]) -> tuple[str, int]:
        """(ended, failed, unreachable or halted; exit code) of the command, started again where it was interrupted."""
        for restart in range(MOST_RESTARTS + 1):
            outcome, code, text = self.follow()
            self.say(text)
            if outcome != "again":
                return outcome, code
            if restart < MOST_RESTARTS:
                self.say("starting it again on the same machine")
                self.machine.stop_command(self.cfg.grace_seconds)
                self.start(env, command)
        self.say(f"the command was interrupted {MOST_RESTARTS + 1} times on one machine")
        return "failed", code

    def follow(self) -> tuple[str, int, str]:
        """Print the log of worker 0 until something happens -> (what, exit code, in words). Lost: the TPU is gone."""
        machine, place, missed, settled = self.machine, 0, 0, False
        while True:
            try:
                node = machine.describe()
            except Unreachable as e:
                self.say(f"gcloud does not answer ({e}); the command goes on")
                self.sleep(self.cfg.poll_seconds)
                continue
            if self.cfg.dry_run:
                machine.report()
                machine.log_from(0)
                return "ended", 0, "the last three every --poll-seconds, until it has ended"
            state = node["state"] if node else "deleted"
            if not self.machine.record.path.exists() or state in HALTED:  # by `delete` in another terminal, or by hand
                return "halted", 1, f"the TPU is {state}"
            if node is None or state in DEAD:
                raise Lost(f"the TPU is {state}")
            found = machine.report() if state == "READY" else {}
            if 0 in found and found[0]["id"] == self.machine.record.run and found[0]["log_bytes"] > place:
                place += self.show_log(place)
            missing = set(range(machine.hosts)) - set(found)
            if missing:
                missed = missed + 1 if state == "READY" else 0
                self.say(f"the TPU is {state}; {numbers(missing)} did not answer")
                if missed >= MISSED:
                    return "unreachable", 1, f"{numbers(missing)} did not answer {missed} times in a row"
            else:
                missed, verdict = 0, self.verdict(found)
                # A preemption ends the command a little before gcloud knows of it: look once more.
                if verdict and (settled or verdict[0] in ("ended", "halted")):
                    return verdict
                settled = verdict is not None
            self.sleep(self.cfg.poll_seconds)

    def show_log(self, place: int) -> int:
        """Print worker 0's log from a byte on -> how many bytes."""
        part = self.machine.log_from(place)
        sys.stdout.flush()
        sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
        return len(part)

    def verdict(self, found: dict[int, dict]) -> tuple[str, int, str] | None:
        """(what, exit code, in words) from the report of every worker, or None while the command goes on."""
        if any(facts["stopped"] for facts in found.values()):
            return "halted", 1, "the command was stopped"
        anew = {worker for worker, facts in found.items() if facts["state"] in ("none", "rebooted")}
        anew |= {worker for worker, facts in found.items() if facts["id"] != self.machine.record.run}
        if anew:
            return "again", 1, f"{numbers(anew)} started anew, without the command"
        ended = {worker: facts["exit_code"] for worker, facts in found.items() if facts["state"] == "ended"}
        ended |= {worker: KILLED for worker, facts in found.items() if facts["state"] == "killed"}
        bad = {worker: code for worker, code in sorted(ended.items()) if code}
        text = "; ".join(f"worker {worker} ended with exit code {code}" for worker, code in bad.items())
        if bad and AGAIN.issuperset(bad.values()):
            return "again", max(bad.values()), text
        if bad:
            return "failed", next(code for code in bad.values() if code not in AGAIN), text
        if len(ended) == len(found):
            return "ended", 0, f"the command has ended with exit code 0 on {numbers(set(found))}"
        return None
