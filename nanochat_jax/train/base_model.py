"""The model that a fine-tuning run starts from, and its tokenizer."""

from nanochat_jax.checkpoints import find
from nanochat_jax.files.paths import base_dir, kept_dir, output_dir
from nanochat_jax.flags.stage import StageConfig
from nanochat_jax.tokenizer import Tokenizer


def base_model(cfg: StageConfig, source: str) -> find.Found:
    """The model that a new run starts from; errors of `find_model`."""
    return find.find_model(source, cfg.model_tag, cfg.model_step, cfg.base, optimizer=bool(cfg.load_optimizer))


def run_tokenizer(cfg: StageConfig) -> Tokenizer:
    """The tokenizer of a run that starts from a model: the base directory's, or that of the model which --base names.

    FileExistsError: the directory that the run is written to has another one. FileNotFoundError: there is none."""
    written = output_dir() / "tokenizer"
    if cfg.base is None or (cfg.resume and written.exists()):
        has_own = not (kept_dir() / "tokenizer").exists() and written.exists()
        return Tokenizer.load(written if has_own else base_dir() / "tokenizer")
    tokenizer = Tokenizer.load(base_model(cfg, cfg.source).tokenizer)
    if written.exists() and Tokenizer.load(written).digest() != tokenizer.digest():
        raise FileExistsError(
            f"{written} is another tokenizer than that of --base={cfg.base}, and models there need it: choose another "
            "base directory for this run with --output-dir"
        )
    return tokenizer
