"""What models the base directory has. Settings and examples: flags/models.py."""

import datetime
import json
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanochat_jax.checkpoints import find, integrity
from nanochat_jax.checkpoints.store import SOURCES
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.main import run_stage
from nanochat_jax.files import bucket
from nanochat_jax.files.json_numbers import finite_or_null
from nanochat_jax.files.paths import kept_dir
from nanochat_jax.flags.models import ModelsConfig
from nanochat_jax.interop.nanochat_model import model_file
from nanochat_jax.model.cost import parameter_counts
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.reports.model_card import MEASURED
from nanochat_jax.reports.runs import evaluated, evaluated_numbers

WIDE = 200  # columns of a file or pipe
COLUMNS = ("stage", "tag", "steps", "parameters", "on disk", "measured", "from", "saved")


def main(cfg: ModelsConfig) -> int:
    """Print the list -> 0."""
    found = list(list_models())
    if cfg.json:
        for model in found:
            print(json.dumps(finite_or_null(model), allow_nan=False))
        return 0
    if not found:
        print(f"no models in {kept_dir()} (NANOCHAT_BASE_DIR names another folder)")
        return 0
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for model in found:
        table.add_row(*(Text(cell) for cell in cells(model)))
    print(f"models in {kept_dir()}")
    Console(width=None if sys.stdout.isatty() else WIDE, highlight=False).print(table)
    return 0


def list_models() -> Iterator[dict[str, Any]]:
    """Facts about the last model of each tag, of each stage the newest first. Nothing is compared with its hashes."""
    for stage, name in SOURCES.items():
        root = kept_dir() / name
        for tag in find.tags_by_time(root):
            folder = root / tag
            ours, theirs = integrity.steps(folder), find.nanochat_steps(folder)
            model = {"stage": stage, "tag": tag, "steps": sorted({*ours, *theirs})}
            model |= {"saved": find.last_saved(folder) / 1e9, "format": "ours" if ours else "nanochat"}
            if model["steps"]:
                try:
                    model |= describe(find.Found(folder, model["steps"][-1], model["steps"][-1] in ours))
                except Exception as e:  # a damaged file is a line of the list, not its end
                    model["error"] = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            yield model


def describe(found: find.Found) -> dict[str, Any]:
    """Facts about a model from its metadata; no parameter is read."""
    meta = find.peek_meta(found)
    settings = meta.get("user_config") if isinstance(meta.get("user_config"), dict) else {}
    facts = {"bytes": size_on_disk(found), "from": None, "total_steps": meta.get("total_steps")}
    config = find.load_config(found) if not found.ours else GPTConfig(**meta["model_config"])
    facts["parameters"] = parameter_counts(config)["total"]
    facts["measured"] = {name: meta[name] for name in MEASURED if isinstance(meta.get(name), int | float)}
    facts["measured"] |= evaluated_numbers(found.folder, find.identity(found))
    facts["evaluated"] = evaluated(found.folder, find.identity(found))
    if found.ours and settings.get("output_tag", 0) != 0 and settings.get("model_tag"):  # sft and rl have an output_tag
        facts["from"] = f"{settings.get('source', 'base')} {settings['model_tag']}, step {settings.get('model_step')}"
    return facts


def size_on_disk(found: find.Found) -> int:
    """Bytes of its files, with those of the optimizer where it is in the same folder."""
    if not found.ours:
        return model_file(found.folder, found.step).stat().st_size
    folder = found.folder / str(found.step)
    if bucket.in_bucket(folder):
        return sum(info.size for info in bucket.list_objects(folder).values())
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def cells(model: dict[str, Any]) -> list[str]:
    """A model's row of the table."""
    steps, total = model["steps"], model.get("total_steps")
    shown = ", ".join(f"{step:,}" for step in steps[-3:])
    shown = ("..., " if len(steps) > 3 else "") + (shown or "none complete")
    if isinstance(total, int) and steps and total > steps[-1]:
        shown += f" of {total:,}"
    when = datetime.datetime.fromtimestamp(model["saved"]).strftime("%Y-%m-%d %H:%M")
    measured = ", ".join(f"{name} {value:.4g}" for name, value in model.get("measured", {}).items())
    if shares := model.get("evaluated"):
        measured += f"{'; ' * bool(measured)}eval: {', '.join(f'{task} {share:.1%}' for task, share in shares.items())}"
    origin = model.get("from") or ("nanochat" if model["format"] == "nanochat" else "")
    return [
        *(model["stage"], model["tag"], shown),
        f"{model['parameters'] / 1e6:,.1f} M" if "parameters" in model else "",
        f"{model['bytes'] / 1e6:,.0f} MB" if "bytes" in model else "",
        *("cannot be read" if "error" in model else measured, origin, when),
    ]


if __name__ == "__main__":
    run_stage(main, parse(ModelsConfig, prog="python -m nanochat_jax.models"))
