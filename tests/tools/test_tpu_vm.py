"""tools/tpu_vm.py against a fake gcloud whose workers are folders here, in which what is sent is really run.

Run: python -m pytest tests/tools/test_tpu_vm.py
"""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tools.tpu_vm import launcher, up
from tools.tpu_vm.gcloud import BACKOFF_CAP, accelerator, backoff
from tools.tpu_vm.machine import pack
from tools.tpu_vm.up import resumed

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.executable).resolve()  # without the environment's start-up
STAGE = '''
"""Counts to 16 with a checkpoint after each step, as a stage of ours would; SIGTERM saves and ends it. The fake gcloud
lets it go on by 4 steps at each look of the launcher, so that nothing depends on how fast this machine is."""
import os, pathlib, signal, subprocess, sys, time
home = pathlib.Path.home()
host = subprocess.run(["hostname"], capture_output=True, text=True).stdout.strip()
done = pathlib.Path(os.environ["NANOCHAT_BASE_DIR"]) / f"steps-{host}"
done.parent.mkdir(parents=True, exist_ok=True)
begun = step = int(done.read_text()) if "--resume=auto" in sys.argv and done.exists() else 0
print(f"begins at step {step}" if step else "begins anew")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
(home / "progress").write_text("0")
while step < 16:
    ticks = home / "ticks"
    if ticks.exists() and step - begun < 4 * ticks.stat().st_size:
        step += 1
        done.write_text(str(step))
        (home / "progress").write_text(str(step - begun))
    else:
        time.sleep(0.01)
print("all 16 steps are done")
'''
SETUP = """#!/bin/sh
set -e
[ "$1 $2" = "--extra tpu" ]
echo "installing" >&2
mkdir -p .venv/bin
[ -e .venv/bin/python ] || ln -s {python} .venv/bin/python
echo set up >>../setups
"""


class Cloud:
    """The fake Google, a small project, and the launcher's command line."""

    def __init__(self, folder: Path):
        self.folder, self.project, self.base = folder / "google", folder / "a project", folder / "base"
        self.state, self.bin = folder / "state", folder / "bin"
        for made in (self.folder, self.bin, self.project / "tools/tpu_vm", self.project / "nanochat_jax"):
            made.mkdir(parents=True)
        shutil.copy(ROOT / "tools/tpu_vm/worker.py", self.project / "tools/tpu_vm")
        (self.project / "tools/setup.sh").write_text(SETUP.format(python=PYTHON))
        (self.project / "tools/setup.sh").chmod(0o755)
        (self.project / "nanochat_jax/__init__.py").write_text("")
        (self.project / "nanochat_jax/sft.py").write_text(STAGE)
        (self.project / ".gitignore").write_text("secret\n.venv/\n__pycache__/\n")
        subprocess.run(["git", "init", "--quiet", self.project], check=True)
        (self.bin / "gcloud").write_text(f'#!/bin/sh\nexec {PYTHON} -I -S {ROOT}/tests/support/fake_gcloud.py "$@"\n')
        (self.bin / "gcloud").chmod(0o755)
        self.slept = []
        self.plays()

    def plays(self, **scenario):
        self.scenario = {name: value for name, value in scenario.items() if name != "paced"}
        (self.folder / "scenario.json").write_text(json.dumps(scenario))
        return self

    def sleep(self, seconds):
        """Records what the launcher wants, and waits a little, so that commands get on."""
        self.slept.append(seconds)
        time.sleep(0.03)

    def argv(self, verb, *flags):
        where = ("--name", "mine", "--zone", "us-east5-b", "--state-dir", str(self.state))
        if verb in ("up", "create", "run"):
            where += ("--source", str(self.project), "--accelerator", "v6e-8", "--yes")
        if verb in ("up", "run"):
            where += ("--base-dir", str(self.base))
        return [verb, *where, *flags]

    def __call__(self, verb, *flags, sleep=None):
        return launcher.main(self.argv(verb, *flags), sleep or self.sleep)

    def up(self, *flags, command=(".venv/bin/python", "-m", "nanochat_jax.sft"), sleep=None):
        self.plays(**self.scenario, paced="nanochat_jax.sft" in command)
        return self("up", *flags, "--", *command, sleep=sleep)

    def calls(self, *words):
        """Every call of gcloud with these words in it, as one line."""
        file = self.folder / "calls.jsonl"
        lines = [" ".join(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
        lines = [line.replace(str(self.folder.parent), "") for line in lines]  # the words may be in its name
        return [line for line in lines if all(word in line for word in words)]

    def nodes(self):
        return json.loads((self.folder / "state.json").read_text())["nodes"]

    def host(self, worker=0, life=0):
        return self.folder / "hosts" / f"mine-{life}-{worker}" / "nanochat_jax_tpu"

    def add_foreign(self, **labels):
        node = {"name": "mine", "state": "READY", "labels": labels, "createTime": "2020", "life": 0, "looks": 0}
        state = {"nodes": {"mine": node | {"networkEndpoints": [{}]}}, "counts": {"nodes": 1}}
        (self.folder / "state.json").write_text(json.dumps(state))
        self.host().parent.mkdir(parents=True)

    def finished_log(self):
        """Of worker 0, when its command has ended."""
        deadline = time.time() + 20
        while not (self.host() / "run/exit_code").exists() and time.time() < deadline:
            time.sleep(0.05)
        return (self.host() / "run/log").read_text()

    def kill_all(self):
        mark = f"NANOCHAT_TPU_VM={self.folder.resolve()}/".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
            except OSError:
                pass


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    cloud = Cloud(tmp_path)
    monkeypatch.setenv("PATH", f"{cloud.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_GCLOUD", str(cloud.folder))
    yield cloud
    cloud.kill_all()


# ---- what is asked for


@pytest.mark.parametrize(
    ("kind", "topology", "flags", "chips", "hosts"),
    [
        ("v6e-8", None, "--accelerator-type=v6e-8", 8, 1),
        ("v6e-16", None, "--accelerator-type=v6e-16", 16, 4),
        ("V5E-8", None, "--accelerator-type=v5litepod-8", 8, 1),
        ("v5litepod-256", None, "--accelerator-type=v5litepod-256", 256, 64),
        ("v5e", "4x4", "--accelerator-type=v5litepod-16", 16, 4),
        ("v4-32", None, "--accelerator-type=v4-32", 16, 4),
        ("v4", "2x2x4", "--type=v4 --topology=2x2x4", 16, 4),
        ("v5p-8", None, "--accelerator-type=v5p-8", 4, 1),
        ("v5p", "4x4x4", "--type=v5p --topology=4x4x4", 64, 16),
    ],
)
def test_an_accelerator_is_a_type_or_a_topology(kind, topology, flags, chips, hosts):
    found = accelerator(kind, topology)
    assert (" ".join(found.flags), found.chips, found.hosts) == (flags, chips, hosts)
    assert found.track == (("alpha",) if kind == "v5p" else ())  # gcloud's general release knows only --type=v4


@pytest.mark.parametrize("kind", ["tpu7x-8", "v7x-16", "7x", "v8-8", "ironwood-4", "v10"])
def test_tpu7x_and_later_are_refused_with_the_way_to_them(kind):
    with pytest.raises(ValueError, match=r"Compute Engine.*GKE"):
        accelerator(kind)


@pytest.mark.parametrize(
    ("kind", "topology", "says"),
    [
        ("v3-8", None, "must be such as v4-32"),
        ("v6e", None, "needs a size or --topology"),
        ("v6e-8", "2x4", "names a size"),
        ("v6e-12", None, "slices of 1, 4, 8"),
        ("v5p-7", None, "two a chip"),
        ("v5p-12", None, "4 chips a machine"),
        ("v5p", "4x4", "3 dimensions"),
        ("v6e", "2x4x1", "2 dimensions"),
        ("v6e-x", None, "must be such as"),
    ],
)
def test_what_does_not_exist_is_refused(kind, topology, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        accelerator(kind, topology)


@pytest.mark.parametrize(
    "flags",
    [
        ("--name", "a; rm -rf /"),
        ("--name=-x",),
        ("--name", "A"),
        ("--zone", "us-east5-b --quiet"),
        ("--zone", "us-east5"),
        ("--project", "$(id)"),
        ("--price", "cheap"),
        ("--worker", "0;ls"),
        ("--create-arg", "network"),
        ("--create-arg=--labels=a=b",),
        ("--env", "1A=2"),
        ("--env", "A"),
        ("--base-dir", "relative"),
        ("--disk", "my-disk"),
        ("--disk", "projects/p/zones/us-east5-b/disks/d", "--base-dir", "/mnt/disks/other"),
    ],
)
def test_names_that_are_none_are_refused_before_gcloud_is_called(cloud, flags):
    with pytest.raises(ValueError):
        cloud.up(*flags)
    assert not cloud.calls()


@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(0, 1, exclude_max=True))
def test_the_back_off_doubles_up_to_a_cap_with_jitter(attempt, first, jitter):
    full = min(BACKOFF_CAP, first * 2.0 ** min(attempt, 60))
    assert full / 2 <= backoff(attempt, first, lambda: jitter) <= full
    assert backoff(attempt + 1, first, lambda: jitter) >= backoff(attempt, first, lambda: jitter)


def test_only_our_stages_get_resume_and_only_once():
    python = [".venv/bin/python", "-m"]
    stage = [*python, "nanochat_jax.rl", "--seed", "1"]
    assert resumed(stage) == [*stage, "--resume=auto"]
    for command in ([*python, "nanochat_jax.sft", "--resume"], [*python, "nanochat_jax.eval"], ["ls"]):
        assert resumed(command) == command


# ---- dry runs


def dry(cloud, capsys, verb, *flags):
    assert cloud(verb, "--dry-run", *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not cloud.calls() and all(line.startswith(("gcloud ", "# ")) for line in lines)
    return [shlex.split(line) for line in lines if line.startswith("gcloud")]


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        ("", "compute tpus tpu-vm create mine ZONE --version=v2-alpha-tpuv6e --accelerator-type=v6e-8 LABEL"),
        (
            "--price spot --project my-project-1 --version other --create-arg=--network=n",
            "compute tpus tpu-vm create mine ZONE --project=my-project-1 --version=other --accelerator-type=v6e-8 "
            "--spot LABEL --network=n",
        ),
        (
            "--queued --price spot",
            "compute tpus queued-resources create mine ZONE --node-id=mine --runtime-version=v2-alpha-tpuv6e "
            "--accelerator-type=v6e-8 --spot LABEL",
        ),
        (
            "--queued --accelerator v5p --topology 2x2x2",
            "alpha compute tpus queued-resources create mine ZONE --node-id=mine --runtime-version=v2-alpha-tpuv5 "
            "--type=v5p --topology=2x2x2 LABEL",
        ),
        (
            "--price reserved --accelerator v4-8",
            "compute tpus tpu-vm create mine ZONE --version=tpu-ubuntu2204-base --accelerator-type=v4-8 --reserved "
            "LABEL",
        ),
    ],
)
def test_the_command_that_creates(cloud, capsys, flags, command):
    calls = [call for call in dry(cloud, capsys, "create", *flags.split()) if "create" in call]
    said = re.sub(r"--labels=nanochat-jax-id=[0-9a-f]{16}", "LABEL", " ".join(calls[0]))
    assert said.replace("--zone=us-east5-b", "ZONE") == f"gcloud {command} --quiet" and len(calls) == 1


def test_a_dry_run_prints_the_way_of_up_and_leaves_no_record(cloud, capsys):
    calls = dry(cloud, capsys, "up", "--accelerator", "v6e-16", "--", "bash", "-c", "echo 'a b'; $(x)")
    steps = [next(word for word in call if word in ("describe", "create", "scp", "ssh", "delete")) for call in calls]
    assert steps == ["describe", "create", "scp", "ssh", "ssh", "ssh", "describe", "ssh", "ssh", "delete"]
    start = next(word for call in calls for word in call if word.startswith("--command=") and " start " in word)
    assert shlex.split(start)[-3:] == ["bash", "-c", "echo 'a b'; $(x)"]
    assert not list(cloud.state.glob("*.json"))


@pytest.mark.parametrize("verb", ["status", "logs", "stop", "delete"])
def test_the_other_verbs_have_a_dry_run(cloud, capsys, verb):
    assert dry(cloud, capsys, verb)


# ---- up


def test_up_survives_two_preemptions_and_ends_with_the_command(cloud, capfd):
    """What a user sees."""
    cloud.plays(workers=2, lives=[2, 2, None])
    assert cloud.up("--price", "spot", "--poll-seconds", "0") == 0
    said = capfd.readouterr().out
    order = [
        "TPU mine in us-east5-b, project of gcloud: v6e-8, 8 chips in 1 machine, v2-alpha-tpuv6e",
        "price class: spot",
        "made again after every preemption",
        "+ gcloud compute tpus tpu-vm create mine",
        "running on all workers: .venv/bin/python -m nanochat_jax.sft --resume=auto",
        "begins anew",
        "lost: the TPU is PREEMPTED",
        "+ gcloud compute tpus tpu-vm delete mine",
        "+ gcloud compute tpus tpu-vm create mine",
        "begins at step",
        "lost: the TPU is PREEMPTED",
        "+ gcloud compute tpus tpu-vm create mine",
        "begins at step",
        "all 16 steps are done",
        "the command has ended with exit code 0 on workers 0, 1",
        "still costs money; delete it with tools/tpu_vm.py delete --name mine --zone us-east5-b",
    ]
    place = 0
    for text in order:
        place = said.index(text, place) + len(text)
    assert (len(cloud.calls("create")), len(cloud.calls("delete"))) == (3, 2)
    assert {(cloud.base / f"steps-t1v-n-12ab34cd-w-{w}").read_text() for w in (0, 1)} == {"16"}
    assert cloud.nodes()["mine"]["state"] == "READY"  # a finished run's machine is the user's to delete


def test_a_queued_resource_is_waited_for_and_made_again_after_a_preemption(cloud, capfd):
    cloud.plays(create=["failed"], lives=[2, None])
    assert cloud.up("--queued", "--price", "spot", "--delete-at-end") == 0
    said = capfd.readouterr().out
    states = re.findall(r"^queued resource: (\w+)", said, re.MULTILINE)
    assert states == ["WAITING_FOR_RESOURCES", "PROVISIONING", "FAILED"] + 2 * [
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE",
    ]
    assert "lost: the TPU is deleted" in said and len(cloud.calls("queued-resources", "create")) == 3
    assert len(cloud.calls("queued-resources", "delete", "--force")) == 3
    assert not cloud.nodes() and not list(cloud.state.glob("*.json"))


def test_who_waits_in_the_queue_keeps_the_place_when_up_begins_again(cloud, capfd):
    assert cloud.up("--queued", sleep=Interrupting(cloud, 1)) == 130
    assert "WAITING" in capfd.readouterr().out and cloud.up("--queued") == 0
    assert len(cloud.calls("queued-resources", "create")) == 1 and not cloud.calls("delete")


def test_a_command_that_fails_is_not_started_again_and_its_code_is_ours(cloud, capfd):
    assert cloud.up(command=("bash", "-c", "echo no such file; exit 7")) == 7
    said = capfd.readouterr().out
    assert "no such file" in said and "worker 0 ended with exit code 7" in said
    assert len(cloud.calls("worker.py start")) == 1 and not cloud.calls("delete")


def test_a_program_that_is_not_there_fails_with_127(cloud, capfd):
    assert cloud.up(command=("no-such-program",)) == 127
    assert "no-such-program: No such file or directory" in capfd.readouterr().out


def test_retries_are_counted(cloud):
    assert cloud.up("--retries", "1", command=("bash", "-c", "exit 3")) == 3
    assert len(cloud.calls("worker.py start")) == 2 and len(cloud.calls("create")) == 1


def test_a_preemption_that_gcloud_does_not_know_of_yet_is_no_failure(cloud, capfd):
    """All processes end by SIGTERM while the TPU is still said to be READY."""
    cloud.plays(lives=[2, None], late=True)
    assert cloud.up() == 0
    assert "lost: the TPU is PREEMPTED" in capfd.readouterr().out and len(cloud.calls("create")) == 2


@pytest.mark.parametrize("code", [143, 75], ids=["ended by SIGTERM", "another process was lost"])
def test_a_command_that_saved_and_ended_goes_on_where_it_was(cloud, capfd, code):
    once = f"f=$NANOCHAT_BASE_DIR/once; [ -e $f ] || {{ mkdir -p $(dirname $f); touch $f; exit {code}; }}"
    command = ("bash", "-c", once)
    assert cloud.up(command=command) == 0
    assert "starting it again on the same machine" in capfd.readouterr().out
    assert len(cloud.calls("worker.py start")) == 2 and len(cloud.calls("create")) == 1


def test_a_command_that_ends_by_sigterm_for_ever_is_given_up(cloud, monkeypatch):
    monkeypatch.setattr(up, "MOST_RESTARTS", 1)
    assert cloud.up(command=("bash", "-c", "exit 143")) == 143
    assert len(cloud.calls("worker.py start")) == 2


@pytest.mark.parametrize("why", ["quota", "capacity", "network"])
def test_capacity_and_quota_are_waited_for_with_growing_pauses(cloud, capfd, why):
    cloud.plays(create=[why] * 5)
    assert cloud("create", "--backoff-seconds", "100", "--poll-seconds", "0") == 0
    pauses = [seconds for seconds in cloud.slept if seconds >= 50]
    assert len(pauses) == 5 and all(
        full / 2 <= pause <= full for pause, full in zip(pauses, (100, 200, 400, 600, 600), strict=True)
    )
    assert len(cloud.calls("create")) == 6 and not cloud.calls("delete")
    assert "attempt 2 of 50" in capfd.readouterr().out


def test_attempts_to_create_are_limited(cloud):
    cloud.plays(create=["capacity"] * 9)
    with pytest.raises(ValueError, match=r"no TPU after 3 attempts \(--attempts\); .*no more capacity"):
        cloud("create", "--attempts", "3")
    assert len(cloud.calls("create")) == 3


@pytest.mark.parametrize("why", ["denied", "limit0", "strange"])
def test_what_waiting_does_not_change_is_said_at_once(cloud, why):
    cloud.plays(create=[why] * 5)
    with pytest.raises(ValueError, match="gcloud refuses: ERROR"):
        cloud("create")
    assert len(cloud.calls("create")) == 1


def test_a_tpu_whose_making_was_never_confirmed_is_found_by_its_label(cloud):
    cloud.plays(create=["lost"])
    assert cloud("create") == 0
    assert len(cloud.calls("create")) == 1 and cloud.nodes()["mine"]["state"] == "READY"


# ---- what is not ours


@pytest.mark.parametrize("labels", [{}, {"nanochat-jax-id": "0123456789abcdef"}])
@pytest.mark.parametrize("verb", ["up", "create", "delete"])
def test_a_tpu_of_that_name_that_others_made_is_refused_and_stays(cloud, verb, labels):
    cloud.add_foreign(**labels)
    command = ("--", "ls") if verb == "up" else ("--yes",)
    with pytest.raises(ValueError, match="which this launcher did not create"):
        cloud(verb, *command)
    assert not cloud.calls("create") and not cloud.calls("delete") and "mine" in cloud.nodes()


def test_one_that_was_deleted_and_made_by_others_meanwhile_is_not_ours(cloud):
    cloud("create")
    state = json.loads((cloud.folder / "state.json").read_text())
    state["nodes"]["mine"] |= {"labels": {}, "state": "PREEMPTED"}
    (cloud.folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="did not create"):
        cloud.up()
    assert not cloud.calls("delete")


def test_an_adopted_one_is_used_and_made_again_when_it_is_lost(cloud):
    cloud.add_foreign()
    cloud.plays(lives=[2, None])
    assert cloud.up("--adopt") == 0
    assert (len(cloud.calls("create")), len(cloud.calls("delete"))) == (1, 1)


def test_delete_deletes_what_was_created_and_forgets_it(cloud, capfd):
    cloud("create")
    assert list(cloud.state.glob("*.json"))
    assert cloud("delete", "--yes") == 0
    assert not cloud.nodes() and not list(cloud.state.glob("*.json"))
    assert cloud("delete", "--yes") == 0 and "there is no TPU named mine" in capfd.readouterr().out


# ---- workers that do not do their part


@pytest.mark.parametrize("part", ["tree.new", "worker.py setup", "worker.py start"])
def test_only_the_worker_that_did_not_answer_is_asked_again(cloud, capfd, part):
    cloud.plays(workers=3, ssh=[[part, 1, 2]])
    assert cloud("create") == 0
    assert cloud("run", "--", "true") == 0
    asked = [re.search(r"--worker=(\S+)", call)[1] for call in cloud.calls("tpu-vm ssh", part)]
    assert asked == ["all", "1", "1"] and "worker 1 did not answer; trying again" in capfd.readouterr().out
    if part == "tree.new":
        assert [call for call in cloud.calls("tpu-vm scp") if "--worker=1 " in call]


def test_a_tpu_with_a_worker_that_never_answers_is_made_again(cloud):
    cloud.plays(workers=2, ssh=[["worker.py setup", 1, 4]])
    assert cloud.up() == 0
    assert (len(cloud.calls("create")), len(cloud.calls("delete"))) == (2, 1)


def test_workers_that_answer_on_no_machine_end_up_with_the_question_for_ssh(cloud):
    cloud.plays(ssh=[["", None, 999]])
    with pytest.raises(ValueError, match=r"on 3 machines in a row: does tools/tpu_vm.py ssh .* work"):
        cloud.up()
    assert (len(cloud.calls("create")), len(cloud.calls("delete"))) == (3, 2)


def test_a_lost_connection_does_not_touch_the_command(cloud, capfd):
    cloud.plays(workers=2, ssh=[["worker.py report", 1, 3]], describe=4)
    assert cloud.up() == 0
    said = capfd.readouterr().out
    assert "worker 1 did not answer" in said and "gcloud does not answer" in said
    assert len(cloud.calls("worker.py start")) == 1 and said.count("begins anew") == 1


def test_a_worker_out_of_reach_while_the_command_runs_costs_the_machine(cloud, capfd):
    cloud.plays(workers=2, ssh=[["worker.py report", 1, 5]])
    assert cloud.up() == 0
    assert "out of reach" in capfd.readouterr().out and len(cloud.calls("delete")) == 1


def test_hosts_without_numbers_in_their_names_are_asked_one_by_one(cloud, capfd):
    cloud.plays(workers=2, nameless=True)
    cloud("create")
    assert cloud("run", "--", "sleep", "1000") == 0
    cloud("status")
    said = capfd.readouterr().out
    assert "worker 0: running" in said and "worker 1: running" in said


def test_one_failing_worker_is_named(cloud, capfd):
    cloud.plays(workers=2)
    command = ("bash", "-c", "case $(hostname) in *-1) exit 9;; *) exit 0;; esac")
    assert cloud.up(command=command) == 9
    assert "worker 1 ended with exit code 9" in capfd.readouterr().out


def test_an_answer_that_nobody_understands_is_said_after_a_few_attempts(cloud):
    cloud.plays(describe="strange")
    with pytest.raises(ValueError, match="the moon is in the wrong house"):
        cloud("create")
    assert len(cloud.calls("describe")) == 5 and not cloud.calls("create")


# ---- people


def test_nobody_to_ask_means_nothing_is_created(cloud, monkeypatch):
    argv = [arg for arg in cloud.argv("create") if arg != "--yes"]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(ValueError, match="--yes"):
        launcher.main(argv)
    assert not cloud.calls("create")


def test_no_means_no(cloud, monkeypatch):
    argv = [arg for arg in cloud.argv("create") if arg != "--yes"]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "")
    with pytest.raises(ValueError, match="nothing was done"):
        launcher.main(argv)
    assert not cloud.calls("create")


class Interrupting:
    """A sleep that is left by Ctrl-C the nth time."""

    def __init__(self, cloud, n):
        self.cloud, self.left = cloud, n

    def __call__(self, seconds):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        self.cloud.sleep(seconds)


def test_ctrl_c_leaves_the_machine_and_the_same_command_watches_it_again(cloud, capfd):
    assert cloud.up(sleep=Interrupting(cloud, 1)) == 130
    said = capfd.readouterr().out
    assert "it costs money" in said and "stop paying: tools/tpu_vm.py delete --name mine" in said
    assert cloud.nodes()["mine"]["state"] == "READY" and not cloud.calls("delete")
    with pytest.raises(ValueError, match="another command is running"):
        cloud.up(command=("ls",))
    assert cloud.up() == 0
    said = capfd.readouterr().out
    assert "the command is running already" in said and "begins anew" in said and "all 16 steps" in said
    assert len(cloud.calls("worker.py start")) == len(cloud.calls("create")) == 1


def test_delete_from_another_terminal_ends_up_without_a_new_machine(cloud, capfd):
    def sleep(seconds):
        cloud.sleep(seconds)
        if cloud.calls("worker.py report") and not cloud.calls("delete"):
            cloud("delete", "--yes")

    assert cloud.up(sleep=sleep) == 1
    assert "somebody stopped the command or the TPU" in capfd.readouterr().out and len(cloud.calls("create")) == 1


def test_stop_from_another_terminal_ends_up_and_the_stage_has_saved(cloud, capfd):
    def sleep(seconds):
        cloud.sleep(seconds)
        if cloud.calls("worker.py report") and not cloud.calls("worker.py stop"):
            cloud("stop")

    assert cloud.up(sleep=sleep) == 1
    said = capfd.readouterr().out
    assert "worker 0: ended" in said and "somebody stopped" in said and len(cloud.calls("worker.py start")) == 1
    assert (cloud.host() / "run/exit_code").read_text() == "143"


def test_two_ups_of_one_tpu_do_not_get_into_each_others_way(cloud):
    def sleep(seconds):
        with pytest.raises(ValueError, match=r"another tpu_vm\.py up"):
            cloud.up()
        raise KeyboardInterrupt

    assert cloud.up(sleep=sleep) == 130


def test_status_and_logs_of_a_run(cloud, capfd):
    cloud.plays(workers=2)
    cloud("create")
    line = "for i in $(seq 300); do echo line $i; done; until [ -e ~/go-on ]; do sleep 0.1; done; echo last"
    cloud("run", "--", "bash", "-c", line)
    capfd.readouterr()
    assert cloud("status") == 0
    said = capfd.readouterr().out
    assert "mine: READY" in said and "created here" in said and "worker 1: running" in said

    def sleep(seconds):
        for number in (0, 1):
            (cloud.host(number).parent / "go-on").touch()

    assert cloud("logs", "-f", "--worker", "1", "--lines", "3", sleep=sleep) == 0
    assert capfd.readouterr().out.split() == ["line", "298", "line", "299", "line", "300", "last"]
    cloud("status")
    assert "worker 0: ended with exit code 0" in capfd.readouterr().out
    assert cloud("ssh", "--worker", "all", "--", "echo", "a  'b'") == 0
    assert capfd.readouterr().out == "a  'b'\n" * 2


def test_gcloud_that_is_not_installed_is_one_sentence(cloud, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ValueError, match=r"gcloud is not on the PATH: install the Google Cloud CLI"):
        cloud("status")


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        ([], 2, "tools/tpu_vm.py VERB"),
        (["fly"], 1, "error: fly is none of up, create"),
        (["status", "--", "ls"], 1, "takes no command"),
        (["up", "--zone", "us-east5-b", "--accelerator", "v6e-8"], 1, "what to run?"),
        (["up", "--zone", "us-east5-b", "--", "ls"], 1, "--base-dir"),
        (["status"], 1, "--zone is needed"),
        (["create", "--zone", "us-east5-b"], 1, "--accelerator is needed"),
        (["up", "--help"], 0, "--delete-at-end"),
    ],
)
def test_the_command_line_says_what_is_missing(cloud, argv, code, says):
    done = subprocess.run([sys.executable, ROOT / "tools/tpu_vm.py", *argv], capture_output=True, text=True)
    assert done.returncode == code and says in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("place", ["gs://", "gs:///folder", "gs:/bucket/a", "gs://Bucket/a", "folder", "s3://bucket"])
def test_a_base_directory_is_a_bucket_or_a_folder_from_the_root(cloud, place):
    with pytest.raises(ValueError, match=f"--base-dir={place} must be gs://bucket/folder or begin with /"):
        cloud.up("--base-dir", place)
    assert not cloud.calls()


def test_up_keeps_everything_in_a_bucket(cloud, capfd):
    assert cloud.up("--base-dir", "gs://bucket/a", command=("bash", "-c", 'echo "it is $NANOCHAT_BASE_DIR"')) == 0
    said = capfd.readouterr().out
    assert "it is gs://bucket/a" in said and "must lie on a disk" not in said


def test_a_bucket_as_base_directory_reaches_the_command(cloud):
    cloud("create")
    cloud(
        "run", "--base-dir", "gs://bucket/a b", "--env", "A=x'y $z", "--", "bash", "-c", 'echo "$NANOCHAT_BASE_DIR,$A"'
    )
    time.sleep(0.3)
    assert (cloud.host() / "run/log").read_text() == "gs://bucket/a b,x'y $z\n"


# ---- on a worker


def test_the_worker_s_part_runs_with_the_python_of_the_machines():
    ast.parse((ROOT / "tools/tpu_vm/worker.py").read_text(), feature_version=(3, 8))


@pytest.mark.parametrize(
    "argument", ["it's", 'a "b" $HOME `id` $(id)', "; touch /tmp/x", "a\nb", "", "*", "--", "{}\\"]
)
def test_a_command_arrives_as_it_was_typed(cloud, argument):
    cloud("create")
    cloud("run", "--", sys.executable, "-c", "import sys; print(sys.argv[1:])", argument, "end")
    assert ast.literal_eval(cloud.finished_log()) == [argument, "end"]


def worker(cloud, *args, **env):
    script = cloud.host() / "tree/tools/tpu_vm/worker.py"
    home = str(cloud.host().parent)
    env = {"HOME": home, "PATH": f"{home}/bin:{os.environ['PATH']}", **env}
    env["NANOCHAT_TPU_FILES"] = f"{home}/libtpu_lockfile:{home}/dev/accel*"
    done = subprocess.run([sys.executable, script, *args], env=env, cwd=home, capture_output=True, text=True)
    line = re.search(r"TPU_VM (\{.*\})", done.stdout)
    return json.loads(line[1]) if line else done


def started(cloud):
    """A machine with a command that sleeps."""
    cloud("create")
    cloud("run", "--", "sleep", "1000")
    return cloud


def test_a_command_has_a_session_of_its_own_and_is_started_once(cloud):
    started(cloud)
    run = json.loads((cloud.host() / "run/run.json").read_text())
    assert os.getsid(run["pid"]) == run["pid"] != os.getsid(0)
    assert worker(cloud, "start", "--id", run["id"], "--", "false")["done"] == "start"
    assert json.loads((cloud.host() / "run/run.json").read_text()) == run
    assert "another command is running" in worker(cloud, "start", "--id", "other", "--", "true")["error"]
    assert "a command is running from the old tree" in worker(cloud, "install")["error"]
    assert worker(cloud, "report")["state"] == "running"


def test_a_keeper_that_was_killed_and_a_machine_that_started_anew_are_told_apart(cloud):
    started(cloud)
    file = cloud.host() / "run/run.json"
    run = json.loads(file.read_text())
    os.kill(run["pid"], signal.SIGKILL)
    deadline = time.time() + 5
    while worker(cloud, "report")["state"] == "running" and time.time() < deadline:
        time.sleep(0.05)
    assert worker(cloud, "report")["state"] == "killed"
    file.write_text(json.dumps(run | {"boot": "another"}))
    assert worker(cloud, "report")["state"] == "rebooted"
    (cloud.host().parent / "libtpu_lockfile").touch()  # and what it leaves is cleaned up by the next start
    before = cloud.calls()
    assert before and worker(cloud, "start", "--id", "next", "--", "true")["done"] == "start"
    assert not (cloud.host().parent / "libtpu_lockfile").exists()
    mark = f"NANOCHAT_TPU_VM={cloud.host().resolve()}".encode()
    environs = [p / "environ" for p in Path("/proc").glob("[0-9]*")]
    assert not any("sleep" in read(p.with_name("cmdline")).decode() and mark in read(p) for p in environs)


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


LSBLK = {"name": "/dev/sda", "type": "disk", "fstype": None, "mountpoint": None, "children": [{"name": "/dev/sda1"}]}


@pytest.mark.parametrize(
    ("disks", "says"),
    [
        ([{"fstype": "ext4", "mountpoint": None}], None),
        ([{"fstype": None, "mountpoint": None}], "has no file system: make one, once, with sudo mkfs.ext4 /dev/sdb"),
        ([{"fstype": "ext4", "mountpoint": "/home"}], "found: none"),
        ([{"fstype": "ext4", "mountpoint": None}] * 2, "found: /dev/sdb, /dev/sdc"),
    ],
)
def test_the_attached_disk_is_mounted_and_never_formatted(cloud, disks, says):
    cloud("create")
    cloud("run", "--", "true")
    home = cloud.host().parent
    disks = [{"name": f"/dev/sd{letter}", "type": "disk", **disk} for letter, disk in zip("bc", disks)]
    for program, body in {
        "lsblk": f"echo '{json.dumps({'blockdevices': [LSBLK, *disks]})}'",
        "sudo": "printf '%s\\n' \"$*\" >>log",
    }.items():
        (home / "bin" / program).write_text(f"#!/bin/sh\n{body}\n")
        (home / "bin" / program).chmod(0o755)
    answer = worker(cloud, "mount", "/mnt/disks/d")
    if says:
        assert says in answer["error"] and not (home / "log").exists()
    else:
        assert answer["done"] == "mount" and "-n mount /dev/sdb /mnt/disks/d" in (home / "log").read_text()


def test_a_disk_is_attached_and_mounted_before_the_command(cloud, capsys):
    disk = "projects/p-1/zones/us-east5-b/disks/d"
    calls = dry(cloud, capsys, "up", "--disk", disk, "--base-dir", "/mnt/disks/d/nanochat", "--", "ls")
    said = "\n".join(map(" ".join, calls))
    assert f"--data-disk=source={disk},mode=read-write" in said
    assert said.index("worker.py setup") < said.index("worker.py mount /mnt/disks/d") < said.index("worker.py start")
    with pytest.raises(ValueError, match="only one machine may write"):
        cloud("create", "--dry-run", "--accelerator", "v6e-16", "--disk", disk, "--base-dir", "/mnt/disks/d")


def test_a_foreign_program_on_the_device_is_named_and_left_alone(cloud):
    cloud("create")
    cloud("run", "--", "true")
    device = cloud.host().parent / "dev/accel0"
    device.parent.mkdir()
    device.touch()
    with open(device) as held, subprocess.Popen(["sleep", "100"], stdin=held) as foreign:
        try:
            answer = worker(cloud, "start", "--id", "x", "--", "true")
        finally:
            alive = foreign.poll() is None
            foreign.kill()
    assert re.search(r"held by process \d+ \(.*\), which this launcher did not start", answer["error"]) and alive


def test_stop_kills_what_does_not_listen(cloud):
    cloud("create")
    cloud("run", "--", "bash", "-c", "trap '' TERM; while true; do sleep 0.1; done")
    answer = worker(cloud, "stop", "--seconds", "0.5")
    assert (answer["state"], answer["exit_code"], answer["stopped"]) == ("ended", 137, True)


def test_a_new_tree_replaces_the_old_one_and_keeps_the_environment(cloud):
    (cloud.project / "secret").write_text("x")
    (cloud.project / "gone.py").write_text("")
    (cloud.project / "link").symlink_to("nanochat_jax/sft.py")
    subprocess.run(["git", "-C", cloud.project, "add", "."], check=True)
    cloud("create")
    cloud("run", "--", "true")
    tree = cloud.host() / "tree"
    assert (tree / "gone.py").exists() and not (tree / "secret").exists() and not (tree / ".git").exists()
    assert (tree / "link").is_symlink() and os.access(tree / "tools/setup.sh", os.X_OK)
    (cloud.host() / "venv/kept").touch()
    (tree / "result").touch()
    (cloud.project / "gone.py").unlink()
    (cloud.project / "new.py").write_text("")
    cloud("run", "--", "true")
    assert (tree / ".venv/kept").exists() and (tree / "new.py").exists() and not (tree / "gone.py").exists()
    assert (cloud.host() / "tree.old/result").exists() and (cloud.host() / "setups").read_text().count("set up") == 2


def test_an_archive_that_was_cut_is_not_unpacked(cloud):
    cloud("create")
    cloud("run", "--", "true")
    script = next(call for call in cloud.calls("sha256sum")).partition("--command=")[2].removesuffix(" --quiet")
    archive = cloud.host().parent / "nanochat_jax_tpu.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-100])
    before = (cloud.host() / "tree").stat().st_ino
    assert subprocess.run(["bash", "-c", script], cwd=cloud.host().parent, capture_output=True).returncode
    assert (cloud.host() / "tree").stat().st_ino == before and not (cloud.host() / "tree.new").exists()


def test_equal_trees_make_equal_archives(cloud, tmp_path):
    first, second = (pack(cloud.project, tmp_path / name) for name in ("a.tar.gz", "b.tar.gz"))
    os.utime(cloud.project / ".gitignore", (1, 1))
    assert first == second == pack(cloud.project, tmp_path / "c.tar.gz")
    (cloud.project / "more").write_text("")
    assert pack(cloud.project, tmp_path / "d.tar.gz")[0] != first[0]


def test_what_is_no_project_is_not_sent(cloud, tmp_path):
    with pytest.raises(ValueError, match="must be a git checkout"):
        pack(tmp_path, tmp_path / "a")
    (cloud.project / "tools/tpu_vm/worker.py").unlink()
    with pytest.raises(ValueError, match="is not this project"):
        pack(cloud.project, tmp_path / "a")


def test_a_damaged_record_is_said(cloud):
    cloud("create")
    next(cloud.state.glob("*.json")).write_text("{")
    with pytest.raises(ValueError, match=r"is damaged .*: delete it"):
        cloud("status")


# ---- the files in configs/


@pytest.mark.parametrize("file", sorted((ROOT / "configs/tpu").glob("*.toml")), ids=lambda file: file.stem)
def test_every_tpu_file_is_a_tpu_that_exists(cloud, capsys, file):
    argv = ["create", "--config", str(file), "--dry-run", "--state-dir", str(cloud.state)]
    assert launcher.main(argv) == 0 and "tpus" in capsys.readouterr().out
    assert f"tools/tpu_vm.py up --config configs/tpu/{file.name}" in file.read_text()


def test_the_slurm_file_starts_the_stage_with_resume_and_the_user_s_flags(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$NANOCHAT_BASE_DIR,$http_proxy"\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "32"}
    command = ["bash", ROOT / "configs/slurm.sbatch", "--run", "a b"]
    done = subprocess.run(command, env=env | {"http_proxy": "x"}, capture_output=True, text=True, check=True)
    first, *words = done.stdout.splitlines()
    assert first == f"{tmp_path}/nanochat_base,"
    assert words[words.index("-m") :] == ["-m", "nanochat_jax.sft", "--resume=auto", "--run", "a b"]


def test_the_skypilot_file_runs_what_the_stage_takes():
    task = yaml.safe_load((ROOT / "configs/skypilot.yaml").read_text())
    words = shlex.split(task["run"])
    assert words[-4:] == [".venv/bin/python", "-m", "nanochat_jax.sft", "--resume=auto"]
    assert re.match("NANOCHAT_BASE_DIR=gs://.", words[0]) and "tools/setup.sh --extra tpu" in task["setup"]
