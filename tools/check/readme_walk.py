"""Run every command of README and of docs/ in order, as a newcomer would: with a fresh base directory, a hub on
loopback that serves datasets and a model from a folder, and sizes that 2 cores manage. Prints a line for each command,
and ends with status 1 where one failed.

python tools/check/readme_walk.py --out /tmp/walk
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pyarrow.parquet as pq
import tyro

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("README", "docs/training", "docs/own-data", "docs/data", "docs/clusters", "docs/measured")  # in this order
NAMES += ("docs/serving", "docs/contributing")
PAGES = tuple(ROOT / f"{name}.md" for name in NAMES)
STEPS = "--num-iterations 6 --total-batch-size 1024 --device-batch-size 4 --eval-tokens 4096"
DIALS = "--depth 2 --aspect-ratio 32 --head-dim 32 --max-seq-len 256"
SIZES = {  # flags for a command that begins so, the first that fits; a flag that is given twice counts as given last
    "nanochat_jax.tokenizer train --input": "--vocab-size 600",
    "nanochat_jax.tokenizer train": "--vocab-size 600 --max-chars 1000000",
    "nanochat_jax.base --resume": "",  # as it is: it needs no other flag
    "nanochat_jax.base --data-dir": f"{DIALS} {STEPS}",
    "nanochat_jax.base": f"--download 3 {DIALS} {STEPS}",
    "nanochat_jax.sft --resume": "",
    "nanochat_jax.sft --preflight v5e-8": "--total-batch-size 8192 --device-batch-size 4",
    "nanochat_jax.sft --preflight h100-8": "--total-batch-size 8192 --device-batch-size 4",
    "nanochat_jax.sft": f"{STEPS} --simple-spelling-rows 300 --spelling-bee-rows 300 --chatcore-max-cat 8 "
    "--chatcore-max-sample 2",
    "nanochat_jax.bench -i": "--batch-sizes 1 --decode-tokens 8 --repeats 1",
    "nanochat_jax.bench": f"{DIALS} --batch-sizes 1 --decode-tokens 8 --prompt-tokens 20 --repeats 1 "
    "--examples-per-step 2 --num-samples 2 --device-batch-size 4 --total-batch-size -1",
    "nanochat_jax.eval": "-x 4 -m 16",
    "nanochat_jax.rl --resume": "",
    "nanochat_jax.rl": "--num-steps 2 --examples-per-step 2 --num-samples 2 --max-new-tokens 16 --eval-examples 4",
}
ELSEWHERE = {  # what is run by other means
    "tools/quickstart.sh": "takes minutes: run it by itself",
    "tools/test.sh": "the continuous integration runs it",
    ".venv/bin/python -m pytest": "the continuous integration runs it",
    "tools/setup.sh --extra": "changes the environment, which the other commands use as it is",
    "tools/bench/": "measures, which takes minutes",
    ".venv/bin/python tools/": "measures or checks, which takes minutes",
    "tools/tpu_vm.py": "needs a Google Cloud project; tests drive it against a stand-in",
    ".venv/bin/python -m nanochat_jax.sft --coordinator": "needs further processes; tests start them",
    ".venv/bin/python -m nanochat_jax.eval -i base": "needs CORE's tasks; tests make some",
    ".venv/bin/python -m nanochat_jax.serve": "serves until it is stopped; tests start it",
    ".venv/bin/python -m nanochat_jax.nanochat_export --push": "uploads; tests do, to a hub on loopback",
    "sbatch": "needs a SLURM cluster",
    "sky": "needs SkyPilot and a cloud",
}
LONGEST_SECONDS = 600  # of a command: one whose predecessor failed may begin a run of hours
SERVED_AS = {"HuggingFaceTB--smol-smoltalk": "sgd-dialogues"}  # the hub's dataset is not in the folder
COMMIT = "c" * 40
TALKS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "A number."}] for n in range(9)
]


def commands(page: str) -> list[str]:
    """The commands of all bash blocks, and each Python block as one command. A Python block that begins with the name
    of a file, as "# my_module.py", is written into that file."""
    found = []
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if language == "bash":
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.split("  #")[0].strip() for line in lines if line.strip()]
        elif named := re.match(r"# (\w+\.py)\n", block):
            found.append(f"cat > {named[1]} <<'END'\n{block}END")
        else:
            found.append(f".venv/bin/python -c {shlex.quote(block)}")
    return found


def sized(command: str) -> str:
    """The command with the flags of SIZES."""
    start = command.partition(" -m ")[2]
    return f"{command} {next((flags for name, flags in SIZES.items() if start.startswith(name)), '')}".strip()


class Hub(ThreadingHTTPServer):
    """A hub on loopback. data: folder with the datasets in hub/ and pretraining shards in corpus/."""

    def __init__(self, data: Path):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.data = data


class HubRequest(BaseHTTPRequestHandler):
    """As much of the hub as huggingface_hub asks for: a repository's commit, the list of its files, and a file. Every
    model there is the one in golden/hf."""

    def do_GET(self):
        data, parts = self.server.data, [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        name = "--".join(parts[2:4] if parts[0] == "api" else parts[1:3])
        folder = data / "hub" / SERVED_AS.get(name, name)
        if parts[1:2] == ["models"] or parts[2:3] == ["resolve"]:
            folder, parts = data.parent / "golden/hf/c3_oct2025", parts if parts[0] == "api" else ["models", *parts]
        if parts[4:5] == ["revision"]:
            self.answer(json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT}).encode())
        elif parts[4:5] == ["tree"]:
            files = sorted([*folder.glob("*/*/*.parquet"), *folder.glob("*.json"), *folder.glob("*.safetensors")])
            paths = [str(path.relative_to(folder)) for path in files]
            self.answer(json.dumps([{"type": "file", "path": p, "size": 0, "oid": COMMIT} for p in paths]).encode())
        elif number := re.fullmatch(r"shard_(\d+)\.parquet", parts[-1]):
            shard = min(int(number[1]), 4)  # the validation shard has the largest number
            self.answer((data / f"corpus/shard_{shard:05d}.parquet").read_bytes())
        elif parts[3:4] == ["resolve"]:
            self.answer(folder.joinpath(*parts[5:]).read_bytes())
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, body: bytes):
        self.send_response(200)
        headers = {"Content-Length": str(len(body)), "ETag": f'"{zlib.crc32(body)}"', "X-Repo-Commit": COMMIT}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def prepare(out: Path, shared: Path) -> None:
    """The folder in which the commands run, with the files that they name."""
    for name in (".venv", "configs", "tools"):
        (out / name).symlink_to(ROOT / name)
    for name in ("mine.jsonl", "held_out.jsonl"):
        (out / name).write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    shards = sorted((shared / "data/corpus").glob("*.parquet"))[-2:]
    for folder in ("my_texts", "my_shards", "base"):
        (out / folder).mkdir()
    for shard in shards:
        shutil.copy(shard, out / "my_shards")
    texts = pq.read_table(shards[-1], columns=["text"])["text"].to_pylist()
    (out / "my_texts/texts.txt").write_text("\n".join(texts[:40]), encoding="utf-8")
    shutil.copytree(shared / "golden/checkpoints/c1_master", out / "home/.cache/nanochat")
    shutil.copy(shared / "data/words/words_alpha.txt", out / "base")  # its place on the web is no part of the hub


def main(out: Path, shared: Path = ROOT.parent / "shared", pages: tuple[Path, ...] = PAGES) -> None:
    """out: folder to make (must not exist); its log.txt has the full output. shared: folder with data/ and a base
    directory of nanochat's in golden/checkpoints/c1_master. pages: what to run, in this order."""
    out.mkdir(parents=True)
    out = out.absolute()
    prepare(out, shared)
    hub = Hub(shared / "data")
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HOME": str(out / "home"),
        "NANOCHAT_BASE_DIR": str(out / "base"),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "JAX_PLATFORMS": "cpu",
        "WANDB_MODE": "offline",
    }
    for name in ("NANOCHAT_DATA_DIR", "HF_HUB_OFFLINE", "HF_TOKEN"):
        environment.pop(name, None)
    failed = 0
    for command in (command for page in pages for command in commands(page.read_text(encoding="utf-8"))):
        shown = " ".join(command.split())[:100]
        if reason := next((why for start, why in ELSEWHERE.items() if command.startswith(start)), None):
            print(f"not here  {shown}: {reason}", flush=True)
            continue
        began = time.perf_counter()
        with open(out / "log.txt", "a", encoding="utf-8") as log:
            print(f"$ {sized(command)}", file=log, flush=True)
            done = subprocess.run(
                ["timeout", f"{LONGEST_SECONDS}", "bash", "-c", sized(command)],
                input="Hello!\nquit\n",
                cwd=out,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        failed += done.returncode != 0
        verdict = "ran" if done.returncode == 0 else f"failed with status {done.returncode}"
        print(f"{verdict:8}  {time.perf_counter() - began:5.1f} s  {shown}", flush=True)
    hub.shutdown()
    if failed:
        raise SystemExit(f"{failed} commands failed: see {out / 'log.txt'}")


if __name__ == "__main__":
    tyro.cli(main)
