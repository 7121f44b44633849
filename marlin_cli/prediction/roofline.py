"""How near decoding comes to the time that reading its weights and caches takes at this machine's measured bandwidths, and what
each part was predicted to take."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.models import linear_layers
from marlin_cli.ops import QuantizedLinear
from marlin_cli.prediction.arithmetic import costs_of
from marlin_cli.prediction.bandwidth import Bandwidth, measure_bandwidth
from marlin_cli.prediction.greedy import PARTS
from marlin_cli.prediction.sizes import bytes_by_part
from marlin_cli.quantization.formats import format_of


@dataclass(frozen=True)
class Roofline:
    """Of one byte generated: what must be read, what that takes, what it was predicted to take, and what it took."""

    copy_bytes_per_second: float
    matvec_bytes_per_second: dict[str, float]  # dense, and each packed format of the model, scales among its bytes
    read_bytes: dict[str, float]  # by part of the model and level of the cache; global weights once a patch
    read_seconds_by_part: dict[str, float]  # at those bandwidths
    predicted_seconds_by_part: dict[str, float] | None  # see `prediction`; None where kernels' operations cannot be timed apart
    share: float  # of the measured time, what reading alone would take
    bandwidth_reached: dict[str, float] | None  # that share of each part's own time; None where parts are not told apart


def bandwidth_for(model: ContinuingModel) -> Bandwidth:
    """The bandwidths at which products read the weights of a model, measured now."""
    layers = [layer for layer in linear_layers(model.network).values() if isinstance(layer, QuantizedLinear)]
    formats = sorted({format_of(layer.mode, layer.bits).name for layer in layers})
    return measure_bandwidth(formats, activation_bits=layers[0].activation_bits if layers else 16)


def reading_of(model: ContinuingModel, context_bytes: int, bandwidth: Bandwidth) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that a byte generated at a context must read, and the seconds that takes, by part.

    Raises:
        UsageError: a context beyond the model's.
    """
    bits_of_floats = 32 if model.device.name == "cpu" else 16
    keys, values = (bits_of_floats if bits == 16 else bits for bits in (model.cache_bits.keys, model.cache_bits.values))
    read: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for format, arrays in _weights_by_format(model).items():
        sizes = {part: float(size) for part, size in bytes_by_part(arrays).items()}
        # Costs are proportional to bits: half of the cache is keys.
        both = [costs_of(model.config, sizes, context_bytes, bits, bits_of_floats).read_bytes for bits in (keys, values)]
        for part in both[0]:
            if part.endswith("cache") and format is not None:
                continue  # counted with the dense weights
            size = (both[0][part] + both[1][part]) / 2
            read[part] = read.get(part, 0.0) + size
            seconds[part] = seconds.get(part, 0.0) + size / bandwidth.of(format)
    order = [part for part in PARTS if part in read]
    return {part: read[part] for part in order}, {part: seconds[part] for part in order}


def roofline_of(
    model: ContinuingModel,
    context_bytes: int,
    seconds_per_byte: float,
    measured: Mapping[str, float] | None,
    bandwidth: Bandwidth,
    predicted: dict[str, float] | None = None,
) -> Roofline:
    """See `Roofline`.

    Args:
        context_bytes: about where the measured bytes were decoded.
        seconds_per_byte: measured, of all parts.
        measured: the same by part.
        predicted: see `prediction.predicted_seconds`.
    """
    read, seconds = reading_of(model, context_bytes, bandwidth)
    reached = None
    if measured is not None:  # a part that none of a few bytes passed took no time
        reached = {part: seconds[part] / measured[part] for part in seconds if measured[part] > 0}
    return Roofline(
        copy_bytes_per_second=bandwidth.copy,
        matvec_bytes_per_second={"dense": bandwidth.matvec, **bandwidth.packed},
        read_bytes=read,
        read_seconds_by_part=seconds,
        predicted_seconds_by_part=predicted,
        share=sum(seconds.values()) / seconds_per_byte,
        bandwidth_reached=reached,
    )


def _weights_by_format(model: ContinuingModel) -> dict[str | None, dict[str, mx.array]]:
    """The arrays of packed layers by format, and all others, which are there even if empty, under None."""
    packed = {
        path: format_of(layer.mode, layer.bits).name
        for path, layer in linear_layers(model.network).items()
        if isinstance(layer, QuantizedLinear)
    }
    found: dict[str | None, dict[str, mx.array]] = {None: {}}
    for path, array in tree_flatten(model.network.parameters()):
        found.setdefault(packed.get(path.rpartition(".")[0]), {})[path] = array
    return found
