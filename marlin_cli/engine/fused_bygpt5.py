"""ByGPT5 as single calls of the CPU kernels, as ByT5's decoder: no graph, no operation at a time. None of it on a GPU."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.fused import row_bytes
from marlin_cli.engine.fused_byt5 import SELF_CACHE_ROWS, kernel_head, kernel_stack, knows_stack
from marlin_cli.engine.patch_caches import ROWS_AT_ONCE
from marlin_cli.engine.states import Beginning, KernelRows, taken_up
from marlin_cli.models.bygpt5 import ByGPT5
from marlin_cli.models.byt5_ids import FIRST_BYTE
from marlin_cli.ops.cpu import kernels


class FusedByGPT5:
    """The kernels' own copy of a network; it shares its arrays. Made by `fuse_bygpt5`."""

    def __init__(self, network: ByGPT5, module: Any) -> None:
        self._network, self._module = network, module
        self._stack = kernel_stack(module, network.config.as_decoder(), network.decoder)
        self._head = kernel_head(module, network)

    def logits(self, ids: mx.array) -> mx.array:
        """See `ByGPT5.__call__`, of texts from their beginning: [n, rows, vocab] float32 of ids [n, rows]."""
        return self._predicted(self._stack(self._network.embedding(ids), None))

    def predictions(self, windows: mx.array) -> mx.array:
        """See `ByGPT5.predictions`."""
        return self._network.predictions(windows, self.logits)

    def costs(self, windows: mx.array) -> mx.array:
        """What each byte of windows [n, length] costs, in nats: [n, length] float32."""
        config, table = self._network.config, self._network.embedding.weight
        ids = windows.astype(mx.int32) + FIRST_BYTE
        led = config.starts_all or ids.shape[1] == 1  # does the mark lead all bytes, or the first one alone?
        rest = ids if led else ids[:, 1:]
        lead = mx.full((len(ids),), config.start_id) if led else ids[:, 0]
        no_additions = mx.zeros((1, rest.shape[1] - 1, config.d_model))
        nats: mx.array = self._module.sequence_costs(self._stack, table, self._head, table[lead], no_additions, rest, rest)
        if led:
            return nats
        logits = self.logits(mx.array([[config.start_id]]))[0, 0]
        return mx.concatenate([mx.logsumexp(logits) - logits[ids[:, :1]], nats], axis=1)

    def new_rows(self, streams: int, cache_bits: CacheBits) -> "FusedRows":
        """The state of so many texts that have no ids yet."""
        config = self._network.config
        bits = [32 if wanted == 16 else wanted for wanted in (cache_bits.keys, cache_bits.values)]
        cache = self._module.StackCache(config.layers, streams, config.heads, config.head_dim, *bits, SELF_CACHE_ROWS, [])
        return FusedRows(self, cache)

    def read(self, ids: mx.array, cache: Any) -> mx.array:
        """Logits [n, vocab] of what follows ids [n, rows], which follow those in the cache."""
        table = self._network.embedding.weight
        if ids.shape[1] == 1:
            logits: mx.array = self._module.answer_decode(self._stack, table, self._head, ids[:, 0].tolist(), [1], [cache])
            return logits
        step = max(1, ROWS_AT_ONCE // ids.shape[0])
        for start in range(0, ids.shape[1], step):
            hidden = self._stack(table[ids[:, start : start + step]], cache)
        return self._predicted(hidden[:, -1])

    def read_together(self, ids: Sequence[Sequence[int]], texts: "Sequence[FusedRows]", *, every: bool = False) -> mx.array:
        """Append ids to texts of one stream each, one to each at least, in one call.

        Returns:
            Logits [texts, vocab] of what follows them; with `every` [ids, vocab] of what follows each of the ids.
        """
        flat, counts = [value for own in ids for value in own], [len(own) for own in ids]
        caches = [each.cache for each in texts]
        table = self._network.embedding.weight
        logits: mx.array = self._module.answer_decode(self._stack, table, self._head, flat, counts, caches, [], every)
        return logits

    @property
    def rows_are_exact(self) -> bool:
        """Is a row the same bits whichever rows are beside it?"""
        return bool(self._module.exact_rows())

    def cache_bytes(self, rows: int, cache_bits: CacheBits) -> int:
        """Bytes that the cache of one text takes for `rows` rows."""
        config = self._network.config
        pages = -(-rows // SELF_CACHE_ROWS) * SELF_CACHE_ROWS
        widths = sum(row_bytes(config.head_dim, bits) for bits in (cache_bits.keys, cache_bits.values))
        return pages * config.heads * widths * config.layers

    def _predicted(self, hidden: mx.array) -> mx.array:
        """Logits [.., vocab] of hidden rows [.., d_model]."""
        logits: mx.array = self._module.products_of([self._head], hidden.reshape(-1, hidden.shape[-1]))[0]
        return logits.reshape(*hidden.shape[:-1], -1)


class FusedRows:
    """What the network remembers of a batch of texts, in the kernels' own pages; an `engine.byte_decoding.Rows`."""

    def __init__(self, fused: FusedByGPT5, cache: Any) -> None:
        self._fused, self.cache = fused, cache

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values in use."""
        return int(self.cache.bytes_in_use)

    def read(self, ids: mx.array) -> mx.array:
        """Append ids [n, rows], one row at least: logits [n, vocab] of what follows."""
        return self._fused.read(ids, self.cache)

    def keep(self, streams: Sequence[int]) -> None:
        """Keep these members of the batch, in this order."""
        self.cache.keep(list(streams))

    @property
    def most_drafted(self) -> None:
        """See `byte_streams.Text`: any number."""

    def may_go_back(self) -> None:
        """Nothing is to be noted."""

    def forget(self, rows: int) -> None:
        """Forget so many of the rows that came last."""
        self.cache.cut(self.cache.rows - rows)

    def kept(self) -> KernelRows:
        """The rows of a single text so far, which stay as they are."""
        return KernelRows(self.cache.copy())

    def take_up(self, beginning: Beginning) -> None:
        """Go on from the beginning of a prompt, in place of nothing."""
        self.cache = taken_up(self.cache, beginning)


def fuse_bygpt5(network: Any) -> FusedByGPT5 | None:
    """The fused network, or None where it is another, or the kernels do not run or do not know a layer of it."""
    known = isinstance(network, ByGPT5) and knows_stack(network, [network.decoder])
    if mx.default_device() != mx.Device(mx.cpu) or not known:
        return None
    module = kernels()[0]
    return None if module is None else FusedByGPT5(network, module)
