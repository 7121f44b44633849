"""Why a checkpoint is refused, for the tests of what is."""

from pathlib import Path

import pytest

from marlin_cli.checkpoints import read_checkpoint
from marlin_cli.errors import CheckpointError, ConfigError
from marlin_cli.models import build


def refused(path: Path) -> str:
    """Why `path` is refused, by the reader or by the network: one line that begins with the path."""
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        checkpoint = read_checkpoint(path)
        build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where=str(path))
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path))
    assert message.isprintable()
    return message
