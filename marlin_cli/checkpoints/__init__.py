"""Any supported checkpoint as (configuration, weights): one importer a file, tried in the order of IMPORTERS."""

import dataclasses
import hashlib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints import (
    block_recurrent,
    blt,
    bygpt5,
    canine,
    evabyte,
    gbst,
    gguf_t5,
    hugging_face,
    la_canine,
    megabyte_pytorch,
    native,
    paper,
    spacebyte,
)
from marlin_cli.checkpoints.foreign import Checkpoint, Foreign, ImportOptions, names_in, read_foreign, weights_file
from marlin_cli.checkpoints.parts import Wanted, part_of
from marlin_cli.checkpoints.state_dicts import names_of_models
from marlin_cli.documents import read_json
from marlin_cli.errors import AssumptionWarning, CheckpointError, ConfigError
from marlin_cli.files import check_regular, sha256_of_file
from marlin_cli.models import ARCHITECTURES
from marlin_cli.text import quoted

__all__ = [
    "Checkpoint",
    "ImportOptions",
    "architecture_of",
    "check_weight",
    "check_weights",
    "files_of",
    "fingerprint",
    "lasting",
    "possible_heads",
    "read_checkpoint",
    "sketch",
    "tells_all",
]

# Layouts that tell their configuration, in the order in which they are asked; the last takes every other config.json.
WITH_CONFIG = {
    "gguf_t5": gguf_t5,
    "canine": canine,
    "la_canine": la_canine,
    "gbst": gbst,
    "bygpt5": bygpt5,  # before hugging_face, whose T5 some of them say they are
    "blt": blt,
    "evabyte": evabyte,
    "hugging_face": hugging_face,
    "native": native,
}

# Foreign layouts that the names of the tensors tell.
IMPORTERS: dict[str, Any] = {
    "megabyte_pytorch": megabyte_pytorch,
    "paper": paper,
    "spacebyte": spacebyte,
    "block_recurrent": block_recurrent,
}

# The architecture of each layout but marlin's own, which names it.
ARCHITECTURE_OF = {
    "gguf_t5": "byt5",
    "canine": "canine",
    "la_canine": "la_canine",
    "gbst": "gbst",
    "bygpt5": "bygpt5",
    "blt": "blt",
    "evabyte": "evabyte",
    "hugging_face": "byt5",
    "megabyte_pytorch": "megabyte",
    "paper": "megabyte",
    "spacebyte": "spacebyte",
    "block_recurrent": "block_recurrent",
}

# The field of a configuration that each option speaks of, where an importer has no table of its own. The window stands
# apart: an option goes before the file.
FIELD_OF_OPTION = {
    "heads": "global_heads",
    "head_dim": "global_head_dim",
    "max_bytes": "max_bytes",
    "activation": "ffn",
    "norm": "norm",
    "rope": "global_positions",
    "bos_byte": "bos_byte",
    "attention_scale": "attention_scale",
}

# Options that say which tensors of a file to take, or that another was found by trial.
OF_ANY_LAYOUT = ("weights", "heads_by_trial")

# marlin's table of config.json: under which name the assumptions of an import stand there, and what goes with every copy.
ASSUMED = "assumed"
LASTING = (ASSUMED, "rotated_states")

CACHE_BITS = (4, 8, 16)


def read_checkpoint(
    path: Path, options: ImportOptions | None = None, *, check_values: bool = True, wanted: Wanted | None = None
) -> Checkpoint:
    """Read a model folder or file of any supported layout.

    Weights come in the types they are stored in; torch's float64 comes as float32.

    Args:
        options: what a foreign checkpoint does not reveal.
        check_values: look at every weight now, which brings them all into memory; off, the caller calls `check_weight`
            on each as it takes it, or `check_weights`.
        wanted: what of the arrays a rank holds, see `parts`; all of them if None.

    Raises:
        CheckpointError: no supported layout, a damaged or unsafe file, weights that are not finite numbers, or an
            option that contradicts the checkpoint.
        ConfigError: a configuration that cannot be understood.
    """
    options = options or ImportOptions()
    layout = _layout_with_config(path)
    if layout is not None:
        checkpoint = _read_with_config(path, layout, options)
    else:
        foreign, importer = _read_foreign(path, options)
        if options.heads == "auto":
            raise CheckpointError(f"{path}: the import option heads is auto; choose a number first, see `engine.heads`")
        checkpoint = importer.read(foreign, options)
        _check_options(checkpoint, options)
    _check_marlin(checkpoint)
    checkpoint = _with_assumptions(checkpoint, options)
    if wanted is not None:
        checkpoint = part_of(checkpoint, wanted)
    for name, array in checkpoint.weights.items():
        _check_kind(checkpoint, name, array)
    if check_values:
        check_weights(checkpoint)
    return checkpoint


def check_weights(checkpoint: Checkpoint, but: Collection[str] = ()) -> None:
    """See that the weights of a checkpoint are finite numbers, which brings them into memory.

    Args:
        but: paths of modules whose arrays are not looked at.

    Raises:
        CheckpointError: one is not.
    """
    for name, array in checkpoint.weights.items():
        if name.rpartition(".")[0] not in but:
            check_weight(checkpoint.path, name, array)
            _check_codes(checkpoint, name, array)


def _layout_with_config(path: Path) -> str | None:
    """The name of the layout with a configuration that a model has, None where the names of tensors must tell."""
    return next((name for name, each in WITH_CONFIG.items() if each.recognises(path)), None)


def tells_all(path: Path, options: ImportOptions) -> bool:
    """Does a model say everything that these options could? An LA-CANINE does not say whose adapters are wanted.

    Raises:
        CheckpointError: there is no model.
    """
    if _layout_with_config(path) is None:
        return False
    return options.language is None or architecture_of(path) != "la_canine"


def _read_with_config(path: Path, layout: str, options: ImportOptions) -> Checkpoint:
    """A model whose configuration tells all but the language."""
    languages = layout == "la_canine"
    checkpoint: Checkpoint = la_canine.read(path, options.language) if languages else WITH_CONFIG[layout].read(path)
    given = [field.name for field in dataclasses.fields(options) if getattr(options, field.name) is not None]
    if checkpoint.config.get("model_type") == "la_canine" and "language" in given:
        given.remove("language")
        la_canine.check_language(checkpoint.config, options.language, str(path))
    if given:
        raise CheckpointError(f"{path}: the import option {given[0]} has no meaning here, the model says all; leave it out")
    return checkpoint


def possible_heads(path: Path, options: ImportOptions) -> Iterator[tuple[int, Checkpoint]]:
    """Each number of heads that the shapes of a foreign checkpoint allow, and the checkpoint with it; nothing of others.

    Where the file tells the number it is the only one. The weights are the same arrays in all, and are not looked at.

    Raises:
        CheckpointError, ConfigError: as `read_checkpoint`.
    """
    if _layout_with_config(path) is not None:
        return
    foreign, importer = _read_foreign(path, options)
    for heads in importer.possible_heads(foreign):
        yield heads, importer.read(foreign, dataclasses.replace(options, heads=heads))


def _read_foreign(path: Path, options: ImportOptions) -> tuple[Foreign, Any]:
    """The tensors of a foreign file, and who makes a checkpoint of them."""
    foreign = read_foreign(path, [each.MARKER for each in IMPORTERS.values()], options.weights)
    importer = next((each for each in IMPORTERS.values() if each.recognises(foreign.tensors)), None)
    if importer is None:
        raise _of_no_layout(foreign.path, foreign.tensors)
    return foreign, importer


def _layout_by_names(path: Path) -> str:
    """The layout of a file without a configuration, by the names of its tensors.

    Raises:
        CheckpointError: it is not, or there is no such file, or several.
    """
    models = names_of_models(names_in(path), [each.MARKER for each in IMPORTERS.values()], path)
    for own in models:
        for name, each in IMPORTERS.items():
            if each.recognises(dict.fromkeys(own)):
                return name
    raise _of_no_layout(weights_file(path), models[0])


def _of_no_layout(path: Path, names: Iterable[str]) -> CheckpointError:
    names = set(names)
    some = ", ".join(quoted(name) for name in sorted(names)[:3]) or "no tensors"
    return CheckpointError(
        f"{path}: of no known layout (found {some}); known: folders with the config.json of a"
        f" {', '.join(each.title for each in ARCHITECTURES.values())}; ByT5's GGUF; {', '.join(IMPORTERS)}"
    )


def _with_assumptions(checkpoint: Checkpoint, options: ImportOptions) -> Checkpoint:
    """Say what was assumed, and keep it in marlin's table, which goes with every copy of the model."""
    assumed = dict(checkpoint.assumed)
    if assumed:
        hint = "; if that is wrong, say it with --import NAME=VALUE" if checkpoint.layout in IMPORTERS else ""
        values = ", ".join(f"{name}={_shown(value)}" for name, value in sorted(assumed.items()))
        warnings.warn(
            f"{checkpoint.path}: nothing in it tells {', '.join(sorted(assumed))}; assumed {values}{hint}",
            AssumptionWarning,
            stacklevel=3,
        )
    if options.heads_by_trial and options.heads is not None:
        assumed["heads"] = options.heads
    if not assumed:
        return checkpoint
    return dataclasses.replace(checkpoint, marlin={**(checkpoint.marlin or {}), ASSUMED: assumed}, assumed=assumed)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def lasting(marlin: Mapping[str, Any] | None) -> dict[str, Any]:
    """What of marlin's table is true of every model made of this one, however its weights are packed."""
    return {name: value for name, value in (marlin or {}).items() if name in LASTING}


def _check_marlin(checkpoint: Checkpoint) -> None:
    """See that marlin's table holds what is read from it."""
    bits = (checkpoint.marlin or {}).get("kv_bits", 16)
    if type(bits) is not int or bits not in CACHE_BITS:
        raise ConfigError(f"{checkpoint.path}: marlin's kv_bits in config.json is {quoted(bits)}, expected 4, 8 or 16")


# The byte that means NaN in an array of a packed format, and the bits of it that count: E4M3 has one of each sign.
NOT_A_NUMBER = {
    ("nvfp4", "scales"): (0x7F, 0x7F),
    ("mxfp4", "scales"): (0xFF, 0xFF),
    ("mxfp8", "scales"): (0xFF, 0xFF),
    ("mxfp8", "weight"): (0x7F, 0x7F),
}


def architecture_of(path: Path) -> str:
    """The `model_type` of a model, of which no weight is read; megabyte where config.json does not say.

    Raises:
        CheckpointError: there is no model, or one of no known layout.
        ConfigError: config.json is damaged.
    """
    layout = _layout_with_config(path) or _layout_by_names(path)
    if layout != "native":
        return ARCHITECTURE_OF[layout]
    document = read_json((path if path.is_dir() else path.parent) / native.CONFIG)
    return str(document.get("model_type", "megabyte")) if isinstance(document, dict) else "megabyte"


def files_of(path: Path) -> list[Path]:
    """The files that a model consists of.

    Raises:
        CheckpointError: there is no model.
    """
    layout = _layout_with_config(path)
    return [weights_file(path)] if layout is None else WITH_CONFIG[layout].files(path)


# Options of an import that change no number that is computed.
LENGTHS_AND_TRIALS = ("max_bytes", "heads_by_trial")


def fingerprint(path: Path, options: ImportOptions | None = None) -> str:
    """SHA-256 over the names and bytes of a model's files: equal for equal models, wherever they lie.

    Args:
        options: those that make another network out of the same files count, such as heads or a language.

    Raises:
        CheckpointError: there is no model, or it cannot be read.
    """
    digest = hashlib.sha256()
    for name, value in () if options is None else vars(options).items():
        if value is not None and name not in LENGTHS_AND_TRIALS:
            digest.update(f"{name}:{value}\n".encode())
    try:
        for file in files_of(path):
            check_regular(file, CheckpointError)
            digest.update(f"{file.name}:{sha256_of_file(file)}\n".encode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
    return digest.hexdigest()


# Of each end of a file that `sketch` looks at.
SKETCHED_BYTES = 1 << 20


def sketch(path: Path) -> str:
    """SHA-256 over the names, sizes and ends of a model's files: tells models apart at once, not a damage in between.

    Raises:
        CheckpointError: there is no model, or it cannot be read.
    """
    layout = _layout_with_config(path)
    digest = hashlib.sha256()
    try:
        for file in [weights_file(path)] if layout is None else WITH_CONFIG[layout].files(path):
            check_regular(file, CheckpointError)
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}\n".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(SKETCHED_BYTES))
                opened.seek(max(0, size - SKETCHED_BYTES))
                digest.update(opened.read(SKETCHED_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
    return digest.hexdigest()


def _check_options(checkpoint: Checkpoint, options: ImportOptions) -> None:
    config = checkpoint.config
    own = getattr(IMPORTERS[checkpoint.layout], "FIELD_OF_OPTION", None)
    fields = FIELD_OF_OPTION if own is None else own
    before = getattr(IMPORTERS[checkpoint.layout], "BEFORE_THE_FILE", ("attention_window",) if own is None else ())
    elsewhere = (*OF_ANY_LAYOUT, *before)
    for name in (field.name for field in dataclasses.fields(options)):
        if getattr(options, name) is not None and name not in fields and name not in elsewhere:
            raise CheckpointError(f"{checkpoint.path}: the import option {name} has no meaning here; leave it out")
    for option, field in fields.items():
        wanted, found = getattr(options, option), config.get(field)
        if option == "rope":
            found = str(found).endswith("rope")
        if option == "attention_scale" and found is None:
            found = config["global_head_dim"] ** -0.5
        if wanted is not None and wanted != found:
            raise CheckpointError(f"{checkpoint.path}: {option} is {found} by the checkpoint, but {quoted(wanted)} was given")


def check_weight(path: Path, name: str, array: mx.array) -> None:
    """Raise `CheckpointError` if a weight of the checkpoint at `path` holds NaN or infinity."""
    if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
        raise CheckpointError(f"{path}: the weight {quoted(name)} holds NaN or infinity; take a file from before that")


def _check_codes(checkpoint: Checkpoint, name: str, array: mx.array) -> None:
    """Raise `CheckpointError` if a packed layer holds a code that means NaN."""
    path, _, last = name.rpartition(".")
    table = checkpoint.quantization or {}
    own = table.get(path, True)  # mlx-lm writes true for the settings of all
    settings = table if own is True else own
    mode = settings.get("mode") if isinstance(settings, dict) else None
    code, mask = NOT_A_NUMBER.get((mode, last), (0, 0)) if isinstance(mode, str) else (0, 0)
    if mask and array.dtype in (mx.uint8, mx.uint32) and ((array.view(mx.uint8) & mask) == code).any().item():
        raise CheckpointError(f"{checkpoint.path}: {quoted(name)} holds NaN; take a file from before that")


def _check_kind(checkpoint: Checkpoint, name: str, array: mx.array) -> None:
    """Floating-point numbers, but for the integers of packed layers."""
    packed = f"{name.rpartition('.')[0]}.scales" in checkpoint.weights
    if not packed and not mx.issubdtype(array.dtype, mx.floating):
        kind = str(array.dtype).removeprefix("mlx.core.")
        if array.dtype == mx.uint8:
            kind += " (as MLX reads float8 too)"
        raise CheckpointError(f"{checkpoint.path}: the weight {quoted(name)} is {kind}, expected floating point")
