"""The options of `marlin quantize` as settings, checked against each other."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from marlin_cli.checkpoints import ImportOptions, read_checkpoint
from marlin_cli.checkpoints.export import EXPORTS
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.errors import ConfigError, StatisticsError, UsageError
from marlin_cli.models import architecture_named, settings_for
from marlin_cli.quantization.formats import FORMATS
from marlin_cli.quantization.plan import (
    KEEP,
    LEAST_HASH_BITS,
    PROTECTED,
    WHY_HASH_BITS,
    LayerPlan,
    QuantizationSettings,
    format_from_bits,
    load_recipe,
)
from marlin_cli.text import quoted


def settings_of(
    recipe: str | None,
    bits: int | None,
    bits_by_part: Mapping[str, int | None],
    format_by_part: Mapping[str, str | None],
    kv_bits: int | None,
    group_size: int | None,
    overrides: Sequence[str],
) -> QuantizationSettings:
    """The recipe's settings (or the defaults), changed by the options that were given.

    Args:
        bits: of every part for which nothing else is given; `wo`, the patcher and hash tables have their own.
        bits_by_part, format_by_part: None where nothing is given.

    Raises:
        UsageError: bits and a format that contradict each other, or an override without a format.
        ConfigError: an unknown recipe or format, or impossible bits.
    """
    base = load_recipe(recipe) if recipe is not None else QuantizationSettings()
    changes: dict[str, Any] = {"kv_bits": kv_bits, "group_size": group_size}
    for part, own in bits_by_part.items():
        named = _format(part, own, format_by_part.get(part))
        for_all = None if bits is None or part in ("wo", "patcher", "hash") else _format_of("--bits", bits)
        if part == "hash" and own is not None:
            named = _hash_format(own)
        changes[f"{part}_format"] = for_all if named is None else named
    changes = {name: value for name, value in changes.items() if value is not None}
    if overrides:
        changes["overrides"] = {**base.overrides, **_overrides(overrides)}
    return dataclasses.replace(base, **changes)


def domain_weights_of(texts: Sequence[str]) -> dict[str, float] | None:
    """`DOMAIN=SHARE` options as a mapping; None if there are none.

    Raises:
        UsageError: something else, or a share that is not a number of zero or more.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, separator, share = text.rpartition("=")
        if name in weights:
            raise UsageError(f"--domain-weight {quoted(text)}: {quoted(name)} has two shares; give one")
        try:
            weights[name] = float(share)
        except ValueError:
            separator = ""
        if not separator or not name or not 0 <= weights[name] < float("inf"):
            raise UsageError(f"--domain-weight {quoted(text)} is not DOMAIN=SHARE, for example binary=0.2")
    return weights or None


@contextlib.contextmanager
def naming(statistics_file: str | None) -> Iterator[None]:
    """Errors of statistics inside the block begin with their file, which those who use them do not know."""
    try:
        yield
    except StatisticsError as error:
        if statistics_file is None or str(error).startswith(statistics_file):
            raise
        raise StatisticsError(f"{statistics_file}: {error}") from None


def check_export(name: str | None) -> None:
    """Raise `UsageError` unless `name` is None or a form that other tools read."""
    if name is not None and name not in EXPORTS:
        raise UsageError(f"--export {quoted(name)} is not known; known: {', '.join(EXPORTS)}")


def check_exportable(plans: Sequence[LayerPlan]) -> None:
    """Raise `UsageError` unless every layer stays as it is or becomes what the export can hold."""
    other = [plan for plan in plans if plan.format is not None and plan.format.name != "nvfp4"]
    if other:
        format_name = other[0].format.name if other[0].format else ""
        part = other[0].part
        protected = part in ("encoder", "decoder") and other[0].path.endswith(PROTECTED)
        remedy = "--wo-bits 4" if protected else f"4 or 16 bits for the {part} part"
        remedy = "--hash-bits 16" if part == "hash" else remedy
        raise UsageError(
            f"--export: compressed-tensors is written with nvfp4 alone, and {other[0].path!r} would be {format_name}"
            f" ({len(other)} layers in all); choose {remedy}"
        )


def check_keeps_keys(model: str, options: ImportOptions, kv_bits: int | None) -> None:
    """Raise `UsageError` for bits of keys and values where a model keeps none that grow; `options` are of its import."""
    if kv_bits in (None, 16):
        return
    checkpoint = read_checkpoint(locate_model(model), options, check_values=False)
    architecture = architecture_named(checkpoint.config, model)
    if not architecture.packed_keys(settings_for(checkpoint.config, model)).paths:
        raise UsageError(f"--kv-bits {kv_bits}: this {architecture.title} keeps no keys and values that grow; leave it out")


def _format(part: str, bits: int | None, name: str | None) -> str | None:
    if bits is None:
        return name
    if name is None:
        return _format_of(f"--{part}-bits", bits)
    if name in FORMATS and FORMATS[name].bits != bits:
        raise UsageError(f"--{part}-bits {bits} and --{part}-format {name} contradict each other; give one")
    return name


def _format_of(option: str, bits: int) -> str:
    try:
        return format_from_bits(bits)
    except ConfigError as error:
        raise UsageError(f"{option}: {error}") from None


def _hash_format(bits: int) -> str:
    if bits not in (LEAST_HASH_BITS, 16):
        raise UsageError(f"--hash-bits must be {LEAST_HASH_BITS} or 16, found {bits}: {WHY_HASH_BITS}")
    return KEEP if bits == 16 else QuantizationSettings.hash_format


def _overrides(texts: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        pattern, separator, name = text.rpartition("=")
        if not separator or not pattern:
            raise UsageError(f"--override {quoted(text)} is not REGEX=FORMAT, for example 'global.*down_proj=mxfp8'")
        if pattern in found:
            raise UsageError(f"--override {quoted(text)}: {quoted(pattern)} has two formats; give one")
        found[pattern] = name
    return found
