"""Launches and host time of decoding on Metal, counted and timed without a Mac: by operations, and by compiled graphs.

    python benchmarks/metal_launches.py [--format mxfp8] [--rounds 20]

The graph that the host builds for Metal is built here on any machine: kernels of our own, and MLX's where its CPU has none and
composes them of others, and packed products, are replaced by single nodes of the right shapes that compute nothing. Counted is
what a graph holds.
A node is a launch; none are those that only see memory otherwise (slices, reshapes, broadcasts), and a concatenation is one for
each part. So assumed: rows lie one after the other, storage that is written to is nobody else's, and attention is one launch.
Times are medians of the host alone, with tiny widths: of building a graph (Python and MLX), and of building and scheduling it.
In the second is what a processor takes for the nodes that are left to it: elementwise ones, and dense products.
"""

import argparse
import contextlib
import functools
import io
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from marlin_cli.engine import decoding, encoder_decoder, whole_patches
from marlin_cli.engine.compiled_answers import CompiledAnswers
from marlin_cli.engine.compiled_patches import CompiledPatches
from marlin_cli.engine.decoding import GraphCache, Lockstep
from marlin_cli.engine.encoder_decoder import AnswerState, GraphAnswers
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import dispatch, metal_kernels
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

VIEWS = {
    "AsStrided", "Broadcast", "Contiguous", "Copy", "CustomTransforms", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
SIZES = {"patch_size": 8, "max_bytes": 4096, "global_dim": 64, "global_heads": 2, "local_dim": 64, "local_heads": 2}
BYT5_SIZES = {"d_model": 64, "ffn_dim": 128, "heads": 2, "head_dim": 32, "encoder_layers": 1}


@contextlib.contextmanager
def metal(compiled: bool) -> Iterator[None]:
    """Lets the graph be that of Metal, compiled or by operations."""

    def one_node(shapes: list[tuple[int, ...]], dtypes: list[mx.Dtype], inputs: list[Any]) -> list[mx.array]:
        outputs = [_constant(tuple(shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        return mx.depends(outputs, [array for array in inputs if isinstance(array, mx.array)])  # type: ignore[return-value]

    def kernel(**_: Any) -> Callable[..., list[mx.array]]:
        return lambda *, inputs, output_shapes, output_dtypes, **_: one_node(output_shapes, output_dtypes, inputs)

    def like_the_first(x: mx.array, *rest: Any, **options: Any) -> mx.array:
        return one_node([x.shape], [x.dtype], [x, *rest, *options.values()])[0]

    def product(x: mx.array, weight: mx.array, **parts: Any) -> mx.array:
        return one_node([(*x.shape[:-1], weight.shape[0])], [x.dtype], [x, weight, parts["scales"]])[0]

    of_mlx = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")
    metal_kernels.kernel.cache_clear()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(mx.fast, "metal_kernel", kernel))
        stack.enter_context(mock.patch.object(mx, "quantized_matmul", product))
        for name in of_mlx:
            stack.enter_context(mock.patch.object(mx.fast, name, like_the_first))
        for module in (dispatch, whole_patches, encoder_decoder):
            stack.enter_context(mock.patch.object(module, "gpu", lambda: "metal"))
        stack.enter_context(mock.patch.object(decoding, "fuse", lambda network: None))
        stack.enter_context(mock.patch.object(encoder_decoder, "fuse_byt5", lambda network: None))
        stack.enter_context(mock.patch.dict("os.environ", {"MARLIN_PATCHES": "auto" if compiled else "operations"}))
        try:
            yield
        finally:
            metal_kernels.kernel.cache_clear()


@functools.cache
def _constant(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    made = mx.contiguous(mx.zeros(shape, dtype))
    mx.eval(made)
    return made


def launches(*outputs: mx.array) -> Counter[str]:
    """What the graph behind outputs that have not been evaluated launches, by MLX's names; `Depends` is a stand-in."""
    drawn = io.StringIO()
    mx.export_to_dot(drawn, *outputs)
    text = drawn.getvalue()
    found: Counter[str] = Counter()
    for node, name in re.findall(r'\{ (\d+) \[label ="(\w+)"', text):
        if name == "Concatenate":
            found[name] += len(re.findall(rf"-> {node}$", text, re.MULTILINE))
        elif name not in VIEWS:
            found[name] += 1
    return found


def network_of(format: str, global_layers: int, local_layers: int) -> MegaByte:
    """A MegaByte of tiny widths."""
    mx.random.seed(0)
    network = MegaByte(MegaByteConfig(**SIZES, global_layers=global_layers, local_layers=local_layers))
    return _packed(network, format, QuantizationSettings(global_format=format, local_format=format))


def byt5_of(format: str, layers: int) -> ByT5:
    """A ByT5 of tiny widths."""
    mx.random.seed(0)
    network = ByT5(ByT5Config(**BYT5_SIZES, decoder_layers=layers))
    settings = QuantizationSettings(encoder_format=format, decoder_format=format, cross_format=format)
    return _packed(network, format, settings)


def _packed(network: Any, format: str, settings: QuantizationSettings) -> Any:
    network.set_dtype(mx.bfloat16)
    if format != "16bit":
        network = quantize_network(network, settings).network
    mx.eval(network.parameters())
    return network


class Decoding:
    """A MegaByte's decoding that stands at the beginning of a patch."""

    def __init__(self, network: MegaByte) -> None:
        self.state, self.noise = Lockstep(network, [bytes(80)]), Noise(0, 256)
        self.decode(8)

    def decode(self, count: int, read: bool = True) -> None:
        """Draw so many ids, which the host reads, as it does, or leaves in the graph."""
        while count:
            ids = self.state.advance(Sampling(), self.noise, count)
            count -= ids.shape[1]
            if read:
                np.array(ids)

    def arrays(self) -> list[mx.array]:
        """All that is held."""
        state = self.state
        arrays = [state._patch, state._before_patch]
        for each in state._states:
            arrays += [] if each.condition is None else [each.condition]
            for layer in each.cache.layers if isinstance(each.cache, GraphCache) else []:
                arrays += list(layer.with_room())
        return arrays

    def settle(self) -> None:
        """Go on as if nothing had been queued."""
        self.state._settle()
        mx.eval(self.arrays())

    def queue(self, more: bool = True) -> list[mx.array]:
        """Build the graph of a patch, and of the global step after it if there is `more`; nothing is computed."""
        on_gpu, condition = self.state._on_gpu, self.state._states[1].condition
        decoder = None if on_gpu is None else on_gpu.decoder
        assert isinstance(decoder, CompiledPatches) and condition is not None
        layers = self.state._layers_in_place()
        with mock.patch.object(mx, "async_eval", lambda *arrays: None):
            decoder.enter(condition, self.state._before_patch, self.state._tail(), layers, None)
            patch = decoder.queue(layers, Sampling(), self.noise, more)
        if patch.following is None:
            return [patch.ids]
        return [patch.ids, patch.following, *(array for tail in decoder._tails for array in tail)]


def of_operations(network: MegaByte) -> tuple[int, int]:
    """Launches of a byte within a patch, and of what ends it: the global step and what is around it."""
    with metal(compiled=False):
        state = Decoding(network)
        state.decode(3)
        mx.eval(state.arrays())
        state.decode(1, read=False)
        byte = launches(*state.arrays()).total()
        mx.eval(state.arrays())
        state.decode(SIZES["patch_size"] - 5)
        mx.eval(state.arrays(), state.state.logits)
        state.decode(1, read=False)  # the id that ends the patch, of logits that are there
        return byte, launches(*state.arrays()).total() - 1


def of_patches(network: MegaByte) -> tuple[int, int]:
    """Launches of a patch, and of the global step behind it."""
    with metal(compiled=True):
        state, found = Decoding(network), []
        for more in (False, True):
            state.settle()
            found.append(launches(*state.queue(more)).total())
        return found[0], found[1] - found[0]


def of_answers(network: ByT5, compiled: bool) -> int:
    """Launches of a step of ByT5's decoder, from ids to logits."""
    with metal(compiled):
        state = AnswerState(network, [[5, 9, 1]])
        for _ in range(20):
            mx.eval(state.logits)
            state.push(mx.array([30]))
        return launches(state.logits, *_rows_of(state)).total()


def _rows_of(state: AnswerState) -> list[mx.array]:
    answers = state._answers
    if isinstance(answers, CompiledAnswers):
        return [array for tail in answers._tails for array in tail]
    assert isinstance(answers, GraphAnswers)
    return [rows.with_room() for cache in answers._caches for rows in (cache._keys, cache._values)]


def linear_in_layers(count: Callable[[int], int]) -> str:
    """A count by layers as "a layer + the rest"."""
    one, two, three = (count(layers) for layers in (1, 2, 3))
    assert three - two == two - one
    return f"{two - one} a layer + {one - (two - one)}"


def seconds(network: MegaByte, compiled: bool, rounds: int) -> tuple[float, float]:
    """Of the host a patch: building its graph, and building and scheduling it."""
    patch, building, both = SIZES["patch_size"], [], []
    with metal(compiled):
        state = Decoding(network)
        for _ in range(rounds + 3):
            started = time.perf_counter()
            state.decode(patch)
            both.append(time.perf_counter() - started)
        for _ in range(rounds + 3):
            if compiled:
                state.settle()
            started = time.perf_counter()
            kept = state.queue() if compiled else state.decode(patch, read=False)
            building.append(time.perf_counter() - started)
            mx.eval(kept, state.arrays())
    return statistics.median(building[3:]), statistics.median(both[3:])


def answer_seconds(network: ByT5, compiled: bool, rounds: int) -> tuple[float, float]:
    """The same of a step of ByT5's decoder."""
    building, both = [], []
    with metal(compiled):
        state = AnswerState(network, [[5, 9, 1]])
        for _ in range(rounds + 20):
            mx.eval(state.logits)
            started = time.perf_counter()
            state.push(mx.array([30]))
            building.append(time.perf_counter() - started)
            mx.eval(state.logits)
            both.append(time.perf_counter() - started)
    return statistics.median(building[20:]), statistics.median(both[20:])


def _compared(name: str, before: tuple[float, float], after: tuple[float, float]) -> None:
    for what, one, other in zip(("building", "building and scheduling"), before, after, strict=True):
        print(f"{name}, {what}: {1e3 * one:.3f} -> {1e3 * other:.3f} ms, {one / other:.1f} times")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--format", default="mxfp8", help="of the weights: 16bit, or a packed format")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    format, rounds, patch = options.format, options.rounds, SIZES["patch_size"]
    print("launches, by operations")
    print("  a byte:", linear_in_layers(lambda n: of_operations(network_of(format, 1, n))[0]))
    print("  a global step:", linear_in_layers(lambda n: of_operations(network_of(format, n, 1))[1]))
    print("  a step of ByT5's decoder:", linear_in_layers(lambda n: of_answers(byt5_of(format, n), False)))
    print("launches, compiled")
    print(f"  a patch of {patch} bytes:", linear_in_layers(lambda n: of_patches(network_of(format, 1, n))[0]))
    print("  a global step:", linear_in_layers(lambda n: of_patches(network_of(format, n, 1))[1]))
    print("  a step of ByT5's decoder:", linear_in_layers(lambda n: of_answers(byt5_of(format, n), True)))
    for name, shape in {"6 and 2 layers, a patch": (6, 2), "12 and 4 layers, a patch": (12, 4)}.items():
        _compared(name, *(seconds(network_of(format, *shape), compiled, rounds) for compiled in (False, True)))
    _compared("ByT5, 4 layers, a step", *(answer_seconds(byt5_of(format, 4), compiled, rounds) for compiled in (False, True)))


if __name__ == "__main__":
    main()
