"""Tokenizers pickled by tiktoken are read, everything else is refused in one sentence, and nothing in a file runs."""

import pickle
import random

import pytest

from nanochat_jax.files.plain_pickle import Refused
from nanochat_jax.files.tiktoken_read import read_tokenizer_pickle
from tests.files.test_torch_read import read_or_none

RANKS = {bytes([i]): i for i in range(256)} | {b"th": 256}
TABLES = {"name": "toy", "pat_str": r"\w+|\s", "mergeable_ranks": RANKS, "special_tokens": {"<|bos|>": 257}}


def encoding_pickle(state: object, protocol: int) -> bytes:
    """What pickle writes for a tiktoken Encoding whose __getstate__ gives `state`."""
    name = b"\x8c\x0dtiktoken.core\x8c\x08Encoding\x93" if protocol >= 4 else b"ctiktoken.core\nEncoding\n"
    return bytes([0x80, protocol]) + name + b")\x81" + pickle.dumps(state, protocol)[2:-1] + b"b."


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_tokenizer_is_read_whatever_protocol_wrote_it(tmp_path, protocol):
    (tmp_path / "t.pkl").write_bytes(encoding_pickle(TABLES, protocol))
    assert read_tokenizer_pickle(tmp_path / "t.pkl") == TABLES


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": 3}, "name must be a str, got 3"),
        ({"pat_str": b"x"}, "pat_str must be a str, got b'x'"),
        ({"mergeable_ranks": None}, "mergeable_ranks must be a dict, got None"),
        ({"mergeable_ranks": {"a": 1}}, "must map bytes to ids, got 'a': 1"),
        ({"mergeable_ranks": {b"a": True}}, "must map bytes to ids, got b'a': True"),
        ({"mergeable_ranks": {b"a": -1}}, "must map bytes to ids, got b'a': -1"),
        ({"mergeable_ranks": {b"a": 0, b"b": 0}}, "id 0 is used twice"),
        ({"special_tokens": {b"a": 1}}, "must map str to ids"),
        ({"special_tokens": {"a": 1.0}}, "must map str to ids"),
        ({"special_tokens": {"<|bos|>": 5}}, "id 5 is used twice"),
        ({"special_tokens": [1]}, "special_tokens must be a dict, got list"),
    ],
)
def test_a_tokenizer_with_wrong_tables_is_refused_with_the_table(tmp_path, change, match):
    (tmp_path / "t.pkl").write_bytes(encoding_pickle(TABLES | change, 4))
    with pytest.raises(Refused, match=rf"t\.pkl: .*{match}"):
        read_tokenizer_pickle(tmp_path / "t.pkl")


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", pickle.dumps({"name": "x"}), encoding_pickle("gpt2", 4)])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "t.pkl").write_bytes(content)
    with pytest.raises(Refused, match=r"t\.pkl: "):
        read_tokenizer_pickle(tmp_path / "t.pkl")


def test_a_damaged_tokenizer_never_crashes(tmp_path):
    raw, path, rng = encoding_pickle(TABLES, 4), tmp_path / "t.pkl", random.Random(2)
    for _ in range(200):
        noisy = bytearray(raw)
        noisy[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(noisy if rng.random() < 0.7 else noisy[: rng.randrange(len(raw))])
        got = read_or_none(path, read_tokenizer_pickle)
        assert got is None or got.keys() == TABLES.keys()
