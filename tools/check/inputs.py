"""Hostile inputs for everything that the program reads from files and flags, each through what reads it."""

import dataclasses
import itertools
import os
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import damage
import hostile_inputs as hostile

THEIRS, OURS = "base_checkpoints/theirs", "base_checkpoints/d2/9"


class Input(NamedTuple):
    kind: str  # of KINDS
    data: bytes | str
    base: str  # a base directory that may be changed; see damage.py


def read_file(data: bytes, path: Path, read: Callable[[], object]) -> str:
    """read() while the file has this content; then it has its own again."""
    own = path.read_bytes() if path.exists() else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        read()
        return ""
    finally:
        if own is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(own)


def read_input(case: Input) -> str:
    base = Path(case.base)
    os.environ["NANOCHAT_BASE_DIR"] = case.base
    return KINDS[case.kind].read(case.data, base)


def read_tokenizer(data: bytes, base: Path, name: str) -> str:
    from nanochat_jax.tokenizer import Tokenizer

    return read_file(data, base / "other" / name, lambda: Tokenizer.load(base / "other").encode("hello"))


def read_model(data: bytes, base: Path) -> str:
    return read_file(data, base / THEIRS / "model_000009.pt", lambda: damage.load_theirs(base))


def read_packed(data: bytes, base: Path) -> str:
    """A .pt file with this pickle."""
    from nanochat_jax.files.torch_read import read_pt

    path = base / "other.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other/data.pkl", data)
    read_pt(path)
    return ""


def read_optimizer(data: bytes, base: Path) -> str:
    return read_file(data, base / THEIRS / "optim_000009_rank0.pt", lambda: damage.load_theirs(base))


def read_meta(data: bytes, base: Path) -> str:
    return read_file(data, base / THEIRS / "meta_000009.json", lambda: damage.load_theirs(base))


def read_manifest(data: bytes, base: Path) -> str:
    return read_file(data, base / OURS / "INTEGRITY.json", lambda: damage.load_ours(base))


def read_measured(data: bytes, base: Path) -> str:
    return read_file(data, base / OURS / "measured.json", lambda: damage.load_ours(base))


def read_cache(data: bytes, base: Path) -> str:
    from nanochat_jax.data.token_cache import DamagedCache, TokenCache

    folder = next(path for path in sorted((base / "token_cache").iterdir()) if (path / "meta.json").exists())

    def read() -> None:
        try:
            cache = TokenCache(folder)
        except DamagedCache:
            return  # it is built anew
        for i in range(len(cache)):
            cache.get(i)

    return read_file(data, folder / "meta.json", read)


def read_conversations(data: bytes, base: Path) -> str:
    from nanochat_jax.tasks import CustomJSON
    from nanochat_jax.tokenizer import Tokenizer

    def read() -> None:
        task = CustomJSON(base / "other.jsonl", log=lambda _: None)
        Tokenizer.load(base / "tokenizer").render_many([task[i] for i in range(len(task))], max_tokens=None)

    return read_file(data, base / "other.jsonl", read)


def read_metrics(data: bytes, base: Path) -> str:
    """By a run that goes on, and by report."""
    from nanochat_jax.reports.page import page
    from nanochat_jax.train.metrics import MetricsLog

    def read() -> None:
        page([base / "other"])
        log = MetricsLog(base / "other", "dummy", {}, project="", resumed_at=3)
        log.measured_at(3)
        log.close()

    return read_file(data, base / "other" / "metrics.jsonl", read)


def read_rollouts(data: bytes, base: Path) -> str:
    from nanochat_jax.reports.rollouts import RolloutPage, rollouts_page
    from nanochat_jax.reports.runs import last_answers
    from nanochat_jax.rollouts.log import RolloutLog

    def read() -> None:
        last_answers(base / "other" / "rollouts.jsonl")
        rollouts_page(RolloutPage(base / "other", "other", "page.html"), "report.html")
        log = RolloutLog(base / "other", 100)
        log.saved()
        log.close()

    return read_file(data, base / "other" / "rollouts.jsonl", read)


def read_toml(data: bytes, base: Path) -> str:
    from nanochat_jax.cli.command_line import parse
    from nanochat_jax.cli.settings import check_bounds
    from nanochat_jax.sft import SFTConfig

    path = base / "other.toml"
    return read_file(data, path, lambda: check_bounds(parse(SFTConfig, ["--config", str(path)])))


def read_flags(data: str, base: Path) -> str:
    """data: the number of a setting of SFT or RL, a colon, and what the user types for it."""
    from nanochat_jax import rl, sft
    from nanochat_jax.cli.command_line import parse
    from nanochat_jax.cli.settings import check_bounds, flag, recorded_settings

    number, _, text = data.partition(":")
    cls = (sft.SFTConfig, rl.RLConfig)[int(number) % 2]
    names = [field.name for field in dataclasses.fields(cls) if field.name != "given"]
    cfg = parse(cls, [f"{flag(names[int(number) % len(names)])}={text}"])
    check_bounds(cfg)
    recorded_settings(cfg)
    if cls is rl.RLConfig:
        rl.check(cfg)
    return ""


def read_parquet(data: bytes, base: Path) -> str:
    from nanochat_jax.data.shards import Documents
    from nanochat_jax.tokenizer import Tokenizer

    def read() -> None:
        documents = Documents(base / "other.parquet")
        Tokenizer.load(base / "tokenizer").encode_many([documents[i] for i in range(min(len(documents), 1000))])

    return read_file(data, base / "other.parquet", read)


def lines(one: Iterator[bytes], rng: random.Random) -> Iterator[bytes]:
    """Files of a few of these lines."""
    while True:
        yield b"".join(itertools.islice(one, rng.randint(1, 8)))


def like(data: bytes, rng: random.Random, texts: Iterator[bytes] | None = None) -> Iterator[bytes]:
    """Files as this one, damaged; in place of every second one of the texts, if there are some."""
    while True:
        yield next(texts) if texts and rng.random() < 0.5 else hostile.mutated(data, rng)


class Kind(NamedTuple):
    weight: int  # how many of 100 inputs
    make: Callable[[Path, random.Random], Iterator[bytes | str]]  # from a base directory that is as it was made
    read: Callable[[bytes | str, Path], str]


def file_like(name: str) -> Callable[[Path, random.Random], Iterator[bytes]]:
    return lambda base, rng: like((base / name).read_bytes(), rng)


def json_like(name: str) -> Callable[[Path, random.Random], Iterator[bytes]]:
    return lambda base, rng: like((base / name).read_bytes(), rng, hostile.json_texts(rng))


def cache_meta(base: Path, rng: random.Random) -> Iterator[bytes]:
    file = sorted((base / "token_cache").glob("*/meta.json"))[0]
    return like(file.read_bytes(), rng, hostile.json_texts(rng))


def numbered_flags(_: Path, rng: random.Random) -> Iterator[str]:
    values = hostile.flag_values(rng)
    while True:
        yield f"{rng.randrange(1000)}:{next(values)}"


KINDS = {
    "tokenizer.pkl": Kind(
        5, lambda base, rng: hostile.pickles(rng), lambda data, base: read_tokenizer(data, base, "tokenizer.pkl")
    ),
    "changed tokenizer.pkl": Kind(
        8, file_like("tokenizer/tokenizer.pkl"), lambda data, base: read_tokenizer(data, base, "tokenizer.pkl")
    ),
    "tokenizer.json": Kind(
        5, json_like("tokenizer/tokenizer.json"), lambda data, base: read_tokenizer(data, base, "tokenizer.json")
    ),
    "pickle in .pt": Kind(10, lambda base, rng: hostile.pickles(rng), read_packed),
    "model .pt": Kind(8, file_like(f"{THEIRS}/model_000009.pt"), read_model),
    "optimizer .pt": Kind(4, file_like(f"{THEIRS}/optim_000009_rank0.pt"), read_optimizer),
    "meta_*.json": Kind(6, json_like(f"{THEIRS}/meta_000009.json"), read_meta),
    "INTEGRITY.json": Kind(4, json_like(f"{OURS}/INTEGRITY.json"), read_manifest),
    "measured.json": Kind(3, lambda base, rng: hostile.json_texts(rng), read_measured),
    "cache meta.json": Kind(5, cache_meta, read_cache),
    "conversations": Kind(14, lambda base, rng: lines(hostile.conversations_lines(rng), rng), read_conversations),
    "metrics.jsonl": Kind(2, lambda base, rng: lines(hostile.metrics_lines(rng), rng), read_metrics),
    "rollouts.jsonl": Kind(8, lambda base, rng: lines(hostile.metrics_lines(rng), rng), read_rollouts),
    "TOML": Kind(3, lambda base, rng: hostile.toml_texts(rng), read_toml),
    "flags": Kind(5, numbered_flags, read_flags),
    "parquet": Kind(10, lambda base, rng: hostile.parquet_files(rng), read_parquet),
}


def inputs(pristine: Path, base: Path, rng: random.Random) -> Iterator[Input]:
    """Endless, of all KINDS by their weights."""
    order = [name for name, kind in KINDS.items() for _ in range(kind.weight)]
    rng.shuffle(order)
    made = {name: kind.make(pristine, random.Random(rng.random())) for name, kind in KINDS.items()}
    for name in itertools.cycle(order):
        yield Input(name, next(made[name]), str(base))
