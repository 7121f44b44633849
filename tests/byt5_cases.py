"""Small random ByT5s and pairs for the tests of what runs calibration bytes through one."""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from marlin_cli.corpus import Example
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.pair_batch import PairBatch
from marlin_cli.quantization.pair_batches import pair_batches_by_domain

SHAPE = {"d_model": 32, "ffn_dim": 64, "heads": 2, "head_dim": 32, "encoder_layers": 2, "decoder_layers": 2}
KINDS = {
    "gated": {}, "relu, tied": {"gated_ffn": False, "activation": "relu", "tied_head": True},
    "pooling": {"downsample_factor": 4}, "pooling by maximum": {"downsample_factor": 3, "pooling": "max", "local_window": 5},
}  # fmt: skip


def random_byt5(**changes) -> ByT5:
    """A network whose every parameter, norms and biases included, is random."""
    network = ByT5(ByT5Config(**{**SHAPE, **changes}))
    mx.random.seed(0)
    network.update(
        tree_map(lambda a: mx.random.normal(a.shape) * (0.3 if a.ndim == 1 else a.shape[-1] ** -0.5), network.parameters())
    )
    network.eval()
    return network


def examples(seed: int, count: int = 48) -> list[Example]:
    """Pairs of unequal lengths in two domains; bytes with some structure, so that the inputs of layers are correlated."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        domain = "text" if index % 2 else "code"
        source, target = (
            rng.integers(0, 32 + 64 * (index % 2), rng.integers(1, 40), dtype=np.uint8).tobytes() for _ in range(2)
        )
        found.append(Example(domain, source, target, index, len(source) + len(target)))
    return found


def batches(seed: int, network: ByT5, count: int = 48) -> list[tuple[str, PairBatch]]:
    """Those examples in batches, a domain together."""
    return pair_batches_by_domain(examples(seed, count), network.config)


def divergence(network: ByT5, other: ByT5, seed: int) -> float:
    """Mean KL divergence in nats of what is predicted at every real place, each pair by itself."""
    total, places = 0.0, 0
    for example in examples(seed):
        source = mx.array([[*(byte + 3 for byte in example.source), 1]])
        target = mx.array([[0, *(byte + 3 for byte in example.target)]])
        p, q = (a - mx.logsumexp(a, axis=-1, keepdims=True) for a in (network(source, target), other(source, target)))
        total += (mx.exp(p) * (p - q)).sum().item()
        places += target.size
    return total / places
