"""tokenizer.json of transformers: the same ids as tiktoken's, or a sentence.

Run: python -m pytest tests/files/test_fast_tokenizer_read.py
"""

import json

import pytest

from nanochat_jax.files.fast_tokenizer_read import BYTE_OF, fast_tokenizer_fields, is_fast_tokenizer
from nanochat_jax.files.plain_pickle import Refused
from nanochat_jax.tokenizer import Tokenizer, train_tokenizer
from tests.support import tiny
from tests.support.transformers_files import fast_tokenizer

TOKENIZER = train_tokenizer(iter(["the cat and the hat, the other thing; été 你好 " * 40]), 285)


def write(folder, content):
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_the_characters_for_bytes_are_those_of_the_library():
    assert sorted(BYTE_OF.values()) == [*range(256)]
    assert [BYTE_OF[c] for c in "!~¡¬®ÿĀĠĊ"] == [0x21, 0x7E, 0xA1, 0xAC, 0xAE, 0xFF, 0, 0x20, 0x0A]


def test_a_tokenizer_that_was_written_is_the_same_when_it_is_read(tmp_path):
    read = Tokenizer.load(write(tmp_path, fast_tokenizer(TOKENIZER)))
    assert read.digest() == TOKENIZER.digest()
    assert read.encode("the hat <|bos|>") == TOKENIZER.encode("the hat <|bos|>")
    TOKENIZER.save_for_nanochat(tmp_path)  # beside it: both are compared
    assert Tokenizer.load(tmp_path).digest() == TOKENIZER.digest()
    tiny.tokenizer().save_for_nanochat(tmp_path)
    with pytest.raises(ValueError, match="hold different tokenizers"):
        Tokenizer.load(tmp_path)


def test_the_older_form_of_merges_and_special_tokens_in_the_vocabulary_are_read(tmp_path):
    content = fast_tokenizer(TOKENIZER)
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    content["model"]["vocab"] |= TOKENIZER.special_tokens
    assert Tokenizer.load(write(tmp_path, content)).digest() == TOKENIZER.digest()


def changed(*path_and_value):
    """The tokenizer with one thing changed."""
    *path, last, value = path_and_value
    content = at = fast_tokenizer(TOKENIZER)
    for part in path:
        at = at[part]
    at[last] = value
    return content


def merges(change):
    return changed("model", "merges", change(fast_tokenizer(TOKENIZER)["model"]["merges"]))


SPLIT = ("pre_tokenizer", "pretokenizers", 0)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (changed("model", "type", "Unigram"), "its model's type must be \"BPE\", got 'Unigram'"),
        (changed("model", "dropout", 0.1), "its model's dropout must be null"),
        (changed("model", "unk_token", "<unk>"), "its model's unk_token must be null"),
        (changed("model", "end_of_word_suffix", "</w>"), "its model's end_of_word_suffix must be null"),
        (changed("model", "byte_fallback", True), "its model's byte_fallback must be false"),
        (changed("model", "ignore_merges", False), "its model's ignore_merges must be true"),
        (changed("normalizer", {"type": "NFC"}), "it must have no normalizer"),
        (changed("pre_tokenizer", {"type": "ByteLevel"}), "must be a sequence of Split and ByteLevel"),
        (changed(*SPLIT, "behavior", "Removed"), "must begin with a Split"),
        (changed(*SPLIT, "invert", True), "must begin with a Split"),
        (changed(*SPLIT, "pattern", {"String": " "}), "must have a regular expression"),
        (changed("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True), "must end with"),
        (changed("added_tokens", {}), "its added_tokens must be a list"),
        (changed("added_tokens", []), "lacks the special tokens"),
        (changed("added_tokens", 0, "id", 0), "an integer of its own"),
        (changed("added_tokens", 0, "id", "0"), "an integer of its own"),
        (changed("model", "vocab", []), "its vocab must be an object"),
        (changed("model", "vocab", "the cat", 5), "as characters, got 'the cat'"),
        (changed("model", "vocab", "Ġ" * 2000, 999), "its tokens must be 1 to 1,024 bytes"),
        (changed("model", "vocab", "", 999), "its tokens must be 1 to 1,024 bytes"),
        (changed("model", "merges", None), "its merges must be a list"),
        (merges(lambda found: [*found, 3]), "each of its merges must be two tokens"),
        (merges(lambda found: [*found, ["q", "q"]]), "in the order of what they become"),
        (merges(lambda found: found[::-1]), "in the order of what they become"),
        (merges(lambda found: found[1:]), "its merges lack"),
    ],
)
def test_what_would_give_other_ids_is_refused_with_the_file(tmp_path, content, match):
    with pytest.raises(ValueError, match=match) as e:
        Tokenizer.load(write(tmp_path, content))
    assert str(e.value).startswith(str(tmp_path / "tokenizer.json")) and "\n" not in str(e.value)


def test_only_such_a_file_is_taken_for_one():
    assert is_fast_tokenizer(fast_tokenizer(TOKENIZER))
    assert not any(map(is_fast_tokenizer, ([], {}, {"model": 3, "pre_tokenizer": {}}, {"format": "x"}, None)))
    with pytest.raises(Refused):
        fast_tokenizer_fields({"model": {}, "pre_tokenizer": None}, "x")
