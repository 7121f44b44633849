"""Which layer gets which format: settings and layer shapes in, one decision a layer out. Packs nothing."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marlin_cli.config import did_you_mean, from_mapping
from marlin_cli.documents import read_yaml
from marlin_cli.errors import ConfigError, QuantizationError
from marlin_cli.files import shipped
from marlin_cli.models import part_of
from marlin_cli.quantization.formats import FORMATS, Format, default_format

# How paths of what runs over the bytes of patches begin.
BESIDE_PATCHES = ("byte_encoder.", "byte_decoder.")

KEEP = "16bit"  # the name of "leave it as it is" wherever a format is named


# Ends of paths: what makes a few rows of a patch, and the queries and keys of attention between patches and bytes, whose
# softmax over two rows, or a patch's bytes, is sharp. They stay as they are unless an override says otherwise.
KEPT = (".patch_proj", ".reader.q_proj", ".reader.k_proj")
_KEPT_READERS = re.compile(r"\.readers\.\d+\.[qk]_proj$")

# Ends of paths: the last layer of T5's feed-forwards, whose inputs are large, and the front end before an encoder, where
# small differences of scores decide.
PROTECTED = (".ffn.down_proj", "front.proj")


# Bits of hash tables, at least.
LEAST_HASH_BITS = 8
WHY_HASH_BITS = "rows are added up for every byte, and what fewer bits cost was never measured"


@dataclass(frozen=True)
class QuantizationSettings:
    """What to pack, and how. Byte embeddings, norms and the output head are never packed.

    Raises:
        ConfigError: an unknown format, impossible bits, or an override that is not a regular expression.
    """

    global_format: str = "nvfp4"  # the global transformer, the patch projection and what leads to the next stage
    local_format: str = "mxfp8"  # the local transformer, stages between global and local, what writes recurrent states
    encoder_format: str | None = None  # nvfp4; of what runs over the bytes of patches mxfp8
    decoder_format: str | None = None  # the same
    patcher_format: str = "mxfp8"  # what tells where patches end: another end changes all that follows
    cross_format: str = "nvfp4"  # the decoder's attention to the encoder
    wo_format: str = "mxfp8"  # at least so many bits for the layers of `PROTECTED` in encoders and decoders
    kv_bits: int = 16  # bits of the global cache's keys and values when the model runs
    balance_keys: bool = False  # scale q_proj and k_proj so that packed keys lose less; needs statistics
    group_size: int | None = None  # of int4 and int8; the others have one size
    overrides: dict[str, str] = field(default_factory=dict)  # regular expression of layer paths -> format; last wins
    hash_format: str = "int8"  # hash tables, of which rows are looked up: at least 8 bits

    def __post_init__(self) -> None:
        named = (self.global_format, self.local_format, self.encoder_format, self.decoder_format, self.cross_format)
        for name in (*named, self.patcher_format, self.hash_format, self.wo_format, *self.overrides.values()):
            if name is not None:
                check_format(name)
        if _bits(self.hash_format) < LEAST_HASH_BITS:
            raise ConfigError(f"hash_format must keep {LEAST_HASH_BITS} bits, found {self.hash_format!r}: {WHY_HASH_BITS}")
        if self.kv_bits not in (4, 8, 16):
            raise ConfigError(f"kv_bits must be 4, 8 or 16, found {self.kv_bits}")
        sizes = sorted({*FORMATS["int4"].group_sizes, *FORMATS["int8"].group_sizes})
        if self.group_size is not None and self.group_size not in sizes:
            raise ConfigError(f"group_size must be one of {', '.join(map(str, sizes))}, found {self.group_size}")
        for pattern in self.overrides:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"override {pattern!r} is not a regular expression: {error}") from None

    def format_for(self, path: str) -> str:
        """The format of a layer, before overrides."""
        part = part_of(path)
        if path.endswith(KEPT) or _KEPT_READERS.search(path):
            return KEEP
        chosen = self.formats_of([path]).get(part, KEEP)
        protected = part in ("encoder", "decoder") and path.endswith(PROTECTED)
        return self.wo_format if protected and _bits(chosen) < _bits(self.wo_format) else chosen

    def formats_of(self, paths: Iterable[str]) -> dict[str, str]:
        """The formats of the parts that layers at `paths` belong to, where they are packed."""
        paths = tuple(paths)
        parts = {part_of(path) for path in paths}
        of_bytes = "mxfp8" if any(path.startswith(BESIDE_PATCHES) for path in paths) else "nvfp4"
        known = {
            "global": self.global_format,
            "middle": self.local_format,
            "states": self.local_format,
            "local": self.local_format,
            "patcher": self.patcher_format,
            "hash": self.hash_format,
            "encoder": self.encoder_format or of_bytes,
            "decoder": self.decoder_format or of_bytes,
            "cross": self.cross_format,
        }
        return {part: known[part] for part in known if part in parts}


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one linear layer, or table; `format` None keeps it as it is."""

    path: str
    part: str  # see `models.part_of`
    rows: int
    columns: int
    format: Format | None
    group_size: int


def check_format(name: str) -> None:
    """Raise `ConfigError` unless `name` is a format's, or `16bit`."""
    if name not in FORMATS and name != KEEP:
        raise ConfigError(f"unknown format {name!r}{did_you_mean(name, [*FORMATS, KEEP])}")


def format_from_bits(bits: int) -> str:
    """The default format of a bit width: 4, 8, or 16 to keep.

    Raises:
        ConfigError: another width.
    """
    if bits == 16:
        return KEEP
    if bits not in (4, 8):
        raise ConfigError(f"bits must be 4, 8 or 16, found {bits}")
    return default_format(bits).name


def _bits(name: str) -> int:
    return 16 if name == KEEP else FORMATS[name].bits


def settings_from_bits(
    global_bits: int, local_bits: int, kv_bits: int = 16, decoder_bits: int | None = None
) -> QuantizationSettings:
    """Settings that name bit widths alone; None leaves a part to its own."""
    return QuantizationSettings(
        format_from_bits(global_bits),
        format_from_bits(local_bits),
        decoder_format=None if decoder_bits is None else format_from_bits(decoder_bits),
        kv_bits=kv_bits,
    )


def settings_named(text: str) -> QuantizationSettings:
    """Settings by a short name: a format or its bits for all parts (nvfp4, 8), or two with a slash between (4/8, int4/int8),
    the second for the parts that keep 8 bits unless told otherwise.

    Raises:
        ConfigError: something else.
    """
    first, slash, second = text.partition("/")
    most = _format_named(first)
    rest = _format_named(second) if slash else most
    return QuantizationSettings(most, rest, encoder_format=most, decoder_format=most, cross_format=most, wo_format=rest)


def _format_named(text: str) -> str:
    if text in ("4", "8"):
        return default_format(int(text)).name
    if text not in FORMATS:
        raise ConfigError(f"unknown format {text!r}{did_you_mean(text, [*FORMATS, '4', '8', '4/8'])}")
    return text


def load_recipe(name: str) -> QuantizationSettings:
    """Settings from a YAML file, or from a shipped recipe (configs/recipes) by its name.

    Raises:
        ConfigError: no such recipe, not YAML, or unknown keys.
    """
    folder = shipped("configs/recipes")
    known = {file.stem: file for file in folder.glob("*.yaml")}
    path = known.get(name, Path(name))
    if not os.path.lexists(path):
        raise ConfigError(f"{name}: no such recipe{did_you_mean(name, known)}")
    return from_mapping(QuantizationSettings, read_yaml(path), str(path))


def plan_layers(
    shapes: Mapping[str, tuple[int, int]], settings: QuantizationSettings, where: str = "quantize"
) -> list[LayerPlan]:
    """One decision for each layer of `shapes` (path -> rows, columns).

    Raises:
        QuantizationError: a layer whose columns no group of its format divides (formats that fit are named), an
            override for the output head, or one that no layer matches.
    """
    chosen = {path: settings.format_for(path) for path in shapes}
    for pattern, name in settings.overrides.items():
        matched = [path for path in shapes if re.search(pattern, path)]
        if not matched:
            raise QuantizationError(f"{where}: the override {pattern!r} matches no layer{did_you_mean(pattern, shapes)}")
        chosen.update(dict.fromkeys(matched, name))
    plans = []
    for path, (rows, columns) in shapes.items():
        name = chosen[path]
        if name == KEEP:
            plans.append(LayerPlan(path, part_of(path), rows, columns, None, 0))
            continue
        if part_of(path) == "head":
            raise QuantizationError(f"{where}: the output head stays as it is; take it out of the override")
        if part_of(path) == "hash" and _bits(name) < LEAST_HASH_BITS:
            raise QuantizationError(f"{where}: {path!r} keeps {LEAST_HASH_BITS} bits at least, found {name}: {WHY_HASH_BITS}")
        group_size = _group_size(FORMATS[name], columns, settings.group_size)
        if group_size is None:
            fitting = [other.name for other in FORMATS.values() if other.group_size_for(columns) is not None]
            raise QuantizationError(
                f"{where}: {path!r} has {columns} input channels, which no group of {name} divides; formats that fit:"
                f" {', '.join([*fitting, KEEP])} (--override '{re.escape(path)}={(fitting or [KEEP])[0]}')"
            )
        plans.append(LayerPlan(path, part_of(path), rows, columns, FORMATS[name], group_size))
    return plans


def _group_size(chosen: Format, columns: int, wanted: int | None) -> int | None:
    if wanted is not None and wanted in chosen.group_sizes:
        return wanted if columns % wanted == 0 else None
    return chosen.group_size_for(columns)


def quantization_table(plans: Sequence[LayerPlan], others: Sequence[str]) -> dict[str, Any]:
    """mlx-lm's `quantization` table: defaults of the commonest format, and each other layer by its path.

    Args:
        others: paths of modules that MLX would pack (embeddings) and that stay as they are.
    """
    tables = {plan.path: _entry(plan) for plan in plans}
    packed = [entry for entry in tables.values() if isinstance(entry, dict)]
    if not packed:
        return {}
    default = max(packed, key=packed.count)
    table: dict[str, Any] = dict(default)
    table.update({path: entry for path, entry in tables.items() if entry != default})
    table.update(dict.fromkeys(others, False))
    return table


def _entry(plan: LayerPlan) -> dict[str, Any] | bool:
    if plan.format is None:
        return False
    return {"group_size": plan.group_size, "bits": plan.format.bits, "mode": plan.format.mode}
