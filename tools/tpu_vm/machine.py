"""One TPU VM: to have it ready, to send it the project, to start a command on all its workers and to watch it.

tools/tpu_vm/worker.py is what runs there; launcher.py and up.py decide what is done when.
"""

import dataclasses
import gzip
import hashlib
import json
import re
import shlex
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from nanochat_jax.cli.settings import require
from nanochat_jax.files.paths import write_atomically
from tools.tpu_vm.gcloud import (
    EXISTS,
    FINAL,
    LABEL,
    PASSING,
    Accelerator,
    Answer,
    Gcloud,
    Record,
    Unreachable,
    backoff,
    last_error,
)

FOLDER = "nanochat_jax_tpu"  # in the home folder of every worker; everything of ours is in it
ARCHIVE = f"{FOLDER}.tar.gz"
WORKER = f"python3 {FOLDER}/tree/tools/tpu_vm/worker.py"
DEAD = {"PREEMPTED", "TERMINATED"}  # states that only deleting ends
HALTED = {"STOPPED", "STOPPING", "DELETING", "HIDDEN", "HIDING"}  # somebody wanted that
QUEUE_ENDED = {"FAILED", "SUSPENDING", "SUSPENDED"}
MOST_BYTES = 256 << 20  # of a tree, before compression
TRIES = 4  # of what some workers did not do
LINE = re.compile(rb"TPU_VM (\{[^{}]*\})")


class Lost(Exception):
    """The TPU is not ready any more: preempted, or deleted."""


class Unanswered(Lost):
    """It is ready, but some of its workers do not answer."""


@dataclasses.dataclass
class Machine:
    gcloud: Gcloud
    record: Record
    name: str
    say: Callable[[str], None]
    sleep: Callable[[float], None] = time.sleep
    poll_seconds: float = 20
    backoff_seconds: float = 15
    ssh_args: tuple[str, ...] = ()
    hosts: int = 1

    # ---- the TPU itself

    def describe(self) -> dict | None:
        """The TPU, or None; the number of its workers is noted. Unreachable: nobody knows."""
        node = self.gcloud.describe("tpu-vm", self.name)
        if node and node.get("networkEndpoints"):
            self.hosts = len(node["networkEndpoints"]) // max(1, len(node.get("networkConfigs", [])))
        return node

    def create_args(self, wanted: Accelerator, runtime: str, price: str, queued: bool, extra: tuple[str, ...]):
        """Of gcloud, for a machine with our label."""
        price_flag = {"spot": ("--spot",), "reserved": ("--reserved",), "on-demand": ()}[price]
        flags = (*wanted.flags, *price_flag, f"--labels={LABEL}={self.record.id}", *extra)
        if queued:
            kind, flags = "queued-resources", (f"--node-id={self.name}", f"--runtime-version={runtime}", *flags)
        else:
            kind, flags = "tpu-vm", (f"--version={runtime}", *flags)
        return (*wanted.track, "compute", "tpus", kind, "create", self.name, *flags)

    def create(self, args: Callable[[], tuple[str, ...]], queued: bool, attempts: int) -> None:
        """Until it is READY; the reasons that pass, capacity and quota, are waited for.

        ValueError: gcloud refuses for good, the attempts are used up, or a TPU of this name is somebody else's.
        """
        for attempt in range(attempts):
            self.record.begin(queued)
            waiting = queued and self.is_in_queue()
            answer = Answer(0, b"", "") if waiting else self.gcloud(*args(), show=True, echo=True)
            if answer.code == 0 and (not queued or self.wait_in_queue()):
                return self.wait_until_ready()
            why = last_error(answer.err) if answer.code else "the queued resource ended without a TPU"
            if answer.code and FINAL.search(answer.err):
                raise ValueError(f"gcloud refuses: {why}")
            node = self.describe_patiently()
            request = self.describe_patiently("queued-resources") if queued else None
            if any(found and not self.record.owns(found) for found in (node, request)):
                raise ValueError(f"there is a TPU named {self.name} already, which this launcher did not create")
            if node and node["state"] not in DEAD:  # the answer was lost, not the TPU
                return self.wait_until_ready()
            if answer.code and not PASSING.search(answer.err) and not EXISTS.search(answer.err):
                raise ValueError(f"gcloud refuses: {why}")
            if node or queued:
                self.delete()
            if attempt + 1 < attempts:
                seconds = backoff(attempt, self.backoff_seconds)
                if not answer.code:  # else gcloud has said it
                    self.say(why)
                self.say(f"no TPU yet: trying again in {seconds:.0f} s (attempt {attempt + 2} of {attempts})")
                self.sleep(seconds)
        raise ValueError(f"no TPU after {attempts} attempts (--attempts); the last answer: {why}")

    def describe_patiently(self, kind: str = "tpu-vm") -> dict | None:
        """As describe, as often as it takes where the network or the service is why; ValueError: nobody knows why."""
        attempt = 0
        while True:
            try:
                return self.describe() if kind == "tpu-vm" else self.gcloud.describe(kind, self.name)
            except Unreachable as e:
                if attempt >= TRIES and not PASSING.search(str(e)):
                    raise ValueError(str(e)) from e
                self.say(f"gcloud does not answer ({e}); trying again")
                self.sleep(min(60, backoff(attempt, self.backoff_seconds)))
                attempt += 1

    def is_in_queue(self) -> bool:
        """Whether a queued resource of ours waits from before; one that has ended, by a preemption, is deleted."""
        request = None if self.gcloud.dry_run else self.describe_patiently("queued-resources")
        if request is None or not self.record.owns(request):
            return False
        if request["state"]["state"] in QUEUE_ENDED:
            self.delete()
            return False
        return True

    def wait_in_queue(self) -> bool:
        """Whether the queued resource became a TPU."""
        seen = None
        while not self.gcloud.dry_run:
            resource = self.describe_patiently("queued-resources")
            state = resource["state"]["state"] if resource else "FAILED"
            if state != seen:
                self.say(f"queued resource: {state}")
            if state == "ACTIVE" or state in QUEUE_ENDED:
                return state == "ACTIVE"
            seen = state
            self.sleep(self.poll_seconds)
        return True

    def wait_until_ready(self) -> None:
        """Lost: it will not be."""
        seen = None
        while not self.gcloud.dry_run:
            node = self.describe_patiently()
            state = node["state"] if node else "deleted"
            if state == "READY":
                return
            if node is None or state in DEAD | HALTED:
                raise Lost(f"the TPU is {state}")
            if state != seen:
                self.say(f"the TPU is {state}")
            seen = state
            self.sleep(self.poll_seconds)

    def delete(self) -> None:
        """What the record owns, and nothing else; of a queued resource both. ValueError: gcloud refuses."""
        for kind in ("queued-resources", "tpu-vm") if self.record.queued else ("tpu-vm",):
            found = None if self.gcloud.dry_run else self.describe_patiently(kind)
            if not self.gcloud.dry_run and (found is None or not self.record.owns(found)):
                continue
            force = ("--force",) if kind == "queued-resources" else ()
            answer = self.gcloud("compute", "tpus", kind, "delete", self.name, *force, show=True, echo=True)
            if answer.code and self.describe_patiently(kind) is not None:
                raise ValueError(f"{self.name} was not deleted and costs money: {last_error(answer.err)}")

    # ---- its workers

    def ssh(self, script: str, workers: str = "all", *, echo: bool = False, timeout: float = 300) -> Answer:
        """Run a line of shell; what takes longer than `timeout` seconds counts as lost."""
        head = ("compute", "tpus", "tpu-vm", "ssh", self.name, f"--worker={workers}")
        flags = ("--ssh-flag=-oServerAliveInterval=15", *self.ssh_args, f"--command={script}")
        return self.gcloud(*head, *flags, echo=echo, timeout=timeout)

    def ask(self, script: str, workers: str = "all", *, echo: bool = False, timeout: float = 300) -> dict[int, dict]:
        """What each worker printed for us, by its number."""
        answer = self.ssh(script, workers, echo=echo, timeout=timeout)
        lines = [json.loads(line) for line in LINE.findall(answer.out)]
        if not lines and FINAL.search(answer.err):
            raise ValueError(last_error(answer.err))
        if self.hosts > 1 and any(line["worker"] < 0 for line in lines):  # hosts whose names do not end with numbers
            asked = range(self.hosts) if workers == "all" else map(int, workers.split(","))
            answers = {worker: self.ssh(script, str(worker), echo=echo, timeout=timeout) for worker in asked}
            found = {worker: LINE.findall(answer.out) for worker, answer in answers.items()}
            return {worker: {**json.loads(lines[-1]), "worker": worker} for worker, lines in found.items() if lines}
        if self.hosts == 1 and lines:
            lines = [{**lines[-1], "worker": 0}]  # whatever its host is called
        return {line["worker"]: line for line in lines}

    def everywhere(
        self, what: str, script: str, before: Callable[[str], None] = lambda workers: None, *, timeout: float = 300
    ) -> None:
        """Run a line of shell on all workers, again on those that did not answer; before(workers) comes first each
        time. Lost: the TPU is not ready; Unanswered: some workers never do; ValueError: one refuses."""
        pending = set(range(self.hosts))
        for attempt in range(TRIES):
            if attempt:
                self.check_ready()
                seconds = min(60, backoff(attempt - 1, self.backoff_seconds))
                self.say(f"{what}: {numbers(pending)} did not answer; trying again in {seconds:.0f} s")
                self.sleep(seconds)
            workers = "all" if len(pending) == self.hosts else ",".join(map(str, sorted(pending)))
            before(workers)
            answers = self.ask(script, workers, echo=True, timeout=timeout)
            if self.gcloud.dry_run:
                return
            for worker, facts in sorted(answers.items()):
                if "error" in facts:
                    raise ValueError(f"worker {worker}: {facts['error']}")
            pending -= set(answers)
            if not pending:
                return
        self.check_ready()
        raise Unanswered(f"{what}: {numbers(pending)} did not answer {TRIES} times")

    def check_ready(self) -> None:
        """Lost: it is not."""
        node = self.describe_patiently()
        if self.gcloud.dry_run:
            return
        if node is None or node["state"] != "READY":
            raise Lost(f"the TPU is {node['state'] if node else 'deleted'}")

    def send(self, source: Path) -> None:
        """The tree to all workers, unpacked beside the old one and set up."""
        archive = self.record.path.with_name(f"{self.record.path.stem}.tar.gz")
        digest, files, size = pack(source, archive)
        self.say(f"sending {files} files, {size / 1e6:.1f} MB packed")
        copy = (str(archive), f"{self.name}:{ARCHIVE}", "--scp-flag=-oServerAliveInterval=15", *self.ssh_args)
        new = f"{FOLDER}/tree.new"
        unpack = "; ".join(
            (
                f"set -e; echo '{digest}  {ARCHIVE}' | sha256sum --check --status",
                f"mkdir -p {FOLDER}; rm -rf {new}; mkdir {new}; tar -xzf {ARCHIVE} -C {new}",
                f"python3 {new}/tools/tpu_vm/worker.py install",
            )
        )

        def scp(workers: str) -> None:
            words = ("compute", "tpus", "tpu-vm", "scp", *copy, f"--worker={workers}")
            answer = self.gcloud(*words, echo=True, timeout=1800)
            if answer.code and re.search(r"ssh-add", answer.err):  # gcloud asks for it where there are several workers
                raise ValueError("the key is not in ssh's agent: run ssh-add ~/.ssh/google_compute_engine first")

        self.everywhere("sending the project", unpack, before=scp)
        self.say("setting up: tools/setup.sh --extra tpu")
        self.everywhere("setting up", f"{WORKER} setup", timeout=3600)

    def mount(self, place: str) -> None:
        """The attached disk, on the one worker."""
        self.everywhere("mounting", f"{WORKER} mount {shlex.quote(place)}")

    def start(self, run: str, env: tuple[str, ...], command: list[str]) -> None:
        """On all workers; asked twice with the same id it starts once."""
        words = ["start", "--id", run, *(f"--env={setting}" for setting in env), "--", *command]
        self.everywhere("starting", f"{WORKER} {shlex.join(words)}")

    def report(self) -> dict[int, dict]:
        """State of the command by worker; who does not answer is missing."""
        return self.ask(f"{WORKER} report", timeout=180)

    def log_from(self, place: int, worker: str = "0") -> bytes:
        return self.ssh(f"{WORKER} log --start-at {place}", worker, timeout=180).out

    def stop_command(self, seconds: float) -> dict[int, dict]:
        """SIGTERM on all workers, and SIGKILL after so many seconds -> the report of each."""
        return self.ask(f"{WORKER} stop --seconds {seconds:g}", echo=True, timeout=seconds + 300)


def numbers(workers) -> str:
    """{0} -> worker 0; {1, 3} -> workers 1, 3"""
    return f"worker{'s' * (len(workers) > 1)} {', '.join(map(str, sorted(workers)))}"


def pack(source: Path, archive: Path) -> tuple[str, int, int]:
    """Pack what git knows and what it does not ignore -> (sha256, files, bytes); equal trees make equal archives.

    ValueError: no git checkout, or more than 256 MB.
    """
    command = ["git", "-C", str(source), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        raise ValueError(f"{source} must be a git checkout: git says which files belong to the project") from e
    names = sorted({name for name in listed.decode().split("\0") if name})
    paths = [(name, source / name) for name in names if (source / name).is_symlink() or (source / name).is_file()]
    sizes = sorted(((path.lstat().st_size, name) for name, path in paths), reverse=True)
    total = sum(size for size, _ in sizes)
    require(bool(paths), f"{source} has no files")
    require(
        total <= MOST_BYTES,
        f"{source} has {total / 1e6:.0f} MB of files, {sizes[0][1]} the largest, and {MOST_BYTES >> 20} MB is the most "
        "that is sent: add what is not needed to .gitignore",
    )
    require((source / "tools/tpu_vm/worker.py").is_file(), f"{source} is not this project: no tools/tpu_vm/worker.py")
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_suffix(".part")
    with open(part, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as packed:
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for name, path in paths:
                entry = tar.gettarinfo(path, name)
                entry.uid = entry.gid = entry.mtime = 0
                entry.uname = entry.gname = ""
                if entry.isreg():
                    with open(path, "rb") as f:
                        tar.addfile(entry, f)
                else:
                    tar.addfile(entry)
    data = part.read_bytes()
    part.unlink()
    write_atomically(archive, data)
    return hashlib.sha256(data).hexdigest(), len(paths), len(data)
