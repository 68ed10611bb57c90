"""Convert nanochat's models to ours, once: of a base directory, of a folder with one model in nanochat's form or that
of transformers, or of a repository of the hub. Reading them in place works too."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat_jax.checkpoints import find, integrity, store
from nanochat_jax.checkpoints.layout import TREE
from nanochat_jax.checkpoints.locate import is_on_hub, locate, stages_at
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import check_bounds
from nanochat_jax.distributed.processes import print0
from nanochat_jax.distributed.sharding import flatten_by_path
from nanochat_jax.files import bucket
from nanochat_jax.flags.nanochat_import import ImportConfig
from nanochat_jax.interop.nanochat_model import find_steps
from nanochat_jax.interop.nanochat_optimizer import read_optimizer
from nanochat_jax.interop.optimizer_state import groups_to_json, recorded_groups
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.tokenizer import Tokenizer


def main(cfg: ImportConfig) -> int:
    """Convert -> the exit code."""
    check_bounds(cfg)
    to = bucket.as_path(cfg.to)
    to = to if bucket.in_bucket(to) else to.absolute()
    models = models_at(cfg.src, cfg.source, cfg.model_tag, cfg.model_step, optimizer=cfg.optimizer)
    count = convert_models(models, to, cfg.logit_cap, cfg.optimizer)
    print0(f"{count} models in {to}; use them with NANOCHAT_BASE_DIR={to}")
    return 0


def convert(src: Path, to: Path, logit_cap: float = 15.0, log: Callable = print0) -> int:
    """Write every model under `src` (optimizer state included) and the tokenizer into `to` -> how many models.

    Errors as of `models_at` and `convert_models`."""
    return convert_models(models_at(src), to, logit_cap, log=log)


def models_at(
    src: Path | str,
    source: str | None = None,
    model_tag: str | None = None,
    step: int | None = None,
    *,
    optimizer: bool = True,
) -> list[find.Found]:
    """The models of a base directory, folder or repository that are to be converted: in a base directory all, in the
    tree of a repository one of each stage (the last step of the deepest tag); source, model_tag and step choose others.

    What a repository gives is downloaded. FileNotFoundError, ValueError: there is none."""
    where = {"flag": "", "optimizer": optimizer}
    if is_on_hub(src):
        stages = [source] if source else stages_at(src) or [None]
        located = [locate(src, stage, model_tag, step, **where) for stage in stages]
        return [find.found_at(one, optimizer) for one in located]
    located = locate(src, source, model_tag, step, **where)
    if located.layout != TREE:
        return [find.found_at(located, optimizer)]
    found = [
        find.Found(folder, there, False, base=located)
        for stage, name in store.SOURCES.items()
        if located.folder == Path(src).expanduser().absolute()  # not a folder inside of one
        for folder in sorted((located.folder / name).glob("*/"))
        if any(folder.glob("model_*.pt")) and source in (None, stage) and located.tag in (None, folder.name)
        for there in find_steps(folder)
        if step in (None, there)
    ]
    if not found:
        raise FileNotFoundError(
            f"{src} holds no model of nanochat's: it must be a base directory (base_checkpoints/...), a folder with "
            "model_*.pt and meta_*.json or config.json and model.safetensors, or hub:OWNER/NAME"
        )
    return found


def convert_models(
    models: list[find.Found], to: Path, logit_cap: float = 15.0, optimizer: bool = True, log: Callable = print0
) -> int:
    """Write models and their tokenizer into `to` -> how many models.

    A model that is there already and intact is left alone, so an interrupted conversion goes on where it stopped.
    FileExistsError: `to` holds another tokenizer or other models.
    """
    tokenizer = Tokenizer.load(models[0].tokenizer)
    there = bucket.fetch(to / "tokenizer", exact=True)
    if there.exists() and Tokenizer.load(there).digest() != tokenizer.digest():
        raise FileExistsError(f"{to}/tokenizer is another tokenizer: convert to another folder with --to")
    tokenizer.save(to / "tokenizer")
    for found in models:
        target = to / store.SOURCES[found.source] / found.tag / str(found.step)
        digest = digest_of_files(found)
        if target.exists() and store.converted_from(target) != digest:
            raise FileExistsError(f"{target} is another model: remove it, or convert to another folder with --to")
        if integrity.is_intact(target):
            log(f"{target} is there already")
            continue
        find.check_tokenizer(tokenizer, find.peek_meta(found), found)
        config, params, meta = find.load_params(found, logit_cap)
        arrays, groups = read_state(found, config) if optimizer else (None, {})
        theirs = {} if found.ours or found.transformers else {"nanochat_meta": meta}  # nanochat_export gives it back
        meta = (
            meta
            | theirs
            | groups
            | {
                "step": found.step,
                "model_config": dataclasses.asdict(config),
                "tokenizer": tokenizer.digest(),
                "converted_from": digest,
            }
        )
        store.write(target, flatten_by_path(params), arrays, meta)
        log(f"{found} -> {target}" + ("" if arrays else " (no optimizer state)"))
    return len(models)


def read_state(found: find.Found, config: GPTConfig) -> tuple[dict[str, Any] | None, dict]:
    """(the optimizer's arrays by name, what meta says of its groups); (None, {}) of a model that came without."""
    folder = found.folder / str(found.step)
    if found.ours:
        return (find.read_finite_arrays(folder, "optimizer") if (folder / "optimizer").is_dir() else None), {}
    state = None if found.transformers else read_optimizer(found.folder, found.step, config)
    if state is None:
        return None, {}
    groups = {"optimizer_groups": recorded_groups(state.groups), "nanochat_groups": groups_to_json(state.groups)}
    return state.arrays, groups


def digest_of_files(found: find.Found) -> str:
    """sha256 (hex) of the files of a model's parameters, or of the manifest of ours."""
    digest = hashlib.sha256()
    for file in [found.folder / str(found.step) / integrity.MANIFEST] if found.ours else found.files[1]:
        with open(file, "rb") as f:
            hashlib.file_digest(f, lambda: digest)
    return digest.hexdigest()


if __name__ == "__main__":
    run_stage(main, parse(ImportConfig, prog="python -m nanochat_jax.nanochat_import"))
