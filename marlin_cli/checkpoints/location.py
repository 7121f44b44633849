"""Where a model lies: a path, the name of a shipped demo, or a repository on the Hugging Face hub."""

import os
import warnings
from pathlib import Path

from marlin_cli.config import did_you_mean
from marlin_cli.errors import AssumptionWarning, CheckpointError
from marlin_cli.files import shipped
from marlin_cli.text import beginning, one_line, quoted

# What a model repository may hold that is worth fetching.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.pt", "*.bin", "README.md", "LICEN[CS]E*", "COPYING*", "NOTICE*", "*.jinja"]

# Before a name that is a repository's on the hub, whatever lies here.
HUB_PREFIX = "hf:"

# Characters of what the hub says.
MOST_SAID = 200


def locate_model(name: str) -> Path:
    """The file or folder that `name` stands for: a path that exists, a shipped model, or `hf:owner/name` on the hub.

    `owner/name` alone asks the hub too, where nothing of that name is here; an `AssumptionWarning` says so first, for
    it may be a misspelt path.

    Raises:
        CheckpointError: none of these, or the hub cannot be reached.
    """
    if name.startswith(HUB_PREFIX):
        return _fetch(name.removeprefix(HUB_PREFIX), name)
    if not name or "\0" in name:
        raise CheckpointError(f"{quoted(name)}: is no name of a model")
    path = Path(os.path.expanduser(name))
    try:
        if path.exists():
            return path
        shipped_models = shipped("configs/models")
        if (shipped_models / name / "config.json").is_file():
            return shipped_models / name
        if through := next((parent for parent in path.parents if parent.is_file()), None):
            raise CheckpointError(f"{name}: {through} is a file, no folder; name a model's own file or folder")
    except OSError as error:  # a name longer than names are
        raise CheckpointError(f"{quoted(name)}: {error.strerror}") from None
    if "/" not in name and (shipped_models / f"{name}.json").is_file():
        raise CheckpointError(
            f"{name}: is a configuration without weights, which marlin info and quantize --plan take; name one with weights"
        )
    owner, _, repository = name.partition("/")
    if owner and repository and "/" not in repository and not name.startswith((".", "~")):
        warnings.warn(
            f"{quoted(name)}: nothing of that name here; asking the Hugging Face hub ({HUB_PREFIX}{name} asks it at once)",
            AssumptionWarning,
            stacklevel=2,
        )
        return _fetch(name, name)
    known = sorted(folder.name for folder in shipped_models.iterdir() if (folder / "config.json").is_file())
    hint = did_you_mean(name, known)
    raise CheckpointError(f"{name}: no such file, folder or shipped model{hint}; a model on the hub is {HUB_PREFIX}owner/name")


def _fetch(repository: str, name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    where = "" if name.startswith(HUB_PREFIX) else "no such path here, and "
    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_PATTERNS))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{quoted(name)}: {where}cannot reach the Hugging Face hub, and no copy of it lies here; name a folder that has it"
        ) from None
    # Beside its own errors the library lets those of connections, and of whatever reads an answer, through: any there is.
    except Exception as error:
        raise CheckpointError(f"{quoted(name)}: {where}the Hugging Face hub did not give it: {said_by_hub(error)}") from None


def said_by_hub(error: Exception) -> str:
    """What an error of the library that asks the hub says, in a line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    said = beginning(one_line(error), MOST_SAID)
    if isinstance(error, (HfHubHTTPError, HFValidationError, HTTPError, OSError)):
        return said
    return f"it answered as no hub does ({type(error).__name__}: {said})"
