"""EvaByte's forward pass in torch, transcribed from OpenEvaByte/evabyte (eva_pt_ref.py, modeling_evabyte.py; Apache-2.0).

Its own code imports triton kernels, which need a GPU. As there, what a byte sees is one softmax under a mask: exact keys of its
window, and a row for every chunk of windows before it.
"""

import torch


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    one, two = x.chunk(2, dim=-1)
    return torch.cat((-two, one), dim=-1)


class TorchEvaByte:
    """Runs the tensors of a hub folder, by their names there.

    Args:
        config: of config.json.
        tensors: all of its files.
    """

    def __init__(self, config: dict, tensors: dict[str, torch.Tensor]) -> None:
        self.config, self.tensors = config, tensors
        self.head_dim = config["hidden_size"] // config["num_attention_heads"]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        weight = self.tensors[name]
        return (1 + weight if self.config["norm_add_unit_offset"] else weight) * x

    def attention(self, x: torch.Tensor, layer: str) -> torch.Tensor:
        n, rows, _ = x.shape
        window, chunk = self.config["window_size"], self.config["chunk_size"]
        q, k, v = (
            (x @ self.tensors[f"{layer}.{name}_proj.weight"].T).view(n, rows, -1, self.head_dim).transpose(1, 2)
            for name in "qkv"
        )
        inverse = 1.0 / self.config["rope_theta"] ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angles = torch.cat((torch.outer(torch.arange(rows).float(), inverse),) * 2, dim=-1)
        q, k = (each * angles.cos() + rotate_half(each) * angles.sin() for each in (q, k))
        whole = rows // chunk * chunk
        chunked_k, chunked_v = (
            each[:, :, :whole].view(*each.shape[:2], whole // chunk, chunk, self.head_dim) for each in (k, v)
        )
        mu, phi = self.tensors[f"{layer}.adaptive_mu_k"], self.tensors[f"{layer}.adaptive_phi"]
        short_k = (torch.softmax((mu * chunked_k).sum(-1, keepdim=True), dim=-2) * chunked_k).sum(-2)
        log_phi = self.head_dim**-0.5 * ((phi * chunked_k).sum(-1, keepdim=True) - 0.5 * (chunked_k**2).sum(-1, keepdim=True))
        short_v = (torch.softmax(log_phi, dim=-2) * chunked_v).sum(-2)
        position = torch.arange(rows)[:, None]
        own, short = torch.arange(rows)[None], torch.arange(whole // chunk)[None]
        seen = torch.cat(
            ((own <= position) & (own // window == position // window), short * chunk // window < position // window), dim=1
        )
        scores = q @ torch.cat((k, short_k), dim=2).transpose(-1, -2) * self.head_dim**-0.5
        weights = torch.softmax(scores.masked_fill(~seen, -10e10), dim=-1)
        out = weights @ torch.cat((v, short_v), dim=2)
        return out.transpose(1, 2).reshape(n, rows, -1) @ self.tensors[f"{layer}.o_proj.weight"].T

    def mlp(self, x: torch.Tensor, layer: str) -> torch.Tensor:
        gate, up, down = (self.tensors[f"{layer}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [n, rows, heads of prediction, vocab] of ids [n, rows]."""
        x = self.tensors["model.embed_tokens.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{name}.input_layernorm.weight"), f"{name}.self_attn")
            x = x + self.mlp(self.norm(x, f"{name}.post_attention_layernorm.weight"), f"{name}.mlp")
        logits = self.norm(x, "model.norm.weight") @ self.tensors["lm_head.weight"].T
        return logits.view(*ids.shape, -1, self.config["vocab_size"])
