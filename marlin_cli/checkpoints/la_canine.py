"""Folders of LA-CANINE (wtpsplit's wtp-canine-*): CANINE's names, and tables with a row of each adapter for every language."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints import canine, hugging_face
from marlin_cli.checkpoints.foreign import Checkpoint, Foreign, Taken, read_object
from marlin_cli.checkpoints.t5_ends import CONFIG
from marlin_cli.checkpoints.transformers_folder import check_layers, has_model_type, number, tensors_of
from marlin_cli.errors import CheckpointError, ConfigError
from marlin_cli.text import quoted

MODEL_TYPES = ("la-canine",)

# The languages of the released checkpoints, in the order of their adapters.
LANGUAGES = (
    "af", "am", "ar", "az", "be", "bg", "bn", "ca", "ceb", "cs", "cy", "da", "de", "el", "en", "eo", "es", "et",
    "eu", "fa", "fi", "fr", "fy", "ga", "gd", "gl", "gu", "ha", "he", "hi", "hu", "hy", "id", "ig", "is", "it",
    "ja", "jv", "ka", "kk", "km", "kn", "ko", "ku", "ky", "la", "lt", "lv", "mg", "mk", "ml", "mn", "mr", "ms",
    "mt", "my", "ne", "nl", "no", "pa", "pl", "ps", "pt", "ro", "ru", "si", "sk", "sl", "sq", "sr", "sv", "ta",
    "te", "tg", "th", "tr", "uk", "ur", "uz", "vi", "xh", "yi", "yo", "zh", "zu",
)  # fmt: skip

# What the first layer sees of the characters after each, where that has a bound: [1, 1, positions, positions].
FIRST_MASK = "initial_char_encoder.layer.0.attention.self.bias"

# Stored and never read: the way up is the way down's table with its sides exchanged. The pooler is not read either.
UNREAD = re.compile(r"lang_ff_up_weights\.weight$|^(canine\.)?pooler\.")


def recognises(path: Path) -> bool:
    """Is this a folder of LA-CANINE, or a weights file in one?"""
    return has_model_type(path, MODEL_TYPES)


def read(path: Path, language: str | None = None) -> Checkpoint:
    """Canonical configuration and weights, with the adapters of one language alone.

    Args:
        language: its code (cs, de, ..) or the number of its row. Without one, only a model without adapters is read.

    Raises:
        CheckpointError: weights that are missing, left over or do not fit together; no language, or one that is not there.
        ConfigError: a configuration that is not of LA-CANINE.
    """
    folder = path if path.is_dir() else path.parent
    document, where = read_object(folder / CONFIG), folder / CONFIG
    config: dict[str, Any] = {"model_type": "la_canine", **canine.shape_of(document, where)}
    for name, plain in (("ngram_order", 1), ("position_embedding_type", "absolute")):
        if document.get(name, plain) != plain:
            raise ConfigError(f"{where}: {name} is {quoted(document[name])}; marlin runs {plain}")
    kind = document.get("language_adapter", "on")
    if not isinstance(kind, str) or kind not in ("on", "off", "shared"):
        raise ConfigError(f"{where}: language_adapter {quoted(kind)} is none of on, off, shared")
    foreign = canine.without_prefix(tensors_of(path, _is_unread))
    check_layers(path, foreign, config["layers"])
    config["rows"] = foreign.shape("classifier.weight", 2)[0]
    config["lookahead"] = _lookahead(document, foreign, config["downsample_factor"], where)
    first = "initial_char_encoder.layer.0.output.lang_ff_down_biases.weight"
    languages, width = (0, 0) if kind == "off" else foreign.shape(first, 2)
    config["adapter_dim"] = width
    chosen = _chosen(path, kind, language, languages)
    config["language"] = "" if chosen is None else language
    taken = Taken(foreign)
    del foreign  # a table of all languages is gone as soon as its row is copied
    weights = canine.take_body(path, taken, config)
    canine.take_pair(weights, taken, "output", "classifier")
    if kind != "off":
        for target, source in canine.blocks_of(config).items():
            _take_adapter(weights, taken, target, source, chosen, (config["d_model"], width), languages)
    taken.finish()
    return Checkpoint(path, "la_canine", config, weights)


def files(path: Path) -> list[Path]:
    """All files that a model consists of, those of its configuration first."""
    return hugging_face.files(path)


def check_language(config: Mapping[str, Any], language: str | None, where: str) -> None:
    """Refuse a language for a model that holds the adapters of another, or none.

    Raises:
        CheckpointError: `where` begins the line.
    """
    if language is None or language == config.get("language"):
        return
    held = config.get("language")
    if held:
        raise CheckpointError(
            f"{where}: holds the adapters of {quoted(held)}, {quoted(language)} was asked for; take the original"
        )
    raise CheckpointError(f"{where}: holds no adapters of a language, {quoted(language)} was asked for; leave it out")


def _is_unread(name: str) -> bool:
    return not name.endswith(FIRST_MASK) and (canine.BUFFER.search(name) or UNREAD.search(name)) is not None


def _lookahead(document: Mapping[str, Any], foreign: Foreign, factor: int, where: Path) -> int | None:
    """Molecules that the first layer sees ahead: by its mask in the file, else by config.json.

    wtpsplit sets the configuration's number to 0 as it makes a network, so what it saves says 0; the mask is right.
    """
    mask = foreign.tensors.pop(FIRST_MASK, None)
    if document.get("lookahead") is None:
        return None
    said: int = number(document, "lookahead", 0, where)
    if mask is None:
        return said
    first = mask.reshape(-1)[: mask.shape[-1]] if mask.size else mask.reshape(-1)
    seen = int((first != 0).sum().item())  # type: ignore[arg-type]
    if mask.ndim != 4 or seen < factor or seen % factor:
        raise CheckpointError(f"{foreign.path}: {FIRST_MASK!r} of shape {list(mask.shape)} is no mask of whole molecules")
    return seen // factor - 1


def _chosen(path: Path, kind: str, language: str | None, languages: int) -> int | None:
    """The row of the tables; None for the mean of all or for no tables."""
    if kind != "on":
        check_language({}, language, str(path))
        return None
    codes = LANGUAGES if languages == len(LANGUAGES) else ()
    known = ", ".join(codes) if codes else f"the rows 0 to {languages - 1}"
    if language is None:
        raise CheckpointError(
            f"{path}: holds adapters of {languages} languages; name one (--language or --import language=..): {known}"
        )
    if language in codes:
        return codes.index(language)
    if language.isascii() and language.isdecimal() and len(language) < 6 and int(language) < languages:
        return int(language)
    raise CheckpointError(f"{path}: has no adapters of {quoted(language)}; known: {known}")


def _take_adapter(
    weights: dict[str, mx.array],
    taken: Taken,
    target: str,
    source: str,
    chosen: int | None,
    shape: tuple[int, int],
    languages: int,
) -> None:
    """One row of each of a layer's tables, or the mean of all rows."""
    d_model, width = shape

    def row(name: str, columns: int) -> mx.array:
        table = taken.take(f"{source}.output.lang_ff_{name}.weight", (languages, columns))
        # A gather, not a slice: that would keep the whole table in memory.
        picked = table.mean(axis=0) if chosen is None else mx.take(table, mx.array([chosen]), axis=0)[0]
        mx.eval(picked)
        return picked

    both = row("down_weights", d_model * width)
    weights[f"{target}.adapter.down_proj.weight"] = both.reshape(d_model, width).T
    weights[f"{target}.adapter.up_proj.weight"] = both.reshape(width, d_model).T
    weights[f"{target}.adapter.down_proj.bias"] = row("down_biases", width)
    weights[f"{target}.adapter.up_proj.bias"] = row("up_biases", d_model)
