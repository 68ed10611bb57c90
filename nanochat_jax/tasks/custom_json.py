"""Your own conversations: a JSON lines file."""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Unpack

import numpy as np

from nanochat_jax.distributed.processes import print0
from nanochat_jax.tasks.task import Slice, Task, message_fault

SHOWN = 20  # bad lines that an error spells out
LONGEST_LINE = 16 << 20  # bytes: Python's objects of a line take up to 30 times its size

# Files that nanochat's guides tell users to fetch.
SOURCES = {
    "identity_conversations.jsonl": "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl",
    "words_alpha.txt": "https://raw.githubusercontent.com/dwyl/english-words/master/words_alpha.txt",
}


def source_hint(path: Path) -> str:
    """The end of a sentence: how to get the known file `path`, nothing for any other."""
    url = SOURCES.get(path.name)
    return f"; to download it: curl -L -o {path} {url}" if url else ""


class CustomJSON(Task):
    """CustomJSON(path): one conversation a line, a list of messages or an object that has them under "messages".

    At least two messages of text that alternate from user; other keys are kept; lines of white space are skipped. One
    ValueError reports all bad lines. nanochat refuses the object form, and takes a missing file for an empty one, where
    this raises FileNotFoundError. The file's bytes are kept and a conversation is parsed when it is asked for, because
    Python objects of a large file would take several times its size.
    """

    def __init__(
        self, path: Path | str, *, log: Callable = print0, longest_line: int = LONGEST_LINE, **slice_: Unpack[Slice]
    ):
        """longest_line: bytes; a longer one is a bad line."""
        super().__init__(**slice_)
        self.path = Path(path)
        if not self.path.exists():
            missing = f"{self.path} does not exist{source_hint(self.path)}"
            log(f"Warning: File {missing}")
            raise FileNotFoundError(missing)
        if not self.path.is_file():
            raise ValueError(f"{self.path} is not a file")
        self._data = self.path.read_bytes()
        spans, faults, at = [], [], 0
        for number in itertools.count(1):
            end = self._data.find(b"\n", at)
            end = len(self._data) if end < 0 else end
            try:
                if end - at > longest_line:
                    raise ValueError(f"{end - at:,} bytes, more than --longest-line={longest_line}")
                if _parse(self._data[at:end]) is not None:
                    spans.append((at, end))
            except ValueError as e:
                faults.append((number, e))
            at = end + 1
            if at > len(self._data):
                break
        if faults:
            shown = [f"{self.path}:{number}: {e}" for number, e in faults[:SHOWN]]
            if len(faults) > SHOWN:
                shown.append(f"... and {len(faults) - SHOWN:,} more")
            what = "line is" if len(faults) == 1 else "lines are"
            raise ValueError(f"{len(faults):,} {what} no conversation, fix or remove:\n" + "\n".join(shown))
        self._spans = np.array(spans, np.int64).reshape(-1, 2)

    def num_examples(self) -> int:
        return len(self._spans)

    def get_example(self, index: int) -> dict:
        a, b = self._spans[index].tolist()
        return _parse(self._data[a:b])

    def fingerprint(self) -> str:
        return self.fingerprint_of(hashlib.sha256(self._data).hexdigest())


def _parse(line: bytes) -> dict | None:
    """A line's conversation, None for white space; ValueError, in few words, for anything else."""
    try:
        text = line.decode()
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8: byte 0x{line[e.start]:02x} at column {e.start + 1}") from e
    if text.startswith("\ufeff"):
        raise ValueError("starts with a byte order mark, save the file as UTF-8 without one")
    text = text.strip()
    if not text:
        return None
    try:
        data = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON: {e.msg} at column {e.colno}") from e
    except RecursionError:
        raise ValueError("not a conversation: nested too deeply") from None
    data = {"messages": data} if isinstance(data, list) else data
    if not isinstance(data, dict):
        raise ValueError(f'must be a list of messages or an object with "messages", got {type(data).__name__}')
    if "messages" not in data:
        raise ValueError('an object must have "messages"')
    if fault := message_fault(data["messages"]):
        raise ValueError(fault)
    return data


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list) -> dict:
    made = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"key {key!r:.40} is there twice, which one counts is anybody's guess")
        made[key] = value
    return made
