"""What report --watch answers, and to whom.

Run: python -m pytest tests/reports/test_watch.py
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from nanochat_jax.report import ReportConfig, main
from nanochat_jax.reports import watch
from nanochat_jax.reports.watch import LivePage, Server
from tests.reports.folders import RL, Elements, answer, checkpoint, result, write


@contextlib.contextmanager
def serving(folders):
    with Server(0, LivePage(lambda: folders, print)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def ask(port, method="GET", path="/", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers={"Host": f"127.0.0.1:{port}"} | headers)
    answered = connection.getresponse()
    with contextlib.closing(connection):
        return answered.status, answered.read().decode(), answered.headers


def test_the_page_is_served_with_its_version(tmp_path):
    with serving([write(tmp_path / "a", RL)]) as port:
        status, text, headers = ask(port)
        assert status == 200 and "reward" in text and f"data-version={headers['ETag'][1:-1]}>" in text
        assert headers["Content-Type"] == "text/html; charset=utf-8" and headers["Cache-Control"] == "no-store"
        status, text, head = ask(port, "HEAD")
        assert status == 200 and text == "" and head["ETag"] == headers["ETag"]


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1", "127.0.0.1:9000"])
def test_this_machine_may_be_called_by_its_names_also_through_a_tunnel(tmp_path, host):
    with serving([write(tmp_path / "a", RL)]) as port:
        assert ask(port, Host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil", "", "a:b"]
)
def test_a_request_for_another_name_is_refused(tmp_path, host):
    with serving([write(tmp_path / "a", RL)]) as port:
        status, text, _ = ask(port, Host=host)
        assert status == 403 and "reward" not in text
        assert ask(port, "HEAD", Host=host)[0] == 403


def test_a_request_without_a_name_or_with_two_is_refused(tmp_path):
    with serving([write(tmp_path / "a", RL)]) as port:
        for hosts in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\n" + hosts + b"\r\n")
                assert b" 403 " in connection.makefile("rb").readline()


def test_the_pages_about_rollouts_are_served_as_they_are_linked_and_follow_the_run(tmp_path):
    folders = [write(tmp_path / name, RL, [answer(0, 1.0, "before")] if name == "b" else ()) for name in "ab"]
    with serving(folders) as port:
        (link,) = {link for link in Elements(ask(port)[1]).links if not link.startswith("#")}
        status, text, _ = ask(port, path=f"/{link}")
        assert status == 200 and "before" in text and "after" not in text.partition("id=data>")[2].partition("<")[0]
        with (folders[1] / "rollouts.jsonl").open("a") as file:
            file.write(json.dumps(answer(1, 1.0, "after")) + "\n")
        assert "after" in ask(port, path=f"/{link}")[1].partition("id=data>")[2].partition("<")[0]
        assert ask(port, path=f"/{link}", Host="evil.example")[0] == 403
        assert ask(port, path="/report-rollouts-a.html")[0] == 404


@pytest.mark.parametrize("path", ["/metrics.jsonl", "/../", "/?x", "/%2e%2e/", "http://evil.example/"])
def test_there_is_nothing_but_the_page(tmp_path, path):
    with serving([write(tmp_path / "a", RL)]) as port:
        assert ask(port, path=path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_sent(tmp_path, method):
    with serving([write(tmp_path / "a", RL)]) as port:
        assert ask(port, method)[0] == 501


def test_a_connection_that_says_nothing_holds_nobody_up(tmp_path):
    with serving([write(tmp_path / "a", RL)]) as port, socket.create_connection(("127.0.0.1", port)):
        assert ask(port)[0] == 200


def test_a_page_is_made_anew_only_when_a_file_that_it_shows_has_changed(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(watch, "read_run", lambda folder, log: read.append(folder.name) or original(folder, log))
    folders = [write(tmp_path / name, RL) for name in "ab"]
    live = LivePage(lambda: folders, print)
    first = live.version()
    assert live.version() is first and read == ["a", "b"]
    changes = (
        lambda: (folders[0] / "metrics.jsonl").open("a").write('{"step": 9, "loss": 1}\n'),
        lambda: (folders[0] / "rollouts.jsonl").write_text(json.dumps(answer(0, 1.0)) + "\n"),
        lambda: (folders[0] / "gsm8k.json").write_text(json.dumps(result(3, GSM8K=0.5))),
        lambda: checkpoint(folders[0], 3, seed=1),
        lambda: os.utime(folders[0] / "metrics.jsonl", (1, 1)),
    )
    for change in changes:
        before = live.version().name
        read.clear()
        change()
        assert live.version().name != before and read == ["a"]
    folders.append(write(tmp_path / "c", RL))
    assert b">c<" in live.version().body and read == ["a", "c"]


original = watch.read_run


def test_what_is_left_out_is_said_once(tmp_path):
    folder, said = write(tmp_path / "a", [*RL, {"step": "x"}]), []
    live = LivePage(lambda: [folder], said.append)
    live.version()
    os.utime(folder / "metrics.jsonl", (1, 1))
    live.version()
    assert said == [f"{folder / 'metrics.jsonl'}: 1 line is no record of a step"]


def test_a_page_without_a_run_waits_for_one(tmp_path):
    assert b"no run has begun yet" in LivePage(list, print).version().body


def test_a_port_that_is_taken_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--watch {port} must be a port that is free \(Address already in use\)"):
            main(ReportConfig(watch=port))


@pytest.mark.parametrize(
    ("given", "said"), [({"watch": 65536}, "from 0 to 65535"), ({"output": "a"}, "leave out --output")]
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        main(ReportConfig(**{"watch": 0, **given}))


def test_ctrl_c_ends_it_with_one_line(tmp_path):
    write(tmp_path / "base_checkpoints/d2", RL)
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "nanochat_jax.report", "--watch", "0"]
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
    ) as process:
        port = int(process.stdout.readline().split("/")[2].partition(":")[2])
        assert "smoothed reward 0.25" in ask(port)[1]
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    assert (process.returncode, rest, errors) == (130, "", "\nStopped by SIGINT\n")
