"""A run's page in wandb: the numbers of metrics.jsonl, texts as tables, and a summary. `MetricsLog` alone uses it."""

import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_jax.distributed.processes import print0

# Of two values; the summary has the best and the last one.
BETTER = {"val_bpb": min, "core_metric": max, "pass@1": max, "chatcore": max}
NAME_LENGTH = 100  # of a run's id, without its last part; wandb takes 128 in all
TABLE_ROWS = 256  # the first of more: wandb keeps every table that is logged, for good
TASKS = "chatcore/"  # what a task's accuracy is called by


class WandbLog:
    """A run of wandb that goes on where metrics.jsonl does.

    Its id is in metrics.jsonl, so that a resumed run is the same one, and a run that begins anew in the same folder is
    another. A history of wandb only grows: what an earlier process has sent, and a resumed run computes again to the
    same bits, is not sent twice. The last 15 seconds of a process that is killed may be missing in wandb; metrics.jsonl
    has them. A run that gets its name when it is resumed has its history from the first step on.

    No error of wandb's ends a run: a line says so once, and metrics.jsonl is written on.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        config: dict,
        *,
        project: str,
        directory: Path,
        before: Sequence[Mapping[str, Any]] = (),
        resumed_at: int | None = None,
    ):
        """directory: where wandb keeps its files. before: the records of the run that is resumed, with those of later
        steps than the one that it goes on from. ValueError: wandb cannot start."""
        import wandb  # a second to import: only when asked for

        stem = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{folder.parent.name}-{folder.name}-{name}")[:NAME_LENGTH]
        found, self.sent, self._known = sent_before(before, stem)
        self.id = found or f"{stem}-{secrets.token_hex(4)}"
        self._tokens, self._seconds, self._best = 0, 0.0, {}
        self._late: dict[str, Any] = {}
        self._table = wandb.Table
        names = {"project": project, "name": name, "id": self.id, "dir": str(directory)}
        try:
            self._run = wandb.init(**names, resume="allow", config=config)
        except wandb.Error as e:
            raise ValueError(
                f"wandb cannot start: {str(e).rstrip('. ')}; set WANDB_MODE=offline, or leave out --run"
            ) from e
        self._run.define_metric("*", step_metric="step")
        for record in before:
            if record["step"] <= resumed_at and record.get("event") != "wandb":
                self.log(record["step"], {key: record[key] for key in record.keys() - {"step", "time"}})

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """A record of metrics.jsonl: its numbers, lists of texts as tables of their names, and tasks' accuracies."""
        self._surviving(self._log, step, values)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of a step that is logged; rows: of the same columns, which are numbers or texts."""
        if rows and step > self.sent:
            self._surviving(self._send, step, {}, {name: rows})

    def summarise(self, **values: Any) -> None:
        """Numbers or texts of the run as a whole; of each name the last one stays."""
        self._surviving(lambda: self._run.summary.update(values))

    def finish(self) -> None:
        """Wait until wandb has everything."""
        if self._late:
            self._surviving(lambda: self._run.log(self._late, step=self.sent + 1))
        self._surviving(lambda: self._run.finish())

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._summarise_measured(step, values)
        if (step, values.get("measured")) in self._known:
            return
        row = {key: value for key, value in values.items() if isinstance(value, int | float)}
        tables = {key: [{"step": step, "text": t} for t in value] for key, value in values.items() if _texts(value)}
        tasks = {key.removeprefix(TASKS): value for key, value in row.items() if key.startswith(TASKS)}
        if tasks:
            tables[f"{TASKS}tasks"] = [{"step": step, "task": t, "accuracy": a} for t, a in tasks.items()]
        self._send(step, row, tables)

    def _send(self, step: int, row: dict[str, Any], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """All of a step is one row of wandb's. What comes late, as a measurement that an earlier process did not end,
        is sent with the next step's row, because wandb takes nothing more of a step that later ones have followed."""
        for name, rows in tables.items():
            data = [list(r.values()) for r in rows[:TABLE_ROWS]]
            row |= {name: self._table(columns=list(rows[0]), data=data)}
        self._late |= {"step": step, **row}
        if step > self.sent:
            row, self._late = self._late, {}
            self._run.log(row, step=step)

    def _summarise_measured(self, step: int, values: Mapping[str, Any]) -> None:
        self._tokens += values.get("trained_tokens") or 0
        self._seconds += values.get("seconds") or 0.0
        for name, better in BETTER.items():
            value = values.get(name)
            if value is None or not math.isfinite(value):
                continue
            best = self._best[name] = better(value, self._best.get(name, value))
            at = {"": value, "_step": step, "_tokens": self._tokens, "_seconds": round(self._seconds, 3)}
            for kind in ("last", "best") if value == best else ("last",):
                self._run.summary.update({f"{name}/{kind}{key}": number for key, number in at.items()})

    def _surviving(self, act: Callable, *arguments: Any) -> None:
        if self._run is None:
            return
        try:
            act(*arguments)
        except Exception as e:  # a full disk, a service that is gone, or whatever else wandb makes of it
            self._run = None
            print0(f"WARNING: wandb has failed and gets no more of this run, metrics.jsonl does: {e}")


def sent_before(records: Sequence[Mapping[str, Any]], stem: str) -> tuple[str | None, int, set]:
    """Of the run of wandb that these records of metrics.jsonl went to: (its id, the last step that was sent, (step,
    name of the measurement or None) of each record); (None, -1, nothing) where none begins with `stem`."""
    found, sent, known, own = None, -1, set(), False
    for record in records:
        if record.get("event") == "wandb":
            own = str(record.get("id")).rpartition("-")[0] == stem
            if own:
                found, sent = record["id"], max(sent, record.get("sent", -1))
        elif own:
            sent = max(sent, record["step"])
            known.add((record["step"], record.get("measured")))
    return found, sent, known


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
