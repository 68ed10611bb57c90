"""The tokenizer on a vocabulary written here: 256 bytes, four merges, nine specials."""

import copy
import io
import json
import os
import pickle
import pickletools
import random
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.files.torch_read import read_pt
from nanochat_jax.tokenizer import (
    MAX_TOKENS,
    SEPARATOR,
    SPECIAL_TOKENS,
    BadConversation,
    Tokenizer,
    UnsplittableText,
    train_tokenizer,
)

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
RANKS = {bytes([i]): i for i in range(256)} | {b"he": 256, b"ll": 257, b"hell": 258, b" w": 259}
SPECIALS = {token: 260 + i for i, token in enumerate(SPECIAL_TOKENS)}
BOS, USER, END_USER, ASSISTANT, END, PYTHON, END_PYTHON, OUTPUT, END_OUTPUT = range(260, 269)
TOKENIZER = Tokenizer("small", PATTERN, RANKS, SPECIALS)


def chat(*contents):
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents)]}


def test_merges_are_applied_and_the_ids_decode_to_the_text():
    assert TOKENIZER.encode("hello w") == [258, ord("o"), 259]
    assert TOKENIZER.decode([258, ord("o"), 259]) == "hello w"
    assert TOKENIZER.vocab_size == 269 and TOKENIZER.bos == BOS


def test_text_never_becomes_a_special_token():
    for token in SPECIAL_TOKENS:
        assert max(TOKENIZER.encode(token)) < 260
        ids, _ = TOKENIZER.render_many([chat(token, token)])[0]
        assert (ids >= 260).sum() == 5 and TOKENIZER.decode(ids).count(token) >= 2


def test_surrogates_become_characters_or_replacements():
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud83db")) == "a\ufffdb"
    assert TOKENIZER.decode(TOKENIZER.encode("\ud83d\ude80")) == "🚀"
    ids, _ = TOKENIZER.render_many([chat("a\ud83d", "\ude80b")])[0]
    assert ids.tolist() == TOKENIZER.render_conversation(chat("a\ufffd", "\ufffdb"))[0]


def test_bytes_that_are_no_text_decode_to_replacements():
    assert TOKENIZER.decode([0xE2, 0x82]) == "\ufffd" and TOKENIZER.decode_bytes([0xE2, 0x82]) == b"\xe2\x82"
    assert TOKENIZER.decode(np.array([BOS, 258])) == "<|bos|>hell"


@pytest.mark.parametrize("ids", [[-1], [269], [0, 1 << 40]])
def test_ids_out_of_range_are_refused(ids):
    with pytest.raises(ValueError, match=r"0\.\.268"):
        TOKENIZER.decode(ids)


def test_token_bytes_are_raw_lengths_and_zero_for_specials():
    counts = TOKENIZER.token_bytes()
    assert counts.dtype == np.int32
    assert counts.tolist() == [1] * 256 + [2, 2, 4, 2] + [0] * 9


def test_only_what_the_assistant_writes_has_mask_1():
    parts = [
        {"type": "text", "text": "a"},
        {"type": "python", "text": "1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "b"},
    ]
    ids, mask = TOKENIZER.render_conversation(chat("u", parts, "v"))
    a, b, u, v, one, two = (ord(c) for c in "abuv12")
    assert ids == [
        *(BOS, USER, u, END_USER, ASSISTANT, a, PYTHON, one, END_PYTHON, OUTPUT, two, END_OUTPUT, b, END),
        *(USER, v, END_USER),
    ]
    assert mask == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0]


def test_a_system_message_joins_the_first_user_message_and_the_input_stays_as_it_was():
    conversation = {"messages": [{"role": "system", "content": "s"}, *chat("u", "a")["messages"]]}
    before = copy.deepcopy(conversation)
    assert TOKENIZER.render_conversation(conversation) == TOKENIZER.render_conversation(chat("s\n\nu", "a"))
    assert TOKENIZER.render_for_completion(conversation) == TOKENIZER.render_for_completion(chat("s\n\nu", "a"))
    assert conversation == before


def test_long_conversations_are_cut_and_a_prompt_still_ends_with_assistant_start():
    long = chat("x" * 3000, "y")
    ids, mask = TOKENIZER.render_conversation(long)
    assert len(ids) == len(mask) == MAX_TOKENS
    assert len(TOKENIZER.render_conversation(long, None)[0]) == 3000 + 6
    prompt = TOKENIZER.render_for_completion(long)
    assert len(prompt) == MAX_TOKENS + 1 and prompt[-1] == ASSISTANT


MESSAGE = {"role": "user", "content": "u"}
REFUSED = {
    "no dict": [],
    "no messages": {},
    "messages of no list": {"messages": "hi"},
    "empty": {"messages": []},
    "message of no dict": {"messages": ["hi"]},
    "no role": {"messages": [{"content": "hi"}]},
    "role of a list": {"messages": [{"role": ["user"], "content": "hi"}]},
    "assistant first": {"messages": [{"role": "assistant", "content": "hi"}]},
    "user twice": {"messages": [MESSAGE, MESSAGE]},
    "no user after system": {"messages": [{"role": "system", "content": "s"}]},
    "system without text": {"messages": [{"role": "system", "content": None}, MESSAGE]},
    "user with parts": chat([{"type": "text", "text": "u"}], "a"),
    "assistant with a number": chat("u", 7),
    "part of no dict": chat("u", ["a"]),
    "part of unknown type": chat("u", [{"type": "image", "text": "a"}]),
    "part with a list for a type": chat("u", [{"type": [], "text": "a"}]),
    "part without text": chat("u", [{"type": "python"}]),
}


@pytest.mark.parametrize("conversation", REFUSED.values(), ids=REFUSED)
def test_a_bad_conversation_is_refused_in_one_sentence(conversation):
    with pytest.raises(BadConversation) as one:
        TOKENIZER.render_conversation(conversation)
    assert "\n" not in str(one.value)
    with pytest.raises(BadConversation, match=re.escape(str(one.value))):
        TOKENIZER.render_many([chat("u", "a"), conversation])


def test_only_an_assistant_message_can_be_completed_and_its_content_does_not_matter():
    assert TOKENIZER.render_for_completion(chat("u", None)) == [BOS, USER, ord("u"), END_USER, ASSISTANT]
    for conversation in (chat("u"), chat(), {"messages": [{"role": "assistant", "content": "a"}]}):
        with pytest.raises(BadConversation):
            TOKENIZER.render_for_completion(conversation)


texts = st.text(max_size=20) | st.sampled_from(["", SEPARATOR, SEPARATOR[:-1], "<|bos|>", "\ud800", "hell", "  \n "])
parts = st.builds(lambda t, x: {"type": t, "text": x}, st.sampled_from(["text", "python", "python_output"]), texts)


@st.composite
def conversations(draw):
    turns = draw(st.integers(1, 4))
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for i in range(turns):
        content = draw(texts) if i % 2 == 0 else draw(texts | st.lists(parts, max_size=4))
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return {"messages": messages}


@settings(max_examples=150, deadline=None)
@given(st.lists(conversations(), max_size=6), st.sampled_from([None, 0, 1, 7, 2048]))
def test_a_batch_is_the_same_as_one_by_one(batch, max_tokens):
    many = TOKENIZER.render_many(batch, max_tokens)
    assert [(ids.tolist(), mask.tolist()) for ids, mask in many] == [
        TOKENIZER.render_conversation(conversation, max_tokens) for conversation in batch
    ]


def test_a_batch_of_many_chunks_is_the_same_as_one_by_one(monkeypatch):
    monkeypatch.setattr("nanochat_jax.tokenizer.bpe.CHUNK_CHARS", 10)
    batch = [chat(f"hello {i}", SEPARATOR if i == 7 else "well " * (i % 5)) for i in range(40)]
    for conversation, (ids, mask) in zip(batch, TOKENIZER.render_many(iter(batch)), strict=True):
        assert (ids.tolist(), mask.tolist()) == TOKENIZER.render_conversation(conversation)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_decoding_what_was_encoded_gives_the_text(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert sum(TOKENIZER.token_bytes()[TOKENIZER.encode(text)]) == len(text.encode())


def test_a_text_on_which_tiktoken_panics_is_an_ordinary_error(capfd):
    text = " " * 2_000_000 + "x"
    with pytest.raises(UnsplittableText, match="white space"):
        TOKENIZER.encode(text)
    with pytest.raises(UnsplittableText, match="white space"):
        TOKENIZER.render_many([chat("u", "a"), chat(text, "a")])


def test_saving_and_loading_gives_the_same_tokenizer(tmp_path):
    TOKENIZER.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.digest() == TOKENIZER.digest() and loaded.name == "small"
    assert loaded.encode("hello w") == TOKENIZER.encode("hello w")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_the_digest_changes_with_what_decides_ids_and_not_with_the_name():
    swapped = RANKS | {b"he": 257, b"ll": 256}
    specials = SPECIALS | {"<|bos|>": USER, "<|user_start|>": BOS}
    others = [("small", r"\s+|\S+", RANKS, SPECIALS), ("small", PATTERN, swapped, SPECIALS)]
    others.append(("small", PATTERN, RANKS, specials))
    assert len({TOKENIZER.digest(), *(Tokenizer(*other).digest() for other in others)}) == 4
    assert Tokenizer("other", PATTERN, RANKS, SPECIALS).digest() == TOKENIZER.digest()


def test_without_a_tokenizer_the_error_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.pkl.*copy"):
        Tokenizer.load(tmp_path)


def pickled(folder, ranks):
    encoding = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=SPECIALS)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))


def test_nanochats_pickle_loads_and_must_agree_with_ours(tmp_path):
    pickled(tmp_path, RANKS)
    assert Tokenizer.load(tmp_path).digest() == TOKENIZER.digest()
    TOKENIZER.save(tmp_path)
    assert Tokenizer.load(tmp_path).digest() == TOKENIZER.digest()
    pickled(tmp_path, RANKS | {b"he": 257, b"ll": 256})
    with pytest.raises(ValueError, match=r"tokenizer\.json.*tokenizer\.pkl"):
        Tokenizer.load(tmp_path)


DAMAGE = {
    "cut": lambda d: json.dumps(d)[:-50],
    "a list": lambda d: "[]",
    "deep": lambda d: "[" * 200_000,
    "other format": lambda d: json.dumps(d | {"format": "x"}),
    "no ranks": lambda d: json.dumps({k: v for k, v in d.items() if k != "ranks"}),
    "number for a rank": lambda d: json.dumps(d | {"ranks": [1]}),
    "not base64": lambda d: json.dumps(d | {"ranks": ["!", *d["ranks"][1:]]}),
    "rank twice": lambda d: json.dumps(d | {"ranks": [d["ranks"][1], *d["ranks"][1:]]}),
    "text for an id": lambda d: json.dumps(d | {"special_tokens": d["special_tokens"] | {"<|bos|>": "260"}}),
    "not a regex": lambda d: json.dumps(d | {"pattern": "("}),
    "not UTF-8": lambda d: b"\xff\xfe",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named(tmp_path, damage):
    TOKENIZER.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    damaged = damage(json.loads(path.read_text()))
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a usable tokenizer"):
        Tokenizer.load(tmp_path)


def without(table, key):
    return {k: v for k, v in table.items() if k != key}


BAD_VOCABULARIES = {
    "lacks the special tokens <|python_end|>": (RANKS, without(SPECIALS, "<|python_end|>")),
    "does not know: <|extra|>": (RANKS, SPECIALS | {"<|extra|>": 269}),
    "no token for 1 of the 256 bytes, the first is 7": (
        {token: i - (i > 7) for token, i in without(RANKS, b"\x07").items()},
        {token: i - 1 for token, i in SPECIALS.items()},
    ),
    "special tokens must be 260..268": (RANKS, SPECIALS | {"<|bos|>": 300}),
    "mergeable tokens must be 0..259": (RANKS | {b"he": 5}, SPECIALS),
    "non-empty bytes": (RANKS | {b"": 260}, SPECIALS),
}


@pytest.mark.parametrize(("message", "tables"), BAD_VOCABULARIES.items(), ids=list(BAD_VOCABULARIES))
def test_a_vocabulary_that_is_not_nanochats_is_refused(message, tables):
    with pytest.raises(ValueError) as refused:
        Tokenizer("x", PATTERN, *tables)
    assert message in str(refused.value)


def test_an_unknown_special_token_is_named():
    assert TOKENIZER.special("<|user_start|>") == USER
    with pytest.raises(ValueError, match="pad"):
        TOKENIZER.special("<|pad|>")


# ---- files for nanochat


def test_nanochat_unpickles_the_tokenizer_and_it_encodes_the_same(tmp_path):
    TOKENIZER.save_for_nanochat(tmp_path)
    encoding = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())
    assert type(encoding) is tiktoken.Encoding and encoding.n_vocab == 269
    assert encoding.encode_ordinary("hello w") == TOKENIZER.encode("hello w")
    assert encoding.encode_single_token("<|bos|>") == BOS
    assert Tokenizer.load(tmp_path).digest() == TOKENIZER.digest()


def test_token_bytes_are_a_file_that_torch_loads_with_weights_only(tmp_path):
    TOKENIZER.save_for_nanochat(tmp_path)
    read = read_pt(tmp_path / "token_bytes.pt")
    assert read.dtype == np.int32 and read.tolist() == TOKENIZER.token_bytes().tolist()
    content = (tmp_path / "token_bytes.pt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = {arg for op, arg, _ in pickletools.genops(archive.read("token_bytes/data.pkl")) if op.name == "GLOBAL"}
        assert archive.testzip() is None
    assert names == {"torch._utils _rebuild_tensor_v2", "torch IntStorage", "collections OrderedDict"}
    assert content.index(TOKENIZER.token_bytes().tobytes()) % 64 == 0


# ---- training

NOUNS, VERBS = ("river", "harbour", "mill", "baker", "orchard", "lantern"), ("crossed", "mended", "painted", "sold")
PROSE = [f"The {a} {verb} the {b}, and then the {b} {verb} {a}s!" for a in NOUNS for b in NOUNS for verb in VERBS]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(PROSE, 320)


def test_a_trained_tokenizer_has_the_size_asked_for_and_nanochats_tables(trained):
    assert trained.vocab_size == 320 and trained.name == "rustbpe" and trained.pattern == PATTERN
    assert [trained.special_tokens[s] for s in SPECIAL_TOKENS] == list(range(311, 320))
    assert len(trained.encode(PROSE[0])) < len(PROSE[0]) / 3


def test_merges_are_those_of_byte_pair_encoding():
    tokenizer = train_tokenizer(["abab"] * 3 + ["cd"] * 2, 268)
    ranks = [token for token, rank in tokenizer.mergeable_ranks.items() if rank >= 256]
    assert ranks == [b"ab", b"abab", b"cd"]


def test_a_trained_tokenizer_survives_saving(trained, tmp_path):
    trained.save(tmp_path)
    trained.save_for_nanochat(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer.pkl", "token_bytes.pt"}
    assert Tokenizer.load(tmp_path).digest() == trained.digest()  # it compares the two files


def test_training_depends_neither_on_the_order_of_texts_nor_on_threads(trained):
    shuffled = random.Random(0).sample(PROSE, len(PROSE))
    assert train_tokenizer(iter(shuffled), 320).digest() == trained.digest()
    program = "import sys, json; from nanochat_jax.tokenizer import train_tokenizer as t; "
    program += "print(t(json.load(sys.stdin), 320).digest())"
    for threads in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(PROSE),
            env=os.environ | {"RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == trained.digest()


def test_special_tokens_in_training_text_do_not_become_special(trained):
    tokenizer = train_tokenizer(PROSE + ["<|bos|> <|assistant_end|>"] * 100, 320)
    ids = tokenizer.encode("<|bos|>")
    assert max(ids) < 311 and tokenizer.decode(ids) == "<|bos|>"
    assert b"<|bos|>" not in tokenizer.mergeable_ranks
    assert not any(b"<|" in token and b"|>" in token for token in tokenizer.mergeable_ranks)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=100))
def test_any_text_survives_a_trained_tokenizer(text):
    tokenizer = train_tokenizer([text, "ab ab"], 266)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_surrogates_in_training_text_are_replaced():
    assert train_tokenizer(["a\ud83db"] * 2, 267).digest() == train_tokenizer(["a\ufffdb"] * 2, 267).digest()


def test_what_cannot_be_trained_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"at least 265 tokens.*got 264.*--vocab-size"):
        train_tokenizer(PROSE, 264)
    assert train_tokenizer([], 265).encode("ab") == [97, 98]
    with pytest.raises(ValueError, match=r"vocabulary of 267 tokens only, not for 300"):
        train_tokenizer(["ab ab"], 300)
    with pytest.raises(UnsplittableText, match="white space"):
        train_tokenizer([" " * 2_000_000 + "x"], 300)


def test_an_error_while_texts_are_read_reaches_the_caller():
    def texts():
        yield "ab"
        raise ValueError("shard 3 is damaged")

    with pytest.raises(ValueError, match=r"^shard 3 is damaged$"):
        train_tokenizer(texts(), 265)
