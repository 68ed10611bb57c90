"""The pages served to a browser of this machine while runs train; that of all runs replaces itself when they have
recorded more, those about rollouts are made when they are asked for."""

import hashlib
import re
import socketserver
import sys
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple, NoReturn

from nanochat_jax.checkpoints import integrity
from nanochat_jax.reports.page import page
from nanochat_jax.reports.rollouts import rollout_pages, rollouts_page
from nanochat_jax.reports.runs import Log, Run, read_run

ADDRESS = "127.0.0.1"  # of this machine alone
HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")  # any port: another one is a tunnel's beginning
REPORT = "report.html"  # what the page is called as a file; those about rollouts are named after it
READ = ("metrics.jsonl", "rollouts.jsonl", "*.json", f"*/{integrity.MANIFEST}")  # files of a run that a page depends on

Signature = tuple[tuple[str, int, int], ...]  # path, size and time of change of each file


def signature_of(folder: Path) -> Signature:
    """What changes whenever the page about a run may change."""
    found = []
    for path in sorted(path for pattern in READ for path in folder.glob(pattern)):
        try:
            status = path.stat()
        except OSError:  # it was deleted meanwhile
            continue
        found.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(found)


class Version(NamedTuple):
    """The page as of some files."""

    name: str
    body: bytes


class LivePage:
    """The page about runs, made anew when one of their files has changed; of the other runs nothing is read again."""

    def __init__(self, folders: Callable[[], Sequence[Path]], log: Log):
        """folders: -> those of the runs, which may become more. log: is told once of each thing that is left out."""
        self._folders, self._log = folders, log
        self._lock = threading.Lock()  # a browser asks from several threads
        self._runs: dict[Path, tuple[Signature, Run]] = {}
        self._said: set[str] = set()
        self._version = Version("", b"")

    def version(self) -> Version:
        """The page of now."""
        with self._lock:
            signatures = {folder: signature_of(folder) for folder in self._folders()}
            name = hashlib.sha256(repr(signatures).encode("utf-8", "replace")).hexdigest()[:16]
            if name != self._version.name:

                def read(folder: Path, log: Log) -> Run:
                    known = self._runs.get(folder)
                    if known is None or known[0] != signatures[folder]:
                        known = self._runs[folder] = signatures[folder], read_run(folder, log)
                    return known[1]

                links = {one.folder: one.file for one in rollout_pages([*signatures], REPORT)}
                text = page([*signatures], self._say, read, links=links, version=name)
                self._version = Version(name, text.encode("utf-8", "replace"))
            return self._version

    def rollouts(self, path: str) -> Version | None:
        """A page about a run's rollouts as of now, by its path in the server; None where there is none."""
        for one in rollout_pages(self._folders(), REPORT):
            if path == f"/{one.file}":
                return Version("", rollouts_page(one, "/", self._say).encode("utf-8", "replace"))
        return None

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._log(what)


class Server(socketserver.ThreadingTCPServer):
    """Answers requests of this machine for one page, each in a thread of its own: a browser opens connections on which
    it says nothing for long."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int, live: LivePage):
        """port: 0 for any that is free. OSError: it is taken."""
        self.live = live
        super().__init__((ADDRESS, port), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that has gone away is no error; what else goes wrong is the server's to tell."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the pages and nothing else, and only for who names this machine as the one that is asked: a page
    from elsewhere whose name has been pointed to this machine meanwhile names its own."""

    timeout = 10.0  # seconds of silence
    server: Server

    def do_GET(self) -> None:
        """Answer with the page."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Answer without the page."""
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        live, hosts = self.server.live, self.headers.get_all("Host", [])
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            self.send_error(HTTPStatus.FORBIDDEN, "This page is for 127.0.0.1 and localhost")
        elif (asked := live.version() if self.path == "/" else live.rollouts(self.path)) is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            name, body = asked
            self.send_response(HTTPStatus.OK)
            for header, value in (
                ("Content-Type", "text/html; charset=utf-8"),
                ("Content-Length", str(len(body))),
                ("ETag", f'"{name}"'),
                ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"),
                ("Cross-Origin-Resource-Policy", "same-origin"),
                ("Content-Security-Policy", "frame-ancestors 'none'"),
                ("Referrer-Policy", "no-referrer"),
            ):
                self.send_header(header, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing: a page asks every few seconds."""


def watch(port: int, folders: Callable[[], Sequence[Path]], log: Log) -> NoReturn:
    """Serve the page until a signal comes. port: 0 for any that is free. ValueError: it cannot be had."""
    live = LivePage(folders, log)
    try:
        server = Server(port, live)
    except OSError as e:
        raise ValueError(
            f"--watch {port} must be a port that is free ({e.strerror}): give another, or 0 for any that is free"
        ) from e
    with server:
        live.version()  # what is wrong with files is said before the page is offered
        print(f"http://{ADDRESS}:{server.server_address[1]}/ shows the runs as they go on; Ctrl-C ends it", flush=True)
        server.serve_forever()
