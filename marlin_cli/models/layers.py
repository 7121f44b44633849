"""The linear layers of any network, and its tables: finding them by path, their parts and inputs, and replacing them."""

from collections.abc import Callable
from typing import Any

import mlx.nn as nn

from marlin_cli.models.architecture import Network
from marlin_cli.ops import Linear, PackedTable, QuantizedLinear, Table

# First names of paths that are names of parts too; the other layers belong to the global part.
PARTS = ("middle", "local", "encoder", "decoder", "states", "patcher")


def linear_layers(network: Network) -> dict[str, nn.Module]:
    """Every linear layer of a network by its path, packed ones included, in the order of the definition."""
    return {path: module for path, module in reversed(network.named_modules()) if isinstance(module, (Linear, QuantizedLinear))}


def matrices_of(network: Network) -> dict[str, nn.Module]:
    """Every module that packing is about, by its path: the linear layers, then the tables of which rows are looked up."""
    tables = {path: module for path, module in reversed(network.named_modules()) if isinstance(module, (Table, PackedTable))}
    return {**linear_layers(network), **tables}


def part_of(path: str) -> str:
    """The part that a layer belongs to: global, middle, local, encoder, decoder, cross, states, patcher, hash or head."""
    if path == "hash_embedding":
        return "hash"
    if path in ("output", "drafts"):  # of the next id, and of those further on
        return "head"
    names = path.split(".")
    if names[0] == "decoder" and "cross" in names:
        return "cross"
    if names[0] in ("byte_encoder", "byte_decoder"):  # around patches
        return names[0].removeprefix("byte_")
    if names[0] in ("initial", "final"):  # of bytes, before patches and after them
        return "local"
    if names[0] == "front":  # before an encoder
        return "encoder"
    # What runs once a patch belongs to the global part, on both sides of its transformer.
    return names[0] if names[0] in PARTS else "global"


def inputs_by_layer(network: Network, input_of: Callable[[str], str]) -> dict[str, str]:
    """Path of every linear layer -> path of the layer in whose name its input is measured."""
    return {path: input_of(path) for path in linear_layers(network)}


def set_modules(network: Network, modules: list[tuple[str, nn.Module]]) -> None:
    """Replace modules by path."""
    for path, module in modules:
        *parents, name = path.split(".")
        holder: Any = network
        for part in parents:
            holder = holder[int(part)] if isinstance(holder, list) else holder[part]
        holder[name] = module
