"""A web server on loopback whose answers a test scripts: it plays the hub, its storage, a proxy's login page."""

import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Answer:
    """status, body and headers; `sent`: bytes after which the connection closes; `hold`: an event waited for there."""

    def __init__(self, body=b"", status=200, *, sent=None, hold=None, length=True, **headers):
        self.body, self.status, self.sent, self.hold = body, status, sent, hold
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if length:
            self.headers.setdefault("Content-Length", str(len(body)))


class Server:
    """answers: path -> an Answer, or a list of which each request takes one, the last one for good."""

    def __init__(self):
        self.answers, self.requests, self.held = {}, [], threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, dict(self.headers)))
                answer = outer.answers.get(self.path, Answer(b"{}", 404))
                if isinstance(answer, list):
                    answer = answer.pop(0) if len(answer) > 1 else answer[0]
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # the client may be gone
                    self.wfile.write(answer.body[: answer.sent])
                    self.wfile.flush()
                    if answer.hold:
                        outer.held.set()
                        answer.hold.wait(30)
                        self.wfile.write(answer.body[len(answer.body) if answer.sent is None else answer.sent :])

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def paths(self):
        return [path for path, _ in self.requests]

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def servers(n):
    made = [Server() for _ in range(n)]
    try:
        yield made
    finally:
        for server in made:
            server.close()


def together(server, hold, start, tmp_path):
    """Exit codes and output of two processes that start(stdout) begins; they go on when the second one waits."""
    said = tmp_path / "said"
    with said.open("w") as out:
        both = [start(out) for _ in range(2)]
        deadline = time.monotonic() + 60
        while "another process is downloading" not in said.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.held.is_set()
        hold.set()
        return [process.wait(60) for process in both], said.read_text()


def isolate(monkeypatch, tmp_path):
    """No proxy, token, mirror or home of this machine; the base directory is tmp_path/base; back-off takes no time."""
    from nanochat_jax.files import download

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "NANOCHAT_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setattr(download, "_answered", set())
