"""Any supported checkpoint as (configuration, weights): one importer a file, tried in the order of IMPORTERS."""

import hashlib
from pathlib import Path

import mlx.core as mx

from marlin_cli.checkpoints import megabyte_pytorch, native, paper
from marlin_cli.checkpoints.foreign import Checkpoint, ImportOptions, read_foreign
from marlin_cli.errors import CheckpointError
from marlin_cli.files import sha256_of_file

__all__ = ["Checkpoint", "ImportOptions", "fingerprint", "read_checkpoint"]

# What tells one foreign layout from another, by its tensors' names; `native` is told by its config.json.
IMPORTERS = {"megabyte_pytorch": megabyte_pytorch, "paper": paper}


def read_checkpoint(path: Path, options: ImportOptions | None = None) -> Checkpoint:
    """Read a model folder or file of any supported layout.

    Args:
        options: what a foreign checkpoint does not reveal.

    Raises:
        CheckpointError: no supported layout, a damaged or unsafe file, or weights that are not finite.
        ConfigError: a config.json that cannot be understood.
    """
    options = options or ImportOptions()
    if native.recognises(path):
        checkpoint = native.read(path)
    else:
        foreign = read_foreign(path)
        importer = next((each for each in IMPORTERS.values() if each.recognises(foreign.tensors)), None)
        if importer is None:
            some = ", ".join(sorted(foreign.tensors)[:3]) or "no tensors"
            raise CheckpointError(
                f"{path}: of no known layout (found {some}); known: marlin's own folder with config.json,"
                f" {', '.join(IMPORTERS)}"
            )
        checkpoint = importer.read(foreign, options)
    _check_finite(checkpoint)
    return checkpoint


def fingerprint(path: Path) -> str:
    """SHA-256 over the names and bytes of a model's files: equal for equal models, wherever they lie."""
    files = [path] if path.is_file() else sorted(native.weight_files(path)) + sorted(path.glob("config.json"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{sha256_of_file(file)}\n".encode())
    return digest.hexdigest()


def _check_finite(checkpoint: Checkpoint) -> None:
    for name, array in checkpoint.weights.items():
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            raise CheckpointError(f"{checkpoint.path}: the weight {name!r} holds NaN or infinity; the file is damaged")
