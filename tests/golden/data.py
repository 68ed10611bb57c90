"""Where the golden arrays are, and what is in them: tests read names, shapes and counts from the folder.

The folder is NANOCHAT_GOLDEN, else ../shared/golden beside the checkout, else the small subset beside these tests.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve()
SUBSET = HERE.parents[1] / "golden_subset"


def _find() -> Path:
    if named := os.environ.get("NANOCHAT_GOLDEN"):
        if not Path(named).is_dir():  # else every test would be skipped, and look as if it had passed
            raise FileNotFoundError(f"NANOCHAT_GOLDEN={named} must be a folder")
        return Path(named).absolute()
    shared = HERE.parents[3] / "shared" / "golden"
    return shared if shared.is_dir() else SUBSET


GOLDEN = _find()


class Record(dict):
    """Named entries of a golden file; the test is skipped, with the reason, where it asks for one that is not there."""

    def __init__(self, source: str, entries: dict):
        super().__init__(entries)
        self.source = source

    def __missing__(self, key):
        pytest.skip(f"{self.source} in the golden folder {GOLDEN} has no {key!r}")


def path(relative: str) -> Path:
    """GOLDEN/relative; the test is skipped, with the reason, where this folder does not hold it."""
    found = GOLDEN / relative
    if not found.exists():
        pytest.skip(f"{relative} is not in the golden folder {GOLDEN}")
    return found


def rows(relative: str) -> list[dict]:
    """The lines of a .jsonl file."""
    return [json.loads(line) for line in path(relative).read_text(encoding="utf-8").split("\n") if line.strip()]


def load_json(relative: str) -> Record:
    return Record(relative, json.loads(path(relative).read_text(encoding="utf-8")))


def arrays(relative: str) -> Record:
    """The arrays of an .npz file by name."""
    with np.load(path(relative)) as npz:
        return Record(relative, {name: npz[name] for name in npz.files})


def tokenizers() -> list[str]:
    """Names of the base directories under checkpoints/ that hold a tokenizer, for parametrize."""
    named = [p.parents[1].name for p in (GOLDEN / "checkpoints").glob("*/tokenizer/tokenizer.pkl")]
    return sorted(named) or ["(none)"]


def names(folder: str, suffix: str = ".npz") -> list[str]:
    """File names without suffix under GOLDEN/folder, for parametrize; ["(none)"] where the folder is absent."""
    return sorted(p.name.removesuffix(suffix) for p in (GOLDEN / folder).glob(f"*{suffix}")) or ["(none)"]


def checkpoints() -> list[str]:
    """Names of the base directories under checkpoints/, for parametrize."""
    return sorted(p.name for p in (GOLDEN / "checkpoints").glob("*") if p.is_dir()) or ["(none)"]
