"""A MegaByte of marlin's own layout in torch on an NVIDIA GPU, a patch as one CUDA graph: the honest peer of generation there.

Caches are tensors made once; the global step and all local steps of a patch, with the greedy draw, are captured together, so
that a patch costs the host one replay. Weights are marlin's, dense. It follows `marlin_cli.models.megabyte` for the prefix
layout with rmsnorm, swiglu, rope and learned local positions.
"""

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from marlin_cli.models.megabyte import MegaByte


class GraphTorch:
    """Greedy decoding of some streams.

    Args:
        network: the weights, dense.
        dtype: of weights, activations and caches.
        streams: side by side, of one prompt.
        rows: of the global cache.
    """

    def __init__(self, network: MegaByte, dtype: torch.dtype, streams: int, rows: int) -> None:
        config = network.config
        assert (config.layout, config.ffn, config.norm, config.global_positions) == ("prefix", "swiglu", "rmsnorm", "rope")
        self.config, self.streams, self.dtype = config, streams, dtype
        self.weights = {
            path: torch.from_numpy(np.array(array.astype(mx.float32))).to("cuda", dtype)
            for path, array in tree_flatten(network.parameters())
        }
        half = config.stages[0].width_of_head // 2
        angles = torch.arange(rows + 1)[:, None] * config.rope_theta ** (-torch.arange(half) / half)
        self.cosine, self.sine = (table.to("cuda", dtype) for table in (angles.cos(), angles.sin()))
        self.global_cache, self.local_cache = self._cache(0, rows), self._cache(1, config.patch_size)
        self.position = torch.zeros(1, dtype=torch.long, device="cuda")
        self.columns = torch.arange(rows, device="cuda")
        self.ids = torch.zeros(streams, config.patch_size, dtype=torch.long, device="cuda")
        self.condition = torch.zeros(streams, 1, config.stages[1].dim, dtype=dtype, device="cuda")
        self.graph: torch.cuda.CUDAGraph | None = None

    def _cache(self, stage, rows):
        shape = self.config.stages[stage]
        sizes = (shape.layers, 2, self.streams, shape.heads, rows, shape.width_of_head)
        return torch.zeros(*sizes, dtype=self.dtype, device="cuda")

    def _layer(self, name, stage, number, x, rotation, mask, append):
        """Rows x [streams, n, dim] through one layer; append(keys, values) gives all that are seen."""
        shape, eps = self.config.stages[stage], self.config.norm_eps
        w = lambda path: self.weights[f"{name}.layers.{number}.{path}.weight"]  # noqa: E731
        normed = rms_norm(x, (shape.dim,), w("attention_norm"), eps)
        queries, keys, values = (
            linear(normed, w(f"attention.{which}_proj")).view(*x.shape[:2], shape.heads, -1).transpose(1, 2) for which in "qkv"
        )
        if rotation is not None:
            queries, keys = _rotated(queries, *rotation), _rotated(keys, *rotation)
        out = scaled_dot_product_attention(queries, *append(keys, values), attn_mask=mask)
        x = x + linear(out.transpose(1, 2).reshape(*x.shape[:2], -1), w("attention.o_proj"))
        normed = rms_norm(x, (shape.dim,), w("ffn_norm"), eps)
        return x + linear(silu(linear(normed, w("ffn.gate_proj"))) * linear(normed, w("ffn.up_proj")), w("ffn.down_proj"))

    def _global(self, x):
        """Rows behind `position` through the global stage: the condition of what follows the last one."""
        places = self.position + torch.arange(x.shape[1], device="cuda")
        rotation, mask = (self.cosine[places], self.sine[places]), self.columns[None] <= places[:, None]
        for number, cache in enumerate(self.global_cache):

            def append(keys, values, cache=cache):
                cache[0].index_copy_(2, places, keys)
                cache[1].index_copy_(2, places, values)
                return cache[0], cache[1]

            x = self._layer("global", 0, number, x, rotation, mask, append)
        x = rms_norm(x[:, -1:], (self.config.stages[0].dim,), self.weights["global.norm.weight"], self.config.norm_eps)
        return linear(x, self.weights["global_to_local.weight"])

    def _patch_rows(self, ids):
        width = self.config.patch_size * self.config.byte_width
        rows = embedding(ids, self.weights["byte_embedding.weight"]).reshape(ids.shape[0], -1, width)
        return linear(rows, self.weights["patch_projection.weight"])

    def _patch(self):
        """One patch: its ids, and the condition of the next."""
        positions = self.weights["local_positions.weight"]
        row = self.condition + positions[0]
        for step in range(self.config.patch_size):
            x = row
            for number, cache in enumerate(self.local_cache):

                def append(keys, values, cache=cache, step=step):
                    cache[0, :, :, step : step + 1], cache[1, :, :, step : step + 1] = keys, values
                    return cache[0, :, :, : step + 1], cache[1, :, :, : step + 1]

                x = self._layer("local", 1, number, x, None, None, append)
            x = rms_norm(x, (self.config.stages[1].dim,), self.weights["local.norm.weight"], self.config.norm_eps)
            drawn = linear(x[:, -1], self.weights["output.weight"]).argmax(-1)
            self.ids[:, step] = drawn
            if step + 1 < self.config.patch_size:
                row = (embedding(drawn, self.weights["local_byte_embedding.weight"]) + positions[step + 1])[:, None]
        self.condition.copy_(self._global(self._patch_rows(self.ids)))
        self.position += 1

    @torch.no_grad()
    def read(self, prompt: bytes) -> None:
        """Read a prompt of whole patches."""
        ids = torch.tensor([list(prompt)] * self.streams, device="cuda")
        start = self.weights["global_start"].view(1, 1, -1).expand(self.streams, 1, -1)
        x = torch.cat([start, self._patch_rows(ids)], dim=1)
        self.position.zero_()
        self.condition.copy_(self._global(x))
        self.position += x.shape[1]

    @torch.no_grad()
    def log2_predictions(self, data: bytes) -> np.ndarray:
        """Base-2 logarithms of probabilities [bytes, vocab] of each byte of `data`, whole patches, given those before it."""
        patch, positions = self.config.patch_size, self.weights["local_positions.weight"]
        ids = torch.tensor([list(data)], device="cuda")
        start, rows = self.weights["global_start"].view(1, 1, -1), self._patch_rows(ids)[:, :-1]
        x = torch.cat([start, rows], dim=1)
        x = self._whole("global", 0, x, (self.cosine[: x.shape[1]], self.sine[: x.shape[1]]))
        condition = linear(x, self.weights["global_to_local.weight"]).transpose(0, 1)
        before = embedding(ids.view(-1, patch)[:, :-1], self.weights["local_byte_embedding.weight"])
        x = self._whole("local", 1, torch.cat([condition, before], dim=1) + positions, None)
        logits = linear(x, self.weights["output.weight"]).float().flatten(0, 1)
        return (torch.log_softmax(logits, dim=-1) / np.log(2)).cpu().numpy()

    def _whole(self, name, stage, x, rotation):
        """All rows of a stage at once, and its last norm."""
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device="cuda").tril()
        for number in range(self.config.stages[stage].layers):
            x = self._layer(name, stage, number, x, rotation, mask, lambda keys, values: (keys, values))
        return rms_norm(x, (x.shape[-1],), self.weights[f"{name}.norm.weight"], self.config.norm_eps)

    @torch.no_grad()
    def capture(self) -> None:
        """Capture a patch, which leaves the caches as three patches would."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._patch()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._patch()

    @torch.no_grad()
    def decode(self, patches: int) -> torch.Tensor:
        """The next patches: [streams, patches * patch_size]."""
        assert self.graph is not None
        found = []
        for _ in range(patches):
            self.graph.replay()
            found.append(self.ids.clone())
        return torch.cat(found, dim=1)


def _rotated(x, cosine, sine):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
