"""A web server on loopback whose answers a test scripts: it plays the hub, its storage, a proxy's login page."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import quote

COMMIT = "c" * 40


class Answer:
    """status, body and headers; `sent`: bytes after which the connection closes; `hold`: an event waited for there;
    `begin`: where the body begins that is sent, of a request for the rest of a file."""

    def __init__(self, body=b"", status=200, *, sent=None, hold=None, length=True, begin=0, **headers):
        self.body, self.status, self.sent, self.hold = body[begin:], status, sent, hold
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if length:
            self.headers.setdefault("Content-Length", str(len(self.body)))


class Server:
    """answers: path -> an Answer, or a list of which each request takes one, the last one for good. A POST request
    takes the answer of "POST path", and what it brought is added to `posted`.

    A path is looked up with its query, then without. A HEAD request takes the answer of "HEAD path" where there is one,
    else the headers of the path's last answer.
    """

    def __init__(self):
        self.answers, self.requests, self.held = {}, [], threading.Event()
        self.posted = []  # (path, bytes)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                answer = self.begin(self.path)
                with contextlib.suppress(OSError):  # the client may be gone
                    self.wfile.write(answer.body[: answer.sent])
                    self.wfile.flush()
                    if answer.hold:
                        outer.held.set()
                        answer.hold.wait(30)
                        self.wfile.write(answer.body[len(answer.body) if answer.sent is None else answer.sent :])

            def do_HEAD(self):
                self.begin(f"HEAD {self.path}")

            def do_POST(self):
                brought = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        brought += self.rfile.read(size)
                        self.rfile.readline()
                outer.posted.append((self.path.split("?")[0], brought))
                self.wfile.write(self.begin(f"POST {self.path}").body)

            def begin(self, path):
                outer.requests.append((path, {name.title(): value for name, value in self.headers.items()}))
                bare = path.split("?")[0]
                tried = (path, bare, *([bare.removeprefix("HEAD ")] if bare.startswith("HEAD ") else []))
                answer = next((outer.answers[p] for p in tried if p in outer.answers), Answer(b"{}", 404))
                if isinstance(answer, list):
                    consumed = not path.startswith("HEAD ") or path in outer.answers
                    answer = answer.pop(0) if consumed and len(answer) > 1 else answer[0 if consumed else -1]
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                return answer

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
        """What was asked for with GET, without queries."""
        return [path.split("?")[0] for path, _ in self.requests if not path.startswith("HEAD ")]

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def serve_dataset(server, repo, revision, files, commit=COMMIT):
    """Let the server be a hub that has this dataset; files: path -> bytes. Returns its addresses."""
    return serve_repository(server, f"datasets/{repo}", f"/datasets/{repo}", revision, files, commit)


def serve_model(server, repo, files, revision="main", commit=COMMIT):
    """The same with a model."""
    return serve_repository(server, f"models/{repo}", f"/{repo}", revision, files, commit)


def serve_repository(server, api, files_at, revision, files, commit):
    """The addresses of a repository that is served from now on."""
    api, repo = f"/api/{api}", api.partition("/")[2]
    addresses = SimpleNamespace(
        revision=f"{api}/revision/{quote(revision, safe='')}",
        tree=f"{api}/tree/{commit}",
        file=lambda path, revision=commit: f"{files_at}/resolve/{quote(revision, safe='')}/{quote(path)}",
    )
    listing = [{"type": "file", "path": path, "size": len(body), "oid": "0" * 40} for path, body in files.items()]
    folders = [{"type": "directory", "path": path, "oid": "0" * 40} for path in {p.split("/")[0] for p in files}]
    for known_as in (addresses.revision, f"{api}/revision/{commit}"):
        server.answers[known_as] = Answer(json.dumps({"id": repo, "sha": commit}).encode())
    server.answers[addresses.tree] = Answer(json.dumps(folders + listing).encode())
    for path, body in files.items():
        for known_as in {revision, commit}:
            server.answers[addresses.file(path, known_as)] = file_answer(body, commit=commit)
    return addresses


def file_answer(body, *, commit=COMMIT, etag=None, **how):
    """A file as the hub sends it."""
    return Answer(body, ETag=f'"{etag or hash(body) % 10**12}"', X_Repo_Commit=commit, **how)


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
        assert server.held.wait(60)
        hold.set()
        return [process.wait(60) for process in both], said.read_text()


def isolate(monkeypatch, tmp_path):
    """No proxy, token, mirror or home of this machine; the base directory is tmp_path/base; back-off takes no time.

    Returns the list of seconds that downloads would have waited. The hub's library reads its variables when it is
    imported, so they are set for processes that a test starts, and in the library for this one.
    """
    import huggingface_hub
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    from nanochat_jax.files import download

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "NANOCHAT_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "hf" / "token"),
        "HF_STORED_TOKENS_PATH": str(tmp_path / "hf" / "stored_tokens"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    use_hub(monkeypatch, "https://hub.invalid")
    huggingface_hub.close_session()  # the next one reads the proxies' variables
    waited = []
    for module in (download, _http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waited.append))
    return waited


def use_hub(monkeypatch, address):
    """HF_ENDPOINT, for this process and for those that the test starts."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", address)
    address = address.rstrip("/")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
