"""The columns of metrics.jsonl, as a run has written them and as docs/training.md tells them."""

import json
import re
from pathlib import Path

TRAINING = Path(__file__).parents[2] / "docs/training.md"


def documented() -> set[str]:
    """Names in the first column of the tables of columns."""
    section = TRAINING.read_text(encoding="utf-8").partition("\n### Columns\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", re.sub(r"\([^)]*\)", "", cell))}


def unknown(folder: Path) -> set[str]:
    """Columns of a run's metrics.jsonl that the page does not tell; pass@1 is there as pass@k, a task's as TASK."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    names = {name for line in lines for name in json.loads(line)}
    general = {re.sub(r"^pass@\d+", "pass@k", re.sub(r"^chatcore/.*", "chatcore/TASK", name)) for name in names}
    assert {"step", "time", "loss"} <= general
    return general - documented()
