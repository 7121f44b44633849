"""A MegaByte of marlin's own layout in torch, with both caches: the honest peer of generation. Greedy, one stream.

Global keys and values are kept for the whole context in tensors made once; those of the local model for a patch. Weights are
marlin's. It follows `marlin_cli.models.megabyte` for the prefix layout with rmsnorm, swiglu, rope and learned local positions.
"""

import numpy as np
import torch
from mlx.utils import tree_flatten
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from marlin_cli.models.megabyte import MegaByte


class CachedTorch:
    """Decoding of one stream.

    Args:
        network: the weights, dense.
        dtype: of weights, activations and caches.
    """

    def __init__(self, network: MegaByte, dtype: torch.dtype) -> None:
        config = network.config
        assert (config.layout, config.ffn, config.norm, config.global_positions) == ("prefix", "swiglu", "rmsnorm", "rope")
        self.config = config
        self.weights = {path: torch.from_numpy(np.array(array)).to(dtype) for path, array in tree_flatten(network.parameters())}
        self.dtype = dtype
        half = config.stages[0].width_of_head // 2
        frequencies = config.rope_theta ** (-torch.arange(half) / half)
        angles = torch.arange(config.max_bytes // config.patch_size + 1)[:, None] * frequencies
        self.cosine, self.sine = angles.cos().to(dtype), angles.sin().to(dtype)
        self.global_cache = self._cache(0, config.max_bytes // config.patch_size)
        self.local_cache = self._cache(1, config.patch_size)
        self.rows = 0

    def _cache(self, stage, rows):
        shape = self.config.stages[stage]
        return [torch.empty(2, 1, shape.heads, rows, shape.width_of_head, dtype=self.dtype) for _ in range(shape.layers)]

    def _rotated(self, x, start):
        first, second = x.chunk(2, dim=-1)
        cosine, sine = (table[start : start + x.shape[2]] for table in (self.cosine, self.sine))
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)

    def _stack(self, name, stage, x, caches, start):
        """Rows x [1, n, dim], the first at position `start`, through the layers of a stage."""
        shape, eps = self.config.stages[stage], self.config.norm_eps
        rows = x.shape[1]
        for number, cache in enumerate(caches):
            part = f"{name}.layers.{number}."
            w = lambda path, part=part: self.weights[part + path + ".weight"]  # noqa: E731
            normed = rms_norm(x, (shape.dim,), w("attention_norm"), eps)
            queries, keys, values = (
                linear(normed, w(f"attention.{which}_proj")).view(1, rows, shape.heads, -1).transpose(1, 2) for which in "qkv"
            )
            if stage == 0:
                queries, keys = self._rotated(queries, start), self._rotated(keys, start)
            cache[0, :, :, start : start + rows] = keys
            cache[1, :, :, start : start + rows] = values
            mask = None
            if rows > 1:
                mask = torch.ones(rows, start + rows, dtype=torch.bool).tril(start)
            out = scaled_dot_product_attention(queries, *cache[:, :, :, : start + rows], attn_mask=mask)
            x = x + linear(out.transpose(1, 2).reshape(1, rows, -1), w("attention.o_proj"))
            normed = rms_norm(x, (shape.dim,), w("ffn_norm"), eps)
            x = x + linear(silu(linear(normed, w("ffn.gate_proj"))) * linear(normed, w("ffn.up_proj")), w("ffn.down_proj"))
        return rms_norm(x, (shape.dim,), self.weights[f"{name}.norm.weight"], eps)

    def _global(self, rows):
        hidden = self._stack("global", 0, rows, self.global_cache, self.rows)
        self.rows += rows.shape[1]
        return linear(hidden[:, -1:], self.weights["global_to_local.weight"])

    def _patch_row(self, ids):
        return linear(embedding(ids, self.weights["byte_embedding.weight"]).reshape(1, -1, self.config.patch_size *
                      self.config.byte_width), self.weights["patch_projection.weight"])  # fmt: skip

    @torch.no_grad()
    def read(self, prompt: bytes) -> None:
        """Read a prompt of whole patches."""
        start = self.weights["global_start"].view(1, 1, -1)
        ids = torch.tensor(list(prompt)).view(1, -1)
        self.rows = 0
        self.condition = self._global(torch.cat([start, self._patch_row(ids)], dim=1) if len(prompt) else start)

    @torch.no_grad()
    def patch(self) -> bytes:
        """Decode the next patch."""
        positions = self.weights["local_positions.weight"]
        row, ids = self.condition + positions[0], []
        for step in range(self.config.patch_size):
            hidden = self._stack("local", 1, row, self.local_cache, step)
            ids.append(int(linear(hidden[0, -1], self.weights["output.weight"]).argmax()))
            if step + 1 < self.config.patch_size:
                row = (self.weights["local_byte_embedding.weight"][ids[-1]] + positions[step + 1]).view(1, 1, -1)
        self.condition = self._global(self._patch_row(torch.tensor([ids])))
        return bytes(ids)
