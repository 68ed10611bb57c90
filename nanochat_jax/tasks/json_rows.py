"""The rows of a JSON file: its lines, or the elements of the one array that it is. The bytes stay as they are, and a
row is parsed when it is asked for, because Python's objects of a large file would take several times its size."""

import hashlib
import json
import re
from collections.abc import Iterator

from nanochat_jax.tasks.chat_forms import form_of

BOM = b"\xef\xbb\xbf"
SPACE = re.compile(rb"[ \t\r\n]*+")
STRING = rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+(?:"|\Z)'  # without an end it reaches to the file's: nothing is read twice
FLAT = rb'[\[{](?:[^\[\]{}"]++|' + STRING + rb")*+[\]}]"  # an array or object without another one in it
INNER = FLAT + rb"(?:[ \t\r\n,]*+" + FLAT + rb")*+"
MARK = re.compile(STRING + b"|" + INNER + rb"|(?P<open>(?:[\[{](?=[\[{]))++|[\[{])|(?P<close>[\]}]++)", re.DOTALL)
VALUE = re.compile(FLAT + b"|" + STRING + rb"|[^\[{,\]]*+", re.DOTALL)
DEEPEST = 100_000  # brackets in each other: far more than Python's JSON reader takes

Span = tuple[int, int, int]  # bytes from and to, and the line in which the row begins, from 1


class JSONRows:
    """spans() are those of the rows, value(span) is what is written there, place(span, number) where that is."""

    span_size = 3

    def __init__(self, data: bytes, longest_line: int):
        """longest_line: bytes of a row, at most. ValueError: the text is UTF-16."""
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("is written in UTF-16: save it as UTF-8")
        self._data, self._longest = data, longest_line
        start = _skip(data, len(BOM) if data.startswith(BOM) else 0)
        self.is_array = _is_array(data, start, longest_line)
        self._start = start + self.is_array
        self.noun = "row" if self.is_array else "line"

    def spans(self) -> Iterator[Span]:
        """Of each row, whatever is in it; the last one where it cannot be told what follows."""
        return self._elements() if self.is_array else self._lines()

    def _lines(self) -> Iterator[Span]:
        data, at, line = self._data, self._start, self._data.count(b"\n", 0, self._start) + 1
        while at < len(data):
            end = data.find(b"\n", at)
            end = len(data) if end < 0 else end
            if end - at > self._longest or data[at:end].decode(errors="replace").lstrip("\ufeff").strip():
                yield at, end, line
            after = _skip(data, end)
            at, line = after, line + data.count(b"\n", end, after)

    def _elements(self) -> Iterator[Span]:
        data, at, counted, line = self._data, self._start, 0, 1
        while True:
            start = _skip(data, at)
            counted, line = start, line + data.count(b"\n", counted, start)
            end = _value_end(data, start, start + self._longest)
            if end - start > self._longest:
                yield start, end, line  # which need not be where it ends, so what follows is not looked at
                return
            at = _skip(data, end)
            mark = data[at : at + 1]
            if end == start or mark not in (b",", b"]", b""):
                yield start, at + 1, line  # no value, or something behind it: to parse it says what is wrong
                return
            yield start, end, line
            if not mark:
                yield at, at, line  # the array does not end: nor does this parse
                return
            at += 1
            if mark == b"]":
                if _skip(data, at) < len(data):
                    yield at - 1, len(data), line  # something after the array, which does not parse either
                return

    def value(self, span: Span) -> object:
        """ValueError, in few words: it is too long, or no JSON, or has two meanings."""
        start, end, _ = span
        if end - start > self._longest:
            raise ValueError(f"{end - start:,} bytes, more than --longest-line={self._longest}")
        return parse(self._data[start:end])

    def place(self, span: Span, number: int) -> str:
        """What follows the path; number: of the row, from 0."""
        return f", row {number + 1} (line {span[2]})" if self.is_array else f":{span[2]}"

    def keys(self) -> list[str]:
        """Of the first row, which must be there; none where it is a list."""
        first = self.value(next(iter(self.spans())))
        return list(first) if isinstance(first, dict) else []

    def digest(self) -> str:
        return hashlib.sha256(self._data).hexdigest()


def _skip(data: bytes, at: int) -> int:
    return SPACE.match(data, at).end()


def _is_array(data: bytes, start: int, longest: int) -> bool:
    """Whether the file is one array of rows, and not lines of which the first is a list of messages."""
    inside = _skip(data, start + 1)
    if data[start : start + 1] != b"[" or data[inside : inside + 1] not in (b"[", b"{"):
        return False
    if data[inside : inside + 1] == b"[" or b"\n" in data[start:inside]:
        return True
    try:
        form_of(parse(data[inside : _value_end(data, inside, inside + longest)]))
    except ValueError:
        return False
    return True


def _value_end(data: bytes, start: int, stop: int) -> int:
    """Where the value that begins at `start` ends. Where it has no end it is the data's, or somewhere after `stop`."""
    end = VALUE.match(data, start).end()
    if end > start or data[start : start + 1] not in (b"[", b"{"):
        return end
    depth = 0
    for mark in MARK.finditer(data, start):
        if mark["open"]:
            depth += len(mark["open"])
        elif mark["close"]:
            if depth <= len(mark["close"]):
                return mark.start() + depth
            depth -= len(mark["close"])
        if mark.end() > stop or depth > DEEPEST:
            return mark.end()
    return len(data)


def parse(text: bytes) -> object:
    """What this JSON says. ValueError, in few words: it is not JSON, or has two meanings."""
    try:
        decoded = text.decode()
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8: byte 0x{text[e.start]:02x} at column {e.start + 1}") from e
    decoded = decoded.removeprefix("\ufeff").strip()
    try:
        return json.loads(decoded, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as e:
        line = f"line {e.lineno} of the row, " if e.lineno > 1 else ""
        raise ValueError(f"not JSON: {e.msg} at {line}column {e.colno}") from e
    except RecursionError:
        raise ValueError("not a conversation: nested too deeply") from None


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list) -> dict:
    made = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"key {key!r:.40} is there twice, which one counts is anybody's guess")
        made[key] = value
    return made
