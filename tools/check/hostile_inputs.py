"""Hostile inputs, endless and repeatable: each function takes a random.Random and gives bytes or texts to refuse."""

import io
import json
import pickle
import random
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

NUMBERS = (
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e400",
    "-1e400",
    "-0",
    "-0.0",
    "",
    " ",
    "10e",
    "0x10",
    "1_0",
    "true",
    "\u0663",
)
VALUES = (
    "NaN",
    "Infinity",
    "1e999",
    "9" * 400,
    "9" * 5000,
    "true",
    "null",
    "{}",
    "[]",
    '"<script>"',
    "-1",
    '"\\ud800"',
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The data after one to four flips, cuts, insertions, duplicated or zeroed ranges."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        a, b = sorted((rng.randint(0, len(out)), rng.randint(0, len(out))))
        match rng.randrange(5):
            case 0 if out:
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
            case 1:
                del out[a:b]
            case 2:
                out[a:a] = rng.randbytes(rng.randint(1, 16))
            case 3:
                out[b:b] = out[a : min(b, a + 4096)]
            case _:
                out[a:b] = bytes(b - a)
    return bytes(out)


def pickles(rng: random.Random) -> Iterator[bytes]:
    """Pickles with colliding keys, deep nesting, many marks, shared tuples, huge numbers, and damaged ones."""
    plain = {"a": [1, 2.5, None, ("x", b"y")], 3: {"b": True}}
    while True:
        n = rng.choice((10, 1000, 20_000))
        shapes = (
            # keys of one hash, as opcodes: to make this dict here would take the time that it costs a reader
            b"\x80\x02}("
            + b"".join(b"\x8a\x0c" + ((2**61 - 1) * i).to_bytes(12, "little") + b"N" for i in range(n))
            + b"u.",
            b"\x80\x02" + b"]" * n + b"a" * (n - 1) + b".",
            b"\x80\x02" + b"(" * n + b"t" * n + b".",
            b"\x80\x02)" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b".",
            pickle.dumps(1 << 8 * n, 2),
        )
        yield rng.choice(shapes) if rng.random() < 0.2 else mutated(pickle.dumps(plain, rng.choice((2, 4))), rng)


def json_texts(rng: random.Random) -> Iterator[bytes]:
    """JSON of any value and depth, also values that JSON does not have, and damaged ones."""
    while True:
        text = rng.choice(VALUES)
        for _ in range(rng.choice((0, 1, 3, 10_000))):
            text = f"[{text}]"
        yield mutated(text.encode(), rng) if rng.random() < 0.3 else text.encode()


def _lines(record: dict, rng: random.Random) -> Iterator[bytes]:
    """The record with values swapped or left out, as lines that may be damaged."""
    values = json_texts(rng)
    while True:
        fields = {key: json.dumps(value).encode() for key, value in record.items() if rng.random() > 0.15}
        for key in fields:
            fields[key] = next(values) if rng.random() < 0.15 else fields[key]
        line = b"{" + b", ".join(json.dumps(k).encode() + b": " + v for k, v in fields.items()) + b"}"
        yield rng.choice((line, line, line, mutated(line, rng), next(values))) + b"\n"


def metrics_lines(rng: random.Random) -> Iterator[bytes]:
    """Lines as of metrics.jsonl and rollouts.jsonl, most of them damaged."""
    kinds = [
        {"step": 3, "loss": 2.5, "val_bpb": 1.0, "seconds": 1.5, "pass@1": 0.5, "pass@1_low": 0.4, "pass@1_high": 0.6},
        {"event": "resume", "step": 2},
        {"event": "start"},
        {"step": 3, "example": 7, "sample": 0, "reward": 1.0, "advantage": 0.5, "prompt": "2+2?", "text": "4"},
    ]
    sources = [_lines(kind, rng) for kind in kinds]
    while True:
        yield next(rng.choices(sources, (6, 1, 1, 6))[0])


def conversations_lines(rng: random.Random) -> Iterator[bytes]:
    """Lines as of a file of conversations in one form, most of them damaged; sometimes they begin like an array."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    forms = ({"messages": chat, "source": "x"}, {"conversations": turns}, {"prompt": "a", "completion": "b"})
    sources = [_lines(form, rng) for form in (*forms, {"instruction": "a", "input": "b", "output": "c"})]
    while True:
        line = next(rng.choices(sources, (3, 1, 1, 1))[0])
        yield rng.choice((b"[", b",", b"")) + line if rng.random() < 0.3 else line


def toml_texts(rng: random.Random) -> Iterator[bytes]:
    """TOML files of one setting with a hostile value, deep nesting, or damage."""
    while True:
        name = rng.choice(("num-iterations", "matrix-lr", "resume", "run", "custom-json", "seed", "nothing"))
        deep = rng.choice((10, 10_000))
        values = ("nan", "inf", "1e999", "9" * 400, "9" * 5000, "true", '""', "{a=1}", "[[1]]", "[" * deep + "]" * deep)
        text = f"{name} = {rng.choice(values)}\n".encode()
        yield mutated(text, rng) if rng.random() < 0.3 else text


def parquet_files(rng: random.Random) -> Iterator[bytes]:
    """Parquet files with a column text of strings or of another type, most of them damaged."""
    while True:
        file = io.BytesIO()
        pq.write_table(pa.table({"text": rng.choice((["a", "b"], [1, 2], [["a"], ["b"]], ["a", None]))}), file)
        yield mutated(file.getvalue(), rng) if rng.random() < 0.8 else file.getvalue()


def flag_values(rng: random.Random) -> Iterator[str]:
    """Texts in the place of a flag's value."""
    while True:
        yield rng.choice((*NUMBERS, "1" + "0" * rng.randint(1, 5000), "-1", "x" * rng.randint(1, 5000), "\0", "\udcff"))
