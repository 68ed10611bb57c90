"""The rows of a JSON file: its lines, or the elements of the one array that it is. The bytes stay as they are, and a
row is parsed when it is asked for, because Python's objects of a large file would take several times its size."""

import hashlib
import json
import re
from collections.abc import Iterator

from nanochat_jax.tasks.chat_forms import form_of

BOM = b"\xef\xbb\xbf"
SPACE = re.compile(rb"[ \t\r\n]*+")
FIRST_LOOK = 1 << 16  # bytes in which most elements of an array end
ELEMENT = json.JSONDecoder(parse_int=str, parse_float=str)  # tells where one ends, whatever its numbers are
CUT_IN_A_WORD = 12  # more letters than "-Infinity" has, the longest word in JSON as Python reads it

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
            end = _element_end(data, start, self._longest)
            if end - start > self._longest:
                yield start, end, line
                return
            at = _skip(data, end)
            mark = data[at : at + 1]
            if mark not in (b",", b"]", b""):
                yield start, at + 1, line  # something behind the value: to parse it says so
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
        form_of(parse(data[inside : _element_end(data, inside, longest)]))
    except ValueError:
        return False
    return True


def _element_end(data: bytes, start: int, longest: int) -> int:
    """Where the element that begins at `start` ends; behind its first fault where it is no JSON, and more than
    `longest` behind its start where it is that long, of which no more is read."""
    size = FIRST_LOOK
    while True:
        size = min(size, longest + 1)
        text = data[start : start + size].decode(errors="surrogateescape")
        cut = start + size < len(data)
        try:
            _, end = ELEMENT.raw_decode(text)
        except RecursionError:
            return start + size
        except json.JSONDecodeError as e:
            if cut and size <= longest:
                size *= 4
                continue
            if cut and (e.msg.startswith("Unterminated") or e.pos > len(text) - CUT_IN_A_WORD):
                return start + size
            end = e.pos + 1
        return start + len(text[:end].encode(errors="surrogateescape"))


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
