"""T5's attention over inputs of any length: whole where the scores fit the memory, else in blocks of queries."""

from collections.abc import Callable

import mlx.core as mx

from marlin_cli.ops.dispatch import attention

# Scores (batch x heads x queries x keys) held at once; 128 MiB in float32.
SCORES_AT_ONCE = 1 << 25


def relative_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    bias: mx.array,
    *,
    causal: bool = False,
    window: int | None = None,
    lengths: mx.array | None = None,
    scores_at_once: int = SCORES_AT_ONCE,
) -> mx.array:
    """Attention of every row over all rows, with a bias by distance and without a scale.

    Args:
        queries, keys, values: [batch, heads, rows, head_dim].
        bias: [heads, 2 * most + 1], as `relative_bias` of `ops.attention`.
        causal: a row sees itself and those before it.
        window: a row sees at most this many rows before and after it; no more keys are read, so that the cost grows
            with rows x window.
        lengths: [batch] how many rows of each sequence are real; the rest, at its end, are filler.
        scores_at_once: bounds the memory of the scores.

    Returns:
        [batch, heads, rows, head_dim]; filler rows hold unspecified finite values.
    """
    batch, heads, rows, _ = queries.shape
    if window is None and batch * heads * rows * rows <= scores_at_once:
        return attention(queries, keys, values, 1.0, causal=causal, lengths=lengths, relative_bias=bias)
    reach = rows if window is None else min(rows, window)

    def of_block(start: int, end: int) -> mx.array:
        first, last = max(0, start - reach), end if causal else min(rows, end + reach)
        # `attention` takes the queries for the last rows of the keys; the bias makes up for the rows that follow.
        return attention(
            queries[:, :, start:end], keys[:, :, first:last], values[:, :, first:last], 1.0,
            causal=causal,
            lengths=None if lengths is None else mx.maximum(lengths - first, 0),
            relative_bias=_shifted(bias, last - end, end - start + reach, window),
        )  # fmt: skip

    step = max(1, scores_at_once // (batch * heads * min(rows, 2 * reach + 1)))
    # A block of n queries reads n - 1 keys more than one query does: no longer than the window, it wastes little.
    return _in_blocks(of_block, rows, step if window is None else min(step, max(1, window)))


def cross_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    lengths: mx.array | None,
    scores_at_once: int = SCORES_AT_ONCE,
) -> mx.array:
    """Attention of queries [batch, heads, rows, head_dim] over another sequence, without bias and scale: the same shape.

    Args:
        keys, values: [batch, heads, total, head_dim].
        lengths: [batch] how many rows of the other sequence are real; all if None.
    """
    batch, heads, rows, _ = queries.shape

    def of_block(start: int, end: int) -> mx.array:
        return attention(queries[:, :, start:end], keys, values, 1.0, causal=False, lengths=lengths)

    return _in_blocks(of_block, rows, max(1, scores_at_once // max(1, batch * heads * keys.shape[2])))


def _in_blocks(of_block: Callable[[int, int], mx.array], rows: int, step: int) -> mx.array:
    """The results of `of_block(start, end)` for blocks of `step` rows, one after the other, as one."""
    if rows <= step:
        return of_block(0, rows)
    blocks = []
    for start in range(0, rows, step):
        block = of_block(start, min(rows, start + step))
        mx.eval(block)  # the graph of all blocks at once would hold all their scores
        blocks.append(block)
    return mx.concatenate(blocks, axis=2)


def _shifted(bias: mx.array, shift: int, distance: int, window: int | None) -> mx.array:
    """`bias` for queries counted `shift` rows too late, for distances up to `distance`; nothing is seen beyond `window`."""
    most = bias.shape[1] // 2
    reach = distance + shift
    true = mx.arange(-reach, reach + 1) + shift
    table = bias[:, mx.clip(true, -most, most) + most]
    return table if window is None else mx.where(mx.abs(true) <= window, table, mx.finfo(bias.dtype).min)
