"""Small random networks of every layout and architecture, and a trained one, which tests of all rooms take."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from marlin_cli.models import ARCHITECTURES
from marlin_cli.models.block_recurrent import BlockRecurrentConfig
from marlin_cli.models.blt_config import BltConfig, StackConfig
from marlin_cli.models.bygpt5 import ByGPT5Config
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.canine import CanineConfig
from marlin_cli.models.evabyte import EvaByteConfig
from marlin_cli.models.gbst import GbstConfig
from marlin_cli.models.la_canine import LaCanineConfig
from marlin_cli.models.megabyte_config import MegaByteConfig, StageConfig
from marlin_cli.models.spacebyte_config import SpaceByteConfig

# The demo that marlin shipped until November 2026: smaller, with patches of 8 bytes, stored in bfloat16. For what
# expects numbers of a model that does not change, and for what would take longer with the one that ships.
FIRST_DEMO = Path(__file__).parent / "data" / "megabyte-demo"

SMALL = {
    "patch_size": 4, "max_bytes": 96,
    "global_layers": 2, "global_dim": 32, "global_heads": 2,
    "local_layers": 2, "local_dim": 16, "local_heads": 2,
}  # fmt: skip
LUCID = {**SMALL, "layout": "megabyte_pytorch", "byte_dim": 16, "token_shift": True, "ffn": "gelu", "ffn_bias": True}
MIDDLE = StageConfig(length=2, layers=2, dim=24, heads=2, ffn_dim=48, positions="learned")

# One configuration for each way that rows are made, and for each option of attention and feed-forward.
CONFIGS = {
    "prefix": MegaByteConfig(**SMALL),
    "prefix learned, token shift": MegaByteConfig(
        **SMALL, global_positions="learned", local_positions="rope", token_shift=True
    ),
    "paper": MegaByteConfig(**SMALL, layout="paper", global_positions="learned", ffn="relu", norm="layernorm", qk_norm=True),
    "paper without pads, window": MegaByteConfig(
        **SMALL,
        layout="paper",
        global_positions="learned+rope",
        start_tokens=False,
        attention_window=3,
        rope_interleaved=True,
        norm="variance",
        ffn="silu",
    ),  # fmt: skip
    "grouped attention": MegaByteConfig(**SMALL, global_kv_heads=1, local_kv_heads=1, ffn="gelu_tanh"),
    "megabyte_pytorch": MegaByteConfig(**LUCID, global_positions="learned"),
    "megabyte_pytorch, 3 stages": MegaByteConfig(
        **{**LUCID, "patch_size": 8}, global_positions="rope", local_positions="none", middle=(MIDDLE,)
    ),
}


T5 = {"d_model": 32, "ffn_dim": 64, "heads": 1, "head_dim": 32}
PACKABLE = {
    **SMALL, "global_heads": 1, "global_layers": 1, "local_layers": 1, "local_dim": 32, "local_heads": 1,
    "global_ffn_dim": 64, "local_ffn_dim": 64,
}  # fmt: skip

# A tiny configuration of each architecture, in sizes that every format packs: tests/test_tiny_models.py runs everything on it.
CONTINUING = {
    "megabyte": MegaByteConfig(**PACKABLE),
    "bygpt5": ByGPT5Config(**T5, layers=1, max_bytes=96),
    "block_recurrent": BlockRecurrentConfig(
        d_model=32,
        ffn_dim=64,
        heads=2,
        head_dim=32,
        layers=2,
        recurrent_layers=(0,),
        block_bytes=48,
        state_vectors=6,
        max_bytes=96,
    ),
    "evabyte": EvaByteConfig(
        d_model=32,
        ffn_dim=64,
        heads=1,
        layers=1,
        window_bytes=24,
        chunk_bytes=8,
        prediction_heads=3,
        max_bytes=96,
    ),
    "blt": BltConfig(
        patcher=StackConfig(32, 64, 1, 1, rope_theta=1e4),
        encoder=StackConfig(32, 64, 1, 1),
        patches=StackConfig(64, 64, 2, 1),
        decoder=StackConfig(32, 64, 2, 1),
        threshold=5.51,  # of random weights, that about half of the bytes end a patch
        patcher_window=12,
        local_window=8,
        hash_lengths=(3, 4),
        hash_buckets=64,
        max_bytes=96,
    ),
    "spacebyte": SpaceByteConfig(
        max_bytes=96,
        max_patches=64,
        global_layers=1,
        global_dim=64,
        global_heads=2,
        global_ffn_dim=64,
        initial_layers=1,
        final_layers=1,
        local_dim=32,
        local_heads=1,
        local_ffn_dim=64,
        local_window=12,
        start_id=256,  # so that random bytes end no text
        vocab_size=257,
    ),
}
ANSWERING = {
    "byt5": ByT5Config(**T5, encoder_layers=1, decoder_layers=1, max_bytes=96),
    "gbst": GbstConfig(**T5, encoder_layers=1, decoder_layers=1, max_bytes=96, block_sizes=(1, 2, 3, 4), bytes_in_row=3),
}
CHARACTERS = {
    "d_model": 32, "ffn_dim": 64, "heads": 2, "layers": 1, "hash_functions": 4, "hash_buckets": 128, "max_characters": 128,
    "block_characters": 16,
}  # fmt: skip
ENCODING = {
    "canine": CanineConfig(**CHARACTERS, head="token", labels=("O", "A", "B")),
    "la_canine": LaCanineConfig(**CHARACTERS, adapter_dim=32, language="cs"),
}


def random_weights(config: Any, seed: int = 0) -> Any:
    """A network whose every parameter, norms and start vectors included, is random."""
    mx.random.seed(seed)
    network: Any = ARCHITECTURES[config.model_type].network(config)
    network.update(
        tree_map(lambda a: mx.random.normal(a.shape) * (0.3 if a.ndim == 1 else a.shape[-1] ** -0.5),
                 network.parameters())
    )  # fmt: skip
    mx.eval(network.parameters())
    return network
