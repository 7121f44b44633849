"""A linear layer over packed weights. It multiplies; `marlin_cli.quantization` does the packing."""

import mlx.core as mx
import mlx.nn as nn


class QuantizedLinear(nn.Module):
    """x @ W.T + bias for W packed in one of MLX's formats.

    It holds what `mlx.nn.QuantizedLinear` holds, and `global_scale`: a float32 scalar (a power of two) that
    multiplies the product. nvfp4 needs it, since group scales in E4M3 cannot reach small weights.
    """

    def __init__(self, arrays: dict[str, mx.array], *, group_size: int, bits: int, mode: str) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        for name in ("weight", "scales", "biases", "bias", "global_scale"):
            if name in arrays:
                self[name] = arrays[name]
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        if x.size == 0:  # MLX 0.32.4 divides by the number of rows and dies
            return mx.zeros((*x.shape[:-1], self["weight"].shape[0]), dtype=x.dtype)
        y = mx.quantized_matmul(
            x,
            self["weight"],
            scales=self["scales"],
            biases=self.get("biases"),
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        if "global_scale" in self:
            y = y * self["global_scale"].astype(y.dtype)
        if "bias" in self:
            y = y + self["bias"]
        return y
