"""The time of a decoded byte as a model's shape and this machine's operations predict it; the model itself is not run.

Each kind of operation is timed alone, by the CPU kernels of decoding and on their threads, with weights and caches of its own:

- products: one row through random layers of the model's shapes and formats, as many as it has and as often as in a patch,
  so that as much passes through the processor's caches between two uses of a weight.
- attention: one row against a cache as long as the context fills it.
- the rest: a miniature of the model is decoded, with as many layers, of the same layout, patch and vocabulary, but so narrow
  that its products cost next to nothing. What it takes is Python, the graph between stages, draws, and what a layer does
  beside products and attention. Of a model that is decoded an operation at a time that depends on its widths: there the
  miniature has them, and the inputs of its products alone are cut to a few channels.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.continuation import Continuation, begin
from marlin_cli.engine.fused import kernel_product
from marlin_cli.models import ARCHITECTURES, CachedStack, decoding_of, linear_layers, part_of, set_modules
from marlin_cli.ops import Linear, QuantizedLinear
from marlin_cli.ops.cpu import kernels
from marlin_cli.prediction.bandwidth import again
from marlin_cli.prediction.greedy import PARTS, decoded, with_overhead
from marlin_cli.quantization.encoders import Packed, mlx_encode
from marlin_cli.quantization.formats import FORMATS, default_format, format_of
from marlin_cli.quantization.layers import packed_layer

# Random weights of one stage at most; of a larger stage the first layers stand for all.
LIMIT_BYTES = 1 << 30

ROUNDS, PATCHES_OF_A_ROUND = 5, 8

# Channels that products of floats read in a miniature that has its model's widths.
NARROW = 16


@dataclass(frozen=True)
class LayerShape:
    """A linear layer, as decoding multiplies with it."""

    path: str
    columns: int  # of the product
    depth: int
    format: str | None = None  # the name of a packed format; None: float32
    group_size: int = 0
    activation_bits: int = 16  # of what packed weights multiply

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, scales among them."""
        bits = 32 if self.format is None else FORMATS[self.format].bits_per_weight(self.group_size)
        return int(self.columns * self.depth * bits / 8)


def predicted_seconds(
    config: Any, shapes: Sequence[LayerShape], contexts: Sequence[int], cache_bits: CacheBits
) -> list[dict[str, float]] | None:
    """Seconds of a byte by part at each context, by operations that are timed now; None where `can_predict` says no."""
    if not can_predict(config):
        return None
    probe = DecodingProbe(config, shapes, contexts, cache_bits)
    for _ in range(ROUNDS):
        probe.run(max(1, min(PATCHES_OF_A_ROUND, config.max_bytes // probe.unit)))
    return [probe.seconds_by_part(context) for context in contexts]


def at_bits(shapes: Sequence[LayerShape], bits: int) -> list[LayerShape]:
    """The shapes with weights of so many bits: 4 or 8 in the default format, 16 and 32 as a CPU computes; the head stays."""
    if bits > 8:
        return [dataclasses.replace(shape, format=None) for shape in shapes]
    format = default_format(bits)
    packed = []
    for shape in shapes:
        group_size = format.group_size_for(shape.depth)
        if group_size is None or part_of(shape.path) == "head":
            packed.append(shape)
        else:
            packed.append(dataclasses.replace(shape, format=format.name, group_size=group_size))
    return packed


def layer_shapes(network: nn.Module) -> list[LayerShape]:
    """The linear layers of a network, in the order of its definition. Weights are not read."""
    shapes = []
    for path, layer in linear_layers(network).items():
        columns, depth = layer["weight"].shape
        if isinstance(layer, QuantizedLinear):
            format = format_of(layer.mode, layer.bits).name
            depth = depth * 32 // layer.bits
            shapes.append(LayerShape(path, columns, depth, format, layer.group_size, layer.activation_bits))
        else:
            shapes.append(LayerShape(path, columns, depth))
    return shapes


class DecodingProbe:
    """Times what decoding one stream is made of, on the CPU kernels.

    Args:
        shapes: of its linear layers, see `layer_shapes`.
        contexts: in bytes; for each a prediction is made.
        cache_bits: of the keys and values of the whole context.
        clock: seconds, from any start.
    """

    def __init__(
        self,
        config: Any,
        shapes: Sequence[LayerShape],
        contexts: Sequence[int],
        cache_bits: CacheBits | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        module = kernels()[0]
        assert module is not None
        decoding = decoding_of(config)
        assert decoding.miniature is not None
        # Bytes after which decoding is where it was: of a MegaByte a patch, and where patches differ one of the mean length.
        lengths = {decoding.layer_bytes(shape.path, config) for shape in shapes}
        self.unit, self._clock = math.lcm(ARCHITECTURES[config.model_type].unit_bytes(config), *lengths), clock
        # Layers of a part by how often a patch passes through them.
        chains: dict[tuple[str, int], list[LayerShape]] = {}
        for shape in shapes:
            chains.setdefault((part_of(shape.path), self.unit // decoding.layer_bytes(shape.path, config)), []).append(shape)
        bits = cache_bits or CacheBits()
        widths = [32 if each == 16 else each for each in (bits.keys, bits.values)]
        first, *finer = decoding.stacks(config)
        self._level = f"{first.level} cache"
        self._kept = {
            context: _attention(module, first, first.kept(context // first.row_bytes), widths) for context in contexts
        }
        # A row of a sequence sees half of the others on average; one with a window of its own all of that.
        longest = max(contexts)
        local = [
            (
                f"{stack.level} cache",
                _attention(module, stack, _rows_of(stack, longest), [32, 32]),
                self.unit // stack.row_bytes,
            )
            for stack in finer
        ]
        self._probes: list[tuple[str, _Probe, int]] = [
            *((part, ProductsOfLayers(module, chain), passes) for (part, passes), chain in chains.items()),
            *local,
        ]
        self._miniature = ARCHITECTURES[config.model_type].network(decoding.miniature(config))
        if decoding.by_operations:
            set_modules(self._miniature, [(shape.path, _NarrowProduct(shape)) for shape in shapes])
        mx.eval(self._miniature.parameters())
        self._observed: list[tuple[dict[str, float], dict[int, float]]] = []

    def run(self, patches: int) -> None:
        """Time the operations of so many patches: one observation."""
        size = self.unit
        state = begin(self._miniature, [bytes(size)])
        for _ in decoded(state, size):  # the first patch begins otherwise than those after it
            pass
        parts: dict[str, float] = dict.fromkeys([part for part, _, _ in self._probes], 0.0)
        attention = dict.fromkeys(self._kept, 0.0)
        for _ in range(patches):
            for context, probe in self._kept.items():
                attention[context] += probe.seconds()
            for step in range(size):
                for part, each, passes in self._probes:
                    if step % (size // passes) == 0:
                        parts[part] += each.seconds()
            # With caches and threads as the products leave them.
            for part, seconds in self._around_a_patch(state).items():
                parts[part] = parts.get(part, 0.0) + seconds
        count = patches * size
        by_context = {context: seconds / count for context, seconds in attention.items()}
        self._observed.append(({part: seconds / count for part, seconds in parts.items()}, by_context))

    def observed(self, context_bytes: int) -> list[dict[str, float]]:
        """Seconds of a byte at one of the contexts, in the parts that bench measures, by observation."""
        each = [{**parts, self._level: attention[context_bytes]} for parts, attention in self._observed]
        return [{part: parts[part] for part in PARTS if part in parts} for parts in each]

    def seconds_by_part(self, context_bytes: int) -> dict[str, float]:
        """The prediction at one of the contexts: the observation in the middle."""
        return sorted(self.observed(context_bytes), key=lambda parts: sum(parts.values()))[len(self._observed) // 2]

    def _around_a_patch(self, state: Continuation) -> Mapping[str, float]:
        """What the miniature takes for a patch, less what its attention and its head do."""
        # Where parts are not told apart all of it is overhead: so narrow a model's products and attention are next to nothing.
        before, start = state.part_seconds or {}, self._clock()
        for _ in decoded(state, self.unit):
            pass
        found = with_overhead(before, state.part_seconds or {}, self._clock() - start)
        assert found is not None
        return {part: seconds for part, seconds in found.items() if part != "head" and not part.endswith(" cache")}


class _NarrowProduct(nn.Module):
    """Stands for a layer: called as it is, with an output as wide, but of a few channels of its input."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self._channels = min(shape.depth, shape.group_size or NARROW)
        if shape.format is None:
            self.layer: nn.Module = Linear(self._channels, shape.columns, bias=False)
        else:
            packed = _encoded(shape.columns, self._channels, shape.format, self._channels)
            self.layer = packed_layer(packed, None)
            self.layer.activation_bits = shape.activation_bits

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x[..., : self._channels])


class _Probe(Protocol):
    def seconds(self) -> float:
        """Of one pass."""


class ProductsOfLayers:
    """Random layers of some shapes, or of the first of them where all would take too much memory."""

    def __init__(self, module: Any, shapes: Sequence[LayerShape]) -> None:
        taken: list[LayerShape] = []
        for shape in shapes:
            if taken and sum(each.nbytes for each in taken) + shape.nbytes > LIMIT_BYTES:
                break
            taken.append(shape)
        self._scale = sum(each.nbytes for each in shapes) / sum(each.nbytes for each in taken)
        encode = functools.cache(_encoded)
        self._probe = module.ProductProbe([_random_product(module, shape, encode) for shape in taken])

    def seconds(self) -> float:
        """Of a row through all layers."""
        return self._scale * float(self._probe.seconds())


def _random_product(module: Any, shape: LayerShape, encode: Callable[[int, int, str, int], Packed]) -> Any:
    layer: nn.Module
    if shape.format is None:
        layer = Linear(shape.depth, shape.columns, bias=False)
        layer.weight = layer.weight.astype(mx.float32)
    else:
        # Encoded once for all layers of a shape; each has its own copy.
        layer = packed_layer(again(encode(shape.columns, shape.depth, shape.format, shape.group_size)), None)
        layer.activation_bits = shape.activation_bits
    mx.eval(layer.parameters())
    return kernel_product(module, layer)


def _encoded(columns: int, depth: int, format: str, group_size: int) -> Packed:
    return mlx_encode(mx.random.normal((columns, depth), key=mx.random.key(0)), FORMATS[format], group_size)


def _attention(module: Any, stack: CachedStack, rows: int, bits: Sequence[int]) -> Any:
    seen = -1 if stack.window is None else stack.window
    return module.AttentionProbe(stack.layers, stack.heads, stack.kv_heads, stack.head_dim, rows, seen, *bits)


def _rows_of(stack: CachedStack, context_bytes: int) -> int:
    if stack.sequence_rows is not None:
        return stack.sequence_rows // 2
    return min(stack.window or 0, context_bytes // stack.row_bytes)


def can_predict(config: Any) -> bool:
    """Do the CPU kernels decode such a model on this device, so that operations can be timed apart?"""
    return decoding_of(config).miniature is not None and mx.default_device() == mx.Device(mx.cpu) and kernels()[0] is not None
