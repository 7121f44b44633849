"""`marlin quantize --push owner/name`: sends the packed folder to the Hugging Face hub. The token is the user's own."""

import re
from pathlib import Path

from marlin_cli import console
from marlin_cli.checkpoints.location import said_by_hub
from marlin_cli.errors import OutputError, UsageError
from marlin_cli.text import quoted

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_push(repository: str) -> None:
    """Refuse before anything is packed what could not be sent.

    Raises:
        UsageError: no name of a repository, no huggingface_hub, or nobody has logged in.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UsageError(f"--push {quoted(repository)}: is no owner/name of a repository on the hub")
    try:
        from huggingface_hub import get_token
    except ImportError:
        raise UsageError("--push needs huggingface_hub; install it with pip install 'marlin-cli[hub]'") from None
    if get_token() is None:
        raise UsageError("--push needs a token of yours: run hf auth login, or set HF_TOKEN")


def push(folder: Path, repository: str, *, token: str | None = None) -> None:
    """Make the repository where it is not there, and send all files of a folder in one commit.

    Args:
        token: the user's own unless given.

    Raises:
        OutputError: the hub does not take it, or cannot be reached; the folder stays where it is.
    """
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    try:
        hub.create_repo(repository, exist_ok=True)
        commit = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Packed by marlin")
    except Exception as error:  # see `checkpoints.location`
        said = said_by_hub(error)
        raise OutputError(f"--push {repository}: the hub did not take {folder}, which stays there: {said}") from None
    console.note(f"sent {folder}: {commit.commit_url}")
