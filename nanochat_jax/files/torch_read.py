"""Read what torch.save and pickle wrote, without torch or tiktoken, and without running anything from the file.

A pickle is a program, so it is never handed to `pickle`: `_interpret` below knows the 40 opcodes that plain data needs
and makes only dicts, lists, tuples, numbers, texts and tensors. A file can therefore import, call or patch nothing;
and since every length is checked against the file before it is used, it cannot make us allocate much either.
"""

import collections
import math
import mmap
import pickletools
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

STORAGES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
MAX_PICKLE = 64 << 20  # bytes; a model with 10,000 tensors needs 2 MiB, a tokenizer of 65,536 tokens 1 MiB
MAX_OPCODES = 4_000_000  # a tokenizer of a million tokens; a few seconds and 300 MB at worst
MAX_DEPTH = 100  # nesting of the result, so that no reader of it can overflow its stack
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # how torch.save's files before the zip format begin, after PROTO

LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
KEY_TYPES = {str, int, float, bool, bytes, type(None)}  # tuples nested deep enough overflow the C stack when hashed


class Refused(ValueError):
    """The file is damaged or is not a plain checkpoint. Nothing in it was executed."""


@dataclass(frozen=True)
class Global:
    """A name that the file refers to; it is never looked up."""

    name: str


class Encoding:
    """Stands for tiktoken's Encoding while its pickle is read: keeps the state, does nothing."""

    state: object = None


def read_pt(path: Path | str) -> object:
    """What torch.save put into `path`, with read-only numpy arrays for tensors (bfloat16 through ml_dtypes).

    The arrays are views of the mapped file: a checkpoint larger than memory can be read tensor by tensor.
    """
    with _naming(path):
        archive = Archive(path)
        if archive.has("byteorder") and archive.record("byteorder") != b"little":
            raise Refused("it was written on a big-endian machine")
        return _interpret(bytes(archive.record("data.pkl", MAX_PICKLE)), TORCH_CALLS, archive.storage)


def read_tokenizer_pickle(path: Path | str) -> dict:
    """name, pat_str, mergeable_ranks (bytes -> id) and special_tokens (text -> id) of a pickled tiktoken Encoding."""
    with _naming(path):
        with _open(path) as f:
            data = f.read(MAX_PICKLE + 1)
        if len(data) > MAX_PICKLE:
            raise Refused(f"a tokenizer pickle has at most {MAX_PICKLE:,} bytes, this one has more")
        encoding = _interpret(data, {"tiktoken.core.Encoding": _new_encoding}, _no_storage)
        if not isinstance(encoding, Encoding) or not isinstance(encoding.state, dict):
            raise Refused("it must hold one tiktoken Encoding with its tables, got " + _short(encoding))
        state = encoding.state
        wanted = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}
        for field, kind in wanted.items():
            if type(state.get(field)) is not kind:
                raise Refused(f"the Encoding's {field} must be a {kind.__name__}, got {_short(state.get(field))}")
        _check_ids(state["mergeable_ranks"], "mergeable_ranks", bytes)
        _check_ids(state["special_tokens"], "special_tokens", str)
        ids = [*state["mergeable_ranks"].values(), *state["special_tokens"].values()]
        if len(set(ids)) != len(ids):
            twice = next(i for i, n in collections.Counter(ids).items() if n > 1)
            raise Refused(f"every token needs an id of its own, but id {twice} is used twice")
        return {field: state[field] for field in wanted}


def _check_ids(table: dict, field: str, key_type: type) -> None:
    for key, value in table.items():
        if type(key) is not key_type or type(value) is not int or not 0 <= value < 1 << 31:
            raise Refused(f"{field} must map {key_type.__name__} to ids, got {_short(key)}: {_short(value)}")


@contextmanager
def _naming(path):
    """Every failure becomes one sentence that begins with the file's path."""
    try:
        yield
    except Refused as e:
        raise Refused(f"{path}: {e}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except OSError as e:
        raise Refused(f"{path}: it cannot be read: {e.strerror or e}") from None
    except Exception as e:  # malformed zips and pickles fail in many ways
        raise Refused(f"{path}: it is damaged or of another kind ({type(e).__name__}: {e})") from e


def _open(path):
    if Path(path).exists() and not Path(path).is_file():  # a pipe would block, a device never end
        raise Refused("a file is needed, this is a directory or a device")
    return open(path, "rb")


def _short(value: object) -> str:
    """A few words about any value; repr of a hostile one could be endless."""
    text = repr(value) if type(value) in (int, float, bool, type(None)) else type(value).__name__
    text = repr(value[:40]) if type(value) in (str, bytes) else text
    return text if len(text) <= 60 else text[:57] + "..."


class Archive:
    """The records of a torch zip file, each checked (place, size, CRC-32) when it is asked for."""

    def __init__(self, path: Path | str):
        with _open(path) as f:
            start = f.read(64)
            if not start:
                raise Refused("the file is empty")
            if start[2:].startswith(LEGACY_MAGIC):
                raise Refused("it is in torch's old format: load it with torch and save it again (torch 1.6 or later)")
            if not start.startswith(b"PK"):
                raise Refused(f"torch.save writes zip files, this one begins with {start[:8]!r}")
            self.data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
            with zipfile.ZipFile(f) as z:
                infos = z.infolist()
        self.infos = {info.orig_filename: info for info in infos}
        if len(self.infos) != len(infos):
            raise Refused("two of its records have the same name")
        if sum(info.compress_size for info in infos) > len(self.data):
            raise Refused("its records claim more bytes than the file has")
        roots = [name.removesuffix("/data.pkl") for name in self.infos if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Refused(f"a file of torch.save has one record data.pkl, this zip has {len(roots)}")
        self.root = roots[0]
        self.arrays = {}

    def has(self, name: str) -> bool:
        return f"{self.root}/{name}" in self.infos

    def record(self, name: str, limit: int | None = None) -> memoryview:
        info = self.infos.get(f"{self.root}/{name}")
        if info is None:
            raise Refused(f"record {name} is missing")
        size, at = info.file_size, info.header_offset
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != size or info.flag_bits & 1:
            raise Refused(f"record {name} is compressed or encrypted; torch.save does neither")
        if limit is not None and size > limit:
            raise Refused(f"record {name} may have at most {limit:,} bytes, got {size:,}")
        header = bytes(self.data[at : at + 30])
        name_end = at + 30 + int.from_bytes(header[26:28], "little")
        begin = name_end + int.from_bytes(header[28:30], "little")
        stored_name = bytes(self.data[at + 30 : name_end])
        if header[:4] != b"PK\3\4" or stored_name.decode("utf-8", "replace") != info.orig_filename:
            raise Refused(f"the zip's directory and the header of record {name} disagree")
        content = self.data[begin : begin + size]
        if len(content) != size:
            raise Refused(f"record {name} is cut off: {size:,} bytes expected, got {len(content):,}")
        if zlib.crc32(content) != info.CRC:
            raise Refused(f"record {name} is damaged: its CRC-32 differs")
        return content

    def storage(self, pid: object) -> np.ndarray:
        """The flat array of a record ("storage", type, key, device, number of elements)."""
        kind, storage_type, key, _device, count = pid
        if kind != "storage" or type(key) is not str or type(count) is not int or type(storage_type) is not Global:
            raise Refused("it has a storage record of unknown form")
        if (key, storage_type) not in self.arrays:
            dtype = np.dtype(STORAGES[storage_type.name])
            content = self.record(f"data/{key}")
            if len(content) != count * dtype.itemsize:
                raise Refused(f"storage {key} must have {count} x {dtype.itemsize} bytes, got {len(content):,}")
            array = np.frombuffer(content, dtype)
            if array.ctypes.data % dtype.itemsize:  # torch aligns to 64 bytes, other writers may not
                array = array.copy()
                array.flags.writeable = False
            self.arrays[key, storage_type] = array
        return self.arrays[key, storage_type]


def _no_storage(pid):
    raise Refused("it refers to data outside the pickle")


def _rebuild_tensor(storage, offset, size, stride, *_):
    """A view of `storage` [n]; size and stride count elements, as in torch."""
    if not (isinstance(storage, np.ndarray) and storage.ndim == 1 and type(size) is tuple and type(stride) is tuple):
        raise Refused("it has a tensor of unknown form")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > 32 or not all(type(v) is int and 0 <= v < 1 << 62 for v in numbers):
        raise Refused(f"bad tensor geometry: offset {_short(offset)}, {len(size)} sizes, {len(stride)} strides")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if all(size) else offset - 1
    # The second condition: a stride of 0 would make a huge array of a few bytes.
    if last >= storage.size or math.prod(size) > storage.size:
        raise Refused(
            f"a tensor of shape {size}, strides {stride}, offset {offset} exceeds its {storage.size} elements"
        )
    if not all(size):
        return np.zeros(size, storage.dtype)
    strides = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _rebuild_parameter(tensor, *_):
    if not isinstance(tensor, np.ndarray):
        raise Refused("it has a parameter without a tensor")
    return tensor


def _new_dict():
    return collections.OrderedDict()


def _new_size(sizes):
    if type(sizes) is not tuple:
        raise Refused(f"a torch.Size must be made of a tuple, got {_short(sizes)}")
    return sizes


def _new_encoding():
    return Encoding()


def _not_callable(*_):
    raise Refused("it calls a storage type")


TORCH_CALLS = {
    "collections.OrderedDict": _new_dict,
    "torch.Size": _new_size,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    **dict.fromkeys(STORAGES, _not_callable),
}


def _interpret(data: bytes, calls: dict, storage) -> object:
    """The object that the pickle `data` describes: it may use the names in `calls`; `storage` finds tensors' bytes."""
    stack, control_tokens, memo = [], [], {}

    def since_mark() -> list:
        start = control_tokens.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def name(module, attribute):
        if f"{module}.{attribute}" not in calls:
            raise Refused(
                f"it asks for {_short(f'{module}.{attribute}')}, which plain data does not need; nothing was run"
            )
        return Global(f"{module}.{attribute}")

    def put(items: list):
        if not isinstance(stack[-1], dict) or len(items) % 2:
            raise Refused("its pickle sets items of something that is no dict")
        for key, value in zip(items[::2], items[1::2]):
            if type(key) not in KEY_TYPES:
                raise Refused(f"keys must be texts or numbers, got {_short(key)}")
            stack[-1][key] = value

    def extend(items: list):
        if type(stack[-1]) is not list:
            raise Refused("its pickle appends to something that is no list")
        stack[-1].extend(items)

    def at_key(make, *args):
        try:
            return make(*args)
        except Refused as e:
            key = next((item for item in reversed(stack) if type(item) is str), None)
            raise Refused(str(e) if key is None else f"{e} (at key {_short(key)})") from None

    for count, (opcode, arg, position) in enumerate(pickletools.genops(data)):
        op = opcode.name
        if count >= MAX_OPCODES:
            raise Refused(f"its pickle has more than {MAX_OPCODES:,} operations")
        if op in LITERALS:
            stack.append(arg)
        elif op in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op in CONSTANTS:
            stack.append(CONSTANTS[op])
        elif op == "MARK":
            control_tokens.append(len(stack))
        elif op in TUPLES:
            n = TUPLES[op]
            stack[-n:] = [tuple(stack[-n:])]
        elif op == "TUPLE":
            stack.append(tuple(since_mark()))
        elif op == "EMPTY_TUPLE":
            stack.append(())
        elif op == "EMPTY_DICT":
            stack.append({})
        elif op == "EMPTY_LIST":
            stack.append([])
        elif op == "SETITEMS":
            put(since_mark())
        elif op == "SETITEM":
            value, key = stack.pop(), stack.pop()
            put([key, value])
        elif op == "APPENDS":
            extend(since_mark())
        elif op == "APPEND":
            extend([stack.pop()])
        elif op == "BINPERSID":
            stack.append(at_key(storage, stack.pop()))
        elif op == "GLOBAL":
            stack.append(name(*arg.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(name(_text(module), _text(attribute)))
        elif op in ("REDUCE", "NEWOBJ"):
            args, function = stack.pop(), stack.pop()
            if type(function) is not Global or type(args) is not tuple:
                raise Refused("its pickle calls something that is no name")
            stack.append(at_key(calls[function.name], *args))
        elif op == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Encoding):
                stack[-1].state = state
            elif not isinstance(stack[-1], collections.OrderedDict):  # a state dict's own _metadata is of no use to us
                raise Refused(f"its pickle sets attributes of {_short(stack[-1])}")
        elif op not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"its pickle uses {op} at byte {position}, which plain data does not need")
    if len(stack) != 1 or control_tokens:
        raise Refused("its pickle does not end with one object")
    _check_nesting(stack[0])
    return stack[0]


def _text(value: object) -> str:
    if type(value) is not str:
        raise Refused(f"its pickle names something by {_short(value)}")
    return value


def _check_nesting(root: object) -> None:
    """Refuse an object that contains itself, or is nested deeper than MAX_DEPTH."""

    def containers(item) -> list:
        children = [item.state] if isinstance(item, Encoding) else item.values() if isinstance(item, dict) else item
        return [child for child in children if isinstance(child, (dict, list, tuple, Encoding))]

    heights, unfinished, todo = {}, set(), [(item, False) for item in containers([root])]
    while todo:
        item, visited = todo.pop()
        if visited:
            heights[id(item)] = 1 + max((heights[id(child)] for child in containers(item)), default=0)
            unfinished.discard(id(item))
            if heights[id(item)] > MAX_DEPTH:
                raise Refused(f"its data is nested deeper than {MAX_DEPTH} levels")
        elif id(item) in unfinished:
            raise Refused("its data contains itself")
        elif id(item) not in heights:
            unfinished.add(id(item))
            todo += [(item, True), *((child, False) for child in containers(item))]
