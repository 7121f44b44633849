"""One choice a part of a step of decoding: its Metal twin where that is the device and it takes the arguments, else MLX."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from marlin_cli.ops import dispatch, few_rows, metal_few_rows

P = ParamSpec("P")
R = TypeVar("R")


def _on_metal(plain: Callable[P, R], twin: Callable[P, R], takes: Callable[P, bool]) -> Callable[P, R]:
    @functools.wraps(plain)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        chosen = twin if dispatch.gpu() == "metal" and takes(*arguments, **options) else plain
        return chosen(*arguments, **options)

    return run


projections = _on_metal(few_rows.projections, metal_few_rows.projections, metal_few_rows.takes_projections)
attention_out = _on_metal(few_rows.attention_out, metal_few_rows.attention_out, metal_few_rows.takes_attention_out)
memory_attention_out = _on_metal(
    few_rows.memory_attention_out, metal_few_rows.memory_attention_out, metal_few_rows.takes_memory_attention_out
)
feed_forward = _on_metal(few_rows.feed_forward, metal_few_rows.feed_forward, metal_few_rows.takes_feed_forward)
linear_added = _on_metal(few_rows.linear_added, metal_few_rows.linear_added, metal_few_rows.takes_linear_added)
normed_linear = _on_metal(few_rows.normed_linear, metal_few_rows.normed_linear, metal_few_rows.takes_normed_linear)
draw_embed = _on_metal(few_rows.draw_embed, metal_few_rows.draw_embed, metal_few_rows.takes_draw_embed)
