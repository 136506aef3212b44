"""`export --push-to-hub REPO`: uploads a finished export to the hub as a new, private model.

What the hub tells before is refused before the export: a malformed name, no login, a token that is not valid,
no network, a repository that holds files. Whether the token may write there shows when it does. The token is
that of huggingface_hub (`hf auth login`, or HF_TOKEN).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from qlora_train.boundary import reason_of
from qlora_train.errors import ExportError

# With the errors of the HTTP library that the client uses (httpx or httpx2); a failed upload of one file
# arrives as a RuntimeError.
_FAILURES: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)


def require_uploadable(repo: str, log: Callable[[str], None]) -> None:
    """Raise `ExportError` unless the hub is reached, knows the token, and has no files in `repo`. log: called
    with a line where `repo` is public."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ExportError(f"--push-to-hub {repo}: {error}") from error
    if repo.count("/") != 1:
        raise ExportError(f"--push-to-hub {repo}: give USER/NAME or ORGANIZATION/NAME.")
    if get_token() is None:
        raise ExportError(
            f"--push-to-hub {repo}: nobody is logged in to the hub here. Run `hf auth login` (a token that "
            "may write), or set HF_TOKEN."
        )
    try:
        HfApi().whoami()  # a token that is not valid finds no repository either
        found = HfApi().model_info(repo)
        there = {file.rfilename for file in found.siblings or []} - {".gitattributes"}
    except RepositoryNotFoundError:
        return
    except _FAILURES as error:
        raise ExportError(
            f"--push-to-hub {repo}: the hub does not let us look ({reason_of(error)}). Check token and "
            "network (HF_HUB_OFFLINE must not be set), or export without --push-to-hub."
        ) from error
    if there:
        raise ExportError(
            f"--push-to-hub {repo}: has files already ({sorted(there)[0]}), and two models would be mixed. "
            "Give another name."
        )
    if not found.private:
        log(f"{repo} is there and public: what is uploaded will be, too")


def upload(folder: Path, repo: str) -> str:
    """Upload a folder; returns the model's address. A new repository is private, one that is there stays
    as it is. Raises `ExportError`, which says how to go on."""
    try:
        api = HfApi()
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model of qlora-train")
    except _FAILURES as error:
        again = shlex.join(["hf", "upload", repo, str(folder), "--private"])
        raise ExportError(
            f"{folder}: the export is complete there, but is not on the hub as {repo} ({reason_of(error)}). "
            f"Push it again with: {again}"
        ) from error
    return str(url)
