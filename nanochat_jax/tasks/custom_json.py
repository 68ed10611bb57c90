"""Your own conversations: a file of JSON lines, of one JSON array, or of parquet, or the parquet files of a dataset of
the hub, in any form of chat_forms.py."""

import hashlib
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Unpack

import numpy as np

from nanochat_jax.distributed.processes import print0
from nanochat_jax.files.digest import file_digest
from nanochat_jax.files.parquet import ParquetRows, read_footer
from nanochat_jax.tasks import chat_forms
from nanochat_jax.tasks.chat_forms import Form, conversation_of, form_of, quoted, unread_keys
from nanochat_jax.tasks.hub import split_files
from nanochat_jax.tasks.json_rows import JSONRows
from nanochat_jax.tasks.sources import source_hint
from nanochat_jax.tasks.task import Slice, Task

SHOWN = 20  # bad rows that an error spells out
COUNTED = 100_000  # bad rows after which a file is not read further
HUB = re.compile(r"hub:([^/:]+/[^/:]+)(?::(?:([^/:]+)/)?([^/:]+))?")  # hub:owner/dataset:subset/split
LONGEST_LINE = 16 << 20  # bytes: Python's objects of a line take up to 30 times its size


class CustomJSON(Task):
    """CustomJSON(source): the conversations of a file or of hub:owner/dataset, each row one, as the first row has them.

    A conversation has at least two messages of text that alternate from user, after a message of the role system if
    there is one; other keys beside "messages" are kept; lines of white space are skipped. One ValueError reports all
    bad rows. nanochat takes lines that are lists of messages, and a missing file for an empty one, where this raises
    FileNotFoundError.
    """

    def __init__(
        self,
        source: Path | str,
        *,
        data_dir: Path | str | None = None,
        log: Callable = print0,
        longest_line: int = LONGEST_LINE,
        allow_empty: bool = False,
        **slice_: Unpack[Slice],
    ):
        """source: a path, or "hub:owner/dataset", with ":split" or ":subset/split" behind it if not default/train.

        data_dir: where datasets are looked for first, see hub.py. longest_line: bytes of a row of JSON, above which it
        is a bad one. allow_empty: an answer may be empty."""
        super().__init__(**slice_)
        self.source, self.allow_empty = str(source), allow_empty
        if self.source.startswith("hub:"):
            self._rows = ParquetTable(hub_files(self.source, data_dir), self.source)
        else:
            self._rows = open_file(Path(source), longest_line, log)
        self.form, self._spans = self._check()
        if self.form:
            unread = unread_keys(self._rows.keys(), self.form)
            n = f"{len(self._spans):,} conversation" + "s" * (len(self._spans) != 1)
            log(f"{self.source}: {n} {self.form.title}" + f" (not used: {quoted(unread)})" * bool(unread))

    def num_examples(self) -> int:
        return len(self._spans)

    def get_example(self, index: int) -> dict:
        value = self._rows.value(tuple(self._spans[index].tolist()))
        return conversation_of(value, self.form, self.allow_empty)

    def place(self, index: int) -> str:
        """Where conversation `index` of this slice is in the file."""
        source = self.source_index(index)
        return f"{self.source}{self._rows.place(tuple(self._spans[source].tolist()), source)}"

    def fingerprint(self) -> str:
        forms = hashlib.sha256(Path(chat_forms.__file__).read_bytes()).hexdigest()
        return self.fingerprint_of(self._rows.digest(), forms)

    def _check(self) -> tuple[Form | None, np.ndarray]:
        """The form of the first row that has one, and the span of each row, int64 [N,...]. ValueError: bad rows."""
        form, spans, shown, bad = None, array("q"), [], 0
        for number, span in enumerate(self._rows.spans()):
            try:
                value = self._rows.value(span)
                form = form or form_of(value)
                conversation_of(value, form, self.allow_empty)
                spans.extend(span)
            except ValueError as e:
                bad += 1
                if bad <= SHOWN:
                    shown.append(f"{self.source}{self._rows.place(span, number)}: {e}")
                if bad == COUNTED:
                    break
        if bad:
            if bad > SHOWN:
                more = f"{bad - SHOWN:,} more" + ", the rest was not read" * (bad == COUNTED)
                shown.append(f"... and {more}")
            what = f"{self._rows.noun} is" if bad == 1 else f"{self._rows.noun}s are"
            raise ValueError(f"{bad:,} {what} no conversation, fix or remove:\n" + "\n".join(shown))
        return form, np.frombuffer(spans, np.int64).reshape(-1, self._rows.span_size)


class ParquetTable:
    """The rows of parquet files, one after the other, with the methods of JSONRows; a span is the number of a row."""

    noun, span_size = "row", 1

    def __init__(self, files: list[Path], source: str):
        """source: what an error calls them. ValueError: they are damaged, or have not the columns of any form."""
        self._names = read_footer(files[0]).schema.to_arrow_schema().names
        try:
            form = form_of(dict.fromkeys(self._names))
        except ValueError as e:
            raise ValueError(f"{source} cannot be read as conversations: {e}") from e
        columns = (*form.keys, *(name for name in form.optional if name in self._names))
        self._rows = ParquetRows(files, columns)

    def spans(self) -> Iterator[tuple[int]]:
        """ValueError: the files are damaged, which is not a fault of each row."""
        _, starts = self._rows.batches
        return ((row,) for row in range(starts[-1]))

    def value(self, span: tuple[int]) -> dict:
        return self._rows[span[0]]

    def place(self, span: tuple[int], number: int) -> str:
        return f", row {number + 1}"

    def keys(self) -> list[str]:
        return self._names

    def digest(self) -> list[str]:
        return [file_digest(path) for path in self._rows.files]


def hub_files(source: str, data_dir: Path | str | None) -> list[Path]:
    """The parquet files of hub:owner/dataset:subset/split. ValueError: it is written otherwise; see split_files."""
    if not (found := HUB.fullmatch(source)):
        raise ValueError(f"a dataset of the hub is named as hub:owner/dataset:split, got {source!r:.100}")
    repo, subset, split = found.groups()
    return split_files(repo, subset or "default", split or "train", data_dir)


def open_file(path: Path, longest_line: int, log: Callable) -> JSONRows | ParquetTable:
    """The rows of a file; how it begins says what it is. ValueError, FileNotFoundError: it cannot be read."""
    if not path.exists():
        missing = f"{path} does not exist{source_hint(path)}"
        log(f"Warning: File {missing}")
        raise FileNotFoundError(missing)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    with open(path, "rb") as f:
        if f.read(4) == b"PAR1":
            return ParquetTable([path], str(path))
        f.seek(0)
        data = f.read()
    try:
        return JSONRows(data, longest_line)
    except ValueError as e:
        raise ValueError(f"{path} {e}") from e
