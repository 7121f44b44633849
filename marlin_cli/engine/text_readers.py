"""How networks that take bytes one by one read texts at places of their own: ByGPT5 by its kernels, EvaByte by operations."""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from marlin_cli.engine.byte_streams import ByteStreams, Read
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.fused import rotates
from marlin_cli.engine.fused_bygpt5 import FusedByGPT5, FusedRows, fuse_bygpt5
from marlin_cli.engine.merged_streams import most_bytes
from marlin_cli.engine.speculation import ROWS_DEPEND
from marlin_cli.engine.states import Beginning, KeptRows, PromptKeeper
from marlin_cli.engine.window_decoding import LayerWindow
from marlin_cli.models.bygpt5 import ByGPT5
from marlin_cli.models.evabyte import Attention, EvaByte
from marlin_cli.ops.cpu import kernels


class KernelReader:
    """A `TextReader` of a ByGPT5 whose layers the kernels know: a pass is one call."""

    def __init__(self, network: ByGPT5, fused: FusedByGPT5, bits: CacheBits) -> None:
        self._network, self._fused, self._bits = network, fused, bits

    @property
    def no_drafts(self) -> str | None:
        return None if self._fused.rows_are_exact else ROWS_DEPEND

    def led(self, ids: Sequence[int]) -> list[int]:
        return _led(self._network, ids)

    def new_text(self) -> FusedRows:
        return self._fused.new_rows(1, self._bits)

    def read(self, ids: Sequence[Sequence[int]], texts: Sequence[FusedRows], *, every: bool) -> Read:
        return Read(self._fused.read_together(ids, texts, every=every))

    def further(self, hidden: mx.array) -> None:
        return None

    def most_bytes(self, ids: int) -> int:
        return self._fused.cache_bytes(ids + 1, self._bits)  # a mark may lead them


class WindowText:
    """What an EvaByte remembers of one text.

    A window that is closed stays so: rows that may be forgotten end before the open one is full.
    """

    def __init__(self, network: EvaByte, bits: CacheBits) -> None:
        self.layers = [LayerWindow(bits) for _ in network.layers]
        self._attention: list[Attention] = [layer.attention for layer in network.layers]
        self._window_bytes = network.config.window_bytes

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def most_drafted(self) -> int:
        return self._window_bytes - 1 - (self.layers[0].offset + 1) % self._window_bytes

    def may_go_back(self) -> None:
        for layer in self.layers:
            layer.may_go_back()

    def forget(self, rows: int) -> None:
        for layer, attention in zip(self.layers, self._attention, strict=True):
            layer.forget(rows, attention)

    def kept(self) -> KeptRows:
        raise NotImplementedError("states of an EvaByte are not kept")

    def take_up(self, beginning: Beginning) -> None:
        raise NotImplementedError("states of an EvaByte are not kept")


class WindowReader:
    """A `TextReader` of an EvaByte, whose products and attention are the CPU kernels'."""

    def __init__(self, network: EvaByte, bits: CacheBits, module: Any) -> None:
        self._network, self._bits, self._module = network, bits, module

    @property
    def no_drafts(self) -> str | None:
        if sys.platform == "darwin":
            return "MLX's own operations on this processor take numbers that stand at the end of an array in another way"
        return None if self._module.exact_rows() else ROWS_DEPEND

    def led(self, ids: Sequence[int]) -> list[int]:
        return _led(self._network, ids)

    def new_text(self) -> WindowText:
        return WindowText(self._network, self._bits)

    def read(self, ids: Sequence[Sequence[int]], texts: Sequence[WindowText], *, every: bool) -> Read:
        ends = list(itertools.accumulate(map(len, ids)))
        layers = list(zip(*(text.layers for text in texts), strict=True))
        memory = [each[0] if len(texts) == 1 else _Together(each, ends) for each in layers]
        hidden = self._network.decode(mx.array([list(itertools.chain(*ids))]), memory)[0]
        if not every:
            hidden = hidden[mx.array([end - 1 for end in ends])]
        read = Read(self._network.head(hidden), hidden)
        mx.eval(read.logits, hidden, [layer.arrays for each in layers for layer in each])  # else a graph as long as the text
        return read

    def further(self, hidden: mx.array) -> mx.array | None:
        return self._network.further(hidden) if self._network.config.prediction_heads > 1 else None

    def most_bytes(self, ids: int) -> int:
        return most_bytes(self._network, self._bits, ids)


class _Together:
    """What several texts remember in one layer, as one `models.evabyte.WindowMemory` of one sequence with the rows of all."""

    def __init__(self, layers: Sequence[LayerWindow], ends: Sequence[int]) -> None:
        self._layers, self._parts = layers, list(itertools.pairwise((0, *ends)))

    @property
    def offset(self) -> mx.array:
        parts = zip(self._layers, self._parts, strict=True)
        return mx.array([layer.offset + row for layer, (start, end) in parts for row in range(end - start)])

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, by: Attention) -> mx.array:
        found = [
            layer.attend(queries[:, :, start:end], keys[:, :, start:end], values[:, :, start:end], by)
            for layer, (start, end) in zip(self._layers, self._parts, strict=True)
        ]
        return mx.concatenate(found, axis=2)


def bygpt5_streams(network: Any, bits: CacheBits, keeper: PromptKeeper | None = None) -> ByteStreams | None:
    """The streams of a ByGPT5, or None where no kernels run that know its layers and such a cache."""
    fused = fuse_bygpt5(network)
    if fused is None or not rotates(network.config.head_dim, bits):
        return None
    return ByteStreams(KernelReader(network, fused, bits), keeper, leads_all=network.config.starts_all)


def evabyte_streams(network: EvaByte, bits: CacheBits, keeper: PromptKeeper | None = None) -> ByteStreams | None:
    """The streams of an EvaByte, or None where no kernels run that take its rows."""
    here = mx.default_device() == mx.Device(mx.cpu) and network.embedding.weight.dtype == mx.float32
    module = kernels()[0] if here else None
    return None if module is None else ByteStreams(WindowReader(network, bits, module), keeper)


def _led(network: Any, ids: Sequence[int]) -> list[int]:
    led: list[list[int]] = network.led(mx.array([list(ids)], dtype=mx.int32).reshape(1, -1)).tolist()
    return led[0]
