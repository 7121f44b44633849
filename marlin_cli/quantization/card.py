"""What goes beside packed weights: a card for people and the hub, and what of the original's folder stays true."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from marlin_cli.checkpoints.location import HUB_PREFIX
from marlin_cli.documents import parse_yaml
from marlin_cli.errors import ConfigError
from marlin_cli.files import check_regular
from marlin_cli.models import Architecture, Capability, architecture_named
from marlin_cli.quantization.layers import LayerReport
from marlin_cli.quantization.plan import KEEP
from marlin_cli.quantization.reports import by_part
from marlin_cli.text import markdown, one_line
from marlin_cli.version import __version__

CARD = "README.md"

# Files of the original's folder that hold of a packed one too: how it ends and talks, and what may be done with it.
CARRIED = ("generation_config.json", "chat_template.jinja", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
MOST_CARRIED_BYTES = 1 << 20

# What of the original's card a packed model's says too.
KEPT_FIELDS = ("license", "license_name", "license_link", "language", "datasets")

PIPELINES = {
    Capability.CONTINUES: "text-generation",
    Capability.ANSWERS: "text2text-generation",
    Capability.ENCODES: "feature-extraction",
}

USE, COST = "## Use", "## What it costs"

IN_MLX = (
    "In plain MLX: the weights are `model.safetensors` (`mx.load`), packed as the table `quantization` of config.json",
    "says, in mlx-lm's convention. `mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=.., bits=..,",
    "mode=..)` multiplies by a layer. Layers in nvfp4 have one number more, `<layer>.global_scale`, which multiplies the",
    "product.",
)

IN_COMPRESSED_TENSORS = (
    "The weights are `model.safetensors` in the form of compressed-tensors (nvfp4-pack-quantized), which the table",
    "`quantization_config` of config.json describes.",
)


def carried_files(original: Path) -> dict[str, bytes]:
    """The files of CARRIED in the folder of a model, by name; what is no file, or larger than any of its kind, is left out."""
    folder = original if original.is_dir() else original.parent
    if not (folder / "config.json").is_file():  # a file in a folder of other things
        return {}
    found = {}
    for pattern in CARRIED:
        for file in sorted(folder.glob(pattern)):
            if (data := _small(file)) is not None:
                found[file.name] = data
    return found


def card_of(
    model: str,
    original: Path,
    config: Mapping[str, Any],
    marlin: Mapping[str, Any],
    layers: Sequence[LayerReport],
    kept: Mapping[str, int],
) -> str:
    """The card of a packed model, in Markdown under a head of YAML as the hub reads it.

    Args:
        model: as it was named on the command line; `hf:owner/name` is told as the base.
        marlin: marlin's own table of config.json.
        kept: bytes of all but the layers' weights, by type.
    """
    architecture = architecture_named(config, model)
    parts = by_part(layers)
    formats = sorted({part.format for part in parts if _is_packed(part.format)})
    hub_name = _hub_name(model)
    head = _head(architecture, ["quantized", *formats], hub_name, "quantized", _kept_fields(original))
    base, title = _base(model)
    before = sum(part.bytes_before for part in parts) + sum(kept.values())
    after = sum(part.bytes_after for part in parts) + sum(kept.values())
    rows = ["| part | format | layers | bits a weight | bytes before | bytes after |", "|---|---|---:|---:|---:|---:|"]
    for part in parts:
        sizes = f"{part.bits_per_weight:.2f} | {part.bytes_before:,} | {part.bytes_after:,}"
        rows.append(f"| {part.part} | {part.format} | {part.layers} | {sizes} |")
    rows.append(f"| other | {', '.join(sorted(kept))} | | | {sum(kept.values()):,} | {sum(kept.values()):,} |")
    rows.append(f"| all | | | | {before:,} | {after:,} |")
    method = marlin.get("method", "unknown")
    lines = [
        head, "", f"# {title}, packed", "",
        f"A {architecture.title} over bytes, packed by marlin {__version__} from {base}: method {method}.", "",
        *rows, "",
        *_use(architecture),
        *IN_MLX,
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def plain_card_of(
    config: Mapping[str, Any],
    marlin: Mapping[str, Any] | None,
    weight_bytes: int,
    model: str | None = None,
    original: Path | None = None,
) -> str:
    """The card of a model that was written as it is.

    Args:
        marlin: marlin's own table of config.json; its method is told where the weights are packed.
        weight_bytes: of all weights, as they are stored.
        model: what it was made from by unpacking, as it was named on the command line, in the folder `original`.
    """
    architecture = architecture_named(config, "the model")
    hub_name = None if model is None else _hub_name(model)
    head = _head(architecture, [], hub_name, "finetune", {} if original is None else _kept_fields(original))
    base, title = ("", architecture.title) if model is None else _base(model)
    made = f"written by marlin {__version__}" + (f" from {base}, with 16-bit weights" if base else "")
    method = (marlin or {}).get("method")
    how = f": method {markdown(method)}" if isinstance(method, str) else ""
    lines = [
        head, "", f"# {title}" + (", unpacked" if model is not None else ""), "",
        f"A {architecture.title} over bytes, {weight_bytes:,} bytes of weights, {made}{how}.", "",
        *_use(architecture),
        *(IN_MLX if how else ()),
    ]  # fmt: skip
    return "\n".join(lines).rstrip("\n") + "\n"


def with_cost(card: str, cost: str) -> str:
    """A card that says what was measured of the model, in Markdown."""
    return card.replace(f"{USE}\n", f"{COST}\n\n{cost}\n\n{USE}\n", 1)


def of_compressed_tensors(card: str) -> str:
    """The card of a packed model, for the same weights in the form of compressed-tensors."""
    return card.replace("\n".join(IN_MLX), "\n".join(IN_COMPRESSED_TENSORS), 1)


def _hub_name(model: str) -> str | None:
    return model.removeprefix(HUB_PREFIX) if model.startswith(HUB_PREFIX) else None


def _base(model: str) -> tuple[str, str]:
    """The model that another was made from, as a text and as a title."""
    hub_name = _hub_name(model)
    title = hub_name or one_line(Path(model).name)
    shown = markdown(title)
    if hub_name:
        return f"[{shown}](https://huggingface.co/{hub_name})", shown
    return (f"`{title}`" if "`" not in title else shown), shown


def _head(architecture: Architecture, tags: Sequence[str], hub_name: str | None, relation: str, kept: Mapping[str, Any]) -> str:
    fields = {
        "library_name": "mlx",
        "pipeline_tag": PIPELINES[architecture.capability],
        "tags": ["marlin", "mlx", "byte-level", architecture.name, *tags],
        **({} if hub_name is None else {"base_model": hub_name, "base_model_relation": relation}),
        **kept,
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip()}\n---"


def _use(architecture: Architecture) -> list[str]:
    verb = "encode" if architecture.capability is Capability.ENCODES else "generate"
    return [
        USE, "",
        "    pip install marlin-cli[cpu]     # on a Mac: marlin-cli",
        f"    marlin {verb} PATH -p 'To be, or not to be'", "",
        "    from marlin_cli import load", "", "    model = load(\"PATH\")", "",
    ]  # fmt: skip


def _is_packed(name: str) -> bool:
    return name != KEEP and "float" not in name


def _kept_fields(original: Path) -> dict[str, Any]:
    """The fields of the original's card that hold of a packed model; none where it has no card that can be read."""
    folder = original if original.is_dir() else original.parent
    data = _small(folder / CARD) if (folder / "config.json").is_file() else None
    if data is None or not data.startswith(b"---\n"):
        return {}
    head, _, _ = data[4:].partition(b"\n---")
    try:
        fields = parse_yaml(head, str(folder / CARD), ConfigError)
    except ConfigError:
        return {}
    kept = {name: fields[name] for name in KEPT_FIELDS if name in fields} if isinstance(fields, dict) else {}
    return {name: value for name, value in kept.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _small(file: Path) -> bytes | None:
    """The bytes of a file that is there and no larger than its kind is."""
    try:
        check_regular(file, ConfigError)
        if file.stat().st_size > MOST_CARRIED_BYTES:
            return None
        return file.read_bytes()
    except (ConfigError, OSError):
        return None
