"""Any supported checkpoint as (configuration, weights): one importer a file, tried in the order of IMPORTERS."""

import dataclasses
import hashlib
from pathlib import Path

import mlx.core as mx

from marlin_cli.checkpoints import bygpt5, canine, gbst, gguf_t5, hugging_face, la_canine, megabyte_pytorch, native, paper
from marlin_cli.checkpoints.foreign import Checkpoint, ImportOptions, read_foreign, weights_file
from marlin_cli.documents import read_json
from marlin_cli.errors import CheckpointError
from marlin_cli.files import sha256_of_file

__all__ = ["Checkpoint", "ImportOptions", "architecture_of", "check_weight", "fingerprint", "read_checkpoint"]

# Layouts that tell their configuration, in the order in which they are asked; the last takes every other config.json.
WITH_CONFIG = {
    "gguf_t5": gguf_t5,
    "canine": canine,
    "la_canine": la_canine,
    "gbst": gbst,
    "bygpt5": bygpt5,  # before hugging_face, whose T5 some of them say they are
    "hugging_face": hugging_face,
    "native": native,
}

# Foreign layouts that the names of the tensors tell.
IMPORTERS = {"megabyte_pytorch": megabyte_pytorch, "paper": paper}

# The field of a configuration that each option speaks of. The window stands apart: an option goes before the file.
FIELD_OF_OPTION = {
    "heads": "global_heads",
    "head_dim": "global_head_dim",
    "max_bytes": "max_bytes",
    "activation": "ffn",
    "norm": "norm",
    "rope": "global_positions",
}


def read_checkpoint(path: Path, options: ImportOptions | None = None, *, check_values: bool = True) -> Checkpoint:
    """Read a model folder or file of any supported layout.

    Weights come in the types they are stored in; torch's float64 comes as float32.

    Args:
        options: what a foreign checkpoint does not reveal.
        check_values: look at every weight now, which brings them all into memory; off, the caller calls `check_weight`
            on each as it takes it.

    Raises:
        CheckpointError: no supported layout, a damaged or unsafe file, weights that are not finite numbers, or an
            option that contradicts the checkpoint.
        ConfigError: a configuration that cannot be understood.
    """
    options = options or ImportOptions()
    with_config = next((each for each in WITH_CONFIG.values() if each.recognises(path)), None)
    if with_config is not None:
        checkpoint = with_config.read(path)
        given = [field.name for field in dataclasses.fields(options) if getattr(options, field.name) is not None]
        if given:
            raise CheckpointError(f"{path}: the import option {given[0]} has no meaning here, the model says all")
    else:
        foreign = read_foreign(path)
        importer = next((each for each in IMPORTERS.values() if each.recognises(foreign.tensors)), None)
        if importer is None:
            some = ", ".join(repr(name[:60]) for name in sorted(foreign.tensors)[:3]) or "no tensors"
            raise CheckpointError(
                f"{foreign.path}: of no known layout (found {some}); known: marlin's own folder and ByT5's, with"
                f" config.json; ByT5's GGUF; {', '.join(IMPORTERS)}"
            )
        checkpoint = importer.read(foreign, options)
        _check_options(checkpoint, options)
    for name, array in checkpoint.weights.items():
        _check_kind(checkpoint, name, array)
        if check_values:
            check_weight(checkpoint.path, name, array)
            _check_codes(checkpoint, name, array)
    return checkpoint


# The byte that means NaN in an array of a packed format, and the bits of it that count: E4M3 has one of each sign.
NOT_A_NUMBER = {
    ("nvfp4", "scales"): (0x7F, 0x7F),
    ("mxfp4", "scales"): (0xFF, 0xFF),
    ("mxfp8", "scales"): (0xFF, 0xFF),
    ("mxfp8", "weight"): (0x7F, 0x7F),
}


def architecture_of(path: Path) -> str:
    """The `model_type` of a model, of which no weight is read; megabyte where nothing says otherwise.

    Raises:
        ConfigError: config.json is damaged.
    """
    if gguf_t5.recognises(path) or hugging_face.recognises(path):
        return "byt5"
    folder = path if path.is_dir() else path.parent
    document = read_json(folder / native.CONFIG) if native.recognises(path) else {}
    return str(document.get("model_type", "megabyte")) if isinstance(document, dict) else "megabyte"


def fingerprint(path: Path) -> str:
    """SHA-256 over the names and bytes of a model's files: equal for equal models, wherever they lie.

    Raises:
        CheckpointError: there is no model, or it cannot be read.
    """
    with_config = next((each for each in WITH_CONFIG.values() if each.recognises(path)), None)
    files = [weights_file(path)] if with_config is None else with_config.files(path)
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(f"{file.name}:{sha256_of_file(file)}\n".encode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
    return digest.hexdigest()


def _check_options(checkpoint: Checkpoint, options: ImportOptions) -> None:
    for option, field in FIELD_OF_OPTION.items():
        wanted, found = getattr(options, option), checkpoint.config[field]
        if option == "rope":
            found = found.endswith("rope")
        if wanted is not None and wanted != found:
            raise CheckpointError(f"{checkpoint.path}: {option} is {found} by the checkpoint, but {wanted} was given")


def check_weight(path: Path, name: str, array: mx.array) -> None:
    """Raise `CheckpointError` if a weight of the checkpoint at `path` holds NaN or infinity."""
    if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
        raise CheckpointError(f"{path}: the weight {name!r} holds NaN or infinity; the file is damaged")


def _check_codes(checkpoint: Checkpoint, name: str, array: mx.array) -> None:
    """Raise `CheckpointError` if a packed layer holds a code that means NaN."""
    path, _, last = name.rpartition(".")
    table = checkpoint.quantization or {}
    settings = table.get(path, table)
    mode = settings.get("mode") if isinstance(settings, dict) else None
    code, mask = NOT_A_NUMBER.get((str(mode), last), (0, 0))
    if mask and array.dtype in (mx.uint8, mx.uint32) and ((array.view(mx.uint8) & mask) == code).any().item():
        raise CheckpointError(f"{checkpoint.path}: {name!r} holds NaN; the file is damaged")


def _check_kind(checkpoint: Checkpoint, name: str, array: mx.array) -> None:
    """Floating-point numbers, but for the integers of packed layers."""
    packed = f"{name.rpartition('.')[0]}.scales" in checkpoint.weights
    if not packed and not mx.issubdtype(array.dtype, mx.floating):
        kind = str(array.dtype).removeprefix("mlx.core.")
        raise CheckpointError(f"{checkpoint.path}: the weight {name!r} is {kind}, expected floating point")
