"""Tables of which single rows are looked up, dense and packed: a packed one is never unpacked whole."""

import mlx.core as mx
import mlx.nn as nn


class Table(nn.Module):
    """Rows [rows, columns], looked up by their numbers."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = mx.random.normal((rows, columns), scale=columns**-0.5)

    def __call__(self, rows: mx.array) -> mx.array:
        """Rows [.., columns] of numbers [..], in the type in which they are stored."""
        return self["weight"][rows]


class PackedTable(nn.Module):
    """The same, each row packed in one of MLX's formats; it holds what `mlx.nn.QuantizedEmbedding` holds."""

    def __init__(self, arrays: dict[str, mx.array], *, group_size: int, bits: int, mode: str) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        for name in ("weight", "scales", "biases", "global_scale"):
            if name in arrays:
                self[name] = arrays[name]
        self.freeze()

    def __call__(self, rows: mx.array) -> mx.array:
        """Rows [.., columns] float32 of numbers [..]."""
        wanted, count = rows.flatten(), rows.size
        if count == 0:
            return mx.zeros((*rows.shape, self["weight"].shape[1] * 32 // self.bits))
        if count * self["scales"].shape[1] % 2:  # MLX 0.32.4 cannot unpack an odd number of groups
            wanted = mx.concatenate([wanted, wanted[:1]])
        # MLX computes in the type of float scales; in 16 bits that would add an error of its own.
        scales = self["scales"][wanted]
        biases = None if "biases" not in self else self["biases"][wanted].astype(mx.float32)
        found = mx.dequantize(
            self["weight"][wanted],
            scales if biases is None else scales.astype(mx.float32),
            biases,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=mx.float32,
        )
        found = found * self["global_scale"] if "global_scale" in self else found
        return found[:count].reshape(*rows.shape, -1)
