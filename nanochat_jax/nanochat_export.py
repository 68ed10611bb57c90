"""Write a model as the files that nanochat itself or the transformers library loads, without torch.

For nanochat: model, meta, optimizer state and tokenizer; only today's network (era E, since 2026-03-14) has such files.
For transformers, and so for the Hugging Face hub: the networks of all eras. Tensors are written one after the other,
each converted when its turn comes, so that nothing is in memory twice.
"""

import json
import os
import shutil
import sys
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
from nanochat_jax.files import upload
from nanochat_jax.files.paths import BUNDLED
from nanochat_jax.files.safetensors_write import write_shards
from nanochat_jax.files.torch_write import write_pt
from nanochat_jax.flags.nanochat_export import ExportConfig
from nanochat_jax.interop import nanochat_model, nanochat_write, optimizer_state, transformers_model
from nanochat_jax.interop.nanochat_model import meta_file, model_file
from nanochat_jax.interop.nanochat_optimizer import read_optimizer
from nanochat_jax.interop.nanochat_write import EMBEDDING_TYPES
from nanochat_jax.model.cost import parameter_counts
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.reports.model_card import Described, model_card
from nanochat_jax.reports.runs import evaluated
from nanochat_jax.tokenizer import Tokenizer


def main(cfg: ExportConfig) -> int:
    """Export -> the exit code."""
    require(not str(cfg.output).startswith("gs:"), f"--output must be a folder on a disk, got {cfg.output}")
    check_bounds(cfg)
    output, for_nanochat = cfg.output.expanduser().absolute(), cfg.format == "nanochat"
    require(for_nanochat or cfg.ranks == 1, f"--ranks={cfg.ranks}: --format=hf has no optimizer's state")
    require(
        for_nanochat or cfg.output_tag is None, "--output-tag: with --format=hf, --output is the model's own folder"
    )
    require(cfg.ranks == 1 or cfg.optimizer, f"--ranks={cfg.ranks} is about the optimizer's state: omit --no-optimizer")
    require(cfg.push is None or not for_nanochat, "--push uploads what --format=hf writes: add it")
    found = find.find_model(cfg.source, cfg.model_tag, cfg.step, cfg.base, optimizer=for_nanochat and cfg.optimizer)
    print0(f"Model: {found}")
    tokenizer = Tokenizer.load(found.tokenizer)
    if not for_nanochat:
        where = check_push(cfg) if cfg.push is not None else ""
        card = describe(found, cfg.push or output.name)
        export_for_transformers(found, tokenizer, output, cfg.dtype, card)
        if cfg.push is not None and (cfg.yes or confirm(f"Upload {output} to {cfg.push}, {where}?")):
            message = f"{found.source} {found.tag}, step {found.step}, exported by nanochat_jax"
            print0(f"uploaded: {upload.upload_folder(output, cfg.push, private=cfg.private, message=message)}")
        return 0
    root = output / store.SOURCES[found.source]
    tag = cfg.output_tag or f"d{find.peek_meta(found)['model_config']['n_layer']}"
    one_folder = (root / tag).resolve().parent == root.resolve()
    require(one_folder, f"--output-tag must be the name of one folder, got {tag!r}")
    export(found, tokenizer, root / tag, EMBEDDING_TYPES[cfg.dtype], cfg.optimizer, cfg.ranks)
    print0(f"nanochat loads it with NANOCHAT_BASE_DIR={output}")
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
    check_tokenizer(tokenizer, meta, found)
    if found.ours or found.transformers:
        meta = nanochat_write.nanochat_meta(meta, GPTConfig(**meta["model_config"]), step)
    nanochat_write.check_ranks(find.load_config(found), ranks)
    _check_free(folder, step, tokenizer)
    model, params, recorded = find.load_params(found)
    if not (found.ours or found.transformers):
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


def export_for_transformers(
    found: find.Found, tokenizer: Tokenizer, folder: Path, dtype: str, card: Described, log: Callable = print0
) -> None:
    """Write model `found` into `folder`, which is new or empty, as files that transformers loads; all appear at once.

    dtype: "float32", or "bfloat16" for all but the lambdas. card: what README.md says. ValueError: another tokenizer
    than the model's. FileExistsError: something is in the folder."""
    check_tokenizer(tokenizer, find.peek_meta(found), found)
    _check_new(folder)
    model, params, _ = find.load_params(found)
    bos, eos = tokenizer.bos, tokenizer.special("<|assistant_end|>")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as made:
        staging = Path(made) / "model"
        staging.mkdir()
        configs = {
            transformers_model.CONFIG: transformers_model.transformers_config(model, bos=bos, eos=eos, dtype=dtype),
            "generation_config.json": {"bos_token_id": bos, "eos_token_id": [eos, bos], "pad_token_id": eos},
        }
        for name, content in configs.items():
            (staging / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        if card.own_code:
            code = f"{transformers_model.OUR_CODE}.py"
            shutil.copyfile(BUNDLED / f"{code}.txt", staging / code)
        tokenizer.save_for_transformers(staging, model.sequence_len)
        (staging / "README.md").write_text(model_card(card), encoding="utf-8")
        write_shards(staging, transformers_model.transformers_tensors(params, model, EMBEDDING_TYPES[dtype]))
        _check_new(folder)
        staging.rename(folder)
    for file in sorted(folder.iterdir()):
        log(str(file))
    trust = ", trust_remote_code=True" if card.own_code else ""
    log(f'transformers loads it with AutoModelForCausalLM.from_pretrained("{folder}"{trust})')


def describe(found: find.Found, name: str) -> Described:
    """What the card of a model says. name: of its repository, or its folder."""
    model, meta = find.load_config(found), find.peek_meta(found)
    sizes = {size: getattr(model, size) for size in nanochat_model.LIMITS}
    return Described(
        name=name,
        stage=found.source,
        step=found.step,
        parameters=parameter_counts(model)["total"],
        sizes=sizes,
        meta=meta,
        evaluated=evaluated(found.folder, find.identity(found)),
        own_code=not transformers_model.fits_library(model),
    )


def check_push(cfg: ExportConfig) -> str:
    """What the repository is that --push names, in words. ValueError, OSError: nothing can be uploaded there."""
    upload.check_name(cfg.push)
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    require(cfg.yes or asks, f"--push={cfg.push} asks before it uploads, and there is no terminal: add --yes")
    private = upload.is_private(cfg.push)
    hidden = private is not False or not cfg.private
    require(hidden, f"--push: {cfg.push} is there already and public: to show everybody the model, add --no-private")
    if private is None:
        return f"a new {'private' if cfg.private else 'PUBLIC'} repository"
    return f"which is there already and {'private' if private else 'PUBLIC'}; it keeps its history"


def confirm(question: str) -> bool:
    """Whether the user says yes on the terminal."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _check_new(folder: Path) -> None:
    """OSError where the folder cannot be made, or holds something."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder: choose another with --output")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} must be new or empty for --format=hf: choose another with --output")
    _check_writable(folder)


def _check_writable(folder: Path) -> None:
    above = next(path for path in folder.parents if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise PermissionError(f"{above} must be a folder that can be written to: choose another with --output")


def _check_free(folder: Path, step: int, tokenizer: Tokenizer) -> None:
    """OSError where the output cannot be written to, or holds what must not be replaced or mixed up."""
    _check_writable(folder)
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
