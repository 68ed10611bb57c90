"""What the launcher says to gcloud and how it reads the answers; nothing here knows what runs on a machine."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochat_jax.cli.settings import require
from nanochat_jax.files.paths import write_atomically

LABEL = "nanochat-jax-id"  # on what this launcher created: the id that the local record holds
BACKOFF_CAP = 600.0  # seconds
LATER = (
    "TPU7x and later are not made through the Cloud TPU API that this launcher drives: use Compute Engine "
    "(docs.cloud.google.com/tpu/docs/tpus-in-compute-engine) or GKE "
    "(docs.cloud.google.com/kubernetes-engine/docs/concepts/tpus)"
)
# gcloud's words for what another attempt cannot change, and for what it can; the first are looked for first.
FINAL = re.compile(
    r"PERMISSION_DENIED|INVALID_ARGUMENT|UNAUTHENTICATED|FAILED_PRECONDITION|SERVICE_DISABLED|has not been used in"
    r"|does not have permission|auth login|unrecognized arguments|Invalid choice|must be specified"
    r"|required property|Limit: 0\b",
    re.IGNORECASE,
)
PASSING = re.compile(
    r"no more capacity|capacity|stockout|RESOURCE_EXHAUSTED|quota|rate ?limit|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED"
    r"|INTERNAL|\b(429|500|502|503|504)\b|timed? ?out|connection|network|resolve|did not answer",
    re.IGNORECASE,
)
MISSING = re.compile(r"NOT_FOUND|was not found|\b404\b", re.IGNORECASE)
EXISTS = re.compile(r"ALREADY_EXISTS|already exists|\b409\b", re.IGNORECASE)


class Unreachable(Exception):
    """gcloud could not answer this time: the network, or the service."""


@dataclasses.dataclass(frozen=True)
class Family:
    in_type: str  # how its accelerator types begin
    per_chip: int  # what the number in a type counts: 2 cores a chip, or 1 chip
    dimensions: int  # of a topology
    runtime: str  # the software version that Google names for JAX
    track: tuple[str, ...]  # gcloud's release track that takes the family by --type and --topology


FAMILIES = {
    "v4": Family("v4", 2, 3, "tpu-ubuntu2204-base", ()),
    "v5e": Family("v5litepod", 1, 2, "v2-alpha-tpuv5-lite", ("alpha",)),
    "v5p": Family("v5p", 2, 3, "v2-alpha-tpuv5", ("alpha",)),
    "v6e": Family("v6e", 1, 2, "v2-alpha-tpuv6e", ("alpha",)),
}
ONE_HOST = (1, 4, 8)  # sizes of v5e and v6e with all chips in one machine; larger ones have 4 chips a machine
PODS = (16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """What is asked for: flags of gcloud, the release track they need, chips and hosts."""

    text: str
    flags: tuple[str, ...]
    track: tuple[str, ...]
    chips: int
    hosts: int
    runtime: str


def accelerator(kind: str, topology: str | None = None) -> Accelerator:
    """From a type, v4-32, v5e-8 (or v5litepod-8), v5p-128 or v6e-8, or from a family and a topology: v5p and 4x4x4.

    ValueError: not a type or topology of v4 to v6e.
    """
    text = kind.lower().removeprefix("tpu-")
    if re.match(r"(tpu|v)?(7|8|9|\d\d)|ironwood", text):
        raise ValueError(f"--accelerator={kind}: {LATER}")
    name, _, number = text.partition("-")
    name = {"v5litepod": "v5e", "v5lite": "v5e"}.get(name, name)
    known = "v4-32, v5e-8, v5p-128 or v6e-8, or a family (v4, v5e, v5p, v6e) with --topology"
    require(name in FAMILIES, f"--accelerator={kind}: must be such as {known}")
    family = FAMILIES[name]
    if number:
        require(topology is None, f"--accelerator={kind} names a size: drop --topology={topology}, or the size")
        require(number.isdigit(), f"--accelerator={kind}: must be such as {known}")
        chips, flags, track = int(number) // family.per_chip, (), ()
        require(int(number) % family.per_chip == 0, f"--accelerator={kind}: {name} counts cores, two a chip")
    else:
        require(topology is not None, f"--accelerator={kind} needs a size or --topology: such as {known}")
        shape = r"[1-9]\d*" + r"x[1-9]\d*" * (family.dimensions - 1)
        example = "2x2x2" if family.dimensions == 3 else "2x4"
        fits = re.fullmatch(shape, topology) is not None
        require(fits, f"--topology={topology}: {name} has {family.dimensions} dimensions, such as {example}")
        chips = math.prod(map(int, topology.split("x")))
        flags, track = (f"--type={family.in_type}", f"--topology={topology}"), family.track
    if family.dimensions == 2:
        sizes = ONE_HOST + PODS
        require(chips in sizes, f"{name} has slices of {', '.join(map(str, sizes))} chips, got {chips}")
        hosts = 1 if chips in ONE_HOST else chips // 4
        flags, track = (), ()  # there is one topology of a size, so the type says it all
    else:
        require(chips >= 4 and chips % 4 == 0, f"{name} has 4 chips a machine: {chips} is not a multiple of that")
        hosts = chips // 4
    kind = f"{family.in_type}-{chips * family.per_chip}"
    flags = flags or (f"--accelerator-type={kind}",)
    text = kind if not track and not topology else f"{name} {topology}"
    return Accelerator(text, flags, track, chips, hosts, family.runtime)


def check_names(name: str, zone: str | None, project: str | None) -> None:
    """ValueError: a name that Google would refuse, or that gcloud would take for a flag."""
    shape = r"[a-z]([-a-z0-9]{0,60}[a-z0-9])?"
    valid = re.fullmatch(shape, name) is not None
    require(valid, f"--name={name!r} must be lower-case letters, digits and dashes, beginning with a letter")
    require(zone is not None, "--zone is needed, such as --zone us-east5-b, or zone in a --config file")
    valid = re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", zone) is not None
    require(valid, f"--zone={zone!r} must be such as us-east5-b")
    if project is not None:
        valid = re.fullmatch(r"([a-z0-9.]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]", project) is not None
        require(valid, f"--project={project!r} must be a project's id, such as my-project-123")


def backoff(attempt: int, first: float, rng: Callable[[], float] = random.random) -> float:
    """Seconds before the attempt after attempt 0, 1, ...: doubling, capped, and between half and all of that, so that
    many launchers do not come back together."""
    return min(BACKOFF_CAP, first * 2.0 ** min(attempt, 30)) * (0.5 + rng() / 2)


def last_error(text: str) -> str:
    """The line of gcloud's output that says what was wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "gcloud said nothing")


@dataclasses.dataclass(frozen=True)
class Answer:
    code: int
    out: bytes
    err: str


class Gcloud:
    """gcloud as a program, in one zone and project; with dry_run commands are printed, and taken to succeed."""

    def __init__(self, zone: str, project: str | None, dry_run: bool):
        self.where = (f"--zone={zone}", *((f"--project={project}",) if project else ()))
        self.dry_run = dry_run
        if not dry_run and shutil.which("gcloud") is None:
            raise ValueError(
                "gcloud is not on the PATH: install the Google Cloud CLI (cloud.google.com/sdk/docs/install) and run "
                "gcloud auth login"
            )

    def argv(self, *args: str) -> list[str]:
        """The words before the first flag are the command; --quiet: nobody is there to answer gcloud's questions."""
        head = next((i for i, arg in enumerate(args) if arg.startswith("--")), len(args))
        return ["gcloud", *args[:head], *self.where, *args[head:], "--quiet"]

    def __call__(self, *args: str, show: bool = False, echo: bool = False, timeout: float | None = None) -> Answer:
        """show: print the command first; echo: pass on what it writes to stderr, as it comes. Code 124: timeout."""
        command = self.argv(*args)
        if self.dry_run or show:
            print(f"{'' if self.dry_run else '+ '}{shlex.join(command)}", flush=True)
        if self.dry_run:
            return Answer(0, b"", "")
        # A session of its own: Ctrl-C reaches the launcher, which decides what becomes of gcloud.
        process = subprocess.Popen(
            command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = bytearray(), bytearray()

        def drain(stream, kept: bytearray, shown: bool) -> None:
            for line in iter(stream.readline, b""):
                kept += line
                if shown:
                    sys.stderr.buffer.write(line)
                    sys.stderr.flush()

        jobs = ((process.stdout, out, False), (process.stderr, err, echo))
        threads = [threading.Thread(target=drain, args=job, daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for thread in threads:
            thread.join(10)
        return Answer(code, bytes(out), err.decode(errors="replace"))

    def describe(self, kind: str, name: str) -> dict | None:
        """A tpu-vm or a queued resource, or None. Unreachable: gcloud has no answer; ValueError: it may not answer."""
        answer = self("compute", "tpus", kind, "describe", name, "--format=json", timeout=120)
        if answer.code == 0:
            with contextlib.suppress(ValueError):
                return json.loads(answer.out or b"{}")
            raise Unreachable("gcloud's answer is no JSON")
        if MISSING.search(answer.err):
            return None
        if FINAL.search(answer.err):
            raise ValueError(last_error(answer.err))
        raise Unreachable(last_error(answer.err) if answer.code != 124 else "gcloud did not answer within 120 s")


@dataclasses.dataclass
class Record:
    """What this machine remembers of a TPU that it created, in a file that is written before the TPU is made."""

    path: Path
    id: str = ""  # the label that the TPU carries
    queued: bool = False
    adopted: str = ""  # creation time of a TPU that was made by others and given to `up`
    run: str = ""  # id of the command that was started last
    command: list[str] = dataclasses.field(default_factory=list)
    created: int = 0  # how often
    dry_run: bool = False  # nothing is written

    @classmethod
    def load(cls, path: Path, dry_run: bool) -> "Record":
        """ValueError: there is a file, and it is damaged."""
        try:
            return cls(path, **json.loads(path.read_text() if path.exists() else "{}"), dry_run=dry_run)
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path} is damaged ({e}): delete it, and look after the TPU with gcloud") from e

    def save(self) -> None:
        facts = dataclasses.asdict(self)
        facts = {name: value for name, value in facts.items() if name not in ("path", "dry_run")}
        if not self.dry_run:
            write_atomically(self.path, json.dumps(facts, indent=1).encode())

    def forget(self) -> None:
        if not self.dry_run:
            self.path.unlink(missing_ok=True)

    def begin(self, queued: bool) -> None:
        """Before a TPU is created: from now on one with this label is ours, even if the answer is never heard."""
        self.id, self.queued, self.adopted = self.id or secrets.token_hex(8), queued, ""
        self.created += 1
        self.save()

    def owns(self, resource: dict) -> bool:
        """Whether this launcher created the TPU or queued resource, or was given it."""
        nodes = resource.get("tpu", {}).get("nodeSpec", [])  # of a queued resource
        labels = (nodes[0].get("node", {}) if nodes else resource).get("labels", {})
        created = bool(self.id) and labels.get(LABEL) == self.id
        return created or (bool(self.adopted) and resource.get("createTime") == self.adopted)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """ValueError: another launcher is at work on this TPU."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError("another tpu_vm.py up is at work on this TPU; see tools/tpu_vm.py logs -f") from None
            yield
