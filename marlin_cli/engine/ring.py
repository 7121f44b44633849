"""What a layer remembers of a stream without an end, by operations of MLX: pages of a window, and the first rows beside it."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.cache import KeyValueCache, Pages
from marlin_cli.engine.endless import Reach
from marlin_cli.engine.states import Part
from marlin_cli.models.megabyte_layers import Attention
from marlin_cli.ops import paged_attention
from marlin_cli.ops.reference import KeyValueRows, unpack_rows


class RingCache(KeyValueCache):
    """Keys and values of one layer in pages, of which those are let go that no row to come sees; a `TurningCache`.

    A key is turned by its own place, once. A query reads the window turned by its own place, and the sinks turned as if it
    stood no farther from them than the window is long. Angles are reduced in double precision: a float knows no place after
    some million rows.
    """

    def __init__(self, reach: Reach, key_bits: int = 16, value_bits: int = 16) -> None:
        super().__init__()
        self._reach = reach
        self._is_packed = min(key_bits, value_bits) < 16
        self._pages = Pages(key_bits), Pages(value_bits)
        self._rows = 0
        self.dropped = 0  # rows that have been let go

    @property
    def rows(self) -> int:
        """Rows seen, those let go included."""
        return self._rows

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(pages.nbytes for pages in self._pages)

    def attend_turned(self, queries: mx.array, keys: mx.array, values: mx.array, by: Attention) -> mx.array:
        """See `TurningCache`."""
        reach, held = self._reach, self._rows - self.dropped
        self.dropped += [pages.drop(reach.sinks, held - reach.window) for pages in self._pages][0]
        places = np.arange(self._rows, self._rows + queries.shape[2])
        self._rows += queries.shape[2]
        own, keys = self._turned(queries, places, by), self._turned(keys, places, by)
        pages = self._pages[0].append(keys), self._pages[1].append(values)
        if places[-1] <= reach.farthest:  # every row sees all before it
            return paged_attention(own, *pages, by.scale)
        far = self._turned(queries, np.minimum(places, reach.farthest), by)
        return _attention(far, own, *pages, by.scale, reach)

    def _turned(self, x: mx.array, places: npt.NDArray[np.int64], by: Attention) -> mx.array:
        """x [batch, heads, n, head_dim] as it stands at these places, and turned by a Hadamard matrix where keys are packed."""
        if by.rope_theta is not None:
            x = turned(x, places, by.rope_theta, by.rope_interleaved)
        return mx.hadamard_transform(x) if self._is_packed else x

    def stored(self) -> tuple[Part, Part]:
        return self._pages[0].stored(), self._pages[1].stored()

    def restore(self, parts: tuple[Part, Part]) -> None:
        self.take_back(parts, 0)

    def take_back(self, parts: tuple[Part, Part], dropped: int) -> None:
        """Take rows as `stored` gives them, in place of none; `dropped` more were seen before and let go."""
        self._rows, self.dropped = dropped + parts[0][0].shape[2], dropped
        for pages, part in zip(self._pages, parts, strict=True):
            pages.add(part)

    def keep(self, streams: mx.array) -> None:
        super().keep(streams)
        for pages in self._pages:
            pages.keep(streams)


def turned(x: mx.array, places: npt.NDArray[np.int64], theta: float, interleaved: bool) -> mx.array:
    """Rotary positions (arXiv 2104.09864) of x [batch, heads, n, head_dim], whose rows stand at `places` [n]."""
    half = x.shape[-1] // 2
    angles = places[:, None] * theta ** (-np.arange(half) / half)
    cosines, sines = (mx.array(part(angles).astype(np.float32)) for part in (np.cos, np.sin))
    pairs = x.astype(mx.float32).reshape(*x.shape[:-1], *((half, 2) if interleaved else (2, half)))
    first, second = (pairs[..., 0], pairs[..., 1]) if interleaved else (pairs[..., 0, :], pairs[..., 1, :])
    parts = [first * cosines - second * sines, first * sines + second * cosines]
    return mx.stack(parts, axis=-1 if interleaved else -2).reshape(x.shape).astype(x.dtype)


def _attention(
    far: mx.array, own: mx.array, keys: list[KeyValueRows], values: list[KeyValueRows], scale: float, reach: Reach
) -> mx.array:
    """Attention of the last rows over those held: [batch, heads, rows, head_dim].

    Args:
        far: the queries as they read the sinks.
        own: the queries as they read the window.
    """
    batch, heads, rows, head_dim = own.shape
    k, v = (mx.concatenate([unpack_rows(page, own.dtype) for page in pages], axis=2) for pages in (keys, values))
    kv_heads, total = k.shape[1], k.shape[2]
    grouped = [(x * scale).reshape(batch, kv_heads, -1, head_dim) for x in (far, own)]
    scores = mx.concatenate(
        [x @ part.swapaxes(2, 3) for x, part in zip(grouped, (k[:, :, : reach.sinks], k[:, :, reach.sinks :]), strict=True)],
        axis=-1,
    ).reshape(batch, kv_heads, heads // kv_heads, rows, total)
    places, queried = mx.arange(total)[None], mx.arange(total - rows, total)[:, None]
    seen = (places <= queried) & ((places >= queried - reach.window) | (places < reach.sinks))
    weights = mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1, precise=True)
    return (weights.reshape(batch, kv_heads, -1, total) @ v).reshape(batch, heads, rows, head_dim)
