"""`marlin quantize MODEL --plan`: what a model would take in 16, 8, 4/8 and 4 bits, from its configuration alone."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlx.utils import tree_flatten

from marlin_cli import console
from marlin_cli.checkpoints import ImportOptions, read_checkpoint
from marlin_cli.checkpoints.configurations import settings_alone
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.commands.options import CACHE_BITS, check_bandwidth, check_width
from marlin_cli.errors import UsageError
from marlin_cli.models import ARCHITECTURES, Network, architecture_of, matrices_of, settings_for
from marlin_cli.prediction.arithmetic import costs_of
from marlin_cli.prediction.sizes import part_of_weight
from marlin_cli.quantization.plan import KEEP, QuantizationSettings, plan_layers, settings_named
from marlin_cli.text import with_article

STORED_BYTES = 2  # of a number that stays as it is: 16 bits

# The mixes that are shown, by their names.
MIXES: Mapping[str, QuantizationSettings] = {
    "16": QuantizationSettings(KEEP, KEEP, KEEP, KEEP, KEEP, KEEP, hash_format=KEEP),
    **{name: settings_named(name) for name in ("8", "4/8", "4")},
}


@dataclass(frozen=True)
class Mix:
    """A model in some bits. Bytes a second are those of one stream where reading memory is all that takes time."""

    format: str
    bits_per_weight: float  # of all layers
    weight_bytes: int
    cache_bytes: int | None  # keys and values of one stream at the context; None where that is not known
    bytes_per_second: float | None  # None: no bandwidth, or not known

    @property
    def all_bytes(self) -> int:
        return self.weight_bytes + (self.cache_bytes or 0)


def show_plan(
    name: str, options: ImportOptions, kv_bits: int | None, gigabytes_per_second: float | None, *, json_output: bool
) -> None:
    """The table on stdout, or with `json_output` one document.

    Raises:
        MarlinError: no configuration, or an impossible one.
    """
    check_bandwidth(gigabytes_per_second)
    check_width("--kv-bits", kv_bits, CACHE_BITS)
    rate = None if gigabytes_per_second is None else 1e9 * gigabytes_per_second
    network = draft(name, options)
    mixes: dict[tuple[int, float], Mix] = {}
    for title, settings in MIXES.items():
        mix = mix_of(network, title, settings, kv_bits or 16, rate, name)
        mixes.setdefault((mix.weight_bytes, mix.bits_per_weight), mix)  # of a single part 4/8 is 4
    if json_output:
        rows = [{**asdict(mix), "all_bytes": mix.all_bytes} for mix in mixes.values()]
        print(json.dumps({"model": name, "weights": _weights(network), "mixes": rows}, allow_nan=False))
        return
    columns = ["bits", "bits/weight", "weights, bytes"]
    known = any(mix.cache_bytes is not None for mix in mixes.values())
    columns += [f"keys and values, {network.config.max_bytes:,} bytes", "all, bytes"] if known else []
    timed = any(mix.bytes_per_second is not None for mix in mixes.values())
    columns += [f"bytes/s at {gigabytes_per_second:g} GB/s"] if timed else []
    table: list[list[str]] = []
    for mix in mixes.values():
        cells = [mix.format, f"{mix.bits_per_weight:.2f}", f"{mix.weight_bytes:,}"]
        cells += [f"{mix.cache_bytes or 0:,}", f"{mix.all_bytes:,}"] if known else []
        table.append([*cells, *([f"{mix.bytes_per_second or 0:,.0f}"] if timed else [])])
    console.table(f"{name}: {_weights(network):,} weights; a plan, nothing is read or written", columns, table, to_stdout=True)
    if gigabytes_per_second is not None and not timed:
        title = architecture_of(network).title
        console.note(f"--bandwidth: the arithmetic of {with_article(title)} is not known, so no speed is told")


def draft(name: str, options: ImportOptions) -> Network:
    """A network of this configuration whose numbers are never computed: of a preset, a config.json, or a model.

    Raises:
        MarlinError: there is none, or it is impossible.
    """
    settings = settings_alone(name)
    if settings is None:
        checkpoint = read_checkpoint(locate_model(name), options, check_values=False)
        if checkpoint.quantization is not None:
            raise UsageError(f"--plan: {name} is packed already; marlin info tells what it takes")
        settings = settings_for(checkpoint.config, name)
    return _drafted(settings)


def _drafted(config: Any) -> Network:
    network: Network = ARCHITECTURES[config.model_type].network(config)
    return network


def mix_of(
    network: Network, title: str, settings: QuantizationSettings, kv_bits: int, bytes_per_second: float | None, where: str
) -> Mix:
    """Sizes of the network with its layers packed by the settings, and the speed that reading them allows.

    Raises:
        QuantizationError: a layer that cannot be packed so.
    """
    layers = matrices_of(network)
    plans = plan_layers({path: tuple(layer.weight.shape) for path, layer in layers.items()}, settings, where)
    by_part: Counter[str] = Counter()
    packed = 0
    for plan in plans:
        count = plan.rows * plan.columns
        size = count * STORED_BYTES if plan.format is None else plan.format.bytes_of(count, plan.group_size)
        by_part[part_of_weight(f"{plan.path}.weight")] += size
        packed += size
    weights = {f"{path}.weight" for path in layers}
    for path, array in tree_flatten(network.parameters()):
        if path not in weights:
            by_part[part_of_weight(path)] += array.size * STORED_BYTES
    cache = speed = None
    if architecture_of(network).decoding is not None:
        costs = costs_of(network.config, dict(by_part), network.config.max_bytes, kv_bits)
        cache = round(sum(costs.cache_bytes.values()))
        speed = None if bytes_per_second is None else 1 / costs.seconds_per_byte(bytes_per_second)
    in_layers = sum(plan.rows * plan.columns for plan in plans)
    return Mix(title, 8 * packed / in_layers, sum(by_part.values()), cache, speed)


def _weights(network: Network) -> int:
    return sum(array.size for _, array in tree_flatten(network.parameters()))
