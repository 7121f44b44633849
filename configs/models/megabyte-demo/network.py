"""The network that train.py trains, marlin's own layout of a MegaByte in PyTorch, and the optimiser of its layers."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG = {
    "model_type": "megabyte", "patch_size": 4, "byte_dim": 64, "vocab_size": 256,
    "global_dim": 320, "global_layers": 7, "global_heads": 5, "global_ffn_dim": 832,
    "local_dim": 192, "local_layers": 3, "local_heads": 3, "local_ffn_dim": 512,
    "ffn": "swiglu", "norm": "rmsnorm", "norm_eps": 1e-05, "global_positions": "rope", "rope_theta": 10000.0,
    "local_positions": "learned", "layout": "prefix", "max_bytes": 32768,
}  # fmt: skip
NORM_EPS = 1e-5


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + NORM_EPS)
        return (wide * scale * self.weight).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, heads, rows, head_dim] turned by its positions; cos and sin [rows, head_dim / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attend_few(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over the few rows of a patch, [n, heads, rows, head_dim]: sums, as a tile of them is mostly empty."""
    rows = q.shape[2]
    scores = (q[:, :, :, None].float() * k[:, :, None].float()).sum(-1) * q.shape[-1] ** -0.5
    later = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    return (weights[..., None] * v[:, :, None].float()).sum(3).to(q.dtype)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        batch, rows, dim = x.shape
        q, k, v = (
            part(x).view(batch, rows, self.heads, -1).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cos is None or sin is None:
            mixed = attend_few(q, k, v)
        else:
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, rows, dim))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(dim), Attention(dim, heads)
        self.ffn_norm, self.ffn = RMSNorm(dim), FeedForward(dim, hidden)

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class Stack(nn.Module):
    def __init__(self, config: dict, part: str) -> None:
        super().__init__()
        dim, heads, hidden = (config[f"{part}_{name}"] for name in ("dim", "heads", "ffn_dim"))
        self.layers = nn.ModuleList(Block(dim, heads, hidden) for _ in range(config[f"{part}_layers"]))
        self.norm = RMSNorm(dim)


class MegaByte(nn.Module):
    """Bytes [batch, total], total a multiple of patch_size, to the bits that each of them takes: the same shape."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config
        patch, dim, local = config["patch_size"], config["global_dim"], config["local_dim"]
        self.byte_embedding = nn.Embedding(256, config["byte_dim"])
        self.patch_projection = nn.Linear(patch * config["byte_dim"], dim, bias=False)
        self.global_start = nn.Parameter(torch.randn(dim) * 0.02)
        self.add_module("global", Stack(config, "global"))
        self.global_to_local = nn.Linear(dim, local, bias=False)
        self.local_byte_embedding = nn.Embedding(256, local)
        self.local_positions = nn.Embedding(patch, local)
        self.local = Stack(config, "local")
        self.output = nn.Linear(local, 256, bias=False)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "output.weight")):
                nn.init.zeros_(weight)
            elif "embedding" in name:
                nn.init.normal_(weight)
            elif "positions" in name:
                nn.init.normal_(weight, std=0.02)
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        self.block: Callable[..., Tensor]
        self.last_stage: Callable[..., Tensor]
        self.as_written()

    def as_written(self) -> None:
        self.block, self.last_stage = Block.forward, MegaByte.within_patches

    def compiled(self) -> None:
        """Compile one block and the last stage, not the whole network: seconds, and all layers share them.

        What is compiled is for one shape, so only batches of training should pass through it.
        """
        self.block = torch.compile(Block.forward, dynamic=False)
        self.last_stage = torch.compile(MegaByte.within_patches, dynamic=False)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Run as it is written, in any shape."""
        kept = self.block, self.last_stage
        self.as_written()
        try:
            yield
        finally:
            self.block, self.last_stage = kept

    def logits(self, states: Tensor, patches: Tensor) -> Tensor:
        """Of the bytes of patches [n, patch_size] under the global states [n, global_dim]: [n, patch_size, 256]."""
        lead = self.global_to_local(states)[:, None]
        rows = torch.cat([lead, self.local_byte_embedding(patches[:, :-1]).to(lead.dtype)], dim=1)
        rows = rows + self.local_positions.weight.to(rows.dtype)
        for layer in self.local.layers:
            rows = layer(rows)
        return self.output(self.local.norm(rows)).float()

    def within_patches(self, states: Tensor, patches: Tensor) -> Tensor:
        logits = self.logits(states, patches)
        return F.cross_entropy(logits.flatten(0, 1), patches.flatten(), reduction="none") / math.log(2)

    def states(self, ids: Tensor) -> Tensor:
        """The global state before each patch: [batch, patches, global_dim]."""
        config, (batch, total) = self.config, ids.shape
        patches = total // config["patch_size"]
        embedded = self.patch_projection(self.byte_embedding(ids).view(batch, patches, -1))
        rows = torch.cat([self.global_start.to(embedded.dtype).expand(batch, 1, -1), embedded[:, :-1]], dim=1)
        head = config["global_dim"] // config["global_heads"]
        turns = config["rope_theta"] ** (-torch.arange(0, head, 2, device=ids.device, dtype=torch.float32) / head)
        angles = torch.arange(patches, device=ids.device, dtype=torch.float32)[:, None] * turns
        stack = self.get_submodule("global")
        for layer in stack.layers:
            rows = self.block(layer, rows, angles.cos(), angles.sin())
        return stack.norm(rows)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.states(ids).flatten(0, 1)
        return self.last_stage(self, states, ids.reshape(-1, self.config["patch_size"])).view(ids.shape)


def orthogonal(updates: Tensor) -> Tensor:
    """The nearest orthogonal matrices of updates [n, rows, columns], by Newton-Schulz (Jordan et al., Muon, 2024)."""
    x = updates.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal; matrices of one shape go together, so that few kernels run."""

    def __init__(self, weights: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.02) -> None:
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for weight in weights:
            shapes.setdefault(tuple(weight.shape), []).append(weight)
        groups = [{"params": same} for same in shapes.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            weights: list[nn.Parameter] = group["params"]
            gradients = torch.stack([weight.grad for weight in weights])
            state = self.state[weights[0]]
            running = state.setdefault("momentum", torch.zeros_like(gradients))
            running.lerp_(gradients, 1 - group["momentum"])
            update = orthogonal(gradients.lerp(running, group["momentum"])).float()
            update *= max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            torch._foreach_mul_(weights, 1 - group["lr"] * group["decay"])
            torch._foreach_add_(weights, list(update.unbind()), alpha=-group["lr"])
