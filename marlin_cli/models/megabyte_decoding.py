"""What decoding with a MegaByte is made of; see `models.decoding_shape`."""

import dataclasses

from marlin_cli.models.decoding_shape import CachedStack, DecodingShape
from marlin_cli.models.layers import part_of
from marlin_cli.models.megabyte_config import MegaByteConfig, StageConfig

NARROW = 16  # the widths of the miniature


def stacks(config: MegaByteConfig) -> tuple[CachedStack, ...]:
    """The global stage, which keeps the context, and the finer ones, which begin anew with each of their sequences."""
    first, *finer = config.stages
    return (
        CachedStack("global", *_heads(first), row_bytes=config.patch_size, window=config.attention_window),
        *(
            CachedStack("local", *_heads(stage), row_bytes=config.bytes_per_token(number), sequence_rows=stage.length)
            for number, stage in enumerate(finer, start=1)
        ),
    )


def _heads(stage: StageConfig) -> tuple[int, int, int, int]:
    return stage.layers, stage.heads, stage.kv_heads or stage.heads, stage.width_of_head


def part_bytes(config: MegaByteConfig) -> dict[str, int]:
    """A patch passes the global part at once; of several stages in the middle all count as the finest: a bound."""
    return {"global": config.patch_size, "middle": config.stages[-1].length}


def layer_bytes(path: str, config: MegaByteConfig) -> int:
    """Bytes from one pass through a linear layer to the next."""
    part = part_of(path)
    if part == "middle":
        return config.bytes_per_token(1 + int(path.split(".")[1]))
    return config.patch_size if part == "global" else 1


def miniature_of(config: MegaByteConfig) -> MegaByteConfig:
    """The same model, as narrow as its layout lets it be."""
    paper = config.layout == "paper"  # where a patch is as wide as its bytes
    return dataclasses.replace(
        config,
        max_bytes=config.max_bytes + 2 * config.patch_size,
        byte_dim=NARROW,
        global_dim=NARROW * config.patch_size if paper else NARROW,
        global_heads=1,
        global_kv_heads=None,
        global_head_dim=None,
        global_ffn_dim=NARROW,
        middle=tuple(
            dataclasses.replace(stage, dim=NARROW, heads=1, kv_heads=None, head_dim=None, ffn_dim=NARROW)
            for stage in config.middle
        ),
        local_dim=NARROW,
        local_heads=1,
        local_kv_heads=None,
        local_head_dim=None,
        local_ffn_dim=NARROW,
    )


MEGABYTE_DECODING = DecodingShape(stacks, part_bytes, layer_bytes, miniature_of)
