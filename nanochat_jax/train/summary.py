"""The lines that a run begins and ends with: what it is about to do, and what came of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_jax.cli.device import pages_note
from nanochat_jax.distributed.describe import heads_note, parameter_table, replicas_note
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files.paths import kept_dir, output_dir
from nanochat_jax.model.cost import flops_per_token, parameter_counts
from nanochat_jax.train.plan import Plan
from nanochat_jax.train.start import Start

LOWER_IS_BETTER = {"val_bpb": "validation bits per byte", "loss": "loss"}
HIGHER_IS_BETTER = {"core_metric": "CORE", "pass@1": "held-out pass@1", "chatcore": "ChatCORE", "reward": "reward"}
SHOWN_WITHOUT = {"loss": "val_bpb", "reward": "pass@1"}  # shown only where the other one was not measured
NEXT = {  # stage's folder -> what is usually typed next; {tag} of the run
    "base_checkpoints": "python -m nanochat_jax.sft --model-tag {tag}",
    "chatsft_checkpoints": "python -m nanochat_jax.chat --model-tag {tag}",
    "chatrl_checkpoints": "python -m nanochat_jax.chat --source rl --model-tag {tag}",
}


def describe_run(start: Start, plan: Plan, total: int) -> None:
    """Print what a user should know before the first step: sizes, and what does not divide."""
    cfg, params = start.cfg, plan.abstract_state.params
    lines, notes = parameter_table(params, plan.mesh, plan.replicate)
    if not plan.replicate and "replica" not in (cfg.mesh or ""):
        notes += replicas_note(plan.model.n_embd, plan.mesh)
    notes += heads_note(plan.model.n_kv_head, plan.mesh)
    notes += pages_note(plan.mesh.devices.flat[0].platform)
    for line in [*(lines if cfg.verbose else []), *(f"NOTE: {note}" for note in notes)]:
        print0(line)
    counts = parameter_counts(plan.model)
    if cfg.verbose:
        print0(f"Parameters by kind: {', '.join(f'{name} {count:,}' for name, count in counts.items())}")
    flops = flops_per_token(plan.model, plan.batch.T)
    print0(f"Parameters: {counts['total']:,} | FLOPs per token: {flops:.3e} | steps: {total}")


def end_lines(records: Sequence[Mapping[str, Any]], folder: Path, step: int, seconds: float) -> list[str]:
    """The lines about a run that has done all its steps.

    records: of metrics.jsonl, see `read_metrics`. folder: of the run. step: of its last checkpoint. seconds: since this
    start of the run."""
    minutes = f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    lines = [f"Done: {step:,} steps, {minutes} since this start"]
    for name, title in (LOWER_IS_BETTER | HIGHER_IS_BETTER).items():
        by_step = {r["step"]: r for r in records if isinstance(r.get(name), int | float)}
        if not by_step or _measured(records, SHOWN_WITHOUT.get(name, "")):
            continue
        best = (min if name in LOWER_IS_BETTER else max)(by_step, key=lambda at: by_step[at][name])
        last = max(by_step)
        line = f"{title}: {_number(by_step[last], name)} at step {last:,}"
        if best != last:
            line += f", best {_number(by_step[best], name)} at step {best:,}"
        lines.append(line)
    lines.append(f"The model is in {folder / str(step)}")
    if folder.parent.name in NEXT:
        base = "" if output_dir() == kept_dir() else f"NANOCHAT_BASE_DIR={output_dir()} "
        lines.append(f"Next: {base}{NEXT[folder.parent.name].format(tag=folder.name)}")
    return lines


def _measured(records: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(isinstance(record.get(name), int | float) for record in records)


def _number(record: Mapping[str, Any], name: str) -> str:
    """A measured value, with its 95 % interval where that was measured too."""
    low, high = record.get(f"{name}_low"), record.get(f"{name}_high")
    interval = isinstance(low, int | float) and isinstance(high, int | float)
    return f"{record[name]:.4f}" + (f" ({low:.4f} to {high:.4f})" if interval else "")
