"""A plain torch SpaceByte, with the parameter names and options of kjslag/spacebyte.

Written anew from the layout for use as an oracle: one full forward pass, no cache, ids given with their leading BOS.
"""

from dataclasses import asdict, dataclass

import torch
from paper_megabyte import Block, Logits
from torch import nn
from torch.nn import functional


@dataclass
class TorchSpaceConfig:
    vocab_size: int = 256
    BOS: int = 255
    d_model: int = 64
    context_size: int = 128
    d_key: int = 16
    d_ff_mult: int = 4
    n_layers: int = 2
    tie_embedding: bool = False
    qk_layer_norm: bool = True
    init: str = "simple"
    nonlinear: str = "ReLU"
    rope: bool = False
    attention_groups: int | None = None
    attention_window: int | None = None
    layer_norm: str = "LayerNorm"
    patch_method: str = "utf8"
    global_context_size: int = 64
    d_local: int = 32
    n_initial_layers: int = 1
    n_local_layers: int = 2
    local_attention_window: int = 16


def begins(data, start):
    """Places of the ids of one text that begin a patch: those between words whose neighbour before is within one."""
    found = []
    for place, value in enumerate(data):

        def between(id):
            return not (id < 128 and chr(id).isalnum()) and not 128 <= id < 192

        if value == start or (between(value) and (place == 0 or not between(data[place - 1]))):
            found.append(place)
    return found


class TorchSpaceByte(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.token_embedding = nn.Embedding(c.vocab_size, c.d_local)
        self.local_position_encoding = nn.Parameter(torch.randn(c.context_size, c.d_local))
        final = c.n_local_layers - c.n_initial_layers
        self.initial_blocks = nn.ModuleList(Block(c, c.d_local, c.local_attention_window) for _ in range(c.n_initial_layers))
        self.global_position_encoding = nn.Parameter(torch.randn(c.global_context_size, c.d_model))
        self.global_blocks = nn.ModuleList(Block(c, c.d_model, c.attention_window) for _ in range(c.n_layers))
        self.final_blocks = nn.ModuleList(Block(c, c.d_local, c.local_attention_window) for _ in range(final))
        self.logits = Logits(c, c.d_local)
        if c.tie_embedding:
            del self.logits.logits_linear

    def forward(self, data):
        """Logits [batch, total, vocab] of what follows each of ids [batch, total]."""
        return torch.stack([self.of_one(text) for text in data])

    def of_one(self, text):
        c = self.config
        x = self.token_embedding(text) + self.local_position_encoding[: len(text)]
        x = x[None]
        for block in self.initial_blocks:
            x = block(x)
        if c.patch_method == "periodic":
            every = list(range(0, len(text), c.context_size // c.global_context_size))
        else:
            every = begins(text.tolist(), c.BOS)
        places = every[: c.global_context_size]
        y = functional.pad(x[:, places], (c.d_model - c.d_local, 0)) + self.global_position_encoding[: len(places)]
        for block in self.global_blocks:
            y = block(y)
        x = x.clone()
        x[:, places] += y[..., -c.d_local :]
        for block in self.final_blocks:
            x = block(x)
        if c.tie_embedding:
            scale = {"standard": 1.0, "muTransfer": 1 / c.d_local, "simple": c.d_local**-0.5}[c.init]
            logits = functional.linear(scale * self.logits.layer_norm(x), self.token_embedding.weight)[0]
        else:
            logits = self.logits(x)[0]
        if len(every) > len(places):
            logits[every[len(places)] :] = -1e4
            logits[every[len(places)] :, c.BOS] = 1e4
        return logits

    def checkpoint(self):
        """What spacebyte's train.py saves, less its optimizer."""
        return {"model": "SpaceByte", "model_config": asdict(self.config), "state_dict": self.state_dict(), "iters": 7}
