"""Put a new tokenizer into its folder: all of its files or none, and not over one that models need."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nanochat_jax.tokenizer.bpe import Tokenizer

FILES = ("token_bytes.pt", "tokenizer.pkl", "tokenizer.json")  # moved into place in this order


def refuse_to_replace(folder: Path, overwrite: bool) -> None:
    """FileExistsError where `folder` holds a tokenizer and the user does not want it replaced."""
    held = [name for name in ("tokenizer.json", "tokenizer.pkl") if os.path.exists(folder / name)]
    if held and not overwrite:
        raise FileExistsError(
            f"{folder / held[0]} exists, and models trained with that tokenizer need it: choose another --output, or "
            "give --overwrite"
        )


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder on the disk of `folder`, which need not exist. OSError: nothing can be written there."""
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    with contextlib.ExitStack() as stack:
        with naming_write_errors(folder):
            made = tempfile.TemporaryDirectory(dir=nearest, prefix=".tokenizer-", ignore_cleanup_errors=True)
            staging = Path(stack.enter_context(made))
            (staging / "trial").write_bytes(b"\0")
        yield staging


def install(tokenizer: Tokenizer, staging: Path, folder: Path) -> None:
    """Write the tokenizer for us and for nanochat. OSError: it cannot be written, and what was in `folder` stays."""
    with naming_write_errors(folder):
        tokenizer.save(staging)
        tokenizer.save_for_nanochat(staging)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            os.replace(staging / name, folder / name)


@contextlib.contextmanager
def naming_write_errors(folder: Path) -> Iterator[None]:
    """What the system refuses becomes an OSError of one sentence with what to do about `folder`."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or e
        raise OSError(f"{folder} cannot be written ({reason}): free some space, or choose another --output") from e
