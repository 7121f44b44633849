"""Networks by architecture, built from a checkpoint's configuration and weights."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from marlin_cli.config import did_you_mean, from_mapping
from marlin_cli.documents import read_json
from marlin_cli.errors import CheckpointError, ConfigError, UsageError
from marlin_cli.files import shipped
from marlin_cli.models.architecture import Architecture, Capability, Continuing, Network, Reading
from marlin_cli.models.block_recurrent_steps import BLOCK_RECURRENT
from marlin_cli.models.blt_steps import BLT
from marlin_cli.models.bygpt5_steps import BYGPT5
from marlin_cli.models.byt5_steps import BYT5
from marlin_cli.models.canine_steps import CANINE, LA_CANINE
from marlin_cli.models.decoding_shape import CachedStack, DecodingShape
from marlin_cli.models.evabyte_steps import EVABYTE
from marlin_cli.models.gbst_steps import GBST
from marlin_cli.models.layers import inputs_by_layer, linear_layers, matrices_of, part_of, set_modules
from marlin_cli.models.megabyte_steps import MEGABYTE
from marlin_cli.models.packed import PACKED_ARRAYS, packed_layer, settings_of
from marlin_cli.models.spacebyte_steps import SPACEBYTE
from marlin_cli.models.splitting import Share
from marlin_cli.text import quoted, with_article

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "CachedStack",
    "Capability",
    "Continuing",
    "DecodingShape",
    "Network",
    "Reading",
    "Share",
    "architecture_named",
    "architecture_of",
    "build",
    "config_as_mapping",
    "continuing_of",
    "decoding_of",
    "fill",
    "linear_layers",
    "matrices_of",
    "part_of",
    "preset",
    "preset_names",
    "set_modules",
    "settings_for",
    "shared_inputs",
    "with_weights",
]

AnyNetwork = TypeVar("AnyNetwork", bound=Network)


# model_type -> architecture.
ARCHITECTURES: dict[str, Architecture] = {
    each.name: each for each in (MEGABYTE, BYT5, BYGPT5, BLOCK_RECURRENT, EVABYTE, BLT, SPACEBYTE, GBST, CANINE, LA_CANINE)
}


def build(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    quantization: Mapping[str, Any] | None = None,
    *,
    where: str,
    dtype: mx.Dtype | None = None,
    share: Share | None = None,
) -> Network:
    """The network that `config` describes, holding `weights`.

    Args:
        config: an architecture's fields, with `model_type`.
        weights: parameter path -> array; a packed layer has `.scales` (and `.biases`, `.global_scale`) too.
        quantization: mlx-lm's table: `group_size`, `bits`, `mode`, and by layer path the same or false.
        where: the file that begins every error.
        dtype: floating-point weights and activations are cast to it; as stored if None.
        share: what of it this rank holds; `weights` are cut accordingly (`Share.cuts`).

    Raises:
        ConfigError: an unknown architecture or an impossible configuration.
        CheckpointError: missing, unknown or misshapen weights, or a value that is not finite in a small one.
    """
    architecture = architecture_named(config, where)
    settings = settings_for(config, where)
    # Each block begins with a norm. A network of blocks that the file has not is never drafted.
    absent = [path for path in settings.blocks if f"{path}.attention_norm.weight" not in weights]
    if absent:
        found = f"the weight {quoted(f'{absent[0]}.attention_norm.weight')} is missing"
        raise CheckpointError(f"{where}: {found}, with all of {len(absent):,} layers that config.json asks for")
    network: Network = architecture.network(settings)
    if share is not None:
        share.narrow(network)
    fill(network, weights, quantization, where=where, dtype=dtype, looked_up=architecture.looked_up)
    if share is not None:
        share.join(network)
    return network


def fill(
    network: Any,
    weights: Mapping[str, mx.array],
    quantization: Mapping[str, Any] | None = None,
    *,
    where: str,
    dtype: mx.Dtype | None = None,
    looked_up: frozenset[str] = frozenset(),
) -> None:
    """Give a network of any architecture its weights; see `build` and `Architecture` for the arguments.

    Raises:
        CheckpointError: missing, unknown or misshapen weights, or a value that is not finite in a small one.
    """
    arrays = {
        path: array.astype(dtype)
        if dtype is not None and path.rpartition(".")[0] not in looked_up and _is_castable(path, array)
        else array
        for path, array in weights.items()
    }
    _swap_packed_layers(network, arrays, quantization or {}, where)
    expected = dict(tree_flatten(network.parameters()))
    missing = sorted(expected.keys() - arrays.keys())
    unknown = sorted(arrays.keys() - expected.keys())
    if missing:
        raise CheckpointError(f"{where}: the weight {quoted(missing[0])} is missing ({len(missing)} in all)")
    if unknown:
        raise CheckpointError(
            f"{where}: no place for the weight {quoted(unknown[0])} ({len(unknown)} in all); is it in config.json?"
        )
    for path, array in arrays.items():
        if array.shape != expected[path].shape:
            raise CheckpointError(
                f"{where}: {path!r} has shape {list(array.shape)}, the configuration asks for {list(expected[path].shape)}"
            )
    network.load_weights(list(arrays.items()))
    network.eval()


def preset(name: str) -> Any:
    """A shipped configuration without weights, for example `byt5-small`.

    Raises:
        ConfigError: no such preset.
    """
    if name not in preset_names():
        raise ConfigError(f"{name}: no such preset{did_you_mean(name, preset_names())}")
    file = shipped("configs/models") / f"{name}.json"
    document = read_json(file)
    return from_mapping(ARCHITECTURES[document["model_type"]].config, document, str(file))


def preset_names() -> list[str]:
    """The names of the shipped configurations without weights."""
    return sorted(file.stem for file in shipped("configs/models").glob("*.json"))


def architecture_named(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a checkpoint's configuration names.

    Raises:
        ConfigError: an unknown one.
    """
    name = config.get("model_type", "megabyte")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        hint = did_you_mean(name if isinstance(name, str) else "", ARCHITECTURES)
        raise ConfigError(f"{_config_file(where)}: model_type {quoted(name)} is not supported{hint}")
    return ARCHITECTURES[name]


def settings_for(config: Mapping[str, Any], where: str) -> Any:
    """The settings of the network that a checkpoint's configuration describes; its config.json, if it has one, begins errors.

    Args:
        where: the model, as it was named: a folder, or a file of weights.

    Raises:
        ConfigError: an unknown architecture, an unknown key or an impossible value.
    """
    return from_mapping(architecture_named(config, where).config, config, _config_file(where))


def _config_file(where: str) -> str:
    """The config.json of a model that is a folder or a file in one, for messages; `where` if it has none."""
    path = Path(os.path.expanduser(where))
    try:
        file = (path if path.is_dir() else path.parent) / "config.json"
        return str(file) if path.exists() and file.is_file() else where
    except (OSError, ValueError):  # no name that a file can have
        return where


def architecture_of(network: Network) -> Architecture:
    """The architecture of a network, which knows its own name."""
    return ARCHITECTURES[network.config.model_type]


def continuing_of(network: Network) -> Continuing:
    """How a network continues bytes, which is what it does."""
    found = architecture_of(network).continuing
    assert found is not None
    return found


def decoding_of(config: Any) -> DecodingShape:
    """What decoding with a network of this configuration is made of.

    Raises:
        UsageError: its architecture does not say.
    """
    architecture = ARCHITECTURES[config.model_type]
    if architecture.decoding is None:
        raise UsageError(
            f"the arithmetic of {with_article(architecture.title)} is not known: it is of models that continue bytes"
        )
    return architecture.decoding


def with_weights(network: AnyNetwork, weights: Mapping[str, mx.array]) -> AnyNetwork:
    """A copy of a network without packed layers that has these arrays, all of them, in place of its own."""
    copy: AnyNetwork = architecture_of(network).network(network.config)
    copy.load_weights(list(weights.items()))
    copy.eval()
    return copy


def shared_inputs(network: Network) -> dict[str, str]:
    """Path of every linear layer -> path of the layer in whose name its input is measured."""
    return inputs_by_layer(network, architecture_of(network).input_of)


def config_as_mapping(config: Any) -> dict[str, Any]:
    """A configuration as plain values for config.json, without the fields that say None."""
    return {key: value for key, value in dataclasses.asdict(config).items() if value is not None}


def _is_castable(path: str, array: mx.array) -> bool:
    packed = path.endswith(".scales") and array.dtype == mx.uint8
    return not packed and not path.endswith(".global_scale") and mx.issubdtype(array.dtype, mx.floating)


def _swap_packed_layers(network: Network, arrays: Mapping[str, mx.array], table: Mapping[str, Any], where: str) -> None:
    """Put a `QuantizedLinear`, or a `PackedTable`, wherever the weights hold `.scales`."""
    swapped: list[tuple[str, nn.Module]] = []
    for path, module in matrices_of(network).items():
        if f"{path}.scales" in arrays:
            own = {name: arrays[f"{path}.{name}"] for name in PACKED_ARRAYS if f"{path}.{name}" in arrays}
            swapped.append((path, packed_layer(module, own, settings_of(path, table), f"{where}: {path!r}")))
    set_modules(network, swapped)
