"""Files over HTTP: whole under their final name or not there, however often a transfer fails or is killed.

The hub is HF_ENDPOINT, a mirror of https://huggingface.co. Its token comes from HF_TOKEN, HUGGING_FACE_HUB_TOKEN or the
file where `hf auth login` keeps it, and goes to the hub's own host only, not to where that redirects. HF_HUB_OFFLINE=1
forbids every download. Proxies are those of HTTPS_PROXY, HTTP_PROXY and NO_PROXY.
"""

import contextlib
import email.utils
import os
import queue
import random
import shutil
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock, Timeout

from nanochat_jax.distributed.processes import print0
from nanochat_jax.files.parquet import first_line
from nanochat_jax.files.progress import progress

HUB = "https://huggingface.co"
ATTEMPTS = 6
BACKOFF = 1.0  # seconds before the second attempt; doubles, with jitter
LONGEST_WAIT = 600  # seconds that a server may ask us to wait
TIMEOUT = 30.0  # seconds without a byte
PARALLEL = 4  # transfers at a time
ROOM = "free some space, or name another base directory with NANOCHAT_BASE_DIR"
PAGE = "log in to the network or its proxy with a browser, or check the address"
CHUNK = 1 << 18  # bytes asked for at a time
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP answers that may be another one soon

_answered: set[str] = set()  # hosts that have answered this process: not reaching one of them is a passing fault


class DownloadError(OSError):
    """A file cannot be had; the message is one sentence with the reason and what to do."""


class _Passing(Exception):
    """A fault that another attempt may not meet. `wait`: seconds that the server asks for."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class _Stopped(Exception):
    """Another transfer of the same batch has failed."""


def download(
    url: str, final: Path, *, size: int | None = None, check: Callable | None = None, log: Callable = print0
) -> Path:
    """The file `url` under the name `final`; one that is there already is complete, and stays.

    The transfer goes to a temporary name beside it, and takes the final name when its length is Content-Length (and
    `size` bytes) and check(path) raises no ValueError. Of several processes one downloads, the others wait.
    DownloadError: it cannot be had, after ATTEMPTS attempts where another one may help.
    """
    final = Path(final)
    if not final.is_file():
        with locked(final, log), progress(log) as start:
            _fetch(url, final, size, check, log, start, threading.Event())
    return final


def download_all(files: Sequence[tuple[str, Path]], *, check: Callable | None = None, log: Callable = print0) -> None:
    """download() of (url, final) pairs, a few at a time, by a caller who holds a lock that guards them all.

    The first DownloadError stops all; finished files stay.
    """
    stop, waiting, ended = threading.Event(), queue.SimpleQueue(), queue.SimpleQueue()
    for file in files:
        waiting.put(file)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not stop.is_set():
                url, final = waiting.get_nowait()
                try:
                    ended.put((final, _fetch(url, final, None, check, log, start, stop)))
                except BaseException as e:
                    ended.put((final, e))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(PARALLEL)]
    with progress(log) as start:
        for thread in threads:
            thread.start()
        try:
            for number in range(1, len(files) + 1):
                final, fault = ended.get()
                if fault:
                    raise fault
                log(f"{final.name}: {final.stat().st_size / 1e6:,.1f} MB ({number:,} of {len(files):,} files)")
        finally:
            stop.set()
            if not isinstance(sys.exception(), KeyboardInterrupt):  # else nobody wants to wait, and they are daemons
                for thread in threads:
                    thread.join()


def read(url: str, limit: int, log: Callable = print0) -> bytes:
    """What `url` answers, at most `limit` bytes. DownloadError as for download()."""

    def attempt() -> bytes:
        body = bytearray()
        for chunk, _ in _chunks(url, None):
            body += chunk
            if len(body) > limit:
                raise DownloadError(f"{_shown(url)} answered with more than {limit:,} bytes, which cannot be right")
        return bytes(body)

    return _persist(attempt, url, log, threading.Event())


def endpoint() -> str:
    """The hub's address, without a slash at its end. DownloadError: HF_ENDPOINT is no address."""
    address = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    try:
        _origin(address)
    except ValueError:
        raise DownloadError(f"HF_ENDPOINT must be an address like {HUB}, got {address!r:.100}") from None
    return address


# -------------------------------------------------------------------------------------------------------- one file
def _fetch(url, final: Path, size, check, log, start, stop) -> None:
    """download() by a caller who holds the lock."""
    if final.is_file():  # by another process, while this one waited for the lock
        return
    with writing(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        raise DownloadError(f"{final} is not a file: move it away, a download belongs there")
    part = final.with_name(f".{final.name}.part")  # always the same name: what a kill leaves is overwritten
    report = start(final.name)
    try:
        _persist(lambda: _transfer(url, part, size, check, report, stop), url, log, stop)
        with writing(final.parent):
            os.replace(part, final)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _transfer(url, part: Path, size, check, report, stop) -> None:
    """One attempt at `url` into the new file `part`."""
    done = 0
    with writing(part.parent):
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:
            for chunk, total in _chunks(url, size):
                if stop.is_set():
                    raise _Stopped
                if not done and total and shutil.disk_usage(part.parent).free < total:
                    raise DownloadError(f"{part.parent} has no room for {total / 1e6:,.1f} MB of {_shown(url)}: {ROOM}")
                file.write(chunk)
                done += len(chunk)
                report(done, total)
            file.flush()
            os.fsync(file.fileno())
    if check:
        try:
            check(part)
        except ValueError as e:
            if total is None:
                raise _Passing(f"the transfer, of unknown length, ended early: {e}") from e
            raise DownloadError(f"{_shown(url)} is damaged at its source: {e}") from e


def _chunks(url: str, size: int | None) -> Iterator[tuple[bytes, int | None]]:
    """The bytes of `url` as they come, at least some, each with the number of all, None where the server tells none."""
    with _answer(url) as response:
        length = response.length
        if None not in (size, length) and size != length:
            raise DownloadError(f"{_shown(url)} has {length:,} bytes instead of {size:,}: it is another file by now")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise DownloadError(f"{_shown(url)} came compressed, which was not asked for: a proxy's fault?")
        total, done = size if length is None else length, 0
        while chunk := response.read1(CHUNK if length is None else min(CHUNK, length - done)):
            head = b"" if done else chunk.lstrip().lower()
            if response.headers.get_content_type() == "text/html" or head.startswith((b"<!doctype html", b"<html")):
                raise DownloadError(f"{_shown(url)} answered with a web page, not with the file: {PAGE}")
            done += len(chunk)
            yield chunk, total
            if done > (total or done):
                break
    if not done or done != (total or done):
        raise _Passing(f"the transfer ended after {done:,} of {f'{total:,}' if total else 'some'} bytes")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What goes wrong with files inside is a DownloadError with what to do about `folder`."""
    try:
        yield
    except DownloadError:
        raise
    except OSError as e:
        raise DownloadError(f"{folder} cannot be written ({e.strerror or e}): {ROOM}") from e


@contextlib.contextmanager
def locked(target: Path, log: Callable = print0) -> Iterator[None]:
    """One process at a time makes `target`, the others wait; the kernel frees the lock of one that is killed."""
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log(f"another process is downloading {target.name}: waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _persist(attempt: Callable, url: str, log: Callable, stop: threading.Event):
    """attempt(), again where its fault is a passing one."""
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except _Passing as e:
            if number == ATTEMPTS:
                raise DownloadError(f"{_shown(url)} failed {ATTEMPTS} times, at last so: {e}; try again later") from e
            seconds = random.uniform(0.5, 1.5) * BACKOFF * 2 ** (number - 1) if e.wait is None else e.wait
            if seconds > LONGEST_WAIT:
                raise DownloadError(f"{_shown(url)}: {e} and asks to wait {seconds:,.0f} s; try again later") from e
            log(f"{_shown(url)}: {e}, trying again in {seconds:.0f} s")
            if stop.wait(seconds):
                raise _Stopped from None


# ------------------------------------------------------------------------------------------------------ the network
@contextlib.contextmanager
def _answer(url: str) -> Iterator:
    """The open response of a GET. The network's faults, inside the block too, become DownloadError or _Passing."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise DownloadError(f"{_shown(url)} is not downloaded because HF_HUB_OFFLINE is set: unset it")
    try:
        try:
            redirects = _Redirects(url)
            request = Request(url, headers={"User-Agent": "nanochat_jax", "Accept-Encoding": "identity"})
            _authorize(request)
            response = build_opener(redirects).open(request, timeout=TIMEOUT)
        except ValueError as e:  # the address, a redirect's or a host name cannot be one
            raise DownloadError(f"{_shown(url)} leads nowhere: {first_line(e)}") from e
        _answered.add(redirects.host)
        with response:
            yield response
    except (DownloadError, _Passing):
        raise
    except HTTPError as e:
        _answered.add(redirects.host)
        with e:
            raise _refusal(url, e) from e
    except (OSError, HTTPException) as e:
        reason, host = getattr(e, "reason", None) or e, redirects.host
        said = f"{type(reason).__name__}: {first_line(reason)}"
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"{host} is not trusted ({said}): name its certificates with SSL_CERT_FILE") from e
        if isinstance(e, URLError) and host not in _answered:
            remedy = "check the network and HTTPS_PROXY" + (", or name a mirror with HF_ENDPOINT" * _is_hub(url))
            raise DownloadError(f"{host} cannot be reached ({said}): {remedy}") from e
        raise _Passing(said) from e


class _Redirects(HTTPRedirectHandler):
    """Follows redirects, not from https to http; the token goes along to the hub's own host only."""

    def __init__(self, url: str):
        self.host = _origin(url)[1]  # that is asked at present

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        scheme, host, _ = _origin(newurl)
        if scheme == "http" and req.type == "https":
            raise DownloadError(f"{_shown(req.full_url)} redirects to plain http, which is refused")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        _answered.add(self.host)
        self.host = host
        _authorize(request)
        return request


def _refusal(url: str, e: HTTPError) -> Exception:
    """What an HTTP answer that is no success means."""
    said = f"{e.code} {str(e.reason).splitlines()[0][:100]}" if e.reason else f"{e.code}"
    if e.code in PASSING:
        return _Passing(f"HTTP {said}", _retry_after(e.headers.get("Retry-After")))
    if e.code in (401, 403) and _is_hub(e.url):
        _, source = _token()
        remedy = f"the token of {source} is wrong or may not read it" if source else "set HF_TOKEN, or check the name"
        return DownloadError(f"{_shown(url)} answered {said}, it needs a token that may read it: {remedy}")
    if e.code in (404, 410):
        return DownloadError(f"{_shown(url)} does not exist ({said}): check the name")
    return DownloadError(f"{_shown(url)} answered {said}")


def _retry_after(value: str | None) -> float | None:
    """Seconds from now of a Retry-After header: a number or a date; None where it is neither."""
    value = (value or "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port. ValueError: not an http or https address."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https") or not url.isprintable() or " " in url:
        raise ValueError(f"{url!r:.200} is not an http or https address")
    return parts.scheme, host, port or {"http": 80, "https": 443}[parts.scheme]


def _is_hub(url: str) -> bool:
    return _origin(url) == _origin(endpoint())


def _shown(url: str) -> str:
    return "".join(c for c in url.split("?")[0][:300] if c.isprintable())  # a query may hold a signature


def _authorize(request: Request) -> None:
    if _is_hub(request.full_url) and (token := _token()[0]):
        request.add_unredirected_header("Authorization", f"Bearer {token}")


def _token() -> tuple[str, str]:
    """The hub's token and where it is from; two empty strings where there is none. DownloadError: it is no token."""
    for source in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(source, "").strip():
            break
    else:
        home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
        path = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token").expanduser()
        token, source = "", str(path)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            token = path.read_text(encoding="utf-8").strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise DownloadError(f"{source} must hold one token and nothing else")
    return token, source if token else ""
