"""A small MegaByte, trained on the spot for `benchmarks/endless.py` and `benchmarks/sparse.py`."""

import time

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.models.megabyte_config import MegaByteConfig

CONFIG = MegaByteConfig(
    patch_size=8, max_bytes=4096, global_layers=3, global_dim=128, global_heads=2,
    local_layers=2, local_dim=96, local_heads=2,
)  # fmt: skip


def trained(data: bytes, steps: int, window_bytes: int = 512, batch: int = 12, rate: float = 3e-3) -> ContinuingModel:
    """A model of `CONFIG` after so many steps on windows from anywhere in `data`."""
    model = ContinuingModel.from_config(CONFIG, seed=0, device="cpu")
    network, text, draw = model.network, np.frombuffer(data, dtype=np.uint8), np.random.default_rng(0)

    def loss(ids: mx.array) -> mx.array:
        return nn.losses.cross_entropy(network(ids), ids, reduction="mean")

    step = nn.value_and_grad(network, loss)
    schedule = optim.join_schedules(
        [optim.linear_schedule(0.0, rate, steps // 10 + 1), optim.cosine_decay(rate, steps)], [steps // 10 + 1]
    )
    optimizer = optim.AdamW(learning_rate=schedule)
    started = time.perf_counter()
    for number in range(steps):
        starts = draw.integers(0, len(text) - window_bytes, batch)
        ids = mx.array(np.stack([text[start : start + window_bytes] for start in starts]).astype(np.int32))
        cost, gradients = step(ids)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(network, gradients)
        mx.eval(cost, network.parameters(), optimizer.state)
        if number % 50 == 49:
            spent = time.perf_counter() - started
            print(f"  step {number + 1} of {steps}: {cost.item() / np.log(2):.3f} bits per byte, {spent:.0f} s", flush=True)
    return model
