"""Downloads against a server on loopback: a file is whole under its name or not there, and a fault is a sentence.

Run: python -m pytest tests/files/test_download.py
"""

import email.utils
import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from nanochat_jax.files import download as module
from nanochat_jax.files import progress
from nanochat_jax.files.download import DownloadError, download, download_all, endpoint, read
from tests.support.loopback import Answer, isolate, servers, together

BODY = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path)


@pytest.fixture
def server():
    with servers(1) as (made,):
        yield made


@pytest.fixture
def said():
    return []


@pytest.fixture
def get(server, tmp_path, said):
    """get(answer...) -> the path of the file after its download."""

    def run(*answers, **kwargs):
        server.answers["/file"] = list(answers)
        return download(f"{server.url}/file", tmp_path / "d" / "file.bin", log=said.append, **kwargs)

    yield run
    left = (
        [p.name for p in (tmp_path / "d").glob("*") if p.name not in ("file.bin", ".file.bin.lock")]
        if (tmp_path / "d").is_dir()
        else []
    )
    assert left == []  # no temporary file


def refused(get, *answers, **kwargs):
    with pytest.raises(DownloadError) as e:
        get(*answers, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


# ------------------------------------------------------------------------------------------------- whole or not there
def test_a_file_arrives_whole_and_is_not_asked_for_again(get, server):
    assert get(Answer(BODY), size=len(BODY)).read_bytes() == BODY
    assert get(Answer(b"another")).read_bytes() == BODY
    ((path, headers),) = server.requests
    assert path == "/file" and headers["Accept-Encoding"] == "identity"


def test_a_truncated_transfer_is_tried_again_and_said(get, said):
    assert get(Answer(BODY, sent=1000), Answer(BODY, sent=0), Answer(BODY)).read_bytes() == BODY
    assert "ended after 1,000 of 1,048,576 bytes, trying again" in said[0] and len(said) == 2


def test_a_transfer_that_never_ends_well_gives_up_with_the_reason(get, server, tmp_path):
    message = refused(get, Answer(BODY, sent=1000))
    assert f"failed {module.ATTEMPTS} times" in message and "1,000 of 1,048,576 bytes" in message
    assert len(server.requests) == module.ATTEMPTS and not (tmp_path / "d" / "file.bin").exists()


def test_a_body_of_unknown_length_is_complete_when_its_check_says_so(get):
    def check(path):
        if path.read_bytes() != BODY:
            raise ValueError("not all of it")

    assert get(Answer(BODY, sent=5000, length=False), Answer(BODY, length=False), check=check).read_bytes() == BODY


def test_what_the_check_refuses_at_its_full_length_is_not_tried_again(get, server):
    def check(path):
        raise ValueError("no parquet file")

    assert "damaged at its source: no parquet file" in refused(get, Answer(BODY), check=check)
    assert len(server.requests) == 1


def test_an_empty_answer_is_no_file(get):
    assert get(Answer(b""), Answer(b"x")).read_bytes() == b"x"


def test_another_size_than_the_expected_one_is_refused_before_the_transfer(get, server):
    assert "has 1,048,576 bytes instead of 99" in refused(get, Answer(BODY), size=99)
    assert len(server.requests) == 1
    for size in (len(BODY) + 1, len(BODY) - 1):
        assert f"failed {module.ATTEMPTS} times" in refused(get, Answer(BODY, length=False), size=size)


def test_a_web_page_in_place_of_the_file_is_named_as_such(get):
    for page in (Answer(b"hello", Content_Type="text/html"), Answer(b"\n <!DOCTYPE html><title>Log in</title>")):
        assert "a web page, not with the file: log in" in refused(get, page)


def test_a_compressed_answer_is_refused(get):
    assert "compressed" in refused(get, Answer(BODY, Content_Encoding="gzip"))


# ------------------------------------------------------------------------------------------------------ HTTP answers
def test_errors_of_the_moment_are_tried_again(get, server):
    assert get(Answer(b"", 503), Answer(b"", 500), Answer(b"", 408), Answer(BODY)).read_bytes() == BODY
    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_final_refusal_is_not_tried_again(get, server, status):
    assert str(status) in refused(get, Answer(b"", status))
    assert len(server.requests) == 1


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that downloads would have waited."""
    waited = []

    class Event(threading.Event):
        def wait(self, seconds):
            waited.append(seconds)

    monkeypatch.setattr(module, "threading", SimpleNamespace(Event=Event))
    return waited


def test_a_server_that_asks_for_a_pause_gets_it(get, said, pauses):
    later = email.utils.formatdate(time.time() + 90, usegmt=True)
    answers = [Answer(b"", 429, Retry_After=value) for value in ("7", later, "Thu, 01 Jan 1970 00:00:00 GMT")]
    assert get(*answers, Answer(BODY)).read_bytes() == BODY
    assert pauses[0] == 7 and 80 < pauses[1] <= 90 and pauses[2] == 0
    assert "HTTP 429 Too Many Requests, trying again in 7 s" in said[0]


def test_without_a_readable_wish_pauses_double_with_jitter(get, pauses, monkeypatch):
    monkeypatch.setattr(module, "BACKOFF", 1.0)
    refused(get, *[Answer(b"", 503, Retry_After=value) for value in ("soon", "-5", "\u00b2", "")])
    assert len(pauses) == module.ATTEMPTS - 1
    assert all(0.5 * 2**i <= pause <= 1.5 * 2**i for i, pause in enumerate(pauses))


@pytest.mark.parametrize("wish", ["100000", "9" * 400])
def test_a_server_that_wants_too_long_a_pause_ends_the_download(get, wish):
    assert "try again later" in refused(get, Answer(b"", 429, Retry_After=wish))


def test_a_slow_server_is_a_passing_fault(get, monkeypatch, said):
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    hold = threading.Event()
    assert get(Answer(BODY, sent=100, hold=hold), Answer(BODY)).read_bytes() == BODY
    assert "TimeoutError" in said[0]
    hold.set()


def test_an_unreachable_host_is_said_at_once(tmp_path, said):
    for url in ("http://127.0.0.1:1/file", "http://no-such-host.invalid/file"):
        with pytest.raises(DownloadError, match=r"cannot be reached .*check the network and HTTPS_PROXY"):
            download(url, tmp_path / "file", log=said.append)
    assert said == []


def test_a_host_that_has_answered_before_may_come_back(get, server, tmp_path, said):
    get(Answer(BODY))
    server.close()
    with pytest.raises(DownloadError, match=f"failed {module.ATTEMPTS} times"):
        download(f"{server.url}/other", tmp_path / "other", log=said.append)


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "//x/y", "x", ""),
        *("http://[::1/", "http://h:99999999/", "http://h/a b", "http://h/\n", "http://h/\0"),
    ],
)
def test_only_http_addresses_are_fetched(tmp_path, url):
    with pytest.raises(DownloadError, match="is not an http or https address"):
        download(url, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_host_name_that_cannot_be_one_is_refused(tmp_path):
    with pytest.raises(DownloadError, match=r"leads nowhere|cannot be reached"):
        download(f"http://{'a' * 70}.com/", tmp_path / "file")


def test_offline_means_no_attempt(get, server, monkeypatch):
    for value in ("1", "true", "ON", "yes"):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        assert "HF_HUB_OFFLINE is set" in refused(get, Answer(BODY))
    assert server.requests == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert get(Answer(BODY)).read_bytes() == BODY


def test_a_proxy_of_the_environment_is_used(tmp_path, monkeypatch, server):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    server.answers["http://far.invalid/file"] = Answer(BODY)
    assert download("http://far.invalid/file", tmp_path / "file").read_bytes() == BODY


# ------------------------------------------------------------------------------------------------ tokens and redirects
@pytest.fixture
def hub(monkeypatch):
    """The hub and another host."""
    with servers(2) as (ours, other):
        monkeypatch.setenv("HF_ENDPOINT", ours.url + "/")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield ours, other


def tokens(server):
    return [headers.get("Authorization") for _, headers in server.requests]


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(hub, tmp_path):
    ours, other = hub
    ours.answers["/a"] = Answer(b"", 302, Location="/b")  # a renamed dataset: the same host
    ours.answers["/b"] = Answer(b"", 307, Location=f"{other.url}/c?signature=s")
    other.answers["/c?signature=s"] = Answer(BODY)
    assert download(f"{ours.url}/a", tmp_path / "file").read_bytes() == BODY
    assert tokens(ours) == ["Bearer hf_secret"] * 2 and tokens(other) == [None]
    download(f"{other.url}/c?signature=s", tmp_path / "file2")
    assert tokens(other) == [None, None]


def test_tokens_are_found_where_the_hubs_own_tools_look(hub, tmp_path, monkeypatch):
    ours, _ = hub
    ours.answers["/a"] = Answer(b"x")
    files = {"HF_TOKEN_PATH": tmp_path / "named", "HF_HOME": tmp_path / "hf" / "token"}
    for name, path in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(f" {name}_token\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(files["HF_TOKEN_PATH"]))
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "older")
    expected = ["hf_secret", "older", "HF_TOKEN_PATH_token", "HF_HOME_token"]
    for unset in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", None):
        read(f"{ours.url}/a", 10)
        if unset:
            monkeypatch.delenv(unset)
    files["HF_HOME"].unlink()
    read(f"{ours.url}/a", 10)
    assert tokens(ours) == [*(f"Bearer {token}" for token in expected), None]


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "schlüssel"])
def test_a_damaged_token_is_refused_and_not_shown(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(DownloadError, match="HF_TOKEN must hold one token") as e:
        read(f"{hub[0].url}/a", 10)
    assert token not in str(e.value) and hub[0].requests == []


def test_a_refusal_of_the_hub_says_what_to_do_about_the_token(hub, monkeypatch):
    ours, _ = hub
    ours.answers["/a"] = Answer(b"", 401)
    with pytest.raises(DownloadError, match=r"401 .*the token of HF_TOKEN is wrong or may not read it") as e:
        read(f"{ours.url}/a", 10)
    assert "hf_secret" not in str(e.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DownloadError, match=r"401 .*set HF_TOKEN, or check the name"):
        read(f"{ours.url}/a", 10)


def test_a_redirect_in_a_circle_or_to_another_scheme_ends(get, server):
    far = refused(get, Answer(b"", 302, Location="http://storage.invalid/x"))
    assert far.startswith("storage.invalid cannot be reached") and module._answered == {"127.0.0.1"}
    assert "302" in refused(get, Answer(b"", 302, Location="/file"))
    for scheme in ("file:///etc/passwd", "ftp://127.0.0.1/x", "http://[::1/"):
        assert "\n" not in refused(get, Answer(b"", 302, Location=scheme))


def test_a_redirect_from_https_to_http_is_refused():
    secure = module.Request("https://hub.example/file")
    with pytest.raises(DownloadError, match="redirects to plain http"):
        module._Redirects("https://hub.example/file").redirect_request(
            secure, None, 302, "", {}, "http://hub.example/file"
        )
    assert (
        module._Redirects("https://hub.example/file")
        .redirect_request(secure, None, 302, "", {}, "https://cdn.example/file")
        .type
        == "https"
    )


@pytest.mark.parametrize("address", ["hub.example", "file:///x", "https://", "https://a b"])
def test_a_bad_endpoint_is_named(monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(DownloadError, match="HF_ENDPOINT must be an address like"):
        endpoint()


def test_a_query_may_hold_a_signature_and_is_never_shown(server):
    with pytest.raises(DownloadError, match="/gone does not exist") as e:
        read(f"{server.url}/gone?signature=secret", 10)
    assert "secret" not in str(e.value)


def test_a_short_answer_is_read_whole_and_a_long_one_refused(server):
    server.answers["/list"] = [Answer(b"[1]", sent=1), Answer(b"[1]")]
    assert read(f"{server.url}/list", 3) == b"[1]"
    with pytest.raises(DownloadError, match="more than 2 bytes"):
        read(f"{server.url}/list", 2)


# ------------------------------------------------------------------------------------------------------------- disks
def test_a_place_that_cannot_be_written_is_named_with_what_to_do(get, server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(DownloadError, match=r"cannot be written .*NANOCHAT_BASE_DIR"):
        download(f"{server.url}/file", tmp_path / "file" / "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DownloadError, match="is not a file: move it away"):
        download(f"{server.url}/file", tmp_path / "folder")
    assert server.requests == []

    def read_only(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module.os, "replace", read_only)
    assert "cannot be written (Read-only file system)" in refused(get, Answer(BODY))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_noticed_before_the_transfer_or_in_it(get, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        assert "has no room for 1.0 MB" in refused(get, Answer(BODY))

    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(module, "open", lambda path, mode: full, raising=False)
        assert "cannot be written (No space left on device): free some space" in refused(get, Answer(BODY))


# -------------------------------------------------------------------------------------------------- several at a time
def test_many_files_arrive_and_those_that_are_there_stay(server, tmp_path, said):
    files = [(f"{server.url}/{i}", tmp_path / f"{i}.bin") for i in range(12)]
    server.answers = {f"/{i}": Answer(b"%d" % i * 1000) for i in range(12)}
    files[3][1].write_bytes(b"mine")
    download_all(files, log=said.append)
    assert [path.read_bytes() for _, path in files] == [b"mine" if i == 3 else b"%d" % i * 1000 for i in range(12)]
    assert "/3" not in server.paths() and said[-1].endswith("(12 of 12 files)")


def test_the_first_failure_stops_all_and_leaves_no_half_file(server, tmp_path):
    hold = threading.Event()
    slow = Answer(BODY, sent=100, hold=hold)
    server.answers = {f"/{i}": slow for i in range(50)} | {"/1": Answer(b"", 404)}
    threading.Timer(0.5, hold.set).start()
    with pytest.raises(DownloadError, match="/1 does not exist"):
        download_all([(f"{server.url}/{i}", tmp_path / "d" / str(i)) for i in range(50)], log=lambda line: None)
    assert len(server.requests) < 12
    assert not list((tmp_path / "d").iterdir())


def start_download(url, final, stdout=None):
    code = "import sys; from nanochat_jax.download import download; download(sys.argv[1], sys.argv[2])"
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
    deadline = time.monotonic() + 30
    while not list((tmp_path / "d").glob(".file.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    hold.set()
    assert not (tmp_path / "d" / "file").exists() and (tmp_path / "d" / ".file.part").exists()
    assert download(f"{server.url}/file", tmp_path / "d" / "file", log=said.append).read_bytes() == BODY
    assert [path.name for path in (tmp_path / "d").iterdir() if path.suffix != ".lock"] == ["file"] and said == []


# ---------------------------------------------------------------------------------------------------------- progress
def test_without_a_terminal_progress_is_a_line_now_and_then(get, said, monkeypatch):
    monkeypatch.setattr(progress, "SAID_EVERY", -1)
    get(Answer(BODY))
    assert said[-1] == "downloading file.bin: 1.0 of 1.0 MB"


def test_on_a_terminal_progress_is_a_bar(get, said, monkeypatch):
    screen = io.StringIO()
    console = progress.Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    get(Answer(BODY, sent=1000), Answer(BODY))
    assert "file.bin" in screen.getvalue() and len(said) == 1
