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
        return Path(named)
    shared = HERE.parents[3] / "shared" / "golden"
    return shared if shared.is_dir() else SUBSET


GOLDEN = _find()


def path(relative: str) -> Path:
    """GOLDEN/relative; the test is skipped, with the reason, where this folder does not hold it."""
    found = GOLDEN / relative
    if not found.exists():
        pytest.skip(f"{relative} is not in the golden folder {GOLDEN}")
    return found


def rows(relative: str) -> list[dict]:
    """The lines of a .jsonl file."""
    return [json.loads(line) for line in path(relative).read_text(encoding="utf-8").split("\n") if line.strip()]


def load_json(relative: str) -> dict:
    return json.loads(path(relative).read_text(encoding="utf-8"))


def arrays(relative: str) -> dict[str, np.ndarray]:
    with np.load(path(relative)) as npz:
        return {name: npz[name] for name in npz.files}


def names(folder: str, suffix: str = ".npz") -> list[str]:
    """File names without suffix under GOLDEN/folder, for parametrize; ["(none)"] where the folder is absent."""
    return sorted(p.name.removesuffix(suffix) for p in (GOLDEN / folder).glob(f"*{suffix}")) or ["(none)"]


def checkpoints() -> list[str]:
    """Names of the base directories under checkpoints/, for parametrize."""
    return sorted(p.name for p in (GOLDEN / "checkpoints").glob("*") if p.is_dir()) or ["(none)"]
