"""The labels of a classifier in transformers' folders: the names of its rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlin_cli.checkpoints.foreign import Foreign
from marlin_cli.config import describe
from marlin_cli.errors import CheckpointError, ConfigError

CLASSIFIER = "classifier"


def labels_of(document: Mapping[str, Any], foreign: Foreign, where: Path) -> tuple[str, ...]:
    """The labels of the classifier's rows, in their order; transformers leaves LABEL_0 and LABEL_1 out of the file.

    Raises:
        ConfigError: id2label is something else than a table of numbers and names.
        CheckpointError: there are not as many as the classifier has rows.
    """
    table = document.get("id2label")
    if table is None:
        table = {"0": "LABEL_0", "1": "LABEL_1"}
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ConfigError(f"{where}: id2label should be a table of numbers and names, found {describe(table)}")
    rows = foreign.shape(f"{CLASSIFIER}.weight", 2)[0]
    if {str(key) for key in table} != {str(index) for index in range(rows)}:
        raise CheckpointError(
            f"{where}: the classifier has {rows} rows, and id2label names {len(table)}; it must have 0 to {rows - 1}"
        )
    return tuple(table[str(index)] for index in range(rows))
