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
from huggingface_hub import constants

from nanochat_jax.data import shards
from nanochat_jax.files import download
from nanochat_jax.tasks import GSM8K, hub
from tests.support.loopback import Answer, file_answer, isolate, serve_dataset, servers, together, use_hub


def parquet(*questions):
    file = io.BytesIO()
    pq.write_table(pa.table({"question": questions, "answer": ["#### 1"] * len(questions)}), file)
    return file.getvalue()


FILES = [parquet("a", "b"), parquet("c")]
PATHS = [f"main/train/{i:04d}.parquet" for i in range(2)]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path)


@pytest.fixture
def server(monkeypatch):
    with servers(1) as (made,):
        use_hub(monkeypatch, made.url)
        yield made


def serve(server, files, commit="c" * 40, repo="openai/gsm8k"):
    return serve_dataset(server, repo, hub.EXPORT, files, commit)


@pytest.fixture
def gsm8k(server):
    """The hub with GSM8K in two files, and its other split; its addresses."""
    return serve(server, dict(zip(PATHS, FILES)) | {"main/test/0000.parquet": FILES[0], "README.md": b"x"})


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
def test_a_split_that_is_on_no_disk_is_downloaded_once(gsm8k, server, folder):
    assert sorted(c["messages"][0]["content"] for c in GSM8K("train")) == ["a", "b", "c"]
    assert sorted(path.name for path in folder.iterdir()) == ["00000.parquet", "00001.parquet", "manifest.json"]
    assert json.loads((folder / "manifest.json").read_text()) == ["00000.parquet", "00001.parquet"]
    assert [(folder / f"0000{i}.parquet").read_bytes() for i in range(2)] == FILES
    assert {path.name for path in folder.parent.iterdir()} <= {"train", ".train.lock"}
    asked = len(server.requests)
    assert len(GSM8K("train")) == 3 and len(server.requests) == asked
    assert len(server.paths()) == 4  # the commit, its files, two of them


def test_a_mirror_is_used_before_the_hub(gsm8k, server, tmp_path):
    mirror = tmp_path / "mirror" / "openai--gsm8k" / "main" / "train"
    mirror.mkdir(parents=True)
    (mirror / "x.parquet").write_bytes(FILES[1])
    (mirror / "manifest.json").write_text('["x.parquet"]')
    assert len(GSM8K("train", data_dir=tmp_path / "mirror")) == 1
    assert server.requests == []


def test_files_are_named_by_their_place_in_the_list_never_by_their_path(server, folder):
    serve(server, {"main/train/b?c=d.parquet": FILES[0], "main/train/x/../manifest.json": b"[]", PATHS[1]: FILES[1]})
    assert len(GSM8K("train")) == 3
    assert json.loads((folder / "manifest.json").read_text()) == ["00000.parquet", "00001.parquet"]
    assert (folder / "00000.parquet").read_bytes() == FILES[1]  # 0001.parquet comes before b?c=d.parquet


def test_a_path_that_leads_out_of_its_folder_is_refused(server, folder):
    serve(server, {"main/train/../../../x.parquet": FILES[0]})
    assert "Invalid filename 'main/train/../../../x.parquet'" in refusal()
    assert not folder.exists()


def test_of_a_large_dataset_the_part_that_the_hub_exports_is_taken(server):
    serve(server, {path.replace("train", "partial-train"): body for path, body in zip(PATHS, FILES)})
    assert len(GSM8K("train")) == 3


def test_what_goes_wrong_for_a_moment_is_tried_again(gsm8k, server):
    server.answers[gsm8k.revision] = [Answer(b"", 503), server.answers[gsm8k.revision]]
    server.answers[gsm8k.tree] = [Answer(b"", 429), server.answers[gsm8k.tree]]
    for path, body in zip(PATHS, FILES):
        server.answers[gsm8k.file(path)] = [file_answer(body, sent=100), Answer(b"", 500), file_answer(body)]
    assert len(GSM8K("train")) == 3


def test_a_split_or_subset_that_the_dataset_does_not_have_is_named(gsm8k, server):
    with pytest.raises(FileNotFoundError, match=r"has no socratic/train/: check the names of subset and split"):
        hub.split_files("openai/gsm8k", "socratic", "train")
    with pytest.raises(FileNotFoundError, match=r"has no main/trai/: check the names"):
        hub.split_files("openai/gsm8k", "main", "trai")


def test_half_a_download_is_never_taken_for_the_dataset(gsm8k, server, folder, monkeypatch):
    monkeypatch.setattr(download, "PARALLEL", 1)
    server.answers[gsm8k.file(PATHS[1])] = Answer(b"", 404, X_Error_Code="EntryNotFound")
    assert "main/train/0001.parquet of dataset openai/gsm8k does not exist (404 Not Found): check the name" in refusal()
    assert not folder.exists()
    server.answers[gsm8k.file(PATHS[1])] = file_answer(FILES[1])
    assert len(GSM8K("train")) == 3
    assert server.paths().count(gsm8k.file(PATHS[0])) == 1  # what had arrived is kept
    assert [path.name for path in folder.parent.iterdir() if path.suffix != ".lock"] == ["train"]


def test_what_a_stopped_download_left_is_dropped_when_the_dataset_has_changed(gsm8k, server, folder, monkeypatch):
    monkeypatch.setattr(download, "PARALLEL", 1)
    server.answers[gsm8k.file(PATHS[1])] = Answer(b"", 404)
    refusal()
    assert (folder.parent / ".train.building" / ("c" * 40) / "00000.parquet").exists()
    serve(server, dict(zip(PATHS, reversed(FILES))), commit="d" * 40)
    assert len(GSM8K("train")) == 3
    assert [(folder / f"0000{i}.parquet").read_bytes() for i in range(2)] == FILES[::-1]
    assert [path.name for path in folder.parent.iterdir() if path.suffix != ".lock"] == ["train"]


def test_an_empty_folder_is_filled(gsm8k, folder):
    folder.mkdir(parents=True)
    assert len(GSM8K("train")) == 3
    assert not list(folder.parent.glob("train.*"))


def test_files_without_a_manifest_are_moved_aside_and_not_lost(gsm8k, folder):
    folder.mkdir(parents=True)
    (folder / "00000.parquet").write_bytes(b"half of it, or a user's own")
    assert len(GSM8K("train")) == 3
    (aside,) = [path for path in folder.parent.iterdir() if path.name.startswith("train.")]
    assert (aside / "00000.parquet").read_bytes() == b"half of it, or a user's own"


@pytest.mark.parametrize("content", [b"PAR1 is not enough PAR1", FILES[0][:-1], b"x" * 5000])
def test_a_file_that_is_no_parquet_file_does_not_count(gsm8k, server, folder, content):
    server.answers[gsm8k.file(PATHS[1])] = file_answer(content)
    assert "is damaged at its source" in (message := refusal()) and "not a readable parquet file" in message
    assert not folder.exists()


def test_a_login_page_is_named(gsm8k, server):
    page = Answer(b"<!doctype html><html>Log in</html>", Content_Type="text/html")
    for address in (gsm8k.file(PATHS[0]), gsm8k.tree, gsm8k.revision):
        server.answers[address] = page
        assert "is not answered as by the hub" in (message := refusal()) and "log in to the network" in message


def test_a_dataset_that_the_hub_does_not_have_or_does_not_give_is_a_sentence(gsm8k, server, monkeypatch):
    server.answers[gsm8k.revision] = Answer(b'{"error": "no"}', 404, X_Error_Code="RepoNotFound")
    missing = f"dataset openai/gsm8k ({hub.EXPORT}) does not exist (404 Not Found): check the name"
    assert missing in refusal()
    server.answers[gsm8k.revision] = Answer(b'{"error": "no"}', 401)
    assert "answered 401 Unauthorized, it needs a token that may read it: set HF_TOKEN" in refusal()
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    server.answers[gsm8k.revision] = Answer(b'{"error": "no"}', 403, X_Error_Code="GatedRepo")
    assert "the token of HF_TOKEN or hf auth login is wrong or may not read it" in refusal()
    assert server.requests[-1][1]["Authorization"] == "Bearer hf_x"


def test_without_a_network_the_sentence_says_what_was_tried(monkeypatch, tmp_path):
    use_hub(monkeypatch, "http://127.0.0.1:1")
    message = refusal()
    assert str(tmp_path / "base" / "task_data") in message
    assert "cannot be reached" in message and "name a mirror with HF_ENDPOINT" in message


def test_offline_the_sentence_says_so(gsm8k, server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal()
    assert server.requests == []


def test_a_base_directory_that_cannot_be_written_is_a_sentence(gsm8k, tmp_path):
    (tmp_path / "base").write_text("a file")
    assert "cannot be written" in refusal()


@pytest.mark.parametrize("subset", ["..", "../../x", "/etc", "a/b", "."])
def test_a_subset_is_the_name_of_a_folder(server, subset):
    with pytest.raises(ValueError, match="must be the name of a folder"):
        hub.split_files("openai/gsm8k", subset, "train")
    assert server.requests == []


def test_names_are_quoted_in_the_address(server, tmp_path):
    serve(server, {"a b/x#y/0000.parquet": FILES[0]}, repo="o/n")
    (file,) = hub.split_files("o/n", "a b", "x#y")
    assert file == tmp_path / "base" / "task_data" / "o--n" / "a b" / "x#y" / "00000.parquet"


def test_a_name_that_no_dataset_can_have_is_a_sentence(server):
    with pytest.raises(
        FileNotFoundError, match=r"dataset o/n\? .* cannot exist .*Repo id must use alphanumeric chars"
    ) as e:
        hub.split_files("o/n?", "a", "b")
    assert "\n" not in str(e.value) and server.requests == []


# --------------------------------------------------------------------------------------------------------- processes
def start_process(stdout=None):
    code = 'from nanochat_jax.tasks import GSM8K; print("rows", len(GSM8K("train")))'
    return subprocess.Popen([sys.executable, "-c", code], stdout=stdout)


def test_two_processes_that_want_one_dataset_download_it_once(gsm8k, server, tmp_path):
    hold = threading.Event()
    server.answers[gsm8k.file(PATHS[1])] = file_answer(FILES[1], sent=50, hold=hold)
    codes, said = together(server, hold, start_process, tmp_path)
    assert codes == [0, 0] and said.count("rows 3") == 2
    assert said.count("another process is downloading train: waiting for it") == 1
    assert sorted(server.paths()) == sorted([gsm8k.revision, gsm8k.tree, *map(gsm8k.file, PATHS)])


def test_after_a_killed_downloader_another_one_finishes(gsm8k, server, folder):
    hold = threading.Event()
    server.answers[gsm8k.file(PATHS[1])] = [file_answer(FILES[1], sent=50, hold=hold), file_answer(FILES[1])]
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
    assert (
        download.download(hub.SOURCES[name], tmp_path / "base" / name)
        == tmp_path / "base" / name
        == hub.find_file(name)
    )


# ------------------------------------------------------------------------------------------------------------ shards
def serve_shards(server, *numbers):
    files = {f"shard_{i:05d}.parquet": parquet(f"text {i}") for i in numbers}
    return serve_dataset(server, shards.CLIMBMIX, "main", files)


def test_shards_are_downloaded_with_the_one_for_validation_and_those_there_stay(server, tmp_path):
    said = []
    climbmix = serve_shards(server, 0, 1, 2, 6542)
    names = ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]
    assert shards.fetch_shards(2, tmp_path / "d", said.append) == [tmp_path / "d" / name for name in names]
    assert pq.read_table(tmp_path / "d" / names[1])["question"].to_pylist() == ["text 1"]
    assert len(shards.fetch_shards(3, tmp_path / "d", said.append)) == 4
    shards.fetch_shards(3, tmp_path / "d", said.append)
    names.insert(2, "shard_00002.parquet")
    assert sorted(server.paths()) == sorted(climbmix.file(name, "main") for name in names)
    assert "downloading 3 of 3 shards" in said[0] and "(3 of 3 files)" in said[3]
    assert {path.name for path in (tmp_path / "d").iterdir()} == {*names, ".shards.lock"}


def test_a_damaged_shard_does_not_count_and_the_others_stay(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PARALLEL", 1)
    climbmix = serve_shards(server, 0, 6542)
    server.answers[climbmix.file("shard_06542.parquet", "main")] = file_answer(b"x" * 100)
    with pytest.raises(download.DownloadError, match=r"shard_06542.parquet of dataset \S+ is damaged at its source"):
        shards.fetch_shards(1, tmp_path, lambda line: None)
    assert not (tmp_path / "shard_06542.parquet").exists() and (tmp_path / "shard_00000.parquet").exists()


@pytest.mark.parametrize("n", [0, -1, 6543])
def test_there_are_so_many_shards_and_no_more(tmp_path, n):
    with pytest.raises(ValueError, match=r"in 1..6542, got --download="):
        shards.fetch_shards(n, tmp_path)
