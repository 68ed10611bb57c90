"""Read a pickled tokenizer of tiktoken without tiktoken, and without running anything from the file."""

import collections
from pathlib import Path

from nanochat_jax.files.plain_pickle import (
    MAX_PICKLE,
    Instance,
    Refused,
    open_file,
    read_pickle,
    refusing_failures,
    short,
)

FIELDS = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}  # of a tiktoken Encoding


def read_tokenizer_pickle(path: Path | str) -> dict:
    """name, pat_str, mergeable_ranks (bytes -> id) and special_tokens (text -> id) of a pickled tiktoken Encoding."""
    with refusing_failures(path):
        with open_file(path) as f:
            data = f.read(MAX_PICKLE + 1)
        if len(data) > MAX_PICKLE:
            raise Refused(f"a tokenizer pickle has at most {MAX_PICKLE:,} bytes, this one has more")
        encoding = read_pickle(data, {"tiktoken.core.Encoding": Instance})
        state = encoding.state if isinstance(encoding, Instance) else None
        if not isinstance(state, dict):
            raise Refused(f"it must hold one tiktoken Encoding with its tables, got {short(encoding)}")
        for field, kind in FIELDS.items():
            if type(state.get(field)) is not kind:
                raise Refused(f"the Encoding's {field} must be a {kind.__name__}, got {short(state.get(field))}")
        ids = [*_checked_ids(state, "mergeable_ranks", bytes), *_checked_ids(state, "special_tokens", str)]
        if len(set(ids)) != len(ids):
            twice = next(i for i, n in collections.Counter(ids).items() if n > 1)
            raise Refused(f"every token needs an id of its own, but id {twice} is used twice")
        return {field: state[field] for field in FIELDS}


def _checked_ids(state: dict, field: str, key_type: type) -> list[int]:
    for key, value in state[field].items():
        if type(key) is not key_type or type(value) is not int or not 0 <= value < 1 << 31:
            raise Refused(f"{field} must map {key_type.__name__} to ids, got {short(key)}: {short(value)}")
    return list(state[field].values())
