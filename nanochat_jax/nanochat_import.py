"""Convert a nanochat base directory to ours, once; reading its files in place works too."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import tyro

from nanochat_jax.checkpoints import integrity
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files import bucket
from nanochat_jax.interop.nanochat_model import _file, find_steps, read_model


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """Convert every model in a nanochat base directory, once; reading them in place works too."""

    src: tyro.conf.Positional[Path]  # nanochat's base directory (it holds base_checkpoints/, tokenizer/, ...)
    to: Path  # base directory to write, ours from then on
    logit_cap: float = 15.0  # 20 for models trained 2026-03-02 to 03-09, which cannot be told from the files


def convert(src: Path, to: Path, logit_cap: float = 15.0, log: Callable = print0) -> int:
    """Write every model under `src` (optimizer state included) and the tokenizer into `to` -> how many models.

    A model that is there already and intact is left alone, so an interrupted conversion goes on where it stopped.
    FileNotFoundError: `src` holds no model. FileExistsError: `to` holds another tokenizer or other models.
    """
    from nanochat_jax.checkpoints import store
    from nanochat_jax.distributed import sharding  # it reads nanochat's files through this module
    from nanochat_jax.interop import nanochat_optimizer
    from nanochat_jax.interop.nanochat_optimizer import read_optimizer, recorded_groups
    from nanochat_jax.tokenizer import Tokenizer

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
        with open(_file(folder, "model", step, "pt"), "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if target.exists() and store.converted_from(target) != digest:
            raise FileExistsError(f"{target} is another model: remove it, or convert to another folder with --to")
        if integrity.is_intact(target):
            log(f"{target} is there already")
            continue
        config, params, theirs = read_model(folder, step, logit_cap)
        state = read_optimizer(folder, step, config)
        meta = theirs | {"step": step, "model_config": dataclasses.asdict(config), "tokenizer": tokenizer.digest()}
        meta |= {"converted_from": digest, "nanochat_meta": theirs}  # nanochat_export gives the latter back
        if state:
            meta |= {"optimizer_groups": recorded_groups(state["groups"]), "nanochat_groups": state["groups"]}
        arrays = nanochat_optimizer.imported_arrays(state) if state else None
        store.write(target, sharding.flatten_by_path(params), arrays, meta)
        log(f"{folder}/model_{step:06d}.pt -> {target}" + ("" if state else " (no optimizer state)"))
    return len(models)


def main() -> None:
    config = tyro.cli(ImportConfig, prog="python -m nanochat_jax.nanochat_import")
    try:
        to = bucket.place(config.to)
        count = convert(config.src, to if bucket.in_bucket(to) else to.absolute(), config.logit_cap)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    print0(f"{count} models in {to}; use them with NANOCHAT_BASE_DIR={to}")


if __name__ == "__main__":
    main()
