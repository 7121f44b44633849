"""Where a model lies: a path, the name of a shipped demo, or a repository on the Hugging Face hub."""

from pathlib import Path

from marlin_cli.config import did_you_mean
from marlin_cli.errors import CheckpointError
from marlin_cli.files import shipped
from marlin_cli.text import one_line

# What a model repository may hold that is worth fetching.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.pt", "*.bin"]


def locate_model(name: str) -> Path:
    """The file or folder that `name` stands for: a path that exists, a shipped model, else `owner/name` on the hub.

    Raises:
        CheckpointError: none of these, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    shipped_models = shipped("configs/models")
    if (shipped_models / name / "config.json").is_file():
        return shipped_models / name
    owner, _, repository = name.partition("/")
    if owner and repository and "/" not in repository and not name.startswith((".", "~")):
        return _fetch(name)
    known = sorted(folder.name for folder in shipped_models.iterdir() if (folder / "config.json").is_file())
    raise CheckpointError(f"{name}: no such file, folder or shipped model{did_you_mean(name, known)}")


def _fetch(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{repository}: no such path here, and the Hugging Face hub did not give it: {one_line(error)[:200]}"
        ) from None
