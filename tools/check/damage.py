"""A base directory with everything in it, what can happen to its files, and the commands that read them afterwards.

A case's reader runs a command to its end in a process that is ready (see limited.py) and returns a digest of what came
of it. A run is resumed on a folder whose steps are done, so that it reads everything and trains only what damage took.
"""

import hashlib
import os
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from limited import START_SECONDS, Worker

STEPS, SAVE_EVERY = {"sft": 8, "base": 8, "rl": 4}, {"sft": 4, "base": 4, "rl": 2}
TAGS = {"base": "pretrained", "sft": "tuned", "rl": "rewarded"}  # of the runs
TASK = "tools.check.kill_resume:Early"


class Damage(NamedTuple):
    file: str  # in the base directory
    kind: str
    seed: int


# ------------------------------------------------------------------------------------------------ the base directory
def write_models(base: Path) -> None:
    """A base model with two checkpoints, and nanochat's files of one."""
    from nanochat_jax import nanochat_export
    from tests.support import tiny

    for step in (7, 9):
        tiny.write_base(base, step=step, seed=step)
    found = nanochat_export.find.find_model("base", "d2", base=base)
    theirs = base / "base_checkpoints" / "theirs"
    nanochat_export.export(found, tiny.tokenizer(), theirs, np.dtype("float32"), log=lambda _: None)


def run_stages(base: Path, worker: Worker) -> None:
    """A finished run of each stage, and their caches and data."""
    from tests.support import tiny

    rl = ["--source", "base", "--model-tag", "d2", "--task", TASK, "--num-samples", "4", "--max-new-tokens", "8"]
    flags = {
        "base": [*tiny.base_flags(base), "--model-tag", TAGS["base"], "--num-iterations", str(STEPS["base"])],
        "sft": [*tiny.sft_flags(base), "--model-tag", "d2", "--output-tag", TAGS["sft"]],
        "rl": [
            *rl,
            "--cut-answers",
            "keep",
            "--output-tag",
            TAGS["rl"],
            "--examples-per-step",
            "4",
            "--num-steps",
            str(STEPS["rl"]),
        ],
    }
    flags["sft"] += ["--num-iterations", str(STEPS["sft"])]
    old = base.stat().st_mtime - 60  # so that hashes of the data are remembered
    for file in (*base.glob("shards/*"), *base.glob("*.jsonl")):
        os.utime(file, (old, old))
    for stage, given in flags.items():
        given += ["--save-every", str(SAVE_EVERY[stage]), "--device-batch-size", "1"]
        given += ["--eval-every", "-1" if stage == "rl" else str(SAVE_EVERY[stage])]
        ended = worker.run(run_command, (stage, given, str(base)), START_SECONDS)
        if ended.how != "well":
            raise SystemExit(f"{stage} fails before anything is damaged: {ended}")


def run_command(argument: tuple[str, list[str], str]) -> str:
    """(command, flags, base directory): as a user runs it, but in this process."""
    import importlib

    from nanochat_jax.cli.command_line import parse

    command, flags, base = argument
    os.environ["NANOCHAT_BASE_DIR"] = base
    module = importlib.import_module(f"nanochat_jax.{command}")
    settings = {"base": "BaseConfig", "sft": "SFTConfig", "rl": "RLConfig", "eval": "EvalConfig"}[command]
    code = module.main(parse(getattr(module, settings), flags))
    assert not code, f"the exit code is {code}"
    return ""


VARIABLES = {  # of the environment that cases run in: programs are found that the runs above have compiled
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "HF_HUB_OFFLINE": "1",
}


def renew(pristine: Path, base: Path) -> None:
    """Make `base` what the pristine one is."""
    shutil.rmtree(base, ignore_errors=True)
    shutil.copytree(pristine, base)


# ---------------------------------------------------------------------------------------------------------- damages
def flip_a_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(max(1, path.stat().st_size))])


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def replace_by_a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def append_garbage(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 200)))


def overwrite_a_part(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    at = rng.randrange(max(1, len(data)))
    part = bytes(16) if rng.random() < 0.5 else rng.randbytes(16)
    path.write_bytes(data[:at] + part[: len(data) - at] + data[at + 16 :])


KINDS = (flip_a_bit, truncate, empty, delete, replace_by_a_folder, append_garbage, overwrite_a_part)


def damages_of(base: Path, count: int, rng: random.Random) -> list[Damage]:
    """`count` damages: all kinds on all files, in an order that meets every reader early, again with other draws."""
    names = [path.relative_to(base).as_posix() for path in sorted(base.rglob("*")) if path.is_file()]
    names = [name for name in names if not name.endswith(".lock") and "/." not in name]
    planned: list[Damage] = []
    while len(planned) < count:
        once = [(name, kind.__name__) for name in names for kind in KINDS]
        rng.shuffle(once)
        rank: dict[str, int] = {}
        order = [(rank.setdefault(reader_of(name), 0), name, kind) for name, kind in once]
        for i, (_, name, kind) in enumerate(order):
            order[i] = (rank[reader_of(name)], name, kind)
            rank[reader_of(name)] += 1
        planned += [Damage(name, kind, rng.randrange(1 << 30)) for _, name, kind in sorted(order)]
    return planned[:count]


def do_damage(base: Path, damage: Damage) -> None:
    kind = next(kind for kind in KINDS if kind.__name__ == damage.kind)
    kind(base / damage.file, random.Random(damage.seed))


# ---------------------------------------------------------------------------------------------------------- readers
def resume(stage: str, base: Path) -> str:
    """python -m nanochat_jax.<stage> --resume -> the digest of the arrays of its last step."""
    from nanochat_jax.checkpoints import store

    run_command((stage, ["--model-tag" if stage == "base" else "--output-tag", TAGS[stage], "--resume"], str(base)))
    folder = base / store.SOURCES[stage] / TAGS[stage] / str(STEPS[stage])
    return digest(*(store.read_arrays(folder, item) for item in ("params", "optimizer")))


def resume_sft(base: Path) -> str:
    return resume("sft", base)


def resume_base(base: Path) -> str:
    return resume("base", base)


def resume_rl(base: Path) -> str:
    return resume("rl", base)


def compile_again(base: Path) -> str:
    """The last checkpoint of fine-tuning is given up, so that its steps are taken again, with programs from disk."""
    from nanochat_jax.checkpoints import store

    shutil.rmtree(base / store.SOURCES["sft"] / TAGS["sft"] / str(STEPS["sft"]), ignore_errors=True)
    return resume("sft", base)


def load(tag: str, base: Path) -> str:
    """What eval and chat read: the tokenizer and a model, here with its optimizer."""
    from nanochat_jax.checkpoints import find
    from nanochat_jax.distributed.sharding import flatten_by_path
    from nanochat_jax.files.paths import base_dir
    from nanochat_jax.optim.groups import default_groups
    from nanochat_jax.tokenizer import Tokenizer

    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    found = find.find_model("base", tag, optimizer=True)
    find.check_tokenizer(tokenizer, find.peek_meta(found))
    config, params, _ = find.load_params(found)
    groups = default_groups(config.n_embd, embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02)
    optimizer = find.load_optimizer(found, config, groups)
    return digest(flatten_by_path(params), optimizer[1] if optimizer else {})


def load_ours(base: Path) -> str:
    return load("d2", base)


def load_theirs(base: Path) -> str:
    return load("theirs", base)


def draw_report(base: Path) -> str:
    from nanochat_jax import report

    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    report.main(report.ReportConfig())
    return hashlib.sha256((base / "report.html").read_bytes()).hexdigest()


def digest(*arrays: dict) -> str:
    made = hashlib.sha256()
    for named in arrays:
        for name, array in sorted(named.items()):
            made.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return made.hexdigest()


# beginning of a file's path -> its readers, in turn; the first that fits
READERS = {
    "base_checkpoints/d2/": (load_ours,),
    "base_checkpoints/theirs/": (load_theirs,),
    f"base_checkpoints/{TAGS['base']}/metrics.jsonl": (draw_report, resume_base),
    f"base_checkpoints/{TAGS['base']}/": (resume_base,),
    f"chatsft_checkpoints/{TAGS['sft']}/metrics.jsonl": (draw_report, resume_sft),
    f"chatsft_checkpoints/{TAGS['sft']}/": (resume_sft,),
    f"chatrl_checkpoints/{TAGS['rl']}/metrics.jsonl": (draw_report, resume_rl),
    f"chatrl_checkpoints/{TAGS['rl']}/rollouts.jsonl": (draw_report, resume_rl),
    f"chatrl_checkpoints/{TAGS['rl']}/": (resume_rl,),
    "tokenizer/": (load_ours, resume_sft),
    "compilation_cache/": (compile_again,),
    "shards/": (resume_base,),
    "token_cache/shard_": (resume_base,),
    "token_cache/file_digests.json": (resume_base,),
    "": (resume_sft,),  # token caches and the files of conversations
}
# What nothing protects: nanochat's meta has no checksum, and what a run measured is only looked at. Another result is
# no fault there.
UNPROTECTED = {load_theirs, draw_report}


def reader_of(file: str) -> str:
    """The beginning of READERS that a file has."""
    return next(beginning for beginning in READERS if file.startswith(beginning))


def reader_for(damage: Damage):
    readers = READERS[reader_of(damage.file)]
    return readers[damage.seed % len(readers)]


def verdict(how: str, reader, result: str | None, expected: str, said: str) -> str:
    """What a case that ended so is: "same", "other" (where nothing could be noticed), "passed over" (a checkpoint of
    another step, with a warning), "refused", or a fault."""
    if how != "well":
        return how
    warned = "WARNING: checkpoint" in said and ("passed over" in said or "the one before it" in said)
    if result == expected:
        return "passed over" if warned else "same"
    if reader is load_ours and warned:
        return "passed over"
    return "other" if reader in UNPROTECTED else "another result without a word"


ALLOWED = ("same", "passed over", "refused", "other")
