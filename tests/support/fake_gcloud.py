#!/usr/bin/env python3
"""A gcloud that plays Cloud TPU on this machine: put it on the PATH as `gcloud`, with FAKE_GCLOUD naming its folder.

TPUs and queued resources are in <folder>/state.json; every worker is <folder>/hosts/<TPU>-<life>-<worker>/, its home,
where what is sent by ssh is really run by bash. <folder>/calls.jsonl has every call. What goes wrong is read from
<folder>/scenario.json:

workers      of every TPU (1)
create       what the attempts to create say, in order: ok, quota, capacity, denied, limit0, network, lost (made, but
             the answer is an error); then ok. Of a queued resource also failed (it is FAILED after two looks)
lives        per TPU, in order: preempted after so many looks at a running command (null: never)
late         true: the life's last look finds the command killed and the TPU still READY, as happens for a while
ssh          failures of ssh, [pattern of the command, worker or null, how many times]; 999: always
describe     how many describes of a TPU fail with a network error, after the first; "strange": all, with another one
nameless     true: the workers' host names do not end with their numbers
paced        true: the command counts the bytes of ~/ticks, one more for each look, and answers in ~/progress
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE_GCLOUD"]).resolve()
SAYS = {
    "quota": "ERROR: (gcloud.compute.tpus.tpu-vm.create) RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPreemptiblePerProject"
    "PerZoneForTPUAPI' has been exceeded. Limit: 8 in zone us-east5-b.",
    "capacity": 'ERROR: (gcloud.compute.tpus.tpu-vm.create) {"code": 8, "message": "There is no more capacity in the '
    'zone \\"us-east5-b\\"; you can try in another zone where Cloud TPU Nodes are offered"}',
    "denied": "ERROR: (gcloud.compute.tpus.tpu-vm.create) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied.",
    "limit0": "ERROR: (gcloud.compute.tpus.tpu-vm.create) RESOURCE_EXHAUSTED: Quota limit 'TPUV6E' has been exceeded. "
    "Limit: 0 in region us-east5.",
    "network": "ERROR: gcloud crashed (ConnectionError): ('Connection aborted.', ConnectionResetError(104))",
    "strange": "ERROR: (gcloud.compute.tpus.tpu-vm.create) the moon is in the wrong house",
}


def fail(text, code=1):
    print(text, file=sys.stderr)
    sys.exit(code)


class Cloud:
    def __init__(self):
        self.scenario = json.loads((FOLDER / "scenario.json").read_text())
        self.file = FOLDER / "state.json"
        state = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.nodes, self.queue = state.get("nodes", {}), state.get("queue", {})
        self.counts = state.get("counts", {})  # of what the scenario has used up

    def save(self):
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps({"nodes": self.nodes, "queue": self.queue, "counts": self.counts}))
        part.replace(self.file)

    def count(self, what):
        """How often, before this time."""
        self.counts[what] = self.counts.get(what, 0) + 1
        return self.counts[what] - 1

    def create(self, kind, name, flags):
        if name in (self.nodes if kind == "tpu-vm" else self.queue):
            fail(f"ERROR: (gcloud.compute.tpus.{kind}.create) ALREADY_EXISTS: Resource '{name}' already exists")
        plan = self.scenario.get("create", [])
        step = self.count("create")
        answer = plan[step] if step < len(plan) else "ok"
        if answer in SAYS:
            self.save()
            fail(SAYS[answer])
        labels = dict(pair.split("=") for pair in flags.get("labels", "").split(",") if pair)
        if kind == "queued-resources":
            spec = [{"nodeId": flags["node-id"], "node": {"labels": labels}}]
            will = "FAILED" if answer == "failed" else "ACTIVE"
            self.queue[name] = {"name": name, "tpu": {"nodeSpec": spec}, "looks": 0, "will": will, "flags": flags}
        else:
            self.add_node(name, labels, flags)
        self.save()
        if answer == "lost":
            fail(SAYS["network"])

    def add_node(self, name, labels, flags):
        life = self.count("nodes")
        workers = self.scenario.get("workers", 1)
        self.nodes[name] = {
            "name": name,
            "state": "READY",
            "health": "HEALTHY",
            "labels": labels,
            "acceleratorType": flags.get("accelerator-type", ""),
            "createTime": f"2026-11-22T00:00:{life:02d}Z",
            "networkEndpoints": [{"ipAddress": f"10.0.0.{i}"} for i in range(workers)],
            "life": life,
            "looks": 0,
        }
        for worker in range(workers):
            self.home(name, worker).mkdir(parents=True)

    def home(self, name, worker):
        return FOLDER / "hosts" / f"{name}-{self.nodes[name]['life']}-{worker}"

    def lose(self, name):
        """The machines are gone: their processes and their disks."""
        for worker in range(len(self.nodes[name]["networkEndpoints"])):
            home = self.home(name, worker)
            mark = f"NANOCHAT_TPU_VM={home}/".encode()
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if mark in (folder / "environ").read_bytes():
                        os.kill(int(folder.name), signal.SIGKILL)
                except OSError:
                    pass
            shutil.rmtree(home, ignore_errors=True)

    def describe(self, kind, name):
        if kind == "queued-resources":
            found = self.queue.get(name)
            if found:
                found["looks"] += 1
                looks = found["looks"]
                state = "WAITING_FOR_RESOURCES" if looks == 1 else "PROVISIONING" if looks == 2 else found["will"]
                if state == "ACTIVE" and looks == 3:
                    self.add_node(name, found["tpu"]["nodeSpec"][0]["node"]["labels"], found["flags"])
                found["state"] = {"state": state}
        else:
            found = self.nodes.get(name)
            looks = self.count("describe")
            if self.scenario.get("describe") == "strange":
                fail(SAYS["strange"])
            if 1 <= looks <= self.scenario.get("describe", 0):
                self.save()
                fail(SAYS["network"])
        self.save()
        if not found:
            fail(f"ERROR: (gcloud.compute.tpus.{kind}.describe) NOT_FOUND: Resource 'nodes/{name}' was not found")
        print(json.dumps(found))

    def delete(self, kind, name, flags):
        if kind == "queued-resources" and "force" not in flags:
            fail("ERROR: the queued resource has nodes: use --force")
        if self.nodes.get(name, {}).get("state") == "READY" or name in self.nodes:
            self.lose(name)
        found = (self.queue if kind == "queued-resources" else self.nodes).pop(name, None)
        if kind == "queued-resources":
            self.nodes.pop(name, None)
        self.save()
        if not found:
            fail(f"ERROR: NOT_FOUND: {name}")

    def workers(self, name, flags):
        node = self.nodes.get(name)
        if not node:
            fail(f"ERROR: NOT_FOUND: Resource 'nodes/{name}' was not found")
        if node["state"] != "READY":
            fail(f'ERROR: This TPU has terminal state "{node["state"]}", so it cannot be used anymore.')
        wanted = flags.get("worker", "0")
        return range(len(node["networkEndpoints"])) if wanted == "all" else [int(w) for w in wanted.split(",")]

    def broken(self, what, worker):
        for i, (pattern, which, times) in enumerate(self.scenario.get("ssh", [])):
            if re.search(pattern, what) and which in (None, worker) and self.counts.get(f"ssh{i}", 0) < times:
                self.count(f"ssh{i}")
                return True
        return False

    def look(self, name):
        """At a running command: the TPU may end its life by it."""
        node = self.nodes[name]
        node["looks"] += 1
        lives = self.scenario.get("lives", [])
        limit = lives[node["life"]] if node["life"] < len(lives) else None
        if limit is not None and node["looks"] == limit and self.scenario.get("late"):
            return [self.home(name, worker) for worker in range(len(node["networkEndpoints"]))]
        if limit is not None and node["looks"] >= limit + bool(self.scenario.get("late")):
            self.lose(name)
            node["state"] = "PREEMPTED"
            if name in self.queue:  # the queued resource remains, without the TPU
                del self.nodes[name]
                self.queue[name]["will"] = "SUSPENDED"
            self.save()
            fail("ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].", 255)
        return []


def wait_for(home):
    """Until the command has used up its ticks, or has ended."""
    ticks, progress = home / "ticks", home / "progress"
    granted, deadline = ticks.stat().st_size if ticks.exists() else 0, time.time() + 60
    ended = home / "nanochat_jax_tpu/run/exit_code"
    while not ended.exists() and time.time() < deadline:
        if progress.exists() and progress.read_text() == str(4 * granted):
            break
        time.sleep(0.01)


def run_on(home, worker, script, nameless=False):
    """As sshd would: a bash in the home folder, with nothing of this process but the PATH."""
    bin_folder = home / "bin"
    bin_folder.mkdir(exist_ok=True)
    (bin_folder / "hostname").write_text(f"#!/bin/sh\necho {'vm' if nameless else f't1v-n-12ab34cd-w-{worker}'}\n")
    (bin_folder / "hostname").chmod(0o755)
    (bin_folder / "python3").write_text(f'#!/bin/sh\nexec {os.path.realpath(sys.executable)} -E -S "$@"\n')
    (bin_folder / "python3").chmod(0o755)
    env = {"HOME": str(home), "PATH": f"{bin_folder}:{os.environ['PATH']}", "LANG": "C.UTF-8"}
    env["NANOCHAT_TPU_FILES"] = f"{home}/libtpu_lockfile:{home}/dev/accel*"
    return subprocess.Popen(["bash", "-c", script], cwd=home, env=env, stdin=subprocess.DEVNULL)


def main():
    words, flags, arguments = [], {}, sys.argv[1:]
    for word in arguments:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            flags[name] = value
        else:
            words.append(word)
    with open(FOLDER / "calls.jsonl", "a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    words = words[words.index("tpus") + 1 :]
    kind, verb, *rest = words
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cloud = Cloud()
        if verb == "create":
            return cloud.create(kind, rest[0], flags)
        if verb == "describe":
            return cloud.describe(kind, rest[0])
        if verb == "delete":
            return cloud.delete(kind, rest[0], flags)
        if verb in ("start", "stop"):
            cloud.nodes[rest[0]]["state"] = "READY" if verb == "start" else "STOPPED"
            return cloud.save()
        name = rest[1].partition(":")[0] if verb == "scp" else rest[0]
        workers = cloud.workers(name, flags)
        what = flags.get("command", "scp")
        look = what.endswith("report") and (cloud.home(name, 0) / "nanochat_jax_tpu/run/run.json").exists()
        paced = [cloud.home(name, worker) for worker in workers] if look and cloud.scenario.get("paced") else []
        for home in paced:
            wait_for(home)
        dying = cloud.look(name) if look else []
        for home in paced:
            with open(home / "ticks", "a") as ticks:
                ticks.write("x")
        broken = {worker for worker in workers if cloud.broken(what, worker)}
        homes = {worker: cloud.home(name, worker) for worker in workers if worker not in broken}
        cloud.save()
        for home in dying:  # preemption: everything gets SIGTERM, and gcloud does not know of it yet
            stop = "worker.py stop --seconds 5 >/dev/null; rm -f nanochat_jax_tpu/run/stopped"
            run_on(home, 0, f"python3 nanochat_jax_tpu/tree/tools/tpu_vm/{stop}").wait()
        jobs = {}
        for worker, home in homes.items():
            if verb == "scp":
                shutil.copy(rest[0], home / rest[1].partition(":")[2])
            else:
                jobs[worker] = run_on(home, worker, flags["command"], cloud.scenario.get("nameless"))
        if verb == "ssh" and not what.startswith("sleep"):
            fcntl.flock(lock, fcntl.LOCK_UN)
        codes = {worker: job.wait() for worker, job in jobs.items()} | dict.fromkeys(broken, 255)
    for worker, code in codes.items():
        if code and len(workers) > 1:
            print(f"##### Command execution on worker {worker} failed with exit status {code}.", file=sys.stderr)
    sys.exit(next((code for code in codes.values() if code), 0))


if __name__ == "__main__":
    main()
