"""Packs a checkpoint into a model folder layer by layer, so that neither the model nor its copy has to fit into memory."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from marlin_cli.checkpoints import Checkpoint, check_weight, lasting
from marlin_cli.checkpoints.stored_rows import StoredRows, open_rows
from marlin_cli.checkpoints.writer import ModelWriter, writing_model
from marlin_cli.models import build, config_as_mapping
from marlin_cli.quantization.apply import marlin_table, prepared
from marlin_cli.quantization.card import CARD, card_of, carried_files
from marlin_cli.quantization.layers import LayerReport, added, pack_layer, pack_rows, type_name
from marlin_cli.quantization.plan import LayerPlan, QuantizationSettings, quantization_table
from marlin_cli.statistics import Statistics

# Larger tables are read, packed and written so many bytes of rows at a time.
ROWS_AT_ONCE_BYTES = 1 << 27


@dataclass(frozen=True)
class Written:
    """What was written: a report by layer, in the model's order, and the bytes by type of all but the layers' weights."""

    layers: list[LayerReport]
    kept_bytes: dict[str, int]


def quantize_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    settings: QuantizationSettings,
    statistics: Statistics | None = None,
    *,
    where: str,
    method: str = "mse",
    domain_weights: Mapping[str, float] | None = None,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
    with_card: bool = False,
) -> Written:
    """Write to `target` what `quantize_network` would make of a checkpoint.

    Memory: a shard of the output and some copies of the largest layer in float32; of a table in a safetensors file, of which
    a block of rows is packed at a time, no more than these. awq, whose factors come from several
    layers together, holds the model too, and gptq what reads inputs that stand out.

    Args:
        checkpoint: read with `check_values` off. Its weights are used up: the mapping is empty afterwards.
        where: the model, as errors name it.
        on_bytes: called with the bytes of each weight that is done.
        with_card: write a card too, and what of the model's folder holds of the packed one (see `card`).

    Raises:
        CheckpointError: weights that do not fit the configuration, or that hold NaN or infinity.
        OutputError: the folder exists and `overwrite` is off, or it cannot be written.
        ConfigError, UsageError, QuantizationError, StatisticsError: see `quantize_network`.
    """
    network, plans, factors = prepared(
        build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where=where),
        settings, statistics, method=method, domain_weights=domain_weights,
    )  # fmt: skip
    config = config_as_mapping(network.config)
    embeddings = sorted(path for path, module in network.named_modules() if isinstance(module, nn.Embedding))
    weights = dict(tree_flatten(network.parameters()))
    tables = {f"{plan.path}.weight": weights[f"{plan.path}.weight"] for plan in plans if plan.part == "hash"}
    stored = open_rows(checkpoint.stored, {name: each for name, each in tables.items() if each.nbytes > ROWS_AT_ONCE_BYTES})
    del tables
    # From here on `weights` alone holds them, and an array goes when it is written.
    checkpoint.weights.clear()
    del network
    plan_of = {plan.path: plan for plan in plans}
    reports: dict[str, LayerReport] = {}
    kept: Counter[str] = Counter()
    with writing_model(target, overwrite=overwrite) as writer:
        for name in sorted(weights):
            path, _, last = name.rpartition(".")
            plan = plan_of.get(path)
            if plan is not None and plan.format is not None and last == "bias":
                continue  # its weight takes it along
            array = weights.pop(name)
            if name in stored:
                assert plan is not None
                del array
                reports[path] = _pack_by_rows(checkpoint.path, name, stored[name], plan, method, writer, on_bytes)
                continue
            check_weight(checkpoint.path, name, array)
            on_bytes(array.nbytes)
            if plan is None or last == "bias":
                kept[type_name(array)] += array.nbytes
                writer.add(name, array)
                continue
            bias = None if plan.format is None else weights.pop(f"{path}.bias", None)
            if bias is not None:
                kept[type_name(bias)] += bias.nbytes
            layer, reports[path] = pack_layer(
                array, bias, plan, statistics, method=method, domain_weights=domain_weights, factor=factors.get(path)
            )
            for part, result in sorted(layer.parameters().items() if layer is not None else [(last, array)]):
                mx.eval(result)
                writer.add(f"{path}.{part}", result)
        marlin = {**lasting(checkpoint.marlin), **marlin_table(settings, plans, statistics, method, domain_weights)}
        layers = [reports[plan.path] for plan in plans]
        if with_card:
            card = card_of(where, checkpoint.path, config, marlin, layers, kept)
            for name, data in {**carried_files(checkpoint.path), CARD: card.encode()}.items():
                writer.put(name, data)
        writer.finish(config, quantization_table(plans, embeddings), marlin)
    return Written(layers, dict(kept))


def _pack_by_rows(
    where: Path,
    name: str,
    rows: StoredRows,
    plan: LayerPlan,
    method: str,
    writer: ModelWriter,
    on_bytes: Callable[[int], None],
) -> LayerReport:
    """Pack a table that stays in its file, a block of rows after the other."""

    def blocks() -> Iterator[mx.array]:
        for block in rows.blocks(ROWS_AT_ONCE_BYTES):
            check_weight(where, name, block)
            yield block
            on_bytes(block.nbytes)

    reports: list[LayerReport] = []
    packed = pack_rows(blocks(), plan, method)
    first, report = next(packed)

    def arrays() -> Iterator[dict[str, mx.array]]:
        for block, own in itertools.chain([(first, report)], packed):
            reports.append(own)
            yield {f"{plan.path}.{part}": array for part, array in block.items()}

    shapes = {f"{plan.path}.{part}": (array.dtype, (plan.rows, *array.shape[1:])) for part, array in first.items()}
    writer.add_rows(shapes, arrays())
    return added(reports)
