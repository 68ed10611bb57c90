"""The part of tools/tpu_vm.py that runs on every worker of a TPU VM, with the system's own Python (3.8 or newer).

Everything lies in one folder: tree/ (the sent project), tree.old/ (the one before), venv/ (tree/.venv points there) and
run/ (the command's log, run.json, exit_code). A command runs in a session of its own under a keeper, which holds a lock
as long as it lives, so that no number of a process is ever mistaken for another's, and writes the exit code. Every verb
prints one line, TPU_VM {flat JSON}, and may be repeated after a lost connection.
"""

import argparse
import contextlib
import fcntl
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[3]  # of <folder>/tree/tools/tpu_vm/worker.py; of tree.new/ while it is unpacked
TREE, RUN = HERE / "tree", HERE / "run"
MARK = "NANOCHAT_TPU_VM"  # in the environment of all that a command starts: whose leftovers may be killed
# What a dead program leaves behind, or a living one holds: the lock file of libtpu, and the devices.
TPU_FILES = os.environ.get("NANOCHAT_TPU_FILES", "/tmp/libtpu_lockfile:/dev/accel*:/dev/vfio/[0-9]*").split(":")
NUMBERED = re.compile(r"-w-(\d+)$")  # a worker's host name ends with its number


class Refused(Exception):
    """A sentence for the user."""


def say(**facts):
    """The line that the launcher reads, whole in one write: several workers share the pipe."""
    host = subprocess.run(["hostname"], stdout=subprocess.PIPE, text=True).stdout.strip()
    number = NUMBERED.search(host)
    facts = {"worker": int(number.group(1)) if number else -1, "host": host, **facts}
    sys.stdout.flush()
    inner = json.dumps(facts)[1:-1].replace("{", "\\u007b").replace("}", "\\u007d")  # the line has two braces
    os.write(1, f"TPU_VM {{{inner}}}\n".encode())


def write(path, text):
    """Atomically."""
    part = path.with_name(path.name + ".part")
    with open(str(part), "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(str(part), str(path))


def install():
    """tree.new, just unpacked and checked, becomes tree; the environment lies outside and stays."""
    if running():
        raise Refused("a command is running from the old tree: end it first with tools/tpu_vm.py stop")
    (HERE / "venv").mkdir(exist_ok=True)
    link = HERE / "tree.new" / ".venv"
    if not link.is_symlink():
        link.symlink_to("../venv")
    shutil.rmtree(str(HERE / "tree.old"), ignore_errors=True)
    if TREE.exists():
        TREE.rename(HERE / "tree.old")
    (HERE / "tree.new").rename(TREE)
    say(done="install")


def setup(extra):
    """tools/setup.sh in the tree. The system's Python is older than 3.12 on these machines, and uv brings one."""
    path = os.pathsep.join([os.path.expanduser("~/.local/bin"), os.environ.get("PATH", os.defpath)])
    env = dict(os.environ, PATH=path)
    if not any(shutil.which(program, path=path) for program in ("uv", "python3.12", "python3.13")):
        pip = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--user", "uv"], stdout=2, env=env)
        if pip.returncode:
            raise Refused("pip cannot install uv, and there is no Python 3.12: install one of them by hand")
    if subprocess.run(["tools/setup.sh", "--extra", extra], cwd=str(TREE), env=env, stdout=2).returncode:
        raise Refused("tools/setup.sh failed; its output is above")
    say(done="setup")


def mount(place):
    """Mount the one attached disk that is not in use, which must have a file system: nothing is ever formatted here."""
    if not os.path.ismount(place):
        listing = ["lsblk", "--json", "--paths", "--output", "NAME,TYPE,FSTYPE,MOUNTPOINT"]
        devices = json.loads(subprocess.run(listing, stdout=subprocess.PIPE, check=True).stdout)["blockdevices"]
        disks = [d for d in devices if d["type"] == "disk" and not d.get("children") and not d["mountpoint"]]
        if len(disks) != 1:
            names = ", ".join(d["name"] for d in disks) or "none"
            raise Refused(f"there must be one attached disk that is not in use, found: {names}")
        (disk,) = disks
        if not disk["fstype"]:
            raise Refused(
                f"the disk {disk['name']} has no file system: make one, once, with sudo mkfs.ext4 {disk['name']}"
            )
        for command in (["mkdir", "-p", place], ["mount", disk["name"], place], ["chmod", "a+w", place]):
            if subprocess.run(["sudo", "-n", *command]).returncode:
                raise Refused(f"sudo {' '.join(command)} failed; its output is above")
    say(done="mount")


@contextlib.contextmanager
def run_lock(patience=0.0):
    """The lock of run/, or None where a keeper holds it; who only looks holds it for a moment, so the one who starts a
    command has the patience of a second."""
    RUN.mkdir(exist_ok=True)
    lock, deadline = os.open(str(RUN / "lock"), os.O_RDWR | os.O_CREAT), time.time() + patience
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = lock
                break
            except BlockingIOError:
                if time.time() >= deadline:
                    mine = None
                    break
            time.sleep(0.05)
        yield mine
    finally:
        os.close(lock)


def running():
    with run_lock() as lock:
        return lock is None


def boot():
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def facts_of_run():
    try:
        return json.loads((RUN / "run.json").read_text())
    except (OSError, ValueError):
        return {}


def report(tail=0):
    """state: none, running, ended (exit_code), rebooted (the machine, meanwhile) or killed (there is no exit code)."""
    run, alive = facts_of_run(), running()
    code = (RUN / "exit_code").read_text() if (RUN / "exit_code").exists() else None
    if alive:
        state = "running"
    elif not run:
        state = "none"
    elif code is not None:
        state = "ended"
    else:
        state = "killed" if run["boot"] == boot() else "rebooted"
    try:
        data = (RUN / "log").read_bytes() if tail else b""
    except FileNotFoundError:
        data = b""
    say(
        tail_at=len(data) - len(b"".join(data.splitlines(True)[-tail:])) if tail else 0,
        state=state,
        id=run.get("id", ""),
        exit_code=int(code) if state == "ended" else -1,
        stopped=(RUN / "stopped").exists() and state != "running",
        log_bytes=(RUN / "log").stat().st_size if (RUN / "log").exists() else 0,
    )


def processes():
    """(number, folder in /proc) of every process but this one and its parents."""
    above, number = set(), os.getpid()
    while number > 1:
        above.add(number)
        number = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
    return [(int(p.name), p) for p in Path("/proc").iterdir() if p.name.isdigit() and int(p.name) not in above]


def our_leftovers(spared=None):
    """Processes that a command of this folder started and that live, without the spared one."""
    mark, found = f"{MARK}={HERE}".encode(), []
    for number, folder in processes():
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if number != spared and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(number)
    return found


def holders(files):
    """(number, command line) of the processes that have one of the files open, as far as this user may see them."""
    found = []
    for number, folder in processes():
        with contextlib.suppress(OSError):
            if any(os.readlink(str(fd)) in files for fd in (folder / "fd").iterdir()):
                found.append((number, (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()))
    return found


def end_leftovers(seconds, spared=None):
    """SIGTERM, and SIGKILL for those that live after so many seconds."""
    for number, wait in ((signal.SIGTERM, seconds), (signal.SIGKILL, 10)):
        for process in our_leftovers(spared):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        deadline = time.time() + wait
        while our_leftovers(spared):
            if time.time() > deadline:
                break
            time.sleep(0.1)
        else:
            return
    raise Refused(f"processes {our_leftovers(spared)} cannot be killed: restart the machine")


def clean():
    """What a killed command left: its processes, and libtpu's lock file, which would make the next one wait or fail."""
    if our_leftovers():
        print("ending processes that an earlier command left behind", file=sys.stderr)
        end_leftovers(10)
    files = [name for pattern in TPU_FILES for name in glob.glob(pattern)]
    for number, command in holders(files):
        raise Refused(f"the TPU is held by process {number} ({command}), which this launcher did not start: end it")
    lock = Path(TPU_FILES[0])
    if lock.exists():
        try:
            lock.unlink()
        except PermissionError:  # of another user, in a folder with the sticky bit
            subprocess.run(["sudo", "-n", "rm", "-f", str(lock)], check=False)
        print(f"removed a stale {lock}", file=sys.stderr)


def start(name, settings, command):
    """Start the command on this worker, unless it runs already; return when its keeper has written run.json."""
    with run_lock(patience=1) as lock:
        run = facts_of_run()
        if lock is None and run.get("id") != name:
            raise Refused(f"another command is running ({run.get('id')}): end it first with tools/tpu_vm.py stop")
        if run.get("id") == name and (lock is None or (RUN / "exit_code").exists()):
            return say(done="start", id=name)  # asked again after a lost connection
        clean()
        for file in ("exit_code", "stopped", "run.json"):
            with contextlib.suppress(FileNotFoundError):
                (RUN / file).unlink()
        if (RUN / "log").exists():
            (RUN / "log").rename(RUN / "log.old")
        path = os.pathsep.join([os.path.expanduser("~/.local/bin"), os.environ.get("PATH", os.defpath)])
        env = dict(os.environ, PATH=path, PYTHONUNBUFFERED="1", **{MARK: str(HERE)})
        env.update(setting.split("=", 1) for setting in settings)
        with open(str(RUN / "log"), "ab") as log:
            subprocess.Popen(
                [sys.executable, str(TREE / "tools/tpu_vm/worker.py"), "keep", "--id", name, "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=str(TREE),
                env=env,
                pass_fds=[lock],  # the keeper holds it from its first moment
                start_new_session=True,  # what ends this connection does not end the command
            )
    deadline = time.time() + 30
    while facts_of_run().get("id") != name:
        if time.time() > deadline:
            raise Refused("the command did not start within 30 s; see run/log")
        time.sleep(0.05)
    say(done="start", id=name)


def keep(name, command):
    """Run the command to its end and write its exit code. The lock is inherited, the command does not get it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # they are the command's, in the same group
        signal.signal(number, lambda *_: None)
    write(RUN / "run.json", json.dumps({"id": name, "pid": os.getpid(), "boot": boot(), "command": command}))
    try:
        code = subprocess.Popen(command).wait()
    except OSError as e:
        print(f"{command[0]}: {e.strerror}", flush=True)
        code = 127
    write(RUN / "exit_code", str(code if code >= 0 else 128 - code))


def stop(seconds):
    """SIGTERM, so that a stage saves and ends; SIGKILL after so many seconds."""
    if running():
        write(RUN / "stopped", "")
        end_leftovers(seconds, spared=facts_of_run().get("pid"))  # the keeper writes the exit code and ends
        deadline = time.time() + 5
        while running() and time.time() < deadline:
            time.sleep(0.05)
    end_leftovers(5)
    report()


def log(start_at):
    """The log's bytes from a place on."""
    with contextlib.suppress(FileNotFoundError), open(str(RUN / "log"), "rb") as f:
        f.seek(start_at)
        shutil.copyfileobj(f, sys.stdout.buffer)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(metavar="VERB")
    verbs.required = True

    def takes(function):
        verb = verbs.add_parser(function.__name__)
        verb.set_defaults(function=function)
        return verb.add_argument

    takes(install)
    takes(setup)("--extra", default="tpu")
    takes(report)("--tail", type=int, default=0)  # tail_at: where so many last lines begin
    takes(mount)("place")
    takes(stop)("--seconds", type=float, default=60)
    takes(log)("--start-at", type=int, default=0)
    for function in (start, keep):
        add = takes(function)
        add("--id", dest="name", required=True)
        if function is start:
            add("--env", dest="settings", action="append", default=[], metavar="NAME=VALUE")
        add("command", nargs=argparse.REMAINDER)
    args = vars(parser.parse_args())
    if "command" in args:
        args["command"] = args["command"][1:]  # without --
    try:
        args.pop("function")(**args)
    except Refused as e:
        say(error=str(e))
        sys.exit(3)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
