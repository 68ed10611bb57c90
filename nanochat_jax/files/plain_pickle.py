"""Read pickles of plain data without running anything from them; all files from elsewhere come in through here.

A pickle is a program, so it is never handed to `pickle`: `read_pickle` knows the 40 opcodes that plain data needs and
makes only dicts, lists, tuples, numbers and texts, and what our own functions make for the few names that a caller
allows. A file can therefore import, call or patch nothing; and since every length is checked against the file before
it is used, it cannot make us allocate much either.
"""

import collections
import pickletools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_PICKLE = 64 << 20  # bytes; a model with 10,000 tensors needs 2 MiB, a tokenizer of 65,536 tokens 1 MiB
MAX_OPCODES = 1_000_000  # a tokenizer of 250,000 tokens; what this many can build is also let go within seconds
MAX_DEPTH = 100  # nesting of the result, so that no reader of it can overflow its stack

LITERALS = {  # opcodes that push their own argument
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
KEY_TYPES = {str, int, bool, bytes, type(None)}  # tuples nested deep enough overflow the C stack when hashed
KEYS = range(-(2**31), 2**31)  # of integers; larger ones and floats can all have one hash, each lookup then walks them


class Refused(ValueError):
    """The file is damaged or is not a plain checkpoint. Nothing in it was executed."""


@dataclass(frozen=True)
class Global:
    """A name that the file refers to; it is never looked up."""

    name: str


class Instance:
    """Stands for an object of a class that the caller allows: keeps the state that the pickle gives it."""

    state: object = None


@contextmanager
def naming_file(path: Path | str) -> Iterator[None]:
    """Put the file's path before the message of a Refused."""
    try:
        yield
    except Refused as e:
        raise Refused(f"{path}: {e}") from e.__cause__


@contextmanager
def refusing_failures(path: Path | str) -> Iterator[None]:
    """Turn every failure into a Refused of one sentence that begins with the file's path; a missing file stays one."""
    with naming_file(path):
        try:
            yield
        except Refused:
            raise
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} does not exist") from None
        except OSError as e:
            raise Refused(f"it cannot be read: {e.strerror or e}") from None
        except Exception as e:  # malformed zips and pickles fail in many ways
            raise Refused(f"it is damaged or of another kind ({type(e).__name__}: {e})") from e


def open_file(path: Path | str) -> BinaryIO:
    """Open it to read bytes. Refused: it is no file; OSError: it cannot be opened."""
    if Path(path).exists() and not Path(path).is_file():  # a pipe would block, a device never end
        raise Refused("a file is needed, this is a directory or a device")
    return open(path, "rb")


def short(value: object) -> str:
    """A few words about any value; repr of a hostile one could be endless."""
    text = repr(value) if type(value) in (int, float, bool, type(None)) else type(value).__name__
    text = repr(value[:40]) if type(value) in (str, bytes) else text
    return text if len(text) <= 60 else text[:57] + "..."


def read_pickle(data: bytes, calls: Mapping[str, Callable], load_persistent: Callable | None = None) -> object:
    """The object that a pickle describes.

    calls: for each name that the pickle may use, the function of ours that is called in its place.
    load_persistent: from a persistent id to the object outside the pickle; None: there must be no such id.
    """
    stack, marks, memo = [], [], {}

    def pop_to_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def push_global(*parts: object) -> None:
        for part in parts:
            if type(part) is not str:
                raise Refused(f"its pickle names something by {short(part)}")
        name = ".".join(parts)
        if name not in calls:
            raise Refused(f"it asks for {short(name)}, which plain data does not need; nothing was run")
        stack.append(Global(name))

    def set_items(items: list) -> None:
        if not isinstance(stack[-1], dict) or len(items) % 2:
            raise Refused("its pickle sets items of something that is no dict")
        for key, value in zip(items[::2], items[1::2]):
            if type(key) not in KEY_TYPES or (type(key) is int and key not in KEYS):
                raise Refused(f"keys must be texts or integers of 32 bits, got {short(key)}")
            stack[-1][key] = value

    def extend(items: list) -> None:
        if type(stack[-1]) is not list:
            raise Refused("its pickle appends to something that is no list")
        stack[-1].extend(items)

    def push_result(function: Callable, *args: object) -> None:
        """Where the call is refused, add the last text on the stack: the name of the tensor that it is for."""
        try:
            stack.append(function(*args))
        except Refused as e:
            key = next((item for item in reversed(stack) if type(item) is str), None)
            raise Refused(str(e) if key is None else f"{e} (at key {short(key)})") from None

    for count, (opcode, arg, position) in enumerate(pickletools.genops(data)):
        if count >= MAX_OPCODES:
            raise Refused(f"its pickle has more than {MAX_OPCODES:,} operations")
        match opcode.name:
            case op if op in LITERALS:
                stack.append(arg)
            case op if op in CONSTANTS:
                stack.append(CONSTANTS[op])
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as op:
                n = int(op[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "MARK":
                if len(marks) > 2 * MAX_DEPTH:  # a container has one, an object's arguments another
                    raise Refused(f"its data is nested deeper than {MAX_DEPTH} levels")
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "SETITEMS":
                set_items(pop_to_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                set_items([key, value])
            case "APPENDS":
                extend(pop_to_mark())
            case "APPEND":
                extend([stack.pop()])
            case "BINPERSID":
                if load_persistent is None:
                    raise Refused("it refers to data outside the pickle")
                push_result(load_persistent, stack.pop())
            case "GLOBAL":
                push_global(*arg.split(" ", 1))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                push_global(module, attribute)
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                if type(function) is not Global or type(args) is not tuple:
                    raise Refused("its pickle calls something that is no name")
                push_result(calls[function.name], *args)
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Instance):
                    stack[-1].state = state
                elif not isinstance(
                    stack[-1], collections.OrderedDict
                ):  # a state dict has _metadata, which is not needed
                    raise Refused(f"its pickle sets attributes of {short(stack[-1])}")
            case "PROTO" | "FRAME" | "STOP":
                pass
            case op:
                raise Refused(f"its pickle uses {op} at byte {position}, which plain data does not need")
    if len(stack) != 1 or marks:
        raise Refused("its pickle does not end with one object")
    _check_nesting(stack, -1, {})
    return stack[0]


def _check_nesting(item: object, depth: int, heights: dict[int, int]) -> int:
    """The height of the containers in `item`, which lies at `depth`; heights: of those that are known, by id."""
    if id(item) not in heights and depth <= MAX_DEPTH:
        inside = [item.state] if isinstance(item, Instance) else item.values() if isinstance(item, dict) else item
        containers = [child for child in inside if isinstance(child, dict | list | tuple | Instance)]
        below = [_check_nesting(child, depth + 1, heights) for child in containers]
        heights[id(item)] = 1 + max(below, default=0)
    if depth > MAX_DEPTH or depth + heights[id(item)] > MAX_DEPTH:
        raise Refused(f"its data contains itself or is nested deeper than {MAX_DEPTH} levels")
    return heights[id(item)]
