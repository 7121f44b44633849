"""What ranks that share models do in tests, run as a program by each; and the small models that they share."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from marlin_cli.api import MODELS, capability_of
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.stopping import Stopping
from marlin_cli.errors import MarlinError
from marlin_cli.models import ARCHITECTURES, Capability
from marlin_cli.models.bygpt5 import ByGPT5Config
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.ranks import Ranks, joined

TEXT = bytes(range(64)) + b"The rest is here, it is said."
PROMPTS = [b"", b"abcdefg", b"The rest is here.", b"0123456789" * 4]

SIZES = {
    "patch_size": 4, "max_bytes": 96, "global_layers": 2, "global_dim": 128, "global_heads": 4, "global_ffn_dim": 256,
    "local_layers": 1, "local_dim": 64, "local_heads": 2, "local_ffn_dim": 64,
}  # fmt: skip
LUCID = {"layout": "megabyte_pytorch", "byte_dim": 16, "token_shift": True, "ffn": "gelu", "ffn_bias": True}
T5 = {"d_model": 64, "ffn_dim": 128, "heads": 2, "head_dim": 32, "max_bytes": 96, "decoder_layers": 1}

# Configurations of which two ranks share a part, and how their weights are packed.
CASES: dict[str, tuple[Any, str | None]] = {
    "dense": (MegaByteConfig(**{**SIZES, "global_layers": 10}), None),
    "grouped": (MegaByteConfig(**SIZES, global_kv_heads=2, qk_norm=True), None),
    "one head of keys": (MegaByteConfig(**SIZES, global_kv_heads=1, attention_window=3), None),
    "biases": (MegaByteConfig(**{**SIZES, **LUCID}, global_positions="learned"), None),
    "biases int4": (MegaByteConfig(**{**SIZES, **LUCID}, global_positions="learned"), "int4"),
    "paper": (MegaByteConfig(**SIZES, layout="paper", global_positions="learned", norm="layernorm"), None),
    "nvfp4": (MegaByteConfig(**SIZES), "nvfp4"),
    "mxfp4": (MegaByteConfig(**SIZES, global_kv_heads=2), "mxfp4"),
    "mxfp8": (MegaByteConfig(**SIZES), "mxfp8"),
    "int4": (MegaByteConfig(**SIZES), "int4"),
    "int8": (MegaByteConfig(**SIZES), "int8"),
    "byt5": (ByT5Config(**T5, encoder_layers=2), None),
    "byt5 nvfp4": (ByT5Config(**T5, encoder_layers=1), "nvfp4"),
    "byt5 that pools": (ByT5Config(**T5, encoder_layers=2, downsample_factor=2), None),
}


# A model of which each rank has all.
WHOLE = {"bygpt5": ByGPT5Config(d_model=64, ffn_dim=128, heads=2, head_dim=32, layers=1, max_bytes=96)}


def write(folder: Path, name: str) -> None:
    """A case's model, of random weights."""
    config, packing = (WHOLE[name], None) if name in WHOLE else CASES[name]
    architecture = ARCHITECTURES[config.model_type]
    model: Any = MODELS[architecture.capability].from_config(config, device="cpu")
    mx.random.seed(sum(map(ord, name)))
    weights = tree_map(
        lambda a: mx.random.normal(a.shape) * (0.3 if a.ndim == 1 else a.shape[-1] ** -0.5), model.network.parameters()
    )
    model.network.update(weights)
    if packing is not None:
        same = dict.fromkeys(("global_format", "encoder_format", "decoder_format", "cross_format"), packing)
        model = model.quantize(settings=QuantizationSettings(**same, group_size=32 if packing.startswith("int") else None))
    model.save(folder / name)


def seen(folder: Path, name: str, ranks: Ranks) -> dict[str, Any]:
    """What a model does, and what of it is in memory."""
    path = folder / name
    capability = capability_of(path)
    model: Any = MODELS[capability].from_pretrained(path, device="cpu", split=ranks)
    held = sum(array.nbytes for _, array in tree_flatten(model.network.parameters()))
    drawn = Sampling(temperature=0.8, seed=3)
    if capability is Capability.CONTINUES:
        found = [model.logits(TEXT), mx.array([model.bits_per_byte(TEXT, 32)])]
        limits: Any = Stopping(24)
    else:
        found = [model.logits(TEXT, b"an answer"), model.encode(TEXT)]
        limits = Stopping(8)
    texts = [_texts(model.pieces(PROMPTS, limits, sampling), len(PROMPTS)) for sampling in (Sampling(), drawn)]
    return {"values": [np.array(each).astype(np.float64).reshape(-1).tolist() for each in found], "texts": texts, "held": held}


def _texts(pieces: Any, count: int) -> list[str]:
    texts = [b""] * count
    for piece in pieces:
        texts[piece.stream] += piece.data
    return [text.hex() for text in texts]


def job_share(folder: Path) -> None:
    with joined() as ranks, ranks.computing():
        print(json.dumps({name: seen(folder, name, ranks) for name in CASES}))


def job_differ(folder: Path) -> None:
    """Rank 1 draws by another seed."""
    with joined() as ranks, ranks.computing():
        model: Any = MODELS[Capability.CONTINUES].from_pretrained(folder / "dense", device="cpu", split=ranks)
        list(model.pieces([b"abc"], Stopping(40), Sampling(temperature=1.0, seed=ranks.rank)))


def job_die(folder: Path) -> None:
    """Rank 1 ends in the middle of decoding."""
    with joined() as ranks, ranks.computing():
        model: Any = MODELS[Capability.CONTINUES].from_pretrained(folder / "dense", device="cpu", split=ranks)
        for number in range(100_000):
            for _ in model.pieces([b"abc"], Stopping(40), Sampling()):
                pass
            if number == 0:
                print("decoded", flush=True)
            if number == 3 and ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    try:
        globals()[f"job_{sys.argv[1]}"](Path(sys.argv[2]))
    except MarlinError as error:
        sys.exit(f"marlin: {error}")
