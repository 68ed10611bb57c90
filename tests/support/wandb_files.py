"""What wandb has written to its own files where it is offline."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768  # bytes of a LevelDB log, at whose ends records are split


def files(folder: Path) -> list[Path]:
    """Of the runs of wandb in a run's folder, the earliest first."""
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime_ns)


def records(file: Path) -> Iterator[Record]:
    """A LevelDB log of protocol buffers behind a header of 7 bytes."""
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack("<4xHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def numbers(items) -> dict:
    found = {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in items}
    return {key: value for key, value in found.items() if not key.startswith("_")}


def history(file: Path) -> list[dict]:
    """The rows that wandb draws, without what it adds itself."""
    return [numbers(r.history.item) for r in records(file) if r.WhichOneof("record_type") == "history"]


def summary(file: Path) -> dict:
    """The last value of every number of the summary."""
    last = {}
    for record in records(file):
        if record.WhichOneof("record_type") == "summary":
            last |= numbers(record.summary.update)
    return last


def config(file: Path) -> dict:
    """The settings that the run's page shows."""
    (run,) = [r.run for r in records(file) if r.WhichOneof("record_type") == "run"]
    return {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}


def tables(file: Path) -> list[tuple[str, list[dict]]]:
    """(name, rows) of each table, in the order in which they were logged."""
    found = []
    for row in history(file):
        for name in (key.removesuffix(".path") for key in row if key.endswith(".path")):
            table = json.loads((file.parent / "files" / row[f"{name}.path"]).read_text(encoding="utf-8"))
            found.append((name, [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]))
    return found
