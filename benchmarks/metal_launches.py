"""Launches and host time of decoding on Metal, counted and timed without a Mac: operation by operation, and by whole patches.

    python benchmarks/metal_launches.py [--format mxfp8] [--rounds 20]

The graph that the host builds for Metal is built here on any machine: kernels of our own, and MLX's where its CPU has none and
composes them of others, are replaced by single nodes of the right shapes that compute nothing. Counted is what a graph holds.
A node is a launch; none are those that only see memory otherwise (slices, reshapes, broadcasts), and a concatenation is one for
each part. So assumed: rows lie one after the other, storage that is written to is nobody else's, and attention is one launch.
`seconds` are those of building the graph (Python and MLX) and of building and scheduling it, with tiny widths, a patch, medians;
the processor's own work for the nodes that are left to it, matrix products above all, is in the second.
"""

import argparse
import contextlib
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
from marlin_cli.engine.decoding import GraphCache, Lockstep
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.models.megabyte import MegaByte, MegaByteConfig
from marlin_cli.ops import dispatch, metal_kernels
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

VIEWS = {
    "AsStrided", "Broadcast", "Contiguous", "Copy", "CustomTransforms", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "StopGradient",
    "Transpose", "Unflatten", "View",
}  # fmt: skip
SIZES = {"patch_size": 8, "max_bytes": 4096, "global_dim": 64, "global_heads": 2, "local_dim": 64, "local_heads": 2}


@contextlib.contextmanager
def metal(whole: bool) -> Iterator[None]:
    """Lets the graph be that of Metal, by whole patches or operation by operation."""

    def one_node(shapes: list[tuple[int, ...]], dtypes: list[mx.Dtype], inputs: list[Any]) -> list[mx.array]:
        outputs = [_constant(tuple(shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        return mx.depends(outputs, [array for array in inputs if isinstance(array, mx.array)])  # type: ignore[return-value]

    def kernel(**_: Any) -> Callable[..., list[mx.array]]:
        return lambda *, inputs, output_shapes, output_dtypes, **_: one_node(output_shapes, output_dtypes, inputs)

    def like_the_first(x: mx.array, *rest: Any, **options: Any) -> mx.array:
        return one_node([x.shape], [x.dtype], [x, *rest, *options.values()])[0]

    of_mlx = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")
    metal_kernels.kernel.cache_clear()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(mx.fast, "metal_kernel", kernel))
        for name in of_mlx:
            stack.enter_context(mock.patch.object(mx.fast, name, like_the_first))
        for module in (dispatch, whole_patches):
            stack.enter_context(mock.patch.object(module, "gpu", lambda: "metal"))
        for module, name in ((decoding, "fuse"), (encoder_decoder, "fuse_byt5")):
            stack.enter_context(mock.patch.object(module, name, lambda network: None))
        stack.enter_context(mock.patch.dict("os.environ", {"MARLIN_PATCHES": "whole" if whole else "steps"}))
        try:
            yield
        finally:
            metal_kernels.kernel.cache_clear()


CONSTANTS: dict[tuple[tuple[int, ...], mx.Dtype], mx.array] = {}


def _constant(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    if (shape, dtype) not in CONSTANTS:
        CONSTANTS[shape, dtype] = mx.contiguous(mx.zeros(shape, dtype))
        mx.eval(CONSTANTS[shape, dtype])
    return CONSTANTS[shape, dtype]


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
    mx.random.seed(0)
    network = MegaByte(MegaByteConfig(**SIZES, global_layers=global_layers, local_layers=local_layers))
    network.set_dtype(mx.bfloat16)
    if format != "dense":
        network = quantize_network(network, QuantizationSettings(global_format=format, local_format=format)).network
    mx.eval(network.parameters())
    return network


def state_of(network: MegaByte) -> Lockstep:
    """Decoding that stands at the beginning of a patch, the one before it decoded."""
    state = Lockstep(network, [bytes(range(8 * 10))])
    _advance(state, 8)
    return state


def _advance(state: Lockstep, count: int, read: bool = True) -> None:
    noise = Noise(0, state.config.vocab_size)
    while count:
        ids = state.advance(Sampling(), noise, count)
        if read:
            np.array(ids)
        count -= ids.shape[1]


def of_operations(network: MegaByte) -> tuple[Counter[str], Counter[str]]:
    """Launches of a byte in the midst of a patch, and of the global step that follows a patch."""
    with metal(whole=False):
        state = state_of(network)
        patch = network.config.patch_size
        _advance(state, 3)
        mx.eval(_arrays(state))
        _advance(state, 1, read=False)
        byte = launches(*_arrays(state))
        mx.eval(_arrays(state))
        _advance(state, patch - 5)
        mx.eval(_arrays(state), state.logits)
        _advance(state, 1, read=False)  # the id that ends the patch, of logits that are there
        return byte, launches(*_arrays(state))


def _arrays(state: Lockstep) -> list[mx.array]:
    """All that decoding holds."""
    arrays = [state._patch, state._before_patch]
    for each in state._states:
        arrays += [] if each.condition is None else [each.condition]
        for layer in each.cache.layers if isinstance(each.cache, GraphCache) else []:
            arrays += list(layer.with_room())
    return arrays


def of_patches(network: MegaByte) -> tuple[Counter[str], Counter[str]]:
    """Launches of a patch without the global step, and of one with it."""
    with metal(whole=True):
        state = state_of(network)
        decoder, condition = state._on_gpu, state._states[1].condition
        assert decoder is not None and condition is not None
        state._settle()
        mx.eval(condition)
        found = []
        with mock.patch.object(mx, "async_eval", lambda *arrays: None):
            for more in (False, True):
                patch = decoder.queue(condition, state._layers_in_place(), None, Sampling(), Noise(0, 256), more)
                mx.eval([each.with_room() for each in state._layers_in_place()])
                rest = [] if patch.condition is None else [patch.condition, *(a for tail in decoder._tails for a in tail)]
                found.append(launches(patch.ids, *rest))
        return found[0], found[1]


def linear_in_layers(count: Callable[[int], int]) -> tuple[int, int]:
    """Launches a layer, and the rest, of a count by layers."""
    one, two, three = (count(layers) for layers in (1, 2, 3))
    assert three - two == two - one
    return two - one, one - (two - one)


def seconds(network: MegaByte, whole: bool, rounds: int) -> tuple[float, float]:
    """Of the host a patch: building its graph, and building and scheduling it."""
    patch = network.config.patch_size
    with metal(whole):
        building, both = [], []
        for round in range(rounds + 2):
            state = state_of(network)
            _advance(state, patch)
            started = time.perf_counter()
            _advance(state, patch)
            both.append(time.perf_counter() - started)
            mx.eval(_arrays(state))
            with mock.patch.object(mx, "async_eval", lambda *arrays: None):
                if whole:
                    state._settle()
                    state._states[1].condition = mx.array(state._states[1].condition)
                started = time.perf_counter()
                _advance(state, patch, read=False) if not whole else _queue(state)
                building.append(time.perf_counter() - started)
            del round
        return statistics.median(building[2:]), statistics.median(both[2:])


def _queue(state: Lockstep) -> None:
    state._queue(Sampling(), Noise(0, 256), True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--format", default="mxfp8", help="of the weights: dense, or a packed format")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    patch = SIZES["patch_size"]

    def network(local_layers: int, global_layers: int) -> MegaByte:
        return network_of(options.format, global_layers, local_layers)

    before = [
        linear_in_layers(lambda n: of_operations(network(n, 1))[0].total()),
        linear_in_layers(lambda n: of_operations(network(1, n))[1].total()),
    ]
    print("operation by operation: a byte %d a layer + %d; a global step %d a layer + %d" % (*before[0], *before[1]))
    after = [
        linear_in_layers(lambda n: of_patches(network(n, 1))[0].total()),
        linear_in_layers(lambda n: of_patches(network(1, n))[1].total() - of_patches(network(1, n))[0].total()),
    ]
    print("whole patches: a patch of %d bytes %d a layer + %d; a global step %d a layer + %d" % (patch, *after[0], *after[1]))
    print(
        "what is launched, a byte:", dict(of_operations(network(2, 2))[0]), "and a patch:", dict(of_patches(network(2, 2))[1])
    )
    for name, shape in {"demo's": (2, 6), "166 M": (4, 12)}.items():
        times = [seconds(network(*shape), whole, options.rounds) for whole in (False, True)]
        print(
            f"{name} layers, ms a patch: building {1e3 * times[0][0]:.2f} -> {1e3 * times[1][0]:.2f}"
            f" ({times[0][0] / times[1][0]:.1f} times), with scheduling {1e3 * times[0][1]:.2f} -> {1e3 * times[1][1]:.2f}"
            f" ({times[0][1] / times[1][1]:.1f} times)"
        )


if __name__ == "__main__":
    main()
