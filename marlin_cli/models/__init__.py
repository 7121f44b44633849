"""Networks by architecture, built from a checkpoint's configuration and weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from marlin_cli.config import did_you_mean, from_mapping
from marlin_cli.documents import read_json
from marlin_cli.errors import CheckpointError, ConfigError
from marlin_cli.files import shipped
from marlin_cli.models.byt5 import ByT5, ByT5Config
from marlin_cli.models.megabyte import MegaByte, MegaByteConfig
from marlin_cli.models.packed import PACKED_ARRAYS, packed_layer, settings_of
from marlin_cli.ops import Linear, QuantizedLinear
from marlin_cli.text import quoted

Network: TypeAlias = MegaByte | ByT5
NetworkConfig: TypeAlias = MegaByteConfig | ByT5Config

# model_type -> classes of the configuration and of the network.
ARCHITECTURES: dict[str, tuple[type[Any], type[Any]]] = {
    "megabyte": (MegaByteConfig, MegaByte),
    "byt5": (ByT5Config, ByT5),
}

# First names of paths that are names of parts too; the other layers belong to the global part.
PARTS = ("middle", "local", "encoder", "decoder")

# Arrays that a packed linear layer has beside its weight.
PACKED_SUFFIXES = (".scales", ".biases", ".global_scale")


def build(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    quantization: Mapping[str, Any] | None = None,
    *,
    where: str,
    dtype: mx.Dtype | None = None,
) -> Network:
    """The network that `config` describes, holding `weights`.

    Args:
        config: an architecture's fields, with `model_type`.
        weights: parameter path -> array; a packed layer has `.scales` (and `.biases`, `.global_scale`) too.
        quantization: mlx-lm's table: `group_size`, `bits`, `mode`, and by layer path the same or false.
        where: the file that begins every error.
        dtype: floating-point weights and activations are cast to it; as stored if None.

    Raises:
        ConfigError: an unknown architecture or an impossible configuration.
        CheckpointError: missing, unknown or misshapen weights, or a value that is not finite in a small one.
    """
    name = config.get("model_type", "megabyte")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        hint = did_you_mean(name if isinstance(name, str) else "", ARCHITECTURES)
        raise ConfigError(f"{where}: model_type {quoted(name)} is not supported{hint}")
    config_class, network_class = ARCHITECTURES[name]
    settings = from_mapping(config_class, config, where)
    # Each block begins with a norm. A network of blocks that the file has not is never drafted.
    absent = [path for path in settings.blocks if f"{path}.attention_norm.weight" not in weights]
    if absent:
        found = f"the weight {quoted(f'{absent[0]}.attention_norm.weight')} is missing"
        raise CheckpointError(f"{where}: {found}, with all of {len(absent):,} layers that config.json asks for")
    network: Network = network_class(settings)
    fill(network, weights, quantization, where=where, dtype=dtype)
    return network


def fill(
    network: nn.Module,
    weights: Mapping[str, mx.array],
    quantization: Mapping[str, Any] | None = None,
    *,
    where: str,
    dtype: mx.Dtype | None = None,
) -> None:
    """Give a network of any architecture its weights; see `build` for the arguments.

    Raises:
        CheckpointError: missing, unknown or misshapen weights, or a value that is not finite in a small one.
    """
    arrays = {
        path: array.astype(dtype) if dtype is not None and _is_castable(path, array) else array
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


def preset(name: str) -> NetworkConfig:
    """A shipped configuration without weights, for example `byt5-small`.

    Raises:
        ConfigError: no such preset.
    """
    known = {file.stem: file for file in sorted(shipped("configs/models").glob("*.json"))}
    if name not in known:
        raise ConfigError(f"{name}: no such preset{did_you_mean(name, known)}")
    document = read_json(known[name])
    config: NetworkConfig = from_mapping(ARCHITECTURES[document["model_type"]][0], document, str(known[name]))
    return config


def linear_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of a network by its path, packed ones included, in the order of the definition."""
    return {path: module for path, module in reversed(network.named_modules()) if isinstance(module, (Linear, QuantizedLinear))}


def part_of(path: str) -> str:
    """The part of the model that a layer belongs to: global, middle, local, encoder, decoder, cross or head."""
    if path == "output":
        return "head"
    names = path.split(".")
    if names[0] == "decoder" and "cross" in names:
        return "cross"
    # What runs once a patch belongs to the global part, on both sides of its transformer.
    return names[0] if names[0] in PARTS else "global"


def config_as_mapping(config: NetworkConfig) -> dict[str, Any]:
    """A configuration as plain values for config.json, without the fields that say None."""
    return {key: value for key, value in dataclasses.asdict(config).items() if value is not None}


def _is_castable(path: str, array: mx.array) -> bool:
    packed = path.endswith(".scales") and array.dtype == mx.uint8
    return not packed and not path.endswith(".global_scale") and mx.issubdtype(array.dtype, mx.floating)


def _swap_packed_layers(network: nn.Module, arrays: Mapping[str, mx.array], table: Mapping[str, Any], where: str) -> None:
    """Put a `QuantizedLinear` wherever the weights hold `.scales`."""
    swapped: list[tuple[str, nn.Module]] = []
    for path, module in linear_layers(network).items():
        if f"{path}.scales" in arrays:
            own = {name: arrays[f"{path}.{name}"] for name in PACKED_ARRAYS if f"{path}.{name}" in arrays}
            swapped.append((path, packed_layer(module, own, settings_of(path, table), f"{where}: {path!r}")))
    set_modules(network, swapped)


def set_modules(network: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
    """Replace modules by path."""
    for path, module in modules:
        *parents, name = path.split(".")
        holder: Any = network
        for part in parents:
            holder = holder[int(part)] if isinstance(holder, list) else holder[part]
        holder[name] = module
