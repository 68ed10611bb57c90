"""The tasks that have a name on the command line: `eval -a NAME`, `rl --task NAME`."""

from pathlib import Path

from nanochat_jax.tasks import (
    ARC,
    GSM8K,
    MMLU,
    Arithmetic,
    HumanEval,
    SimpleSpelling,
    SpellingBee,
    Task,
    load_task,
    sandbox,
)

TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "SimpleSpelling", "Arithmetic")
MADE_UP = 256  # problems of a task that makes them up, as nanochat's SpellingBee had


def make_task(name: str, data_dir: Path | None = None, *, unsafe: bool = False) -> Task:
    """The task of this name in TASKS, its test split, or the one that module:Class names.

    FileNotFoundError: its data cannot be had. ValueError: there is no such task, or HumanEval where no guard can hold
    the programs and not `unsafe`.
    """
    where = {"data_dir": data_dir}
    if ":" in name:
        return load_task(name, "-a")
    if name in ("ARC-Easy", "ARC-Challenge"):
        return ARC(name, "test", **where)
    if name == "HumanEval":
        if not unsafe and (fault := sandbox.guard_fault()):
            raise ValueError(
                f"{fault}, so HumanEval, which runs what the model writes, is refused; --unsafe-exec of "
                "nanochat_jax.eval runs it with your files and network in reach"
            )
        return HumanEval(unsafe=unsafe, **where)
    if name == "Arithmetic":
        return Arithmetic("test", MADE_UP)
    if name in ("SpellingBee", "SimpleSpelling"):
        return {"SpellingBee": SpellingBee, "SimpleSpelling": SimpleSpelling}[name]("test", MADE_UP, **where)
    if name in ("MMLU", "GSM8K"):
        return {"MMLU": MMLU, "GSM8K": GSM8K}[name]("test", **where)
    raise ValueError(f"-a must name tasks among {', '.join(TASKS)}, or module:Class, got {name!r:.60}")
