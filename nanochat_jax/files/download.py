"""Downloads: files of the Hugging Face hub, and files of other web addresses. A file is whole under its name or absent.

huggingface_hub does the transfers. HF_ENDPOINT names a mirror of the hub, HF_TOKEN or `hf auth login` give a token, and
HF_HUB_OFFLINE=1 forbids all downloads. Proxies are those of HTTPS_PROXY, HTTP_PROXY and NO_PROXY. The library is only
imported when something is downloaded, because the import takes 0.2 seconds that other runs need not spend.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nanochat_jax.distributed.processes import print0
from nanochat_jax.files.parquet import first_line, read_footer
from nanochat_jax.files.paths import write_atomically

ATTEMPTS = 4
BACKOFF = 1.0  # seconds before the second attempt; each further wait is twice as long
PARALLEL = 4  # transfers at a time
TIMEOUT = 30.0  # seconds without a byte, for addresses outside the hub
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # HTTP answers that may be different a moment later
FREE_SPACE = (
    "free some space, or name another base directory with NANOCHAT_BASE_DIR (for models of the hub, another cache with "
    "HF_HOME)"
)
LOGIN_PAGE = "log in to the network or its proxy with a browser, or check the address"


class DownloadError(OSError):
    """A file cannot be had. The message is one sentence with the reason and what helps."""


def list_repository(kind: str, repo: str, revision: str, log: Callable = print0) -> tuple[str, list[str]]:
    """The commit that a revision of a repository stands for, and the sorted paths of its files. DownloadError.

    kind: "dataset" or "model"."""

    def ask() -> tuple[str, list[str]]:
        from huggingface_hub import HfApi

        commit = HfApi().repo_info(repo, repo_type=kind, revision=revision, expand=["sha"]).sha
        if not re.fullmatch("[0-9a-f]{40}", str(commit)):  # callers name folders after it
            raise ValueError(f"{commit!r:.100} is no commit")
        return commit, sorted(HfApi().list_repo_files(repo, revision=commit, repo_type=kind))

    return _repeat(ask, f"{kind} {repo} ({revision})", log)


def fetch_parquet(repo: str, revision: str, files: Mapping[str, str], folder: Path, log: Callable = print0) -> None:
    """Download parquet files of a hub dataset, a few at a time; `files` maps paths in the dataset to names in `folder`.

    The caller holds a lock on the folder. Files that are there already stay as they are. DownloadError: the first
    failure ends the others; files that have arrived stay.
    """
    scratch = folder / ".downloading"

    def fetch(path: str) -> Path:
        from huggingface_hub import hf_hub_download

        final = folder / files[path]
        get = functools.partial(hf_hub_download, repo, path, repo_type="dataset", revision=revision, local_dir=scratch)
        if not final.is_file():
            downloaded = _repeat(get, f"{path} of dataset {repo}", log)
            try:
                read_footer(Path(downloaded))
            except ValueError as e:
                raise DownloadError(f"{path} of dataset {repo} is damaged at its source: {e}") from e
            with writing(folder):
                os.replace(downloaded, final)
        return final

    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    try:
        _fetch_all(fetch, list(files), log)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fetch_model(repo: str, revision: str, commit: str, paths: Sequence[str], log: Callable = print0) -> Path:
    """Download files of a hub model into the library's own cache, a few at a time -> the folder there that has them
    under their paths. What is in the cache already is not downloaded again, and a transfer that breaks off goes on.

    commit: what `list_repository` has said of the revision. DownloadError: a file cannot be had; those that have
    arrived stay."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    what = f"model {repo} ({revision})"

    def fetch(path: str) -> Path:
        get = functools.partial(hf_hub_download, repo, path, revision=revision)
        found = Path(_repeat(get, f"{path} of {what}", log))
        if found.parents[path.count("/")].name != commit:
            raise DownloadError(f"{what} has changed while it was downloaded: start again")
        return found

    missing = [path for path in paths if not isinstance(try_to_load_from_cache(repo, path, revision=commit), str)]
    if missing:
        log(f"downloading {what}, {len(missing)} files, to {constants.HF_HUB_CACHE}")
        _fetch_all(fetch, missing, log)
    return Path(try_to_load_from_cache(repo, paths[0], revision=commit)).parents[paths[0].count("/")]


def cached_model(repo: str, revision: str) -> tuple[str, list[str]]:
    """What `list_repository` says, of the part of a model that is in the hub's cache on this machine. DownloadError:
    there is none."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        raise DownloadError(
            f"model {repo} ({revision}) is not in the hub's cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
            "unset it"
        ) from None
    return folder.name, sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids all downloads."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _fetch_all(fetch: Callable[[str], Path], paths: Sequence[str], log: Callable) -> None:
    """fetch(path) of each, a few at a time, with a line for each; the first DownloadError ends the others."""
    failed = threading.Event()
    with ThreadPool(PARALLEL) as pool, warnings.catch_warnings():  # daemon threads, for which Ctrl-C does not wait
        warnings.filterwarnings("error", "Not enough free disk space")  # the library warns and goes on
        try:
            arrived, number = pool.imap_unordered(lambda path: failed.is_set() or fetch(path), paths), 0
            while number < len(paths):
                with contextlib.suppress(multiprocessing.TimeoutError):  # an endless wait might never see Ctrl-C
                    final, number = arrived.next(timeout=0.5), number + 1
                    size = final.stat().st_size / 1e6
                    log(f"{final.name}: {size:,.1f} MB ({number:,} of {len(paths):,} files)")
        except DownloadError:
            failed.set()
            pool.close()
            pool.join()
            raise


def download(url: str, final: Path, log: Callable = print0) -> Path:
    """A file of any web address under the name `final`; one that is there already stays. DownloadError."""

    def get() -> None:
        from huggingface_hub.utils import get_session  # its client obeys HF_HUB_OFFLINE

        with get_session().stream("GET", url, timeout=TIMEOUT) as response:
            response.raise_for_status()
            parts, shown = response.iter_bytes(1 << 20), url.split("?")[0]  # the query may hold a signature
            if url.startswith("https:") and response.url.scheme != "https":
                raise DownloadError(f"{shown} redirects to plain http, which is refused")
            first = next(parts, b"")
            is_page = first.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html"))
            if is_page or "text/html" in response.headers.get("Content-Type", ""):
                raise DownloadError(f"{shown} answered with a web page, not with the file: {LOGIN_PAGE}")
            if not first:
                raise OSError("the answer is empty")
            with writing(final.parent):
                write_atomically(final, itertools.chain([first], parts))

    if not final.is_file():
        with locked(final, log):
            if not final.is_file():  # another process may have made it meanwhile
                _repeat(get, url.split("?")[0], log)
    return final


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with files inside the block into a DownloadError that says what to do about `folder`."""
    try:
        yield
    except DownloadError:
        raise
    except OSError as e:
        raise DownloadError(f"{folder} cannot be written ({e.strerror or e}): {FREE_SPACE}") from e


@contextlib.contextmanager
def locked(target: Path, log: Callable = print0) -> Iterator[None]:
    """One process at a time makes `target`, the others wait; the kernel frees the lock of one that is killed."""
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=1)
        except Timeout:
            log(f"another process is downloading {target.name}: waiting for it")
            held = lock.acquire()
    with held:
        yield


def _repeat(attempt: Callable[[], Any], what: str, log: Callable) -> Any:
    """attempt(), again where its fault may pass: the library repeats broken transfers itself, but no listing."""
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except DownloadError:
            raise
        except Exception as e:  # of huggingface_hub, httpx, hf_xet and the file system
            fault, transient = explain(e)
            if not transient or number == ATTEMPTS:
                raise DownloadError(f"{what} {fault}" + ("; try again later" if transient else "")) from e
            wait = BACKOFF * 2 ** (number - 1)
            log(f"{what} {fault}, trying again in {wait:.0f} s")
            time.sleep(wait)


def explain(e: BaseException, right: str = "read") -> tuple[str, bool]:
    """The rest of a sentence that begins with what was asked for, and whether another attempt may go better.

    right: what a token must allow."""
    import httpx
    from huggingface_hub import errors, get_token

    while isinstance(e, errors.LocalEntryNotFoundError) and e.__cause__:
        e = e.__cause__  # the library has looked for the file on this disk after the failure that counts
    said = f"{type(e).__name__}: {first_line(e).split(' (')[0]}"  # in brackets may be the end of a signed address
    if isinstance(e, errors.OfflineModeIsEnabled):
        done = "downloaded" if right == "read" else "uploaded"
        return f"is not {done} because HF_HUB_OFFLINE is set: unset it", False
    if (response := getattr(e, "response", None)) is not None:
        answer = f"{response.status_code} {response.reason_phrase}"
        if response.status_code in (404, 410):
            return f"does not exist ({answer}): check the name", False
        if response.status_code in (401, 403) and isinstance(e, errors.HfHubHTTPError):
            remedy = f"the token of HF_TOKEN or hf auth login is wrong or may not {right} it"
            remedy = remedy if get_token() else "set HF_TOKEN, or check the name"
            return f"answered {answer}, it needs a token that may {right} it: {remedy}", False
        return f"answered {answer}", response.status_code in TRANSIENT
    if isinstance(e, errors.HFValidationError):
        return f"cannot exist ({said}): check the name", False
    if isinstance(e, httpx.UnsupportedProtocol | httpx.InvalidURL):
        return f"has no web address ({said}): HF_ENDPOINT must be an address like https://huggingface.co", False
    if isinstance(e, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError):
        remedy = "check the network, HTTPS_PROXY and SSL_CERT_FILE, or name a mirror with HF_ENDPOINT"
        return f"cannot be reached ({said}): {remedy}", False
    if isinstance(e, UserWarning) or getattr(e, "errno", None):
        return f"cannot be written ({getattr(e, 'strerror', None) or first_line(e)}): {FREE_SPACE}", False
    if isinstance(e, httpx.TransportError) or type(e) in (OSError, RuntimeError):  # hf_xet raises RuntimeError
        return f"broke off ({said})", True
    return f"is not answered as by the hub ({said}): {LOGIN_PAGE}", False
