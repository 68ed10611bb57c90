"""Downloads against a server on loopback: a file is whole under its name or not there, and a fault is a sentence.

Run: python -m pytest tests/files/test_download.py
"""

import errno
import gzip
import io
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import httpx
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants, file_download

from nanochat_jax.files import download as module
from nanochat_jax.files.download import DownloadError, download, fetch_parquet, list_repository
from tests.support.loopback import COMMIT, Answer, file_answer, isolate, serve_dataset, servers, together, use_hub

BODY = bytes(range(256)) * 4096  # 1 MiB


def parquet(*texts):
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue()


@pytest.fixture(autouse=True)
def waited(monkeypatch, tmp_path):
    """The seconds that downloads would have waited."""
    yield isolate(monkeypatch, tmp_path)
    huggingface_hub.close_session()


@pytest.fixture
def server():
    with servers(1) as (made,):
        yield made


@pytest.fixture
def said():
    return []


# ------------------------------------------------------------------------------------------- addresses outside the hub
@pytest.fixture
def get(server, tmp_path, said):
    """get(answer...) -> the path of the file after its download."""

    def run(*answers):
        server.answers["/file"] = list(answers)
        return download(f"{server.url}/file", tmp_path / "d" / "file.bin", said.append)

    yield run
    left = {path.name for path in (tmp_path / "d").glob("*")} - {"file.bin", ".file.bin.lock"}
    assert left == set()  # no temporary file


def refused(get, *answers):
    with pytest.raises(DownloadError) as e:
        get(*answers)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_file_arrives_whole_and_is_not_asked_for_again(get, server):
    assert get(Answer(BODY)).read_bytes() == BODY
    assert get(Answer(b"another")).read_bytes() == BODY
    assert server.paths() == ["/file"]


def test_a_truncated_transfer_is_tried_again_and_said(get, said):
    assert get(Answer(BODY, sent=1000), Answer(BODY, sent=0), Answer(BODY)).read_bytes() == BODY
    assert "/file broke off (RemoteProtocolError: peer closed connection" in said[0] and len(said) == 2
    assert said[0].endswith(", trying again in 1 s")


def test_a_transfer_that_never_ends_well_gives_up_with_the_reason(get, server, tmp_path):
    assert "broke off" in (message := refused(get, Answer(BODY, sent=1000))) and message.endswith("; try again later")
    assert len(server.requests) == module.ATTEMPTS and not (tmp_path / "d" / "file.bin").exists()


def test_an_empty_answer_is_no_file(get):
    assert get(Answer(b""), Answer(b"x")).read_bytes() == b"x"


def test_a_web_page_in_place_of_the_file_is_named_as_such(get):
    for page in (Answer(b"hello", Content_Type="text/html"), Answer(b"\n <!DOCTYPE html><title>Log in</title>")):
        assert "a web page, not with the file: log in" in refused(get, page)


def test_a_compressed_answer_is_unpacked(get):
    assert get(Answer(gzip.compress(BODY), Content_Encoding="gzip")).read_bytes() == BODY


def test_errors_of_the_moment_are_tried_again_after_pauses_that_double(get, server, waited):
    assert get(Answer(b"", 503), Answer(b"", 500), Answer(b"", 408), Answer(BODY)).read_bytes() == BODY
    assert len(server.requests) == 4 and waited == [1, 2, 4]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_final_refusal_is_not_tried_again(get, server, status):
    assert str(status) in refused(get, Answer(b"", status))
    assert len(server.requests) == 1


def test_a_slow_server_is_a_passing_fault(get, monkeypatch, said):
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    hold = threading.Event()
    assert get(Answer(BODY, sent=100, hold=hold), Answer(BODY)).read_bytes() == BODY
    assert "broke off (ReadTimeout" in said[0]
    hold.set()


def test_an_unreachable_host_is_said_at_once(tmp_path, said):
    for url in ("http://127.0.0.1:1/file", "http://no-such-host.invalid/file", f"http://{'a' * 60}.invalid/"):
        with pytest.raises(DownloadError, match=r"cannot be reached .*check the network, HTTPS_PROXY"):
            download(url, tmp_path / "file", said.append)
    assert said == []


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "//x/y", "x", ""),
        *("http://[::1/", "http://h:99999999/", "http://h/\n", "http://h/\0"),
    ],
)
def test_only_http_addresses_are_fetched(tmp_path, url):
    with pytest.raises(DownloadError, match=r"has no web address|cannot be reached"):
        download(url, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_offline_means_no_attempt(get, server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it" in refused(get, Answer(BODY))
    assert server.requests == []


def test_a_proxy_of_the_environment_is_used(tmp_path, monkeypatch, server):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    server.answers["http://far.invalid/file"] = Answer(BODY)
    assert download("http://far.invalid/file", tmp_path / "file").read_bytes() == BODY


def test_a_redirect_in_a_circle_or_to_another_scheme_ends(get):
    assert "storage.invalid" not in refused(get, Answer(b"", 302, Location="http://storage.invalid/x?signature=s"))
    assert "TooManyRedirects" in refused(get, Answer(b"", 302, Location="/file"))
    for address in ("file:///etc/passwd", "ftp://127.0.0.1/x", "http://[::1/"):
        refused(get, Answer(b"", 302, Location=address))


def test_a_redirect_from_https_to_http_is_refused(tmp_path):
    def answer(request):
        if request.url.scheme == "https":
            return httpx.Response(302, headers={"Location": "http://cdn.example/file"})
        return httpx.Response(200, content=b"anything")

    transport = httpx.MockTransport(answer)
    try:
        huggingface_hub.set_client_factory(lambda: httpx.Client(transport=transport, follow_redirects=True))
        with pytest.raises(DownloadError, match="redirects to plain http, which is refused"):
            download("https://far.example/file", tmp_path / "file")
    finally:
        huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
    assert not (tmp_path / "file").exists()


def test_a_query_may_hold_a_signature_and_is_never_shown(server, tmp_path):
    with pytest.raises(DownloadError, match="/gone does not exist") as e:
        download(f"{server.url}/gone?signature=secret", tmp_path / "file")
    assert "secret" not in str(e.value)


def test_a_place_that_cannot_be_written_is_named_with_what_to_do(get, server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(DownloadError, match=r"cannot be written .*NANOCHAT_BASE_DIR"):
        download(f"{server.url}/file", tmp_path / "file" / "x")
    assert server.requests == []
    server.answers["/file"] = Answer(BODY)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DownloadError, match="cannot be written"):
        download(f"{server.url}/file", tmp_path / "folder")
    for fault in (errno.EROFS, errno.ENOSPC):

        def fail(*args, fault=fault):
            raise OSError(fault, os.strerror(fault))

        monkeypatch.setattr(module, "write_atomically", fail)
        assert f"cannot be written ({os.strerror(fault)}): free some space" in refused(get, Answer(BODY))


def start_download(url, final, stdout=None):
    code = "import sys, pathlib; from nanochat_jax.files.download import download"
    code += "; download(sys.argv[1], pathlib.Path(sys.argv[2]))"
    return subprocess.Popen([sys.executable, "-c", code, url, str(final)], stdout=stdout)


def test_of_two_processes_one_downloads_and_the_other_waits_for_it(server, tmp_path):
    hold = threading.Event()
    server.answers["/file"] = Answer(BODY, sent=1000, hold=hold)
    codes, said = together(
        server, hold, lambda out: start_download(f"{server.url}/file", tmp_path / "file", out), tmp_path
    )
    assert codes == [0, 0] and said.count("another process is downloading file: waiting for it") == 1
    assert (tmp_path / "file").read_bytes() == BODY and server.paths() == ["/file"]


def test_a_killed_downloader_leaves_nothing_that_blocks_or_is_taken_for_the_file(server, tmp_path, said):
    hold = threading.Event()
    server.answers["/file"] = [Answer(BODY, sent=1000, hold=hold), Answer(BODY)]
    process = start_download(f"{server.url}/file", tmp_path / "d" / "file")
    assert server.held.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    hold.set()
    assert not (tmp_path / "d" / "file").exists()
    assert download(f"{server.url}/file", tmp_path / "d" / "file", said.append).read_bytes() == BODY
    assert [path.name for path in (tmp_path / "d").iterdir() if path.suffix != ".lock"] == ["file"] and said == []


# ------------------------------------------------------------------------------------------------ datasets of the hub
FILES = {f"s/{i}.parquet": parquet(f"text {i}") for i in range(12)}


@pytest.fixture
def hub(server, monkeypatch):
    """The hub with the dataset o/n of 12 files; its addresses."""
    use_hub(monkeypatch, server.url + "/")
    return serve_dataset(server, "o/n", "main", FILES)


@pytest.fixture
def fetch(hub, tmp_path, said):
    """fetch(path...) -> the contents of the folder after these files were downloaded."""

    def run(*paths):
        folder = tmp_path / "d"
        folder.mkdir(exist_ok=True)
        fetch_parquet("o/n", "main", {path: path.rpartition("/")[2] for path in paths}, folder, said.append)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return run


def test_a_dataset_is_listed_at_the_commit_that_a_revision_stands_for(hub):
    assert list_repository("dataset", "o/n", "main") == (COMMIT, sorted(FILES))


def test_many_files_arrive_and_those_that_are_there_stay(fetch, server, tmp_path, said):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "3.parquet").write_bytes(b"mine")
    expected = {path.removeprefix("s/"): body for path, body in FILES.items()}
    assert fetch(*FILES) == expected | {"3.parquet": b"mine"}
    assert not any("3.parquet" in path for path in server.paths()) and said[-1].endswith("(12 of 12 files)")


def test_a_broken_transfer_is_repeated(fetch, hub, server):
    body = FILES["s/0.parquet"]
    broken = file_answer(body, sent=50)
    server.answers[hub.file("s/0.parquet", "main")] = [broken, broken, file_answer(body)]
    assert fetch("s/0.parquet") == {"0.parquet": body}
    assert len(server.paths()) == 3


def test_a_transfer_of_another_length_than_announced_is_no_file(fetch, hub, server, tmp_path):
    server.answers[hub.file("s/0.parquet", "main")] = file_answer(FILES["s/0.parquet"][:-1], length=False)
    server.answers[f"HEAD {hub.file('s/0.parquet', 'main')}"] = file_answer(FILES["s/0.parquet"])
    with pytest.raises(DownloadError, match=r"Consistency check failed.*; try again later"):
        fetch("s/0.parquet")
    assert list((tmp_path / "d").iterdir()) == []
    assert server.paths().count(hub.file("s/0.parquet", "main")) == module.ATTEMPTS


def test_a_damaged_file_does_not_count_and_is_not_tried_again(fetch, hub, server, tmp_path):
    server.answers[hub.file("s/0.parquet", "main")] = file_answer(b"x" * 100)
    with pytest.raises(DownloadError, match=r"s/0.parquet of dataset o/n is damaged at its source: .*not a readable"):
        fetch("s/0.parquet")
    assert list((tmp_path / "d").iterdir()) == [] and len(server.paths()) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_errors_of_the_hubs_moment_are_tried_again(fetch, hub, server, status):
    passing = [Answer(b"", status), Answer(b"", status)]
    for address in (hub.revision, hub.tree):
        server.answers[address] = [passing[0], server.answers[address]]
    assert list_repository("dataset", "o/n", "main", lambda line: None) == (COMMIT, sorted(FILES))
    address, whole = hub.file("s/0.parquet", "main"), file_answer(FILES["s/0.parquet"])
    server.answers[f"HEAD {address}"] = [*passing, whole]
    server.answers[address] = [*passing, whole]
    assert len(fetch("s/0.parquet")) == 1


def test_a_server_that_asks_for_a_pause_gets_it(fetch, hub, server, waited):
    address, whole = hub.file("s/0.parquet", "main"), file_answer(FILES["s/0.parquet"])
    server.answers[f"HEAD {address}"] = [Answer(b"", 429), Answer(b"", 429, Retry_After="7"), whole]
    assert len(fetch("s/0.parquet")) == 1 and waited == [8]


def test_the_first_failure_stops_all_and_leaves_no_half_file(fetch, hub, server, tmp_path):
    hold = threading.Event()
    for path, body in FILES.items():
        server.answers[hub.file(path, "main")] = file_answer(body, sent=50, hold=hold)
    server.answers[hub.file("s/1.parquet", "main")] = Answer(b"", 404, X_Error_Code="EntryNotFound")
    threading.Timer(0.5, hold.set).start()
    with pytest.raises(DownloadError, match=r"s/1.parquet of dataset o/n does not exist \(404"):
        fetch(*FILES)
    assert len(server.paths()) <= 2 * module.PARALLEL
    assert set(os.listdir(tmp_path / "d")) <= {path.removeprefix("s/") for path in FILES}
    assert all((tmp_path / "d" / name).read_bytes() == FILES[f"s/{name}"] for name in os.listdir(tmp_path / "d"))


def test_ctrl_c_does_not_wait_for_transfers(hub, server, tmp_path, ctrl_c_raises):
    hold = threading.Event()
    server.answers[hub.file("s/0.parquet", "main")] = file_answer(FILES["s/0.parquet"], sent=50, hold=hold)
    code = "import pathlib, sys; from nanochat_jax.files.download import fetch_parquet"
    code += '; fetch_parquet("o/n", "main", {"s/0.parquet": "0.parquet"}, pathlib.Path(sys.argv[1]))'
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE)
    assert server.held.wait(60)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1].rstrip().endswith(b"KeyboardInterrupt") and not hold.is_set()
    hold.set()
    assert not list(tmp_path.rglob("0.parquet"))


def test_what_a_killed_download_left_is_removed(fetch, tmp_path):
    (tmp_path / "d" / ".downloading" / "x").mkdir(parents=True)
    assert set(fetch("s/0.parquet")) == {"0.parquet"}


def test_a_full_disk_is_noticed_before_the_transfer_or_in_it(fetch, server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(file_download, "shutil", SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=9)))
        with pytest.raises(DownloadError, match=r"cannot be written \(Not enough free disk space .*: free some space"):
            fetch("s/0.parquet")
    assert server.paths() == []

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(DownloadError, match=r"cannot be written \(No space left on device\): free some space"):
        fetch("s/0.parquet")


def test_a_folder_that_cannot_be_written_is_a_sentence(hub, tmp_path):
    (tmp_path / "d").write_text("a file, not a folder")
    with pytest.raises(DownloadError, match=r"cannot be written .*NANOCHAT_BASE_DIR"):
        fetch_parquet("o/n", "main", {"s/0.parquet": "0.parquet"}, tmp_path / "d", str)


def test_offline_the_hub_is_not_asked(fetch, server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for ask in (lambda: list_repository("dataset", "o/n", "main"), lambda: fetch("s/0.parquet")):
        with pytest.raises(DownloadError, match="is not downloaded because HF_HUB_OFFLINE is set: unset it"):
            ask()
    assert server.requests == []


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch, tmp_path, waited):
    use_hub(monkeypatch, "http://127.0.0.1:1")
    for ask in (
        lambda: list_repository("dataset", "o/n", "main"),
        lambda: fetch_parquet("o/n", COMMIT, {"s/0.parquet": "0.parquet"}, tmp_path),
    ):
        with pytest.raises(DownloadError, match=r"cannot be reached .*name a mirror with HF_ENDPOINT"):
            ask()


@pytest.mark.parametrize("address", ["hub.example", "file:///x", "https://", "https://a b"])
def test_a_bad_endpoint_is_named(monkeypatch, address):
    use_hub(monkeypatch, address)
    with pytest.raises(DownloadError, match="HF_ENDPOINT"):
        list_repository("dataset", "o/n", "main")


@pytest.mark.parametrize(
    "body", [b"{}", b'{"sha": "../../x"}', b"[]", b"[1]", b"null", b"\xff", b"[" * 100_000, b"<!doctype html>", b""]
)
def test_what_answers_unlike_the_hub_is_a_sentence(hub, server, body):
    server.answers[hub.revision] = Answer(body)
    with pytest.raises(DownloadError, match=r"is not answered as by the hub .*: log in") as e:
        list_repository("dataset", "o/n", "main")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("body", [b'["x"]', b"[{}]", b"[1]", b"null", b"\xff", b"[" * 100_000, b"<html>", b""])
def test_a_listing_that_is_none_is_a_sentence(hub, server, body):
    server.answers[hub.tree] = Answer(body)
    with pytest.raises(DownloadError, match="is not answered as by the hub") as e:
        list_repository("dataset", "o/n", "main")
    assert "\n" not in str(e.value)


def test_a_login_page_in_place_of_a_file_is_a_sentence(fetch, hub, server):
    server.answers[hub.file("s/0.parquet", "main")] = Answer(b"<html>Log in</html>", Content_Type="text/html")
    with pytest.raises(DownloadError, match=r"s/0.parquet of dataset o/n is not answered as by the hub .*: log in"):
        fetch("s/0.parquet")


# --------------------------------------------------------------------------------------------------------------- tokens
def tokens(server):
    return [headers.get("Authorization") for _, headers in server.requests]


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(hub, fetch, server, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with servers(1) as (storage,):
        far = storage.url.replace("127.0.0.1", "localhost") + "/c?signature=s"
        body = FILES["s/0.parquet"]
        server.answers[hub.file("s/0.parquet", "main")] = Answer(b"", 307, Location="/renamed")  # the same host
        linked = {"X_Repo_Commit": COMMIT, "X_Linked_Etag": '"e"', "X_Linked_Size": str(len(body))}
        server.answers["/renamed"] = Answer(b"", 302, Location=far, **linked)
        storage.answers["/c?signature=s"] = Answer(body)
        assert fetch("s/0.parquet") == {"0.parquet": body}
        assert tokens(server) and set(tokens(server)) == {"Bearer hf_secret"} and tokens(storage) == [None]
        download(f"{storage.url}/c?signature=s", tmp_path / "other")
        assert tokens(storage) == [None, None]


def test_tokens_are_found_where_the_hubs_own_tools_look(hub, server, tmp_path, monkeypatch):
    token_file = tmp_path / "hf" / "token"  # constants.HF_TOKEN_PATH
    token_file.parent.mkdir(exist_ok=True)
    token_file.write_text(" of_the_file\n")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "older")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for unset in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", None):
        list_repository("dataset", "o/n", "main")
        if unset:
            monkeypatch.delenv(unset)
    token_file.unlink()
    list_repository("dataset", "o/n", "main")
    expected = ["Bearer hf_secret", "Bearer older", "Bearer of_the_file", None]
    assert tokens(server) == [token for token in expected for _ in ("revision", "tree")]


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "schlüssel"])
def test_a_damaged_token_is_not_shown(hub, server, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    server.answers[hub.revision] = Answer(b"", 401)
    with pytest.raises(DownloadError) as e:
        list_repository("dataset", "o/n", "main")
    assert token not in str(e.value) and "\n" not in str(e.value)


def test_a_refusal_of_the_hub_says_what_to_do_about_the_token(hub, fetch, server, monkeypatch):
    for status, address in ((401, hub.revision), (403, hub.tree), (401, hub.file("s/0.parquet", "main"))):
        server.answers[address], kept = Answer(b"", status), server.answers[address]

        def ask(address=address):
            return fetch("s/0.parquet") if "resolve" in address else list_repository("dataset", "o/n", "main")

        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        with pytest.raises(DownloadError, match=rf"{status} .*the token of HF_TOKEN or hf auth login is wrong") as e:
            ask()
        assert "hf_secret" not in str(e.value)
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(DownloadError, match=rf"{status} .*set HF_TOKEN, or check the name"):
            ask()
        server.answers[address] = kept


# ------------------------------------------------------------------------------------------------------------- start-up
def test_the_hubs_library_is_loaded_by_the_first_download_only():
    code = "import sys, nanochat_jax.tasks.registry, nanochat_jax.data.shards, nanochat_jax.files.download"
    code += "; print({'huggingface_hub', 'httpx', 'hf_xet', 'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
