"""The model that a fine-tuning run starts from, and its tokenizer."""

from nanochat_jax.checkpoints import find
from nanochat_jax.files.paths import base_dir, kept_dir, output_dir
from nanochat_jax.flags.stage import StageConfig
from nanochat_jax.tokenizer import Tokenizer


def base_model(cfg: StageConfig, source: str) -> find.Found:
    """The model that a new run starts from; errors of `find_model`."""
    return find.find_model(source, cfg.model_tag, cfg.model_step, cfg.base, optimizer=bool(cfg.load_optimizer))


def run_tokenizer(cfg: StageConfig) -> Tokenizer:
    """The tokenizer of a run that starts from a model: that of the model which --base names, else the base directory's.

    A run that goes on may have one where it is written only. FileNotFoundError: there is none."""
    written = output_dir() / "tokenizer"
    if cfg.base is None or (cfg.resume and written.exists()):
        has_own = not (kept_dir() / "tokenizer").exists() and written.exists()
        return Tokenizer.load(written if has_own else base_dir() / "tokenizer")
    return Tokenizer.load(base_model(cfg, cfg.source).tokenizer)


def check_written_tokenizer(found: find.Found) -> None:
    """FileExistsError where a new run from a model that --base names would be written beside another tokenizer."""
    written = output_dir() / "tokenizer"
    if found.base is None or not written.exists():
        return
    if Tokenizer.load(written).digest() != Tokenizer.load(found.tokenizer).digest():
        raise FileExistsError(
            f"{written} is another tokenizer than that of --base={found.base.name}, and the models there need it: "
            "choose another base directory for this run with --output-dir"
        )


def write_tokenizer(found: find.Found | None) -> None:
    """Save the tokenizer of the model that a run starts from, else the base directory's, where the run is written to
    and there is none, so that it is a base directory."""
    written = output_dir() / "tokenizer"
    elsewhere = output_dir() != kept_dir() or (found and found.base)
    if elsewhere and not written.exists():
        Tokenizer.load(found.tokenizer if found else base_dir() / "tokenizer").save(written)
