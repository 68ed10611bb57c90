"""Endless hostile inputs of every kind that the program reads, drawn from a random.Random."""

import io
import json
import pickle
import random
import string
from collections.abc import Iterator

VALUES = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**400,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "\ud800",
    [],
    {},
)


def mutated(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """The data with a few bytes changed, cut, doubled or put in."""
    while True:
        made = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(made) + 1)
            match rng.randrange(5):
                case 0 if at < len(made):
                    made[at] = rng.randrange(256)
                case 1:
                    del made[at:]
                case 2:
                    made[at:at] = rng.randbytes(rng.randint(1, 9))
                case 3:
                    made[at:at] = made[at : at + rng.randint(1, 200)]
                case _:
                    del made[at : at + rng.randint(1, 200)]
        yield bytes(made)


def pickles(rng: random.Random) -> Iterator[bytes]:
    """Pickles of any values, and mutations of them; some import, some claim huge lengths, some never end."""
    bombs = [
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04" + b"]" * 5000 + b".",
        b"\x80\x04\x8a\xff" + b"\xff" * 255 + b".",
    ]
    bombs += [
        b"\x80\x02\x8b\xff\xff\xff\x7f1.",
        b"\x80\x04X\xff\xff\xff\xffa.",
        b"(" * 100_000 + b".",
        b"\x80\x04}" * 9,
    ]
    bombs += [b"\x80\x04]\x94" + b"(h\x00" * 30 + b"e" * 30 + b"."]
    while True:
        if rng.random() < 0.2:
            yield rng.choice(bombs)
            continue
        data = pickle.dumps(value(rng, 4, for_json=False), protocol=rng.randint(0, 5))
        yield data if rng.random() < 0.4 else next(mutated(data, rng))


def json_texts(rng: random.Random) -> Iterator[str]:
    while True:
        match rng.randrange(8):
            case 0:
                yield "[" * rng.choice((10, 1000, 100_000))
            case 1:
                yield '{"a":' * 5000 + "1" + "}" * 5000
            case 2:
                yield "9" * rng.choice((20, 5000, 100_000))
            case 3:
                yield "".join(rng.choices(string.printable, k=rng.randint(0, 80)))
            case _:
                text = json.dumps(value(rng, 4))
                yield text if rng.random() < 0.7 else next(mutated(text.encode(), rng)).decode("latin1")


def metrics_lines(rng: random.Random) -> Iterator[str]:
    """Lines of metrics.jsonl and rollouts.jsonl: their keys with any value, or any JSON at all."""
    names = (
        "step",
        "loss",
        "event",
        "reward",
        "measured",
        "val_bpb",
        "seconds",
        "example",
        "text",
        "prompt",
        "advantage",
    )
    texts = json_texts(rng)
    while True:
        if rng.random() < 0.2:
            yield next(texts).replace("\n", " ")
            continue
        record = {"step": rng.randint(0, 9), "loss": rng.random(), "example": 1, "prompt": "p", "text": "t"}
        record |= {"reward": rng.random(), "advantage": 0.5, rng.choice(names): value(rng, 2)}
        if rng.random() < 0.2:
            del record[rng.choice(sorted(record))]
        yield json.dumps(record)


def conversations_lines(rng: random.Random) -> Iterator[str]:
    texts = json_texts(rng)
    while True:
        if rng.random() < 0.2:
            yield next(texts).replace("\n", " ")
            continue
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": rng.choice(("hi", "<|bos|>", "\ud800", "\0", " " * 9999))}
            for i in range(rng.randint(0, 5))
        ]
        if messages and rng.random() < 0.5:
            rng.choice(messages)[rng.choice(("role", "content", "more"))] = value(rng, 2)
        yield json.dumps(messages if rng.random() < 0.5 else {"messages": messages})


def toml_texts(rng: random.Random) -> Iterator[str]:
    names = (
        "seed",
        "num_iterations",
        "matrix_lr",
        "run",
        "custom_json",
        "resume",
        "mesh",
        "given",
        "config",
        "nothing",
    )
    values = (
        "1",
        "-1",
        "1e400",
        "nan",
        "inf",
        '"a"',
        '""',
        "[]",
        "[1,2]",
        "{a=1}",
        "true",
        "9" * 5000,
        "1979-05-27",
        "'",
    )
    while True:
        lines = [f"{rng.choice(names)} = {rng.choice(values)}" for _ in range(rng.randint(0, 4))]
        text = "\n".join(lines)
        yield text if rng.random() < 0.7 else next(mutated(text.encode(), rng)).decode("latin1")


def parquet_files(rng: random.Random) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = (["a", None], ["a", "b"], [1, 2], [["a"], []], [b"\xff", b"a"], [{"a": 1}, {"a": 2}], [])
    while True:
        file = io.BytesIO()
        pq.write_table(pa.table({rng.choice(("text", "text", "texts")): rng.choice(columns)}), file)
        yield file.getvalue() if rng.random() < 0.2 else next(mutated(file.getvalue(), rng))


def flag_values(rng: random.Random) -> Iterator[str]:
    values = (
        "",
        "0",
        "-1",
        "1e999",
        "nan",
        "inf",
        "-inf",
        "9" * 400,
        "1_0",
        "0x10",
        " 1",
        "１",
        "None",
        "[1]",
        "--resume",
    )
    values += ("../..", "/", ".", "a/b", "\ud800", "\0", "a" * 5000, "~root", "%s", "{}", "gs:/", "\n")
    while True:
        yield rng.choice(values)


def value(rng: random.Random, depth: int, for_json: bool = True) -> object:
    """Any plain value."""
    match rng.randrange(4) if depth else 0:
        case 1:
            return [value(rng, depth - 1, for_json) for _ in range(rng.randint(0, 4))]
        case 2:
            keys = (rng.choice(("a", "step", "ranks", "name", "", "_pat_str")) for _ in range(rng.randint(0, 4)))
            return {key: value(rng, depth - 1, for_json) for key in keys}
        case _:
            return rng.choice(VALUES) if for_json or rng.random() < 0.8 else rng.choice((b"", b"\xff", (1,), 1j))
