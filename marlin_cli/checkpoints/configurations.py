"""Networks of which no weights are at hand: of a shipped configuration, or of a config.json that tells their shape."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from marlin_cli.checkpoints import WITH_CONFIG, blt, bygpt5, canine, evabyte, gbst, hugging_face
from marlin_cli.checkpoints.foreign import SUFFIXES, Foreign, read_object
from marlin_cli.checkpoints.native import CONFIG
from marlin_cli.errors import CheckpointError
from marlin_cli.models import ARCHITECTURES, preset, preset_names, settings_for
from marlin_cli.text import with_article

# Layouts whose config.json tells all of the shape -> marlin's fields of it.
CONFIG_FROM: Mapping[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "hugging_face": lambda document, where: hugging_face.config_from(where.parent, document),
    "gbst": gbst.config_from,
    "bygpt5": bygpt5.config_from,
    "canine": lambda document, where: {"model_type": "canine", **canine.shape_of(document, where)},
    "evabyte": evabyte.config_from,
    "blt": lambda document, where: blt.settled(blt.config_from(document, where), Foreign(where, {})),
}

# Keys of marlin's own config.json that say nothing of the shape.
OF_WEIGHTS = ("quantization", "quantization_config", "marlin")


def settings_alone(name: str) -> Any | None:
    """The settings of the network that a name stands for by its configuration alone; None where that is not enough.

    Args:
        name: a shipped configuration such as `evabyte`, a config.json, or a folder with one. What is here under that name
            goes before what is shipped.

    Raises:
        ConfigError: a configuration that cannot be understood.
        CheckpointError: one that does not tell the shape without the weights.
    """
    path = Path(os.path.expanduser(name))
    try:
        if not path.exists():
            return preset(name) if name in preset_names() else None
        file = path / CONFIG if path.is_dir() else path
        return _settings_in(file) if file.suffix == ".json" and file.is_file() else None
    except (OSError, ValueError):  # no name that a file can have
        return None


def holds_weights(name: str) -> bool:
    """Are there weights, or an index of them, where a name stands for a file or folder here?"""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return any(file.suffix in (*SUFFIXES, ".gguf") or file.name.endswith(".index.json") for file in path.iterdir())
    return path.is_file() and path.suffix != ".json"


def _settings_in(file: Path) -> Any | None:
    document = read_object(file)
    if file.name != CONFIG and "model_type" not in document:
        raise CheckpointError(f"{file}: is JSON without a model_type, no configuration of a model")
    own = {key: value for key, value in document.items() if key not in OF_WEIGHTS}
    layout = (
        next((each for each in WITH_CONFIG if WITH_CONFIG[each].recognises(file.parent)), "") if file.name == CONFIG else ""
    )
    if layout in CONFIG_FROM:
        own = CONFIG_FROM[layout](document, file)
    elif layout not in ("", "native") and holds_weights(str(file.parent)):
        return None
    elif layout not in ("", "native"):
        title = ARCHITECTURES[layout].title if layout in ARCHITECTURES else layout
        raise CheckpointError(
            f"{file}: does not tell the whole shape of {with_article(title)}; name the folder with its weights"
        )
    return settings_for(own, str(file))
