"""The documents in files: parquet shards, JSON lines and plain text."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanochat_jax.data.shards import Documents
from nanochat_jax.tasks.chat_forms import form_of
from nanochat_jax.tokenizer.conversation import split_conversation

SUFFIXES = (".parquet", ".jsonl", ".txt", ".md")  # files that are read in a folder; one that is named may have any
MAX_LINE = 64 << 20  # bytes of a JSON line, so that a file without line ends does not fill the memory


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The paths, with a folder replaced by its files that end in SUFFIXES, in order of name.

    FileNotFoundError: a path does not exist, or a folder has no such files. ValueError: a shard holds no text.
    """
    files = []
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
            if not found:
                raise FileNotFoundError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
            files += found
        elif not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        else:
            files.append(path)
    for path in files:
        if path.suffix == ".parquet":
            Documents(path)  # checks its footer
    return files


def read_texts(files: Iterable[Path], doc_cap: int, max_chars: int) -> Iterator[str]:
    """The documents of all files, at most `doc_cap` characters of each, up to the one that passes `max_chars`.

    A .parquet file's are in the column "text"; a .jsonl file's lines have a key "text", or are conversations, whose
    contents are documents. Any other file is plain text, which is cut into documents at line ends, and within a line
    only where that is longer than the cap, so nothing is lost. ValueError names the place of what is not text.
    """
    chars = 0
    for path in files:
        if path.suffix == ".parquet":
            documents = _parquet_texts(path)
        elif path.suffix == ".jsonl":
            documents = _jsonl_texts(path)
        else:
            documents = _plain_texts(path, doc_cap)
        for document in documents:
            yield document[:doc_cap]
            chars += min(len(document), doc_cap)
            if chars > max_chars:
                return


@contextlib.contextmanager
def naming_read_errors(path: Path) -> Iterator[None]:
    """What the system refuses while `path` is opened and read becomes an OSError of one sentence."""
    try:
        yield
    except OSError as e:
        raise type(e)(f"{path} cannot be read ({e.strerror or e})") from e


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """(place, value) of each line that is not white space; the place is path:line. ValueError: a line is not JSON."""
    with naming_read_errors(path), open(path, "rb") as f:
        for number, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), start=1):
            place = f"{path}:{number}"
            if len(line) > MAX_LINE:
                raise ValueError(f"{place}: a line may have at most {MAX_LINE:,} bytes: is this a file of JSON lines?")
            if not line.strip():
                continue
            try:
                yield place, json.loads(line.decode().removeprefix("\ufeff"))
            except UnicodeDecodeError as e:
                raise ValueError(f"{place}: not UTF-8: byte 0x{line[e.start]:02x} at column {e.start + 1}") from e
            except json.JSONDecodeError as e:
                raise ValueError(f"{place}: not JSON: {e.msg} at column {e.colno}") from e
            except (RecursionError, ValueError) as e:  # ValueError: a number of thousands of digits
                raise ValueError(f"{place}: not JSON that can be read: {e}") from e


def _jsonl_texts(path: Path) -> Iterator[str]:
    for place, value in _json_lines(path):
        if isinstance(value, dict) and "text" in value:
            if not isinstance(value["text"], str):
                raise ValueError(f'{place}: "text" must be a string, got {type(value["text"]).__name__}')
            yield value["text"]
        else:
            try:
                row = {"messages": value} if isinstance(value, list) else value
                segments = split_conversation({"messages": form_of(row).messages(row)})
            except ValueError as e:
                raise ValueError(f'{place}: neither an object with "text" nor a conversation: {e}') from e
            yield from (segment.text for segment in segments if not segment.special)


def _parquet_texts(path: Path) -> Iterator[str]:
    documents = Documents(path)
    for row in range(len(documents)):
        try:
            yield documents[row]
        except ValueError as e:  # UnicodeDecodeError is one: Arrow does not check that text is UTF-8
            raise ValueError(f"{path}, row {row}: {e}") from e


def _plain_texts(path: Path, doc_cap: int) -> Iterator[str]:
    document, advice = "", "convert it to UTF-8, or leave it out"
    with naming_read_errors(path), open(path, encoding="utf-8-sig", newline="") as f:
        try:
            while line := f.readline(doc_cap):
                if "\0" in line:
                    raise ValueError(f"{path} holds NUL bytes (UTF-16, or no text at all?): {advice}")
                if len(document) + len(line) > doc_cap:
                    yield document
                    document = ""
                document += line
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is not UTF-8 text (byte 0x{e.object[e.start]:02x}): {advice}") from e
    if document:
        yield document
