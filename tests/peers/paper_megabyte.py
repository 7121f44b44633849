"""A plain torch MegaByte in the paper's layout, with the parameter names and options of kjslag/spacebyte.

Written anew from the layout for use as an oracle: one full forward pass, no cache, ids given with their leading BOS.
"""

from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional


@dataclass
class PaperConfig:
    vocab_size: int = 256
    BOS: int = 255
    d_model: int = 64
    context_size: int = 64
    d_key: int = 16
    d_ff_mult: int = 4
    n_layers: int = 2
    patch_size: int = 4
    d_local: int = 32
    n_local_layers: int = 2
    use_padding: bool = True
    qk_layer_norm: bool = True
    init: str = "simple"
    nonlinear: str = "ReLU"
    rope: bool = False
    attention_groups: int | None = None
    attention_window: int | None = None
    layer_norm: str = "LayerNorm"


class Scale(nn.Module):
    """Either of its two norms; both have one parameter, `scale`."""

    def __init__(self, config, dim):
        super().__init__()
        self.kind = config.layer_norm
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        if self.kind == "LayerNorm":
            return functional.layer_norm(x, self.scale.shape, self.scale)
        return x * self.scale / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


def rotate(x):
    """Pairs of neighbours as complex numbers, turned by position; x [batch, heads, time, width]."""
    time, width = x.shape[-2:]
    frequency = 10000.0 ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.arange(time).float()[:, None] * frequency
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


class Attention(nn.Module):
    def __init__(self, config, dim, window):
        super().__init__()
        self.config, self.window = config, window
        self.layer_norm = Scale(config, dim)
        if config.attention_groups is None:
            self.QKV_linear = nn.Linear(dim, 3 * dim, bias=False)
        else:
            self.Q_linear = nn.Linear(dim, dim, bias=False)
            self.KV_linear = nn.Linear(dim, 2 * config.attention_groups * config.d_key, bias=False)
        self.linear = nn.Linear(dim, dim, bias=False)
        if config.qk_layer_norm:
            self.Q_layer_norm = Scale(config, config.d_key)
            self.K_layer_norm = Scale(config, config.d_key)

    def forward(self, x):
        batch, time, dim = x.shape
        x = self.layer_norm(x)
        if self.config.attention_groups is None:
            parts = self.QKV_linear(x).chunk(3, dim=-1)
        else:
            parts = (self.Q_linear(x), *self.KV_linear(x).chunk(2, dim=-1))
        q, k, v = (part.view(batch, time, -1, self.config.d_key) for part in parts)
        if self.config.qk_layer_norm:
            q, k = self.Q_layer_norm(q), self.K_layer_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.config.rope:
            q, k = rotate(q), rotate(k)
        if self.config.init == "muTransfer" and not self.config.qk_layer_norm:
            q = q * self.config.d_key**-0.5
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        at = torch.arange(time)
        mask = at[:, None] >= at
        if self.window is not None:
            mask = mask & (at[:, None] - at <= self.window)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.linear(out.transpose(1, 2).reshape(batch, time, dim))


class FeedForward(nn.Module):
    def __init__(self, config, dim):
        super().__init__()
        self.activation = {"ReLU": nn.ReLU(), "GELU": nn.GELU(approximate="tanh"), "SiLU": nn.SiLU()}[config.nonlinear]
        self.layer_norm = Scale(config, dim)
        self.linear_1 = nn.Linear(dim, config.d_ff_mult * dim, bias=False)
        self.linear_2 = nn.Linear(config.d_ff_mult * dim, dim, bias=False)

    def forward(self, x):
        return self.linear_2(self.activation(self.linear_1(self.layer_norm(x))))


class Block(nn.Module):
    def __init__(self, config, dim, window):
        super().__init__()
        self.attention = Attention(config, dim, window)
        self.feedforward = FeedForward(config, dim)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.feedforward(x)


class Logits(nn.Module):
    def __init__(self, config, dim):
        super().__init__()
        self.vocab_size = config.vocab_size
        self.layer_norm = Scale(config, dim)
        self.logits_linear = nn.Linear(dim, -(-config.vocab_size // 64) * 64, bias=False)

    def forward(self, x):
        return self.logits_linear(self.layer_norm(x))[..., : self.vocab_size]


class PaperMegaByte(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        byte_dim = c.d_model // c.patch_size
        self.global_token_embedding = nn.Embedding(c.vocab_size, byte_dim)
        self.global_position_encoding = nn.Parameter(torch.randn(c.context_size, byte_dim))
        self.global_blocks = nn.ModuleList(Block(c, c.d_model, c.attention_window) for _ in range(c.n_layers))
        self.global_to_local = nn.Linear(byte_dim, c.d_local)
        self.local_token_embedding = nn.Embedding(c.vocab_size, c.d_local)
        self.local_position_encoding = nn.Parameter(torch.randn(c.patch_size, c.d_local))
        self.local_blocks = nn.ModuleList(Block(c, c.d_local, None) for _ in range(c.n_local_layers))
        if c.use_padding:
            self.global_pad = nn.Parameter(torch.randn(c.d_model))
            self.local_pad = nn.Parameter(torch.randn(c.d_local))
        self.logits = Logits(c, c.d_local)

    def forward(self, data):
        """Logits [batch, total, vocab] of bytes [batch, total], a multiple of the patch: row i predicts byte i."""
        c = self.config
        batch, total = data.shape
        bos = torch.full((batch, c.patch_size), c.BOS)
        # The global stage reads whole patches, one patch late; the local stage reads bytes, one byte late.
        late_patches = torch.cat([bos, data], 1)[:, :total]
        late_bytes = torch.cat([bos[:, :1], data], 1)[:, :total]
        x = self.global_token_embedding(late_patches) + self.global_position_encoding[:total]
        x = x.view(batch, -1, c.d_model)
        y = self.local_token_embedding(late_bytes).view(-1, c.patch_size, c.d_local) + self.local_position_encoding
        if c.use_padding:
            x = torch.cat([self.global_pad.expand(batch, 1, -1), x[:, 1:]], 1)
            y = torch.cat([self.local_pad.expand(len(y), 1, -1), y[:, 1:]], 1)
        for block in self.global_blocks:
            x = block(x)
        y = y + self.global_to_local(x.reshape(batch * total, -1)).view(y.shape)
        for block in self.local_blocks:
            y = block(y)
        return self.logits(y).view(batch, total, -1)

    def checkpoint(self):
        """What spacebyte's train.py saves, less its optimizer."""
        return {"model": "MegaByte", "model_config": asdict(self.config), "state_dict": self.state_dict(), "iters": 7}
