"""The hub, played by a server on loopback: a split is whole in task_data/ or not there, and a failure is a sentence.

Run: python -m pytest tests/tasks/test_hub.py
"""

import io
import json
import os
import signal
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.data import shards
from nanochat_jax.files import download
from nanochat_jax.tasks import GSM8K, hub
from tests.support.loopback import Answer, isolate, servers, together

LISTING = "/api/datasets/openai/gsm8k/parquet/main/train"


def parquet(*questions):
    file = io.BytesIO()
    pq.write_table(pa.table({"question": questions, "answer": ["#### 1"] * len(questions)}), file)
    return file.getvalue()


FILES = [parquet("a", "b"), parquet("c")]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path)


@pytest.fixture
def server(monkeypatch):
    """The hub with GSM8K in two files."""
    with servers(1) as (made,):
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        made.answers[LISTING] = listing([f"{made.url}/files/{i}.parquet" for i in range(2)])
        made.answers |= {f"/files/{i}.parquet": Answer(content) for i, content in enumerate(FILES)}
        yield made


def listing(urls):
    return Answer(json.dumps(urls).encode(), Content_Type="application/json")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "base" / "task_data" / "openai--gsm8k" / "main" / "train"


def refusal():
    with pytest.raises(FileNotFoundError) as e:
        GSM8K("train")
    message = str(e.value)
    assert message.startswith("dataset openai/gsm8k (subset main, split train) is not on this machine, looked for")
    assert "NANOCHAT_DATA_DIR or --data-dir to a folder that holds openai--gsm8k/" in message and "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------- datasets
def test_a_split_that_is_in_no_mirror_is_downloaded_once(server, folder):
    assert sorted(c["messages"][0]["content"] for c in GSM8K("train")) == ["a", "b", "c"]
    assert sorted(path.name for path in folder.iterdir()) == ["00000.parquet", "00001.parquet", "manifest.json"]
    assert json.loads((folder / "manifest.json").read_text()) == ["00000.parquet", "00001.parquet"]
    assert [(folder / f"0000{i}.parquet").read_bytes() for i in range(2)] == FILES
    assert len(GSM8K("train")) == 3 and len(server.requests) == 3


def test_a_mirror_is_used_before_the_hub(server, tmp_path):
    mirror = tmp_path / "mirror" / "openai--gsm8k" / "main" / "train"
    mirror.mkdir(parents=True)
    (mirror / "x.parquet").write_bytes(FILES[1])
    (mirror / "manifest.json").write_text('["x.parquet"]')
    assert len(GSM8K("train", data_dir=tmp_path / "mirror")) == 1
    assert server.requests == []


def test_files_are_named_by_their_place_in_the_list_never_by_their_address(server, folder):
    odd = ["/files/../../../../etc/x", "/files/%2e%2e%2fy?z=/../manifest.json"]
    server.answers[LISTING] = listing([server.url + path for path in odd])
    for path, content in zip(odd, FILES):
        server.answers[path] = Answer(content)
    assert len(GSM8K("train")) == 3
    assert json.loads((folder / "manifest.json").read_text()) == ["00000.parquet", "00001.parquet"]


def test_a_mirror_of_the_hub_may_list_the_hubs_own_addresses(server):
    server.answers[LISTING] = listing([f"https://huggingface.co/files/{i}.parquet" for i in range(2)])
    assert len(GSM8K("train")) == 3


def test_what_goes_wrong_for_a_moment_is_tried_again(server):
    server.answers[LISTING] = [Answer(b"", 503), Answer(b"", 429, Retry_After="0"), server.answers[LISTING]]
    server.answers["/files/0.parquet"] = [Answer(FILES[0], sent=100), Answer(FILES[0])]
    server.answers["/files/1.parquet"] = [Answer(FILES[1], sent=100, length=False), Answer(FILES[1])]
    assert len(GSM8K("train")) == 3


@pytest.mark.parametrize(
    "body",
    [
        *(b"{}", b'{"error": "no"}', b"[]", b"[1]", b'[["http://127.0.0.1/x"]]', b"null", b"\xff", b"[" * 100_000),
        *(b'"http://127.0.0.1/x"', json.dumps(["https://h/x"] * 10_000).encode(), b'["x"]' + b" " * (1 << 22)),
    ],
)
def test_a_listing_that_is_no_list_of_addresses_is_refused(server, folder, body):
    server.answers[LISTING] = Answer(body)
    assert "JSON list of 1 to 1000 addresses" in refusal() or "more than 4,194,304 bytes" in refusal()
    assert set(server.paths()) == {LISTING} and not folder.exists()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://h/x", "/relative", "../x", "", "javascript:x", "HTTP:x"])
def test_an_address_of_another_kind_is_refused_before_any_transfer(server, folder, url):
    server.answers[LISTING] = listing([f"{server.url}/files/0.parquet", url])
    assert f"{url!r}, which is no http address" in refusal()
    assert server.paths() == [LISTING] and not folder.exists()


def test_an_https_hub_may_not_list_http_addresses(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    monkeypatch.setattr(hub, "read", lambda url, limit: b'["https://cdn.example/0", "http://cdn.example/1"]')
    with pytest.raises(download.DownloadError, match=r"'http://cdn\.example/1', which is no https address"):
        hub._listed("https://hub.example/list")


def test_half_a_download_is_never_taken_for_the_dataset(server, folder, monkeypatch):
    monkeypatch.setattr(download, "PARALLEL", 1)
    server.answers["/files/1.parquet"] = Answer(b"", 404)
    assert "/files/1.parquet does not exist (404 Not Found)" in refusal()
    assert not folder.exists()
    server.answers["/files/1.parquet"] = Answer(FILES[1])
    assert len(GSM8K("train")) == 3
    assert server.paths().count("/files/0.parquet") == 1  # what had arrived is kept
    assert [path.name for path in folder.parent.iterdir() if path.suffix != ".lock"] == ["train"]


def test_what_a_stopped_download_left_is_dropped_when_the_list_has_changed_or_it_is_old(server, folder):
    building = folder.parent / ".train.building"
    for change in ("list", "age"):
        server.answers["/files/1.parquet"] = Answer(b"", 404)
        refusal()
        (building / "00000.parquet").write_bytes(b"of another time")
        if change == "list":
            server.answers["/files/2.parquet"] = Answer(FILES[0])
            server.answers[LISTING] = listing([f"{server.url}/files/{i}.parquet" for i in (2, 1)])
        else:
            os.utime(building / ".listing.json", (0, 0))
        server.answers["/files/1.parquet"] = Answer(FILES[1])
        assert len(GSM8K("train")) == 3
        (folder / "manifest.json").unlink()


def test_an_empty_folder_is_filled(server, folder):
    folder.mkdir(parents=True)
    assert len(GSM8K("train")) == 3
    assert not list(folder.parent.glob("train.*"))


def test_files_without_a_manifest_are_moved_aside_and_not_lost(server, folder):
    folder.mkdir(parents=True)
    (folder / "00000.parquet").write_bytes(b"half of it, or a user's own")
    assert len(GSM8K("train")) == 3
    (aside,) = [path for path in folder.parent.iterdir() if path.name.startswith("train.")]
    assert (aside / "00000.parquet").read_bytes() == b"half of it, or a user's own"


@pytest.mark.parametrize("content", [b"PAR1 is not enough PAR1", FILES[0][:-1], b"x" * 5000])
def test_a_file_that_is_no_parquet_file_does_not_count(server, folder, content):
    server.answers["/files/1.parquet"] = Answer(content)
    assert "is damaged at its source" in refusal() and "not a readable parquet file" in refusal()
    assert not folder.exists()


@pytest.mark.parametrize("path", [LISTING, "/files/0.parquet"])
def test_a_login_page_is_named(server, path):
    server.answers[path] = Answer(b"<!doctype html><html>Log in</html>", Content_Type="text/html")
    assert f"{path} answered with a web page, not with the file" in refusal()


def test_a_dataset_that_the_hub_does_not_have_or_does_not_give_is_a_sentence(server, monkeypatch):
    server.answers[LISTING] = Answer(b'{"error": "no"}', 404)
    assert f"{LISTING} does not exist (404 Not Found): check the name" in refusal()
    server.answers[LISTING] = Answer(b'{"error": "no"}', 401)
    assert "answered 401 Unauthorized, it needs a token that may read it: set HF_TOKEN" in refusal()
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    server.answers[LISTING] = [Answer(b'{"error": "no"}', 403)]
    assert "the token of HF_TOKEN is wrong or may not read it" in refusal()
    assert server.requests[-1][1]["Authorization"] == "Bearer hf_x"


def test_without_a_network_the_sentence_says_what_was_tried(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    message = refusal()
    assert str(tmp_path / "base" / "task_data") in message
    assert "127.0.0.1 cannot be reached" in message and "name a mirror with HF_ENDPOINT" in message


def test_offline_the_sentence_says_so(server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in refusal()
    assert server.requests == []


def test_a_base_directory_that_cannot_be_written_is_a_sentence(server, tmp_path):
    (tmp_path / "base").write_text("a file")
    assert "cannot be written" in refusal()


@pytest.mark.parametrize("subset", ["..", "../../x", "/etc", "a/b", "."])
def test_a_subset_is_the_name_of_a_folder(server, subset):
    with pytest.raises(ValueError, match="must be the name of a folder"):
        hub.split_files("openai/gsm8k", subset, "train")
    assert server.requests == []


def test_names_are_quoted_in_the_address(server, tmp_path):
    server.answers["/api/datasets/o/n%3F/parquet/a%20b/x%23y"] = listing([f"{server.url}/files/0.parquet"])
    (file,) = hub.split_files("o/n?", "a b", "x#y")
    assert file == tmp_path / "base" / "task_data" / "o--n?" / "a b" / "x#y" / "00000.parquet"


# --------------------------------------------------------------------------------------------------------- processes
def start_process(stdout=None):
    code = 'from nanochat_jax.tasks import GSM8K; print("rows", len(GSM8K("train")))'
    return subprocess.Popen([sys.executable, "-c", code], stdout=stdout)


def test_two_processes_that_want_one_dataset_download_it_once(server, tmp_path):
    hold = threading.Event()
    server.answers["/files/1.parquet"] = Answer(FILES[1], sent=50, hold=hold)
    codes, said = together(server, hold, start_process, tmp_path)
    assert codes == [0, 0] and said.count("rows 3") == 2
    assert said.count("another process is downloading train: waiting for it") == 1
    assert sorted(server.paths()) == sorted([LISTING, "/files/0.parquet", "/files/1.parquet"])


def test_after_a_killed_downloader_another_one_finishes(server, folder):
    hold = threading.Event()
    server.answers["/files/1.parquet"] = [Answer(FILES[1], sent=50, hold=hold), Answer(FILES[1])]
    process = start_process()
    assert server.held.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    hold.set()
    assert not folder.exists()
    assert len(GSM8K("train")) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["00000.parquet", "00001.parquet", "manifest.json"]


# ------------------------------------------------------------------------------------------------------ single files
def test_a_file_is_found_by_argument_then_environment_then_base_directory(tmp_path, monkeypatch):
    def put(*parts):
        path = tmp_path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("words")
        return path

    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "shared" / "hub"))
    for parts in (
        ("base", "words", "w.txt"),
        ("base", "w.txt"),
        ("shared", "words", "w.txt"),
        ("shared", "hub", "w.txt"),
        ("mine", "w.txt"),
        ("mine", "hub", "words", "w.txt"),
    ):
        found = put(*parts)
        assert hub.find_file("w.txt", tmp_path / "mine" / "hub") == found


def test_the_word_list_is_downloaded_where_no_place_has_it(server, tmp_path, monkeypatch):
    monkeypatch.setitem(hub.SOURCES, "words_alpha.txt", f"{server.url}/words")
    server.answers["/words"] = Answer(b"a\r\nb\r\n", Content_Type="text/plain")
    for _ in range(2):
        assert hub.find_file("words_alpha.txt").read_bytes() == b"a\r\nb\r\n"
    assert server.paths() == ["/words"] and (tmp_path / "base" / "words_alpha.txt").exists()


def test_a_word_list_that_cannot_be_had_is_a_sentence_with_places_and_remedy(server, tmp_path, monkeypatch):
    monkeypatch.setitem(hub.SOURCES, "words_alpha.txt", f"{server.url}/words")
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded: .*/words does not exist") as e:
        hub.find_file("words_alpha.txt", tmp_path)
    message = str(e.value)
    assert str(tmp_path / "words" / "words_alpha.txt") in message and "curl -L -o" in message and "\n" not in message


def test_the_identity_conversations_are_the_users_choice(server, tmp_path, monkeypatch):
    name = "identity_conversations.jsonl"
    monkeypatch.setitem(hub.SOURCES, name, f"{server.url}/identity")
    server.answers["/identity"] = Answer(b"[]\n")
    with pytest.raises(FileNotFoundError, match=r"to download it: curl -L -o .*/identity$"):
        hub.find_file(name)
    assert server.requests == []
    assert hub.fetch_file(name) == tmp_path / "base" / name == hub.find_file(name)


# ------------------------------------------------------------------------------------------------------------ shards
def shard(i):
    return f"/datasets/karpathy/climbmix-400b-shuffle/resolve/main/shard_{i:05d}.parquet"


def test_shards_are_downloaded_with_the_one_for_validation_and_those_there_stay(server, tmp_path):
    said = []
    for i in (0, 1, 2, 6542):
        server.answers[shard(i)] = Answer(parquet(f"text {i}"))
    names = ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]
    assert shards.fetch_shards(2, tmp_path / "d", said.append) == [tmp_path / "d" / name for name in names]
    assert pq.read_table(tmp_path / "d" / names[1])["question"].to_pylist() == ["text 1"]
    assert len(shards.fetch_shards(3, tmp_path / "d", said.append)) == 4
    shards.fetch_shards(3, tmp_path / "d", said.append)
    assert sorted(server.paths()) == sorted(shard(i) for i in (0, 1, 2, 6542))
    assert "downloading 3 of 3 shards" in said[0] and "(3 of 3 files)" in said[3]


def test_a_damaged_shard_does_not_count_and_the_others_stay(server, tmp_path):
    server.answers[shard(0)], server.answers[shard(6542)] = Answer(parquet("a")), Answer(b"x" * 100)
    with pytest.raises(download.DownloadError, match=r"shard_06542.parquet is damaged at its source"):
        shards.fetch_shards(1, tmp_path, lambda line: None)
    assert not (tmp_path / "shard_06542.parquet").exists()


@pytest.mark.parametrize("n", [0, -1, 6543])
def test_there_are_so_many_shards_and_no_more(tmp_path, n):
    with pytest.raises(ValueError, match=r"in 1..6542, got --download="):
        shards.fetch_shards(n, tmp_path)
