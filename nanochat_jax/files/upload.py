"""Uploads: a folder of this machine as a model's repository on the Hugging Face hub.

huggingface_hub does the transfers, with the token of HF_TOKEN or `hf auth login`; see `files/download.py`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from nanochat_jax.files.download import explain

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]  # old ones beside new ones would be a mixture of two models


class UploadError(OSError):
    """A folder cannot be uploaded. The message is one sentence with the reason and what helps."""


def check_name(repo: str) -> None:
    """ValueError: this cannot be the name of a repository, OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise ValueError(f"--push must be OWNER/NAME: {' '.join(str(e).split())}") from None
    if repo.count("/") != 1:
        raise ValueError(f"--push must be OWNER/NAME, got {repo!r:.80}")


def is_private(repo: str) -> bool | None:
    """Whether the model repository is private; None: there is none yet. UploadError: nobody can tell."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not get_token():
        raise UploadError(f"model {repo} cannot be uploaded without a token: set HF_TOKEN, or hf auth login")
    with _naming(repo):
        try:
            return bool(HfApi().model_info(repo, expand=["private"]).private)
        except RepositoryNotFoundError as e:
            if e.response.status_code != 404:  # a token that is not valid
                raise
            return None


def upload_folder(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Upload the folder's files as one commit to a model repository, which is made where there is none -> its address.

    Files there are replaced by those of the same name, and files of weights that have none are deleted; both stay in
    the repository's history. private: of one that is made. UploadError."""
    from huggingface_hub import HfApi

    with _naming(repo, f"; later, hf upload {repo} {folder} does it"):
        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=WEIGHTS)
        return str(address)


@contextlib.contextmanager
def _naming(repo: str, advice: str = "") -> Iterator[None]:
    """What goes wrong inside is an UploadError that begins with the repository."""
    try:
        yield
    except Exception as e:  # of huggingface_hub, httpx, hf_xet and the file system
        fault, transient = explain(e, "write to")
        raise UploadError(f"model {repo} {fault}{advice or '; try again later' * transient}") from e
