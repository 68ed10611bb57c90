"""Files of one's own conversations: every form, JSON lines, arrays and parquet; what is wrong is listed by its place.

Run: python -m pytest tests/tasks/test_custom_json.py
"""

import io
import json
import resource
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.tasks import CustomJSON, custom_json, hub
from nanochat_jax.tasks.json_rows import JSONRows
from nanochat_jax.tasks.sources import SOURCES
from tests.support.loopback import isolate, serve_dataset, servers, use_hub


@pytest.fixture(autouse=True)
def own_base_directory(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path)


def chat(user="u", assistant="a"):
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


SYSTEM = {"role": "system", "content": "s"}
THREE = [*chat(), {"role": "user", "content": "v"}]
FORMS = {  # rows, and the messages that they mean
    "as messages with role and content": [
        ({"messages": chat()}, chat()),
        (chat("b"), chat("b")),
        ([SYSTEM, *chat()], [SYSTEM, *chat()]),
    ],
    "as prompt and completion": [
        ({"prompt": "u", "completion": "a"}, chat()),
        ({"prompt": [SYSTEM, *THREE], "completion": [chat()[1]]}, [SYSTEM, *THREE, chat()[1]]),
    ],
    "in ShareGPT's form": [
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, chat()),
        (
            {
                "conversations": [
                    {"from": r, "value": v} for r, v in (("system", "s"), ("user", "u"), ("assistant", "a"))
                ]
            },
            [SYSTEM, *chat()],
        ),
    ],
    "in Alpaca's form": [
        ({"instruction": "u", "input": "", "output": "a"}, chat()),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, chat("Add.\n\n1 2", "3")),
        ({"instruction": "u", "output": "a"}, chat()),
        ({"instruction": "u", "input": None, "output": "a"}, chat()),
    ],
}
each_form = pytest.mark.parametrize("title", FORMS)


def write(path, rows, how):
    if how == "lines":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif how == "pretty":
        path.write_text(json.dumps(rows, indent=2))
    elif how == "array":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    return path


@each_form
@pytest.mark.parametrize("how", ["lines", "array", "pretty", "parquet"])
def test_each_form_is_told_by_its_first_row_said_and_becomes_messages(tmp_path, title, how):
    rows = FORMS[title]
    if how == "parquet":  # whose columns have one type
        rows = [row for row in rows if isinstance(row[0], dict) and row[0].keys() == rows[0][0].keys()][:1]
    said = []
    path = write(tmp_path / "mine", [row for row, _ in rows], how)
    task = CustomJSON(path, log=said.append)
    assert [conversation["messages"] for conversation in task] == [messages for _, messages in rows]
    assert said == [f"{path}: {len(rows)} conversation{'s' * (len(rows) > 1)} {title}"]


def test_keys_that_a_form_does_not_use_are_said(tmp_path):
    said = []
    row = {"instruction": "u", "output": "a", "history": [], "system": "s"}
    for how in ("lines", "parquet"):
        path = write(tmp_path / how, [row], how)
        CustomJSON(path, log=said.append)
        assert said.pop() == f'{path}: 1 conversation in Alpaca\'s form (not used: "history", "system")'


@each_form
def test_a_row_in_another_form_than_the_first_is_a_fault(tmp_path, title):
    others = [FORMS[other][0][0] for other in FORMS if other != title]
    path = write(tmp_path / "mine.jsonl", [FORMS[title][0][0], *others], "lines")
    with pytest.raises(ValueError, match="3 lines are no conversation") as bad:
        CustomJSON(path)
    lines = str(bad.value).splitlines()[1:]
    assert [line.partition(": ")[0] for line in lines] == [f"{path}:{n}" for n in (2, 3, 4)]
    assert all("as the first row has, it has" in line for line in lines), lines


TOOLS, IMAGE = "calls a tool or is its answer", '"image_url" cannot be trained on'
PARTS = [{"type": "text", "text": "t"}]
REFUSED = [
    ([*chat()[:1], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, *THREE], f"message 1 {TOOLS}"),
    ([*THREE, {"role": "tool", "content": "5"}], f"message 3 {TOOLS}"),
    ([*THREE, {"role": "function", "name": "f", "content": "5"}], f"message 3 {TOOLS}"),
    (
        {"conversations": [{"from": "human", "value": "u"}, {"from": "function_call", "value": "{}"}]},
        f"message 1 {TOOLS}",
    ),
    (chat([*PARTS, {"type": "image_url", "image_url": {"url": "x"}}]), f"content of message 0 .* {IMAGE}"),
    (chat("u", PARTS), "content of message 1 must be a string, got a list of parts: join their texts"),
    ([SYSTEM, *chat()[:1]], "at least 2 messages beside the system's, got 1"),
    ([SYSTEM, SYSTEM, *chat()], "message 1 must have role 'user'"),
    ([*chat(), SYSTEM, chat()[1]], "message 2 must have role 'user', as roles alternate"),
    ({"prompt": "u", "completion": chat()[1:]}, "two strings or two lists of messages, got str and list"),
    ({"conversations": [{"role": "user", "content": "u"}]}, 'message 0 must be an object with "from" and "value", got'),
    ({"conversations": 5}, "conversations must be a list, got int"),
    ({"instruction": 5, "output": "a"}, "instruction must be a string, got int"),
    ({"instruction": "u", "output": ""}, "message 1, the assistant's, is empty"),
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "pairs of a better and a worse answer are no conversations"),
]


@pytest.mark.parametrize(("row", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_taken_is_refused_with_a_hint(tmp_path, row, reason):
    for how in ("lines", "pretty"):
        with pytest.raises(ValueError, match=reason):
            CustomJSON(write(tmp_path / "mine.jsonl", [row], how))


def test_empty_answers_are_taken_where_they_are_asked_for(tmp_path):
    path = write(tmp_path / "mine.jsonl", [chat("", "")], "lines")
    with pytest.raises(ValueError, match=r"message 1, the assistant's, is empty .--allow-empty"):
        CustomJSON(path)
    assert list(CustomJSON(path, allow_empty=True)) == [{"messages": chat("", "")}]


def test_a_byte_order_mark_and_windows_line_ends_are_fine_and_utf_16_is_named(tmp_path):
    lines = "\r\n".join(json.dumps(chat(user)) for user in "xy") + "\r\n"
    marked = custom(tmp_path, b"\xef\xbb\xbf" + lines.encode())
    assert list(marked) == list(custom(tmp_path, lines)) and len(marked) == 2
    assert len(custom(tmp_path, b"\xef\xbb\xbf" + json.dumps([chat(), chat()], indent=1).encode())) == 2
    with pytest.raises(ValueError, match="UTF-16: save it as UTF-8"):
        custom(tmp_path, lines.encode("utf-16"))


# ---- arrays


def test_bad_rows_of_an_array_are_listed_with_row_and_line(tmp_path):
    rows = [chat(), 5, chat(), {"x": 1}, "a, ]b", chat(), [1]]
    with pytest.raises(ValueError) as bad:
        custom(tmp_path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    first, *places = str(bad.value).splitlines()
    assert first.startswith("4 rows are no conversation")
    assert [place.partition(": ")[0] for place in places] == [
        f"{tmp_path / 'mine.jsonl'}, row {n} (line {n + 1})" for n in (2, 4, 5, 7)
    ]


GOOD = json.dumps(chat())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"[{GOOD} {GOOD}]", "row 1 .line 1.: not JSON: Extra data"),
        (f"[{GOOD}, {GOOD}", "row 3 .line 1.: not JSON: "),
        (f"[{GOOD},\n{GOOD},]", "row 3 .line 2.: not JSON: "),
        (f"[{GOOD},, {GOOD}]", "row 2 .line 1.: not JSON: "),
        (f"[{GOOD}]\n[{GOOD}]", "row 2 .line 1.: not JSON: "),
        (f"[{GOOD}, {GOOD[:-5]}", "row 2 .line 1.: not JSON: "),
        (f'[{GOOD}, ["\\', "row 2 .line 1.: not JSON: "),
        (f"[{GOOD}, ", "row 2 .line 1.: not JSON: "),
        (f"[{GOOD}}}]", "row 1 .line 1.: not JSON: Extra data"),
    ],
)
def test_a_damaged_array_is_refused_at_the_row_where_it_breaks(tmp_path, text, reason):
    with pytest.raises(ValueError, match=f"no conversation.*\n.*{reason}"):
        custom(tmp_path, text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(json_values, max_size=5), st.sampled_from([None, 1]), st.booleans())
def test_the_rows_of_an_array_are_its_elements(rows, indent, ascii_only):
    rows = [{"messages": 0}, *rows]
    found = JSONRows(json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode(), 1000)
    assert found.is_array and [found.value(span) for span in found.spans()] == rows


def test_a_row_of_an_array_that_is_too_long_is_a_bad_row(tmp_path):
    path = tmp_path / "long.json"
    path.write_text(f"[{GOOD},{json.dumps(chat('x' * 500))},{GOOD}]")
    assert len(CustomJSON(path, longest_line=1000)) == 3
    with pytest.raises(ValueError, match=r"row 2 .line 1.: \d+ bytes, more than --longest-line=200"):
        CustomJSON(path, longest_line=200)


HOSTILE = {
    "one endless string": b'[["' + b'\\"' * (1 << 22),
    "brackets": b"[" * (1 << 23),
    "objects": b'[{"messages":' * (1 << 20),
    "empty lists": b"[[" + b"[]," * (1 << 22),
    "lines that are no JSON": b"x\n" * (1 << 22),
    "blank lines": b"\n" * (1 << 23) + b"x",
    "one long line": b" " * 5 + b"y" * (1 << 24),
    "numbers": b"[[" + b"1," * (1 << 22),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_soon_and_in_little_memory(tmp_path, name):
    (tmp_path / "hostile").write_bytes(HOSTILE[name])
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="no conversation") as refused:
        CustomJSON(tmp_path / "hostile")
    assert len(str(refused.value)) < 10_000
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


# ---- parquet


def test_parquet_files_that_cannot_be_read_as_conversations_are_a_sentence(tmp_path):
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(ValueError, match=r'mine\.parquet cannot be read as conversations: .* it has "text"'):
        CustomJSON(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"mine\.parquet is not a readable parquet file"):
        CustomJSON(path)
    write(path, [{"messages": chat()}, {"messages": [chat()[0]] * 2}, {"messages": None}], "parquet")
    with pytest.raises(ValueError, match=r"2 rows are no conversation.*\n.*\.parquet, row 2: message 1.*\n.*row 3: "):
        CustomJSON(path)


def test_a_parquet_file_that_is_damaged_inside_is_one_fault(tmp_path):
    path = write(tmp_path / "mine.parquet", [{"prompt": "u", "completion": "a"}] * 50, "parquet")
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 400 + data[404:])
    with pytest.raises(ValueError, match=r"^\S*mine\.parquet is not a readable parquet file"):
        CustomJSON(path)


def test_the_fingerprint_of_a_parquet_file_follows_its_content(tmp_path):
    one, other = (CustomJSON(write(tmp_path / user, [{"messages": chat(user)}], "parquet")) for user in "xy")
    again = CustomJSON(write(tmp_path / "again", [{"messages": chat("x")}], "parquet"))
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()


# ---- datasets of the hub


def parquet_bytes(*users):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"messages": chat(user), "id": 1} for user in users]), file)
    return file.getvalue()


def test_a_dataset_is_read_from_a_mirror_in_the_order_of_its_rows(tmp_path):
    for place, users in {"default/train": "ab", "default/test": "c", "all/train": "d"}.items():
        folder = tmp_path / "mirror/hub/o--n" / place
        folder.mkdir(parents=True)
        for user in users:
            (folder / f"{user}.parquet").write_bytes(parquet_bytes(user))
        (folder / "manifest.json").write_text(json.dumps([f"{user}.parquet" for user in users]))
    said = []
    read = {source: CustomJSON(source, data_dir=tmp_path / "mirror", log=said.append) for source in SPLITS}
    assert {s: "".join(c["messages"][0]["content"] for c in task) for s, task in read.items()} == SPLITS
    assert said[0] == 'hub:o/n: 2 conversations as messages with role and content (not used: "id")'
    assert read["hub:o/n"].place(1) == "hub:o/n, row 2"
    assert read["hub:o/n"].fingerprint() == read["hub:o/n:train"].fingerprint() != read["hub:o/n:test"].fingerprint()


SPLITS = {"hub:o/n": "ab", "hub:o/n:train": "ab", "hub:o/n:test": "c", "hub:o/n:all/train": "d"}


def test_a_dataset_that_is_on_no_disk_is_downloaded_unless_that_is_forbidden(tmp_path, monkeypatch):
    with servers(1) as (server,):
        use_hub(monkeypatch, server.url)
        serve_dataset(server, "o/n", hub.EXPORT, {"default/train/0000.parquet": parquet_bytes("a")}, "c" * 40)
        assert len(CustomJSON("hub:o/n")) == 1
        assert (tmp_path / "base/task_data/o--n/default/train/00000.parquet").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert len(CustomJSON("hub:o/n")) == 1
    with pytest.raises(FileNotFoundError, match=r"dataset o/n \(subset default, split test\) is not on this machine"):
        CustomJSON("hub:o/n:test")


@pytest.mark.parametrize("source", ["hub:", "hub:n", "hub:o/n:", "hub:o/n/m", "hub:o/n:a/b/c", "hub:o/n:a:b"])
def test_a_dataset_that_is_named_otherwise_is_a_sentence(source):
    with pytest.raises(ValueError, match="a dataset of the hub is named as hub:owner/dataset:split"):
        CustomJSON(source)


# ---- JSON lines


def custom(tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return CustomJSON(path, log=lambda text: None)


def test_lists_and_objects_are_taken_and_other_keys_kept(tmp_path):
    whole = {"messages": [{"role": "user", "content": "b", "id": 1}, chat()[1]], "source": "x"}
    content = json.dumps(chat("a")) + "\r\n\n \t\n" + json.dumps(whole) + "\n"
    task = custom(tmp_path, content)
    assert list(task) == [{"messages": chat("a")}, whole]


def test_only_a_line_feed_ends_a_line(tmp_path):
    text = "a\u2028b\u2029c\x85d"
    assert list(custom(tmp_path, json.dumps(chat(text), ensure_ascii=False))) == [{"messages": chat(text)}]


BAD_LINES = {
    b"\xff[]": "not UTF-8: byte 0xff at column 1",
    b'{"messages": 5}': "messages must be a list",
    b'{"text": "hi"}': 'an object must have "messages"',
    b'[{"role": "user", "content": NaN}, {}]': "NaN is not JSON",
    b'{"x": -Infinity, "messages": []}': "-Infinity is not JSON",
    b'[{"role": "user", "role": "user", "content": "u"}, {}]': "key 'role' is there twice",
    b"[" * 100_000: "nested too deeply",
    b"[" + b"1" * 5000 + b"]": "",
    b"5": "got int",
    b'[{"role": "user", "content": "u"}, {"role": "assistant", "content": " "}]': "the assistant's, is empty",
    b'[{"role": "user", "content": "u"}]': "at least 2 messages",
    b'[{"role": "user", "content": "u"}, {"role": ["assistant"], "content": "a"}]': "must have role 'assistant'",
    b'[{"role": "user", "content": "u"}, {"role": "assistant", "content": null}]': "must be a string, got NoneType",
    b"\x00": "not JSON",
    b"[] []": "not JSON",
}


def test_every_bad_line_is_reported_with_its_number_and_reason(tmp_path):
    good = json.dumps(chat()).encode()
    with pytest.raises(ValueError) as bad:
        custom(tmp_path, b"\n".join(line for bad_line in BAD_LINES for line in (good, bad_line)))
    first, *rest = str(bad.value).split("\n")
    assert first.startswith(f"{len(BAD_LINES)} lines are no conversation")
    assert len(rest) == len(BAD_LINES)
    for number, (line, reason) in enumerate(zip(rest, BAD_LINES.values())):
        assert line.startswith(f"{tmp_path / 'mine.jsonl'}:{2 * number + 2}: ") and reason in line, line


def test_of_many_bad_lines_twenty_are_shown_and_the_rest_counted(tmp_path):
    with pytest.raises(ValueError) as bad:
        custom(tmp_path, "x\n" * 1500)
    shown = str(bad.value).split("\n")
    assert shown[0].startswith("1,500 lines are") and len(shown) == 22 and shown[-1] == "... and 1,480 more"


def test_a_file_of_nothing_but_bad_lines_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(custom_json, "COUNTED", 1000)
    with pytest.raises(ValueError, match=r"1,000 lines are no conversation") as bad:
        custom(tmp_path, "x\n" * 1500)
    assert str(bad.value).endswith("... and 980 more, the rest was not read")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_file_of_conversations_or_an_ordinary_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "any.jsonl"
    path.write_bytes(content)
    try:
        task = CustomJSON(path)
    except ValueError:
        return
    assert all(len(conversation["messages"]) >= 2 for conversation in task)


def test_a_missing_file_warns_and_stops_with_a_hint_for_known_files(tmp_path):
    said = []
    for name in ("mine.jsonl", *SOURCES):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            CustomJSON(tmp_path / name, log=said.append)
    assert said[0] == f"Warning: File {tmp_path / 'mine.jsonl'} does not exist"
    for line, url in zip(said[1:], SOURCES.values()):
        assert line.startswith("Warning: File ") and url in line
    with pytest.raises(ValueError, match="is not a file"):
        CustomJSON(tmp_path)


def test_a_missing_file_is_told_with_the_one_that_is_most_like_it(tmp_path):
    (tmp_path / "messages.jsonl").touch()
    with pytest.raises(FileNotFoundError, match=r"mesages.jsonl does not exist; did you mean .*/messages.jsonl[?]"):
        CustomJSON(tmp_path / "mesages.jsonl")


def test_an_empty_file_is_an_empty_task_and_the_fingerprint_follows_the_content(tmp_path):
    empty = custom(tmp_path, "")
    assert len(empty) == 0
    one, again, other = (custom(tmp_path, json.dumps(chat(user))) for user in ("x", "x", "y"))
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()


def test_a_line_that_is_too_long_is_a_bad_line(tmp_path):
    line = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    path = tmp_path / "long.jsonl"
    path.write_text(f"{line}\n{line} \n")
    assert len(CustomJSON(path, longest_line=len(line) + 1)) == 2
    with pytest.raises(
        ValueError, match=rf"long\.jsonl:2: {len(line) + 1} bytes, more than --longest-line={len(line)}"
    ):
        CustomJSON(path, longest_line=len(line))
