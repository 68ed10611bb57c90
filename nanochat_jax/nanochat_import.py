"""Convert a nanochat base directory to ours, once; reading its files in place works too."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

from nanochat_jax.checkpoints import integrity, store
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.main import run_stage
from nanochat_jax.distributed.processes import print0
from nanochat_jax.distributed.sharding import flatten_by_path
from nanochat_jax.files import bucket
from nanochat_jax.flags.nanochat_import import ImportConfig
from nanochat_jax.interop.nanochat_model import find_steps, model_file, read_model
from nanochat_jax.interop.nanochat_optimizer import read_optimizer
from nanochat_jax.interop.optimizer_state import groups_to_json, recorded_groups
from nanochat_jax.tokenizer import Tokenizer


def main(cfg: ImportConfig) -> int:
    """Convert -> the exit code."""
    to = bucket.as_path(cfg.to)
    count = convert(cfg.src, to if bucket.in_bucket(to) else to.absolute(), cfg.logit_cap)
    print0(f"{count} models in {to}; use them with NANOCHAT_BASE_DIR={to}")
    return 0


def convert(src: Path, to: Path, logit_cap: float = 15.0, log: Callable = print0) -> int:
    """Write every model under `src` (optimizer state included) and the tokenizer into `to` -> how many models.

    A model that is there already and intact is left alone, so an interrupted conversion goes on where it stopped.
    FileNotFoundError: `src` holds no model. FileExistsError: `to` holds another tokenizer or other models.
    """
    models = [
        (source, folder, step)
        for source, name in store.SOURCES.items()
        for folder in sorted((src / name).glob("*/"))
        if any(folder.glob("model_*.pt"))
        for step in find_steps(folder)
    ]
    if not models:
        raise FileNotFoundError(
            f"{src} holds no model of nanochat's: it must be a base directory (base_checkpoints/...)"
        )
    tokenizer = Tokenizer.load(src / "tokenizer")
    there = bucket.fetch(to / "tokenizer", exact=True)
    if there.exists() and Tokenizer.load(there).digest() != tokenizer.digest():
        raise FileExistsError(f"{to}/tokenizer is another tokenizer: convert to another folder with --to")
    tokenizer.save(to / "tokenizer")
    for source, folder, step in models:
        target = to / store.SOURCES[source] / folder.name / str(step)
        with open(model_file(folder, step), "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if target.exists() and store.converted_from(target) != digest:
            raise FileExistsError(f"{target} is another model: remove it, or convert to another folder with --to")
        if integrity.is_intact(target):
            log(f"{target} is there already")
            continue
        config, params, nanochat_meta = read_model(folder, step, logit_cap)
        state = read_optimizer(folder, step, config)
        meta = nanochat_meta | {
            "step": step,
            "model_config": dataclasses.asdict(config),
            "tokenizer": tokenizer.digest(),
            "converted_from": digest,
            "nanochat_meta": nanochat_meta,  # nanochat_export gives it back
        }
        if state:
            meta["optimizer_groups"] = recorded_groups(state.groups)
            meta["nanochat_groups"] = groups_to_json(state.groups)
        store.write(target, flatten_by_path(params), state.arrays if state else None, meta)
        log(f"{folder}/model_{step:06d}.pt -> {target}" + ("" if state else " (no optimizer state)"))
    return len(models)


if __name__ == "__main__":
    run_stage(main, parse(ImportConfig, prog="python -m nanochat_jax.nanochat_import"))
