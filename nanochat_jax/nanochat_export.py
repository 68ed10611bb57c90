"""Write a model as the files that nanochat itself loads: model, meta, optimizer state and tokenizer, without torch.

Storages are written one after the other, each converted when its turn comes, so that nothing is in memory twice. Only
today's network (era E, since 2026-03-14) has such files.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanochat_jax.checkpoints import find, integrity, store
from nanochat_jax.checkpoints.find import check_tokenizer
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import check_bounds, require
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files.paths import base_dir
from nanochat_jax.files.torch_write import write_pt
from nanochat_jax.flags.nanochat_export import ExportConfig
from nanochat_jax.interop import nanochat_write, optimizer_state
from nanochat_jax.interop.nanochat_model import meta_file, model_file
from nanochat_jax.interop.nanochat_optimizer import read_optimizer
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.tokenizer import Tokenizer


def main(cfg: ExportConfig) -> int:
    """Export -> the exit code."""
    require(not str(cfg.output).startswith("gs:"), f"--output must be a folder on a disk, got {cfg.output}")
    check_bounds(cfg)
    require(cfg.ranks == 1 or cfg.optimizer, f"--ranks={cfg.ranks} is about the optimizer's state: omit --no-optimizer")
    found = find.find_model(cfg.source, cfg.model_tag, cfg.model_step, optimizer=cfg.optimizer)
    root = cfg.output.expanduser().absolute() / store.SOURCES[cfg.source]
    tag = cfg.output_tag or f"d{find.peek_meta(found)['model_config']['n_layer']}"
    one_folder = (root / tag).resolve().parent == root.resolve()
    require(one_folder, f"--output-tag must be the name of one folder, got {tag!r}")
    print0(f"Model: {found}")
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    export(found, tokenizer, root / tag, nanochat_write.EMBEDDING_TYPES[cfg.dtype], cfg.optimizer, cfg.ranks)
    print0(f"nanochat loads it with NANOCHAT_BASE_DIR={root.parent}")
    return 0


def export(
    found: find.Found,
    tokenizer: Tokenizer,
    folder: Path,
    embedding_type: np.dtype,
    with_optimizer: bool = True,
    ranks: int = 1,
    log: Callable = print0,
) -> None:
    """Write model `found` into `folder`, a <kind>_checkpoints/<tag> of a nanochat base directory, and its tokenizer
    beside. All files appear at the end, the model's last; no file is replaced.

    ranks: the processes of nanochat that share the optimizer's state, a file each. ValueError: not a network of today's
    nanochat, another tokenizer than the model's, or ranks that cannot share its state. FileExistsError: files of that
    step, checkpoints of ours or another tokenizer are there.
    """
    base, step, meta = folder.parents[1], found.step, find.peek_meta(found)
    check_tokenizer(tokenizer, meta)
    if found.ours:
        meta = nanochat_write.nanochat_meta(meta, GPTConfig(**meta["model_config"]), step)
    nanochat_write.check_ranks(find.load_config(found), ranks)
    _check_free(folder, step, tokenizer)
    model, params, recorded = find.load_params(found)
    if not found.ours:
        nanochat_write.model_config(model)  # only the tensors tell the era of nanochat's own files
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base, prefix=".export-") as made:
        staging = Path(made)
        tokenizer.save_for_nanochat(staging)
        meta_file(staging, step).write_text(json.dumps(meta, indent=2), encoding="utf-8")
        write_pt(model_file(staging, step), nanochat_write.model_content(params, embedding_type))
        del params  # the optimizer's state needs the room
        state = load_optimizer_state(found, model, recorded) if with_optimizer else None
        for rank in range(ranks if state else 0):
            content = nanochat_write.optimizer_content(state, model, embedding_type, rank, ranks)
            write_pt(staging / f"optim_{step:06d}_rank{rank}.pt", content)
        if with_optimizer and not state:
            log(f"NOTE: {found} has no optimizer state, so none is written")
        _check_free(folder, step, tokenizer)
        for file in sorted(staging.iterdir(), key=lambda file: file.name.startswith("model")):
            target = (base / "tokenizer" if file.name.startswith("token") else folder) / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():  # a tokenizer that is there is the same
                file.rename(target)
                log(str(target))


def _check_free(folder: Path, step: int, tokenizer: Tokenizer) -> None:
    """OSError where the output cannot be written to, or holds what must not be replaced or mixed up."""
    above = next(path for path in folder.parents if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise PermissionError(f"{above} must be a folder that can be written to: choose another with --output")
    if files := sorted(folder.glob(f"*_{step:06d}[._]*")):
        raise FileExistsError(f"{files[0]} is there already: choose another folder with --output or --output-tag")
    if integrity.steps(folder):  # beside nanochat's files the run could not go on
        raise FileExistsError(f"{folder} holds checkpoints of our own: choose another folder with --output")
    there = folder.parents[1] / "tokenizer"
    if any(there.glob("tokenizer.*")) and Tokenizer.load(there).digest() != tokenizer.digest():
        raise FileExistsError(f"{there} holds another tokenizer than the model's: choose another folder with --output")


def load_optimizer_state(found: find.Found, model: GPTConfig, meta: dict) -> optimizer_state.OptimizerState | None:
    """The optimizer of a model in either format; None where it came without."""
    if not found.ours:
        return read_optimizer(found.folder, found.step, model)
    folder = found.folder / str(found.step)
    if not (folder / "optimizer").is_dir():
        return None
    if "nanochat_groups" in meta:
        groups = optimizer_state.groups_from_json(meta["nanochat_groups"])
    else:
        groups = optimizer_state.nanochat_groups(meta["optimizer_groups"])
    return optimizer_state.OptimizerState(groups, find.read_finite_arrays(folder, "optimizer"))


if __name__ == "__main__":
    run_stage(main, parse(ExportConfig, prog="python -m nanochat_jax.nanochat_export"))
