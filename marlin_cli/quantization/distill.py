"""Tunes packed weights so that the network predicts what it predicted in 16 bits: codes and scales, not formats.

Every packed layer is trained as level x scale: the level rounded to the format's values on the way forward and passed
straight through on the way back, the scale rounded as the format stores it. The loss is the KL divergence of the
packed network's next-byte distribution from the original's, so bytes need no labels, and at the end the levels are
packed again: size and layout are those of the network that came in.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_unflatten

from marlin_cli.errors import QuantizationError
from marlin_cli.models import Network, architecture_of, linear_layers, matrices_of, part_of, set_modules
from marlin_cli.ops import Linear, PackedTable, QuantizedLinear
from marlin_cli.ops.dispatch import linear
from marlin_cli.quantization.apply import copy_with
from marlin_cli.quantization.encoders import Packed, decode, round_e2m1, scalar
from marlin_cli.quantization.grids import grid_of
from marlin_cli.quantization.layers import packed_layer, packed_of

AnyNetwork = TypeVar("AnyNetwork", bound=Network)


@dataclass(frozen=True)
class DistillSettings:
    """How far levels and scales may move. Rates are of Adam, falling to zero along a cosine."""

    level_rate: float = 0.01  # in levels of the format, a step
    scale_rate: float = 1e-3  # in parts of the scale, a step
    free_rate: float = 1e-3  # of what stays in 16 bits, in parts of the array's root mean square, a step
    steps: int = 100
    parts: tuple[str, ...] | None = ("local", "head")  # see `models.part_of`; None tunes all


def settings_for(network: Network, steps: int) -> DistillSettings:
    """So many steps as a network's architecture takes them."""
    plain, tuning = DistillSettings(steps=steps), architecture_of(network).tuning
    level_rate, scale_rate, free_rate = (tuning.share * rate for rate in (plain.level_rate, plain.scale_rate, plain.free_rate))
    return DistillSettings(level_rate, scale_rate, free_rate, steps, tuning.parts)


class _TunedLinear(nn.Module):
    """A packed linear layer as levels [rows, groups, size] and scales that can be trained."""

    def __init__(self, weight: mx.array, packed: Packed, bias: mx.array | None) -> None:
        super().__init__()
        grid = grid_of(packed)
        rows, groups = grid.scales.shape
        self._packed, self._stored = packed, packed.scales.dtype
        scales, offsets = mx.array(grid.scales)[..., None], 0.0 if grid.biases is None else mx.array(grid.biases)[..., None]
        self._scales, self._offsets = scales, offsets
        self._bias: mx.array | None = bias
        exact = (weight.astype(mx.float32).reshape(rows, groups, -1) - offsets) / scales
        # The levels that were chosen, approached from where the original weight lies if that rounds to them.
        levels = mx.array(_levels_of(packed)).reshape(rows, groups, -1)
        self.levels = mx.where(self._rounded(exact) == levels, self._clipped(exact), levels)
        self.gain = mx.zeros((rows, groups, 1))  # relative change of the scale
        if grid.biases is not None:
            self.shift = mx.zeros((rows, groups, 1))  # change of the bias, in scales

    def __call__(self, x: mx.array) -> mx.array:
        y = differentiable_linear(x, self.weight())
        return y if self._bias is None else y + self._bias

    def weight(self) -> mx.array:
        """The weights as they will be decoded, differentiable: [rows, columns]."""
        clipped = self._clipped(self.levels)
        value = clipped + mx.stop_gradient(self._rounded(clipped) - clipped)
        weight = value * self._scale()
        if "shift" in self:
            weight = weight + self._offset()
        return weight.reshape(weight.shape[0], -1)

    def packed(self) -> Packed:
        """The packed weight at the present levels and scales."""
        scales = self._scale()[..., 0]
        mode = self._packed.format.mode
        changed = self._packed
        if mode == "nvfp4":
            codes = mx.to_fp8(scales / (self._packed.global_scale or 1.0))
            changed = dataclasses.replace(changed, scales=codes)
        elif "shift" in self:
            offsets = self._offset()[..., 0]
            changed = dataclasses.replace(changed, scales=scales.astype(self._stored), biases=offsets.astype(self._stored))
        levels = np.array(self._rounded(self.levels).reshape(scales.shape[0], -1))
        return grid_of(changed).pack(levels)

    def _scale(self) -> mx.array:
        if self._packed.format.mode.startswith("mx"):
            return self._scales  # powers of two: none lies near enough to move to
        wanted = self._scales * (1 + self.gain)
        if self._packed.format.mode == "nvfp4":
            unit = self._packed.global_scale or 1.0
            stored = mx.from_fp8(mx.to_fp8(mx.maximum(wanted / unit, 2.0**-9)), mx.float32) * unit
        else:
            stored = wanted.astype(self._stored).astype(mx.float32)
        return wanted + mx.stop_gradient(stored - wanted)

    def _offset(self) -> mx.array:
        wanted = self._offsets + self.shift * self._scales
        return wanted + mx.stop_gradient(wanted.astype(self._stored).astype(mx.float32) - wanted)

    def _clipped(self, levels: mx.array) -> mx.array:
        format = self._packed.format
        if format.mode == "affine":
            return mx.clip(levels, 0, (1 << format.bits) - 1)
        return mx.clip(levels, -6, 6) if format.bits == 4 else mx.clip(levels, -448, 448)

    def _rounded(self, levels: mx.array) -> mx.array:
        format = self._packed.format
        clipped = self._clipped(levels)
        if format.mode == "affine":
            return mx.round(clipped)
        if format.bits == 4:
            return mx.sign(clipped) * round_e2m1(mx.abs(clipped))
        return mx.from_fp8(mx.to_fp8(clipped), mx.float32)


class _PlainLinear(nn.Module):
    """A linear layer that is not packed, or not tuned, and lets gradients through."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        packed = isinstance(layer, QuantizedLinear)
        self.weight = decode(packed_of(layer)) if packed else layer["weight"].astype(mx.float32)
        if "bias" in layer:
            self.bias = layer["bias"].astype(mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        y = differentiable_linear(x, self.weight)
        return y + self.bias if "bias" in self else y


def distill(
    network: AnyNetwork,
    packed: AnyNetwork,
    batches: Iterable[Any],
    settings: DistillSettings | None = None,
    *,
    on_step: Callable[[int, float], None] = lambda step, divergence: None,
) -> AnyNetwork:
    """A copy of `packed` whose codes and scales are tuned to predict as `network` does.

    Memory: some twelve times the packed layers' weights in float32, and the activations of one batch.

    Args:
        network: the original, in float32.
        packed: its packed copy.
        batches: calibration bytes, see `feeds`; one a step, as many as `settings.steps` are taken.
        on_step: called with the number of the step and its KL divergence in bits a prediction.

    Raises:
        QuantizationError: no layer is packed, or the divergence is not finite.
    """
    settings = settings or DistillSettings()
    logits = architecture_of(network).logits
    original = linear_layers(network)
    tuned = {
        path: _TunedLinear(original[path]["weight"], packed_of(module), module.get("bias"))
        for path, module in linear_layers(packed).items()
        if isinstance(module, QuantizedLinear) and _is_tuned(path, settings)
    }
    if not tuned:
        raise QuantizationError("no layer of the model is packed; there is nothing to tune")
    student = copy_with(packed, [])
    set_modules(student, [(path, tuned.get(path) or _PlainLinear(layer)) for path, layer in linear_layers(packed).items()])
    stored = dict(tree_flatten(packed.parameters()))
    holding = (path for path, layer in matrices_of(packed).items() if isinstance(layer, (QuantizedLinear, PackedTable)))
    inside = tuple(f"{path}." for path in holding)
    free = {
        path: array.astype(mx.float32)
        for path, array in stored.items()
        if not path.startswith(inside) and _is_tuned(path, settings)
    }
    sizes = {path: mx.sqrt(mx.square(array).mean()) + 1e-12 for path, array in free.items()}
    adam = {
        name: optimizers.Adam(
            learning_rate=optimizers.cosine_decay(rate, settings.steps), betas=[0.9, 0.99], bias_correction=True
        )
        for name, rate in (("levels", settings.level_rate), ("scales", settings.scale_rate), ("free", settings.free_rate))
    }

    def divergence(parameters: dict[str, dict[str, mx.array]], batch: Any, wanted: mx.array) -> mx.array:
        for path, layer in tuned.items():
            layer.update({name: arrays[path] for name, arrays in parameters.items() if path in arrays and name in layer})
        # Adam's steps are all of a size: relative to each array's own, so that one rate fits all.
        student.update(tree_unflatten([(path, array * sizes[path]) for path, array in parameters["free"].items()]))
        found = _log_probabilities(logits(student, batch))
        return (mx.exp(wanted) * (wanted - found)).sum(axis=-1).mean()

    step = mx.value_and_grad(divergence)
    parameters = {
        name: {path: layer[name] for path, layer in tuned.items() if name in layer} for name in ("levels", "gain", "shift")
    }
    parameters["free"] = {path: array / sizes[path] for path, array in free.items()}
    rates = {"levels": "levels", "gain": "scales", "shift": "scales", "free": "free"}
    for number, batch in zip(range(settings.steps), batches, strict=False):
        wanted = _log_probabilities(logits(network, batch))
        mx.eval(wanted)
        loss, gradients = step(parameters, batch, wanted)
        for rate, optimizer in adam.items():
            names = [name for name in parameters if rates[name] == rate]
            chosen = {name: parameters[name] for name in names}
            parameters.update(optimizer.apply_gradients({name: gradients[name] for name in names}, chosen))
        mx.eval(parameters, loss, [optimizer.state for optimizer in adam.values()])
        value = scalar(loss) / math.log(2)
        if not math.isfinite(value):
            raise QuantizationError(
                f"at step {number + 1} of {settings.steps} the divergence of the tuned network is not finite; its weights are"
                " damaged or overflow, or so many steps lead there: take fewer"
            )
        on_step(number, value)
    for path, layer in tuned.items():
        layer.update({name: arrays[path] for name, arrays in parameters.items() if path in arrays and name in layer})
    packed_again = {path: layer.packed() for path, layer in tuned.items()}
    # The last step is taken after the last divergence.
    for path, array in [*((path, decode(each)) for path, each in packed_again.items()), *parameters["free"].items()]:
        if not mx.isfinite(array).all().item():
            raise QuantizationError(f"{path!r}: the last step of {settings.steps} made it not finite; take fewer")
    result = copy_with(packed, [(path, packed_layer(packed_again[path], layer._bias)) for path, layer in tuned.items()])
    # Modules that hold what was tuned may be shared with the network that came in.
    shared = {path: layer for path, layer in linear_layers(result).items() if f"{path}.weight" in free}
    set_modules(result, [(path, _own(layer)) for path, layer in shared.items()])
    changed = [(path, (array * sizes[path]).astype(stored[path].dtype)) for path, array in parameters["free"].items()]
    result.load_weights(changed, strict=False)
    return result


def _log_probabilities(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _is_tuned(path: str, settings: DistillSettings) -> bool:
    """Is the layer or parameter in a part that is tuned?"""
    first = path.split(".")[0]
    part = "head" if first == "output" else "local" if first.startswith("local_") else part_of(path)
    return settings.parts is None or part in settings.parts


def _own(layer: nn.Module) -> nn.Module:
    """A plain linear layer with the same arrays."""
    copy = Linear(layer["weight"].shape[1], layer["weight"].shape[0], bias="bias" in layer)
    copy.update(layer.parameters())
    return copy


def _levels_of(packed: Packed) -> npt.NDArray[np.float32]:
    """The levels [rows, columns] of the codes in a packed weight."""
    words = np.array(packed.weight)
    bits = packed.format.bits
    codes = ((words[..., None] >> (np.arange(32 // bits, dtype=np.uint32) * bits)) & ((1 << bits) - 1)).astype(np.uint8)
    codes = codes.reshape(words.shape[0], -1)
    if packed.format.mode == "affine":
        return codes.astype(np.float32)
    if bits == 8:
        return np.array(mx.from_fp8(mx.array(codes), mx.float32))
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([magnitudes, -magnitudes])[codes]


def differentiable_linear(x: mx.array, weight: mx.array) -> mx.array:
    """`ops.linear` with its gradient written in the same products: the fast twins have none."""
    return cast(mx.array, _product(x, weight))


@mx.custom_function
def _product(x: mx.array, weight: mx.array) -> mx.array:
    return linear(x, weight)


@_product.vjp
def _linear_gradient(primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, weight = primals
    rows = cotangent.reshape(-1, cotangent.shape[-1])
    gradient = linear(mx.contiguous(rows.T), mx.contiguous(x.reshape(-1, x.shape[-1]).T))
    return linear(cotangent, mx.contiguous(weight.T)), gradient
