"""Patches of unequal lengths: where they end, and what their bytes come to together. No weights.

Bytes of a patch stand side by side, so that a patch is a run of equal numbers in `own`, [n, rows]: the patch of each byte.
Numbers of bytes whose patch has not ended are not below `count`; what they hold goes nowhere.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Patches:
    """Patches that end among some bytes of texts.

    Attributes:
        own: [n, rows] int, the patch of each byte, counted from the one that is open where they begin.
        last: [n, count] int, the last byte of each patch; 0 of filler.
        count: patches of the text that has the most; the others have filler behind theirs.
        longest: the longest patch, in bytes.
    """

    own: mx.array
    last: mx.array
    count: int
    longest: int


def ends_of_patches(
    entropies: npt.NDArray[np.float32], threshold: float, most: int | None, open_bytes: npt.NDArray[np.int64], first: bool
) -> npt.NDArray[np.bool_]:
    """Which bytes [n, rows] end a patch: those after which the next byte is hard to tell, and the mark of a beginning.

    Args:
        entropies: of the byte after each, in nats.
        most: bytes after which a patch ends anyway.
        open_bytes: [n], bytes of the open patch that came before.
        first: does a text begin here?
    """
    ends = entropies > threshold
    if first and ends.shape[1]:
        ends[:, 0] = True
    if most is not None:
        for text, length in enumerate(open_bytes.tolist()):
            for row in range(ends.shape[1]):
                ends[text, row] |= length + 1 >= most
                length = 0 if ends[text, row] else length + 1
    return ends


def patches_of(ends: npt.NDArray[np.bool_]) -> Patches:
    """The patches that end at `ends` [n, rows]."""
    n, rows = ends.shape
    through = ends.cumsum(axis=1)
    counts = through[:, -1] if rows else np.zeros(n, np.int64)
    last = np.zeros((n, int(counts.max(initial=0))), np.int64)
    longest = 1
    for text in range(n):
        own = np.flatnonzero(ends[text])
        last[text, : len(own)] = own
        longest = max(longest, int(np.diff(own, prepend=-1).max(initial=1)))
    return Patches(mx.array((through - ends).astype(np.int32)), mx.array(last.astype(np.int32)), last.shape[1], longest)


def running_maximum(x: mx.array, patches: Patches) -> mx.array:
    """The largest of the bytes of a patch up to each one, channel by channel: x [n, rows, ..]."""
    step = 1
    while step < patches.longest:
        same = patches.own[:, step:] == patches.own[:, :-step]
        same = same.reshape(*same.shape, *(1 for _ in x.shape[2:]))
        x = mx.concatenate([x[:, :step], mx.where(same, mx.maximum(x[:, step:], x[:, :-step]), x[:, step:])], axis=1)
        step *= 2
    return x


def at_rows(x: mx.array, rows: mx.array) -> mx.array:
    """Rows [n, m] of x [n, rows, ..]: [n, m, ..]."""
    return mx.take_along_axis(x, rows.reshape(*rows.shape, *(1 for _ in x.shape[2:])), axis=1)


def by_patch(x: mx.array, patches: Patches) -> mx.array:
    """Values [n, count, ..] of patches, for each of their bytes: [n, rows, ..]; those of open patches are another's."""
    return at_rows(x, mx.minimum(patches.own, patches.count - 1))


def summed(x: mx.array, patches: Patches) -> mx.array:
    """The sum over the bytes of each patch of x [n, rows, ..]: [n, count, ..]."""
    n, rows = patches.own.shape
    slots = patches.count + 1  # the last of bytes whose patch is open
    places = mx.minimum(patches.own, patches.count) + mx.arange(n)[:, None] * slots
    sums = mx.zeros((n * slots, *x.shape[2:]), dtype=x.dtype).at[places.reshape(-1)].add(x.reshape(n * rows, *x.shape[2:]))
    return sums.reshape(n, slots, *x.shape[2:])[:, : patches.count]


def pooled_attention(queries: mx.array, keys: mx.array, values: mx.array, patches: Patches, scale: float) -> mx.array:
    """Attention of each patch to its own bytes, which takes no more memory than a few rows a byte.

    Args:
        queries: [n, count, queries of a patch, heads, head_dim].
        keys, values: [n, rows, heads, head_dim].

    Returns:
        As the queries; finite for filler.
    """
    scores = scale * (by_patch(queries, patches) * keys[:, :, None]).sum(axis=-1).astype(mx.float32)
    largest = at_rows(mx.stop_gradient(running_maximum(scores, patches)), patches.last)
    weights = mx.exp(mx.minimum(scores - by_patch(largest, patches), 0))  # of open bytes, which no one reads, not large
    total = summed(weights, patches)[..., None]
    found = summed(weights[..., None] * values[:, :, None].astype(mx.float32), patches)
    return (found / mx.where(total > 0, total, 1)).astype(values.dtype)
