"""The tokenizer on a vocabulary written here: 256 bytes, four merges, nine specials."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.tokenizer import (
    MAX_TOKENS,
    SEPARATOR,
    SPECIAL_TOKENS,
    BadConversation,
    Tokenizer,
    UnsplittableText,
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
    with pytest.raises(BadConversation, match=r"^conversation 1: "):
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
    monkeypatch.setattr("nanochat_jax.tokenizer.CHUNK_CHARS", 10)
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
    with pytest.raises(BadConversation, match=r"^conversation 1: "):
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
    import pickle

    import tiktoken

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
