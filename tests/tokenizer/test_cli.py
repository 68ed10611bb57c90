"""The commands of `python -m nanochat_jax.tokenizer`: train, show, eval."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nanochat_jax.flags.tokenizer import Show
from nanochat_jax.tasks.custom_json import LONGEST_LINE
from nanochat_jax.tasks.task import AdaptedTask
from nanochat_jax.tokenizer import MAX_TOKENS, SPECIAL_TOKENS, Tokenizer, train_tokenizer
from nanochat_jax.tokenizer.__main__ import main
from nanochat_jax.tokenizer.compression import SAMPLES, compression_table, offline_encoding
from nanochat_jax.tokenizer.corpus import MAX_LINE, read_texts
from nanochat_jax.tokenizer.show import format_tokens, visible
from nanochat_jax.tokenizer.summary import summarize

CORPUS = Path(__file__).parents[3] / "shared" / "data" / "corpus"
BYTES = Tokenizer(
    "bytes",
    r"\w+|\W",
    {bytes([i]): i for i in range(256)} | {b"hi": 256},
    {token: 257 + i for i, token in enumerate(SPECIAL_TOKENS)},
)
ESCAPE = "\x1b[31m\x1b]0;owned\x07\x9b2J\r\x08\u202e\u2066\u200b"


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    """An empty base directory, and no colours."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "base"


def call(capsys, *argv):
    """-> (exit code or the error's sentence, what was printed)."""
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in argv])
    return end.value.code, capsys.readouterr().out


def test_conversations_are_cut_and_read_as_sft_does():
    assert (Show().max_tokens, Show().longest_line) == (MAX_TOKENS, LONGEST_LINE)


def write_shards(folder, n=3):
    folder.mkdir(parents=True)
    for i in range(n):
        texts = [f"shard {i} holds the words of shard {i}: " + "lorem ipsum dolor " * 5] * 4
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{i:05d}.parquet")
    return folder


def plain(conversation, tokenizer=BYTES, cut=None):
    ids, mask = tokenizer.render_conversation(conversation, cut)
    return format_tokens(tokenizer, ids, mask)


def chat(user, assistant):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


# ---- train


def test_training_on_a_file_writes_a_tokenizer_for_us_and_for_nanochat(tmp_path, base, capsys):
    (tmp_path / "a.txt").write_text("the cat and the dog and the cat\n" * 20)
    code, out = call(capsys, "train", "--input", tmp_path / "a.txt", "--vocab-size", 270)
    assert code == 0 and "read 640 characters" in out and "vocabulary of 270 tokens" in out
    assert "the text it learned from" in out
    assert {p.name for p in (base / "tokenizer").iterdir()} == {"tokenizer.json", "tokenizer.pkl", "token_bytes.pt"}
    assert Tokenizer.load(base / "tokenizer").vocab_size == 270


@pytest.mark.parametrize("folder", ["base_data_climbmix", "base_data"])
def test_by_default_the_base_directorys_shards_are_read_without_the_last(base, capsys, folder):
    write_shards(base / folder)
    code, out = call(capsys, "train", "--vocab-size", 280)
    assert code == 0 and "in 8 documents" in out
    tokenizer = Tokenizer.load(base / "tokenizer")
    texts = [pq.read_table(base / folder / f"shard_0000{i}.parquet")["text"].to_pylist() for i in (0, 1)]
    assert tokenizer.digest() == train_tokenizer([*texts[0], *texts[1]], 280).digest()


def test_shards_are_fetched_first_where_they_are_asked_for(base, capsys, monkeypatch, tmp_path):
    def fetch_shards(n, folder):
        assert (n, folder) == (2, base / "base_data_climbmix")
        write_shards(folder)

    monkeypatch.setattr("nanochat_jax.tokenizer.__main__.fetch_shards", fetch_shards)
    code, out = call(capsys, "train", "--vocab-size", 280, "--download", 2)
    assert code == 0 and "in 8 documents" in out
    assert "leave out --input" in call(capsys, "train", "--download", 2, "--input", tmp_path, "--overwrite")[0]
    assert "--download must be at least 0" in call(capsys, "train", "--download", -1, "--overwrite")[0]


def test_a_tokenizer_is_not_replaced_unless_asked(tmp_path, base, capsys):
    BYTES.save(base / "tokenizer")
    (tmp_path / "a.txt").write_text("the cat and the dog\n" * 20)
    argv = ["train", "--input", tmp_path / "a.txt", "--vocab-size", 270]
    code, _ = call(capsys, *argv)
    assert re.search(r"tokenizer\.json exists, and models trained with .* need it.*--overwrite", code)
    assert Tokenizer.load(base / "tokenizer").digest() == BYTES.digest()
    assert [p.name for p in (base / "tokenizer").iterdir()] == ["tokenizer.json"]
    assert call(capsys, *argv, "--overwrite")[0] == 0
    assert Tokenizer.load(base / "tokenizer").vocab_size == 270
    (base / "tokenizer" / "tokenizer.json").unlink()  # as nanochat leaves it
    assert "tokenizer.pkl exists" in call(capsys, *argv)[0]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["a.txt", "a.txt/new"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, capsys, place):
    (tmp_path / "a.txt").write_text("text")
    code, _ = call(capsys, "train", "--input", tmp_path / "nowhere", "--output", tmp_path / place)
    assert re.search(r"a\.txt\S* cannot be written \(.*\): free some space, or choose another --output", code)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_folders_that_were_made_for_nothing_are_removed(tmp_path, capsys):
    code, _ = call(capsys, "train", "--input", tmp_path / "nowhere", "--output", tmp_path / "a" / "b")
    assert "nowhere does not exist" in code and not (tmp_path / "a").exists()


@pytest.mark.parametrize("there", [False, True], ids=["new", "overwritten"])
def test_on_a_full_disk_nothing_is_left_and_a_tokenizer_that_was_there_stays(
    tmp_path, base, capsys, monkeypatch, there
):
    def save_for_nanochat(self, folder):  # after tokenizer.json
        raise OSError(errno.ENOSPC, "No space left on device")

    if there:
        BYTES.save(base / "tokenizer")
    before = contents(tmp_path)
    (tmp_path / "a.txt").write_text("the cat and the dog\n" * 20)
    argv = ["train", "--input", tmp_path / "a.txt", "--vocab-size", 270, *["--overwrite"] * there]
    with monkeypatch.context() as full:
        full.setattr(Tokenizer, "save_for_nanochat", save_for_nanochat)
        code, _ = call(capsys, *argv)
    assert re.search(r"tokenizer cannot be written \(No space left on device\): free some space", code)
    (tmp_path / "a.txt").unlink()
    assert contents(tmp_path) == before and base.exists() == there
    (tmp_path / "a.txt").write_text("the cat and the dog\n" * 20)
    assert call(capsys, *argv)[0] == 0


def test_training_stops_with_the_document_that_passes_max_chars(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "ab " * 10}) + "\n" for _ in range(9)))
    _, out = call(capsys, "train", "--input", tmp_path / "a.jsonl", "--vocab-size", 266, "--max-chars", 60)
    assert "read 90 characters in 3 documents" in out


REFUSED = {
    "latin.txt": (b"caf\xe9", r"latin\.txt is not UTF-8 text \(byte 0xe9\)"),
    "nul.txt": (b"a\0b", r"nul\.txt holds NUL bytes"),
    "empty.txt": (b"", r"there is no text in .*empty\.txt"),
    "number.jsonl": (b'\n{"text": 3}', r'number\.jsonl:2: "text" must be a string, got int'),
    "broken.jsonl": (b'{"text": "a"}\n{"te', r"broken\.jsonl:2: not JSON"),
    "deep.jsonl": (b"[" * 200_000, r"deep\.jsonl:1: not JSON that can be read"),
    "digits.jsonl": (b'{"text": ' + b"1" * 5000 + b"}", r"digits\.jsonl:1: not JSON that can be read"),
    "latin.jsonl": (b'{"text": "\xe9"}', r"latin\.jsonl:1: not UTF-8: byte 0xe9 at column 11"),
    "other.jsonl": (b'{"content": "a"}', r'other\.jsonl:1: neither an object with "text" nor a conversation'),
    "broken.parquet": (b"PAR1", r"broken\.parquet is not a readable parquet file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_text_is_refused_in_one_sentence(tmp_path, base, capsys, name):
    content, sentence = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    code, out = call(capsys, "train", "--input", tmp_path / name, "--vocab-size", 265)
    assert re.search(sentence, code) and "\n" not in code and not out
    assert not (base / "tokenizer").exists()


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"text": ["a", None]}, "row 1: the text is missing"),
        ({"content": ["a"]}, "no column text"),
        ({"text": [1]}, "must hold strings"),
        (pa.table([["a"], ["b"]], names=["text", "text"]), "must have one column text, it has 2"),
        ({"text": pa.array([b"a", b"\xff"]).view(pa.string())}, "row 1: .*utf-8"),
    ],
    ids=["null", "other column", "numbers", "twice", "no UTF-8"],
)
def test_a_shard_without_text_is_refused_in_one_sentence(tmp_path, capsys, table, sentence):
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), tmp_path / "a.parquet")
    code, _ = call(capsys, "train", "--input", tmp_path / "a.parquet", "--vocab-size", 265)
    assert re.search(sentence, code) and "a.parquet" in code


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train"], "does not exist: give --input FILE or FOLDER, or --download N"),
        (["train", "--input", "nowhere"], "nowhere does not exist"),
        (["train", "--vocab-size", "264"], "at least 265 tokens"),
        (["train", "--doc-cap", "0"], "--doc-cap must be at least 1, got 0"),
        (["eval", "--max-chars", "0"], "--max-chars must be at least 1, got 0"),
        (["show", "a.jsonl", "--max-conversations", "-1"], "--max-conversations must be at least 0, got -1"),
        (["show"], "name one file of conversations, or one --task"),
        (["show", "a.jsonl"], "no tokenizer.json or tokenizer.pkl"),
        (["eval"], "no tokenizer.json or tokenizer.pkl"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_one_sentence(capsys, argv, sentence):
    code, _ = call(capsys, *argv)
    assert sentence in code and "\n" not in code


def test_without_a_command_the_commands_are_listed_and_a_wrong_one_is_refused(capsys):
    code, out = call(capsys)
    assert code == 0 and all(command in out for command in ("train", "show", "eval"))
    for argv in (["learn"], ["--config", "x.toml"], ["train", "--vocab", "3"]):
        assert call(capsys, *argv)[0] not in (0, None)


def test_a_folder_gives_its_files_of_known_kinds_in_order_of_name(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("bb")
    (folder / "a.jsonl").write_text('{"text": "a"}')
    (folder / "c.bin").write_bytes(b"\xff\0")
    code, out = call(capsys, "train", "--input", folder, "--vocab-size", 265)
    assert code == 0 and "read 3 characters in 2 documents" in out


# ---- texts


def test_a_plain_file_loses_nothing_and_is_cut_at_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\nthree is longer than ten\n\nfour".encode())
    documents = list(read_texts([path], 10, 1000))
    assert documents == ["one\r\ntwo\n", "three is l", "onger than", " ten\n\nfour"]


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs"])), st.integers(1, 20))
def test_the_pieces_of_a_plain_file_are_the_file(tmp_path_factory, text, cap):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_bytes(text.encode())
    documents = list(read_texts([path], cap, 10**9))
    assert "".join(documents) == text and all(0 < len(document) <= cap for document in documents)


def test_json_lines_give_texts_and_the_contents_of_conversations(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        {"text": "one\0", "messages": 3},
        chat("two", "three"),
        {"instruction": "add", "input": "1", "output": "2"},
        chat("four", [{"type": "python", "text": "5"}, {"type": "python_output", "text": "6"}])["messages"],
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert list(read_texts([path], 4, 1000)) == ["one\0", "two", "thre", "add\n", "2", "four", "5", "6"]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(lines[0]).encode())  # a byte order mark
    assert list(read_texts([path], 4, 1000)) == ["one\0"]


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path):
    with open(tmp_path / "a.jsonl", "wb") as f:
        f.truncate(MAX_LINE + 10)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: a line may have at most"):
        list(read_texts([tmp_path / "a.jsonl"], 10, 10))


def test_training_on_a_real_shard(capsys, tmp_path):
    shard = CORPUS / "shard_00004.parquet"
    if not shard.exists():
        pytest.skip(f"{shard} is not on this machine")
    argv = ["train", "--input", shard, "--vocab-size", 1024, "--max-chars", 300_000, "--output", tmp_path / "new"]
    assert call(capsys, *argv)[0] == 0
    tokenizer = Tokenizer.load(tmp_path / "new")
    text = next(read_texts([shard], 10_000, 1))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(text.encode()) / len(tokenizer.encode(text)) > 2.2
    assert b" the" in tokenizer.mergeable_ranks


# ---- show


def test_trained_tokens_stand_in_brackets_and_marks_in_the_text_are_escaped():
    shown = plain(chat("hi[1]|\\", "a\n<|bos|>hi"))
    assert shown.plain == (
        "<|bos|>|<|user_start|>|hi|\\[|1|\\]|\\||\\\\|<|user_end|>|<|assistant_start|>|"
        "[a|\\n\n|<|\\||b|o|s|\\||>|hi|<|assistant_end|>]"
    )


def test_the_result_of_a_tool_is_not_trained():
    parts = [{"type": "python", "text": "1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "b"}]
    assert plain(chat("a", parts)).plain.endswith(
        "[<|python_start|>|1|<|python_end|>]|<|output_start|>|2|<|output_end|>|[b|<|assistant_end|>]"
    )


def test_colours_follow_the_mask():
    shown = plain(chat("u", "a"))
    spans = [(shown.plain[span.start : span.end], str(span.style)) for span in shown.spans]
    grey = [("|", "bright_black")]
    assert spans == [
        *[("<|bos|>", "bold bright_black"), *grey, ("<|user_start|>", "bold bright_black"), *grey],
        *[("u", "bright_black"), *grey, ("<|user_end|>", "bold bright_black"), *grey],
        *[("<|assistant_start|>", "bold bright_black"), *grey, ("[", "green"), ("a", "green"), *grey],
        *[("<|assistant_end|>", "bold green"), ("]", "green")],
    ]


def test_a_character_that_is_spread_over_tokens_is_shown_whole():
    assert plain(chat("é你", "🐕a")).plain == (
        "<|bos|>|<|user_start|>|é|你|<|user_end|>|<|assistant_start|>|[🐕|a|<|assistant_end|>]"
    )
    assert plain(chat("a你", "b"), cut=5).plain == "<|bos|>|<|user_start|>|a|\\xe4\\xbd"


def test_what_does_not_print_is_written_as_in_a_python_string():
    assert visible("\ta\x1b[0m\x9b\u202eé\xa0\\n") == r"\ta\x1b\[0m\x9b\u202eé\xa0\\n"
    assert visible("a\r\nb") == "a\\r\\n\nb"
    assert visible("[a|\x07]", "") == "[a|\\x07]"


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(st.sampled_from(ESCAPE + "[]|\\ab\n")))
def test_nothing_that_a_terminal_acts_on_is_shown(text):
    shown = visible(text)
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert shown.count("\n") == text.count("\n")
    assert re.fullmatch(r"([^\[\]|\\]|\\[\[\]|\\a-zU])*", shown)  # no mark without a backslash


def write_conversations(path, *conversations):
    path.write_text("".join(json.dumps(c) + "\n" for c in conversations))
    return path


def test_show_prints_a_count_and_the_tokens_of_each_conversation(tmp_path, base, capsys):
    BYTES.save(base / "tokenizer")
    path = write_conversations(tmp_path / "c.jsonl", chat("u", "a"), chat("u", "bb")["messages"], chat("u", "c"))
    code, out = call(capsys, "show", path, "--max-conversations", 2)
    form, shown, _, *lines = out.splitlines()
    assert form == f"{path}: 3 conversations as messages with role and content" and shown == "2 of 3 follow"
    assert code == 0 and lines[0] == f"{path}:1: 7 tokens, 2 trained" and lines[3] == f"{path}:2: 8 tokens, 3 trained"
    assert lines[1] == "<|bos|>|<|user_start|>|u|<|user_end|>|<|assistant_start|>|[a|<|assistant_end|>]"
    assert len(lines) == 6 + 3
    assert "c.jsonl:3" in call(capsys, "show", path, "--max-conversations", 0)[1]
    assert "the first 6 follow, with 1 trained" in call(capsys, "show", path, "--max-tokens", 6)[1]


def test_show_ends_with_a_summary_of_all_conversations(tmp_path, base, capsys):
    BYTES.save(base / "tokenizer")
    lengths = [1] * 5 + [2] * 4 + [20]  # of the answers, without the tokens around them: 5 for the question, 1 after it
    path = write_conversations(
        tmp_path / "c.jsonl", *(chat("u", "x" * n) for n in lengths), chat("<|bos|> <|bos|>", "y")
    )
    _, out = call(capsys, "show", path, "--max-conversations", 1, "--max-tokens", 10)
    kept = 5 * 7 + 4 * 8 + 10 + 10  # the last two are cut
    assert out.splitlines()[-4:] == [
        "all 11 conversations: 8 tokens in the median, 90 % have at most 21, the longest 26",
        "2 of them are longer than 10 tokens and are cut",
        f"{5 * 2 + 4 * 3 + 5} of {kept} tokens are trained ({100 * (5 * 2 + 4 * 3 + 5) / kept:.1f} %)",
        "1 text holds the name of a special token, such as <|bos|>, which is plain text",
    ]
    assert "are cut" not in call(capsys, "show", path, "--max-tokens", 0)[1]


def test_a_summary_of_very_many_conversations_is_of_the_first(tmp_path):
    task = AdaptedTask([chat("u", "a")] * 3 + [chat("u", "b" * 100)] * 7)
    first, *_ = summarize(task, BYTES, None, str, most=3)
    assert first == "the first 3 of 10 conversations: 7 tokens in the median, 90 % have at most 7, the longest 7"


def test_show_takes_what_sft_takes_and_lists_the_same_faults(tmp_path, base, capsys):
    BYTES.save(base / "tokenizer")
    rows = [{"instruction": "u", "output": "a"}, {"instruction": "u", "output": ""}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    code, _ = call(capsys, "show", tmp_path / "a.json")
    assert re.fullmatch(r"error: 1 row is no conversation.*\n.*a\.json, row 2 \(line 6\): message 1.*is empty.*", code)
    code, out = call(capsys, "show", tmp_path / "a.json", "--allow-empty")
    assert code == 0 and "a.json: 2 conversations in Alpaca's form" in out and "a.json, row 2 (line 6): 6 tokens" in out
    assert "more than --longest-line=30" in call(capsys, "show", tmp_path / "a.json", "--longest-line", 30)[0]
    folder = tmp_path / "mirror/o--n/default/train"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"prompt": ["u"], "completion": ["a"]}), folder / "x.parquet")
    (folder / "manifest.json").write_text('["x.parquet"]')
    code, out = call(capsys, "show", "hub:o/n", "--data-dir", tmp_path / "mirror")
    assert code == 0 and "hub:o/n, row 1: 7 tokens, 2 trained" in out


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}], ids=str)
def test_a_hostile_file_cannot_reach_the_terminal(tmp_path, base, environment):
    BYTES.save(base / "tokenizer")
    folder = tmp_path / "evil\x1b[2J"
    folder.mkdir()
    path = write_conversations(folder / "c.jsonl", chat(f"{ESCAPE}[bold]", f"{ESCAPE}:smile: [/]"))
    run = subprocess.run(
        [sys.executable, "-m", "nanochat_jax.tokenizer", "show", path],
        env=os.environ | environment | {"PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        check=True,
    )
    out = run.stdout.decode()
    ours = re.sub(r"\x1b\[[0-9;]*m", "", out)  # the colours
    assert all(c.isprintable() or c == "\n" for c in ours) and "\x1b[31m" not in out
    assert ("\x1b[32m" in out) == (environment == {"FORCE_COLOR": "1"})
    assert "\\x1b|\\[|3|1|m" in ours and "s|m|i|l|e" in ours and "[b|o" not in ours


def test_a_line_that_is_no_conversation_ends_show_with_its_number(tmp_path, base, capsys):
    BYTES.save(base / "tokenizer")
    path = write_conversations(tmp_path / "c.jsonl", chat("u", "a"), {"messages": [{"role": "assistant"}]})
    code, out = call(capsys, "show", path)
    assert "c.jsonl:2: message 0 must have role 'user'" in code and out == ""
    assert "holds no conversation" in call(capsys, "show", write_conversations(tmp_path / "e.jsonl"))[0]


def test_what_cannot_be_read_is_a_sentence_with_its_name(tmp_path, base, capsys):
    BYTES.save(base / "tokenizer")
    assert call(capsys, "show", tmp_path / "nope.jsonl")[0] == f"error: {tmp_path / 'nope.jsonl'} does not exist"
    assert call(capsys, "show", tmp_path)[0] == f"error: {tmp_path} is not a file"
    if os.path.exists("/proc/self/mem"):  # a file that opens and does not read
        code, _ = call(capsys, "eval", "--input", "/proc/self/mem")
        assert re.fullmatch(r"error: /proc/self/mem cannot be read \([A-Z][a-z/ ]+\)", code)


def test_show_takes_a_task(base, capsys, tmp_path, monkeypatch):
    BYTES.save(base / "tokenizer")
    (tmp_path / "shown_task.py").write_text(
        "class Pair:\n    def __len__(self): return 2\n    def __getitem__(self, i):\n"
        "        return {'messages': [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': str(i)}]}\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out = call(capsys, "show", "--task", "shown_task:Pair")
    assert code == 0 and "Pair 1: 7 tokens, 2 trained" in out and "[1|<|assistant_end|>]" in out


def test_a_closed_pipe_ends_show_quietly(tmp_path, base):
    BYTES.save(base / "tokenizer")
    path = write_conversations(tmp_path / "c.jsonl", *[chat("u" * 500, "a" * 500)] * 500)
    show = subprocess.Popen(
        [sys.executable, "-m", "nanochat_jax.tokenizer", "show", path, "--max-conversations", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert any(b"1,005 tokens" in show.stdout.readline() for _ in range(4))
    show.stdout.close()
    assert show.stderr.read() == b""
    show.stderr.close()
    assert show.wait(30) in (0, 1)


# ---- eval


def table_of(tokenizer, **more):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(compression_table(tokenizer.encode, more))
    return console.export_text()


def test_eval_prints_bytes_per_token_of_every_kind_and_file(tmp_path, base, capsys, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    BYTES.save(base / "tokenizer")
    (tmp_path / "a.txt").write_text("hi" * 30 + "é")
    code, out = call(capsys, "eval", "--input", tmp_path / "a.txt")
    assert code == 0 and all(kind in out for kind in SAMPLES)
    row = next(line for line in out.splitlines() if "a.txt" in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["62", "32", "1.94"]
    assert "gpt2 (not on this machine)" in out and "cl100k_base (not on this machine)" in out


def test_in_a_narrow_terminal_files_of_long_names_are_still_told_apart(tmp_path, base, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    BYTES.save(base / "tokenizer")
    for name in ("one", "two"):
        (tmp_path / f"{'long' * 20}_{name}.txt").write_text("text")
    _, out = call(capsys, "eval", "--input", tmp_path)
    names = "".join(line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│"))
    assert all(f"{'long' * 20}_{name}.txt" in names for name in ("one", "two"))


def test_an_encoding_that_is_not_here_is_never_downloaded(tmp_path, monkeypatch):
    from tiktoken import load

    def download(url):
        raise AssertionError(f"{url} was asked for")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(load, "read_file", download)
    assert offline_encoding("gpt2") is None
    assert load.read_file is download  # given back
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {"gpt2": BYTES._plain})
    assert offline_encoding("gpt2") is BYTES._plain


def test_a_reference_that_is_here_has_a_column(monkeypatch):
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {"gpt2": BYTES._plain, "cl100k_base": BYTES._plain})
    out = table_of(BYTES, mine=["hihi"], empty=[])
    row = next(line for line in out.splitlines() if "mine" in line)
    assert [cell.strip() for cell in row.split("│")[2:7]] == ["4", "2", "2.00", "2.00", "2.00"]
    assert "not on this machine" not in out
    assert re.search(r"empty +│ +0 │ +0 │ +- │", out)
