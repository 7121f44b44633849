"""Every operation once, in plain MLX, slow where it must be and obviously right: the truth for all fast twins."""

import mlx.core as mx


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    *,
    window: int | None = None,
    left_padding: mx.array | None = None,
) -> mx.array:
    """Causal attention of the last rows of a sequence over all of it.

    Args:
        queries: [batch, heads, rows, head_dim]; row i stands at position total - rows + i.
        keys, values: [batch, kv_heads, total, head_dim]; kv_heads divides heads.
        scale: factor of the dot products.
        window: a row sees itself and at most this many rows before it.
        left_padding: [batch] int, how many rows at the start of each sequence are filler.

    Returns:
        [batch, heads, rows, head_dim]; filler rows hold unspecified finite values.
    """
    rows, total = queries.shape[2], keys.shape[2]
    mask: mx.array | str | None = "causal" if rows > 1 else None
    if window is not None or left_padding is not None:
        query_positions = mx.arange(total - rows, total)[:, None]
        key_positions = mx.arange(total)[None]
        allowed = key_positions <= query_positions
        if window is not None:
            allowed = allowed & (query_positions - key_positions <= window)
        if left_padding is not None:
            first = left_padding[:, None, None, None]
            # A filler row sees itself, so that its softmax stays finite.
            allowed = (allowed & (key_positions >= first)) | (key_positions == query_positions)
        mask = allowed
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def delay_one_row(rows: mx.array, before: mx.array | None = None) -> mx.array:
    """Each row replaced by the one before it: [batch, n, channels]; `before` [batch, 1, channels] or zeros come first."""
    if before is None:
        before = mx.zeros_like(rows[:, :1])
    return mx.concatenate([before, rows[:, :-1]], axis=1)


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """x [.., columns] @ weight [rows, columns].T: [.., rows]."""
    return x @ weight.T


def packed_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """x [.., columns] @ W.T for W [rows, columns] packed as `mx.quantize` packs it: [.., rows]."""
    if x.size == 0:  # MLX 0.32.4 divides by the number of rows and dies
        return mx.zeros((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
    return mx.quantized_matmul(
        x, weight, scales=scales, biases=biases, transpose=True, group_size=group_size, bits=bits, mode=mode
    )
