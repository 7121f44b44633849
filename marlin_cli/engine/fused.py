"""The stages of a MegaByte as single calls of the CPU kernels: no graph, no operation at a time. None of it on a GPU."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.engine.cache import ROWS_PER_PAGE, CacheBits
from marlin_cli.engine.endless import reach_of
from marlin_cli.engine.graph_rows import run_together
from marlin_cli.engine.sampling import Draws, kernel_drawing
from marlin_cli.engine.stage_caches import GraphCache, StageMemory
from marlin_cli.engine.states import Beginning, KernelRows, taken_up
from marlin_cli.models.megabyte import MegaByte, RunStage
from marlin_cli.models.megabyte_config import MegaByteConfig, StageConfig
from marlin_cli.models.megabyte_layers import Block, Stack, VarianceNorm
from marlin_cli.models.splitting import share_of
from marlin_cli.ops import Linear, QuantizedLinear
from marlin_cli.ops.cpu import kernels

KNOWN = (Linear, QuantizedLinear)
NORMS = {nn.RMSNorm: "rmsnorm", nn.LayerNorm: "layernorm", VarianceNorm: "variance"}


class FusedStages:
    """The kernels' own copies of a network's stages; they share its arrays. Made by `fuse`."""

    def __init__(self, network: MegaByte, module: Any) -> None:
        self._network, self._module = network, module
        self._stages = network.config.stages
        self._stacks: list[Any] = [
            _stack(module, network.config, stage.config, stage.stack, network.config.attention_window if number == 0 else None)
            if _knows(stage.stack)
            else None
            for number, stage in enumerate(network.stages)
        ]
        self._head = kernel_product(module, network.output)
        self._table = network.stages[-1].byte_embedding.weight
        self._seconds = [module.PartSeconds() for _ in network.stages]
        self._counts = module.PageCounts(network.config.stages[0].layers)

    @property
    def part_seconds(self) -> dict[str, float]:
        """Seconds spent in the caches and sequences made here so far, by part of the model and level of the cache.

        What runs once a patch on both sides of the global stage is computed when the next call asks for it, and counts there.
        """
        first, *middle, last = self._seconds
        found = {
            "global": first.whole - first.attention + sum(each.inputs for each in (*middle, last)),
            "global cache": first.attention,
            "middle": sum(each.whole - each.inputs - each.attention for each in middle),
            "local": last.whole - last.inputs - last.attention - last.head - last.drawing,
            "local cache": sum(each.attention for each in (*middle, last)),
            "head": last.head,
            "sampling": last.drawing,
        }
        return {part: seconds for part, seconds in found.items() if middle or part != "middle"}

    @property
    def pages_read(self) -> list[tuple[int, int]]:
        """By global layer, how many pages caches that leave some out have read so far, and of how many."""
        found: list[tuple[int, int]] = self._counts.so_far()
        return found

    @property
    def rows_are_exact(self) -> bool:
        """Is a row of a result the same whichever rows are beside it?"""
        return bool(self._module.exact_rows())

    def run_stage(self, number: int, rows: mx.array) -> mx.array:
        """A `RunStage`: every sequence from its beginning, nothing remembered."""
        if not self.has(number):
            return self._network.stages[number].stack(rows)
        return self._stacks[number](rows, None)

    def has(self, number: int) -> bool:
        """Do the kernels run this stage? One that ranks share goes by the network itself."""
        return self._stacks[number] is not None

    def predictions(self, windows: mx.array) -> mx.array:
        """Logits [n, length, vocab] float32 of windows [n, length], as the network itself gives them."""
        return self._network(windows, self.run_stage)

    def new_cache(
        self, number: int, streams: int, padding: Sequence[int], bits: CacheBits | None = None
    ) -> "FusedCache | GraphCache":
        """An empty cache of one stage; `padding` filler rows at the start of each stream, or nothing.

        Args:
            bits: how the first stage holds its rows; the others keep all, in the network's own type.
        """
        stage, held = self._stages[number], bits or CacheBits()
        reach = None if held.window is None else reach_of(self._network.config, held.window)
        if not self.has(number):
            return GraphCache(self._network.stages[number].stack, stage, number > 0, padding, held, reach)
        rows = ROWS_PER_PAGE if number == 0 else stage.length + 1
        widths = [32 if wanted == 16 else wanted for wanted in (held.keys, held.values)]
        kv_heads = stage.kv_heads or stage.heads
        seen = {} if reach is None else {"window": reach.window, "sinks": reach.sinks}
        sparse = {} if held.share_left is None else {"share_left": held.share_left, "counts": self._counts}
        cache = self._module.StackCache(
            stage.layers, streams, kv_heads, stage.width_of_head, *widths, rows, list(padding), **seen, **sparse
        )
        return FusedCache(self._stacks[number], cache, self._seconds[number])

    def run_together(self, number: int, rows: mx.array, counts: Sequence[int], caches: Sequence[Any]) -> mx.array:
        """Take rows of many streams, which stand anywhere, through the layers of a stage in one call: hidden rows.

        Args:
            rows: [sum of counts, dim], those of each stream together; they follow those that its cache has seen.
            caches: of one stream each, and each of another.
        """
        if not self.has(number):
            return run_together(self._network.stages[number].stack, rows, counts, caches)
        held = [each.held for each in caches]
        hidden: mx.array = self._stacks[number].ragged(rows, list(counts), held, seconds=self._seconds[number])
        return hidden

    def decode_sequence(
        self,
        lead: mx.array,
        additions: mx.array,
        given: mx.array,
        known: Sequence[int],
        places: int,
        draws: Draws,
        *,
        with_logits: bool = False,
    ) -> tuple[mx.array, mx.array | None]:
        """Draw the ids that follow those given in sequences of the last stage, in one call.

        Args:
            lead: [streams, dim] their leading rows.
            additions: [streams or 1, tokens, dim], see `MegaByte.additions`.
            given: [streams, n] the ids that stand in them already, of each stream as many as `known` has.
            places: how many ids each has in the end.

        Returns:
            The ids [streams, places] int32, -1 where the model gave no numbers, and, if asked for, the logits
            [streams, places, vocab] that they were drawn from.
        """
        found, logits = self._module.local_patch_decode(
            self._stacks[-1], self._table, self._head, lead, additions, given.astype(mx.int32), list(known), places,
            draws.noise, [kernel_drawing(self._module, each) for each in draws.settings], with_logits, self._seconds[-1],
        )  # fmt: skip
        return found, logits

    def costs(self, ids: mx.array, run_stage: RunStage | None = None) -> mx.array:
        """What each of ids [batch, total] costs, in nats, as `MegaByte.__call__` predicts it: [batch, total] float32.

        Args:
            run_stage: takes rows through the stages before the last one.
        """
        network, last = self._network, len(self._stages) - 1
        batch, total = ids.shape
        tokens, condition, previous = network.last_sequences(ids, run_stage or self.run_stage)
        lead = network.leading_row(last, tokens.shape[0], condition, previous)[:, 0]
        expected = tokens
        if network.config.layout == "megabyte_pytorch":
            # One row more: it predicts the first id of the sequence that follows, and a leading row the very first alone.
            following = mx.concatenate([tokens[1:, :1], tokens[:1, :1]])
            expected = mx.concatenate([tokens, following], axis=1)
        nats = self._module.sequence_costs(
            self._stacks[-1], self._table, self._head, lead, network.additions(condition), tokens.astype(mx.int32),
            expected.astype(mx.int32),
        )  # fmt: skip
        return network.in_order(nats, batch, total)

    def predictions_of_patches(self, patches: mx.array, condition: mx.array, previous: mx.array) -> mx.array:
        """Logits [n, patch_size, vocab] of the ids of patches whose conditions are known, each from those before it.

        They are those that `decode_sequence` would draw from. See `MegaByte.sequences_of`, `MegaByte.in_patches`.
        """
        network, last = self._network, len(self._stages) - 1
        tokens, condition, previous = network.sequences_of(patches, condition, previous, self.run_stage)
        added = network.additions(condition)  # summed up first, as in `decode_sequence`, for the same bits
        lead = network.leading_row(last, tokens.shape[0], condition, previous)
        rows = mx.concatenate([lead, self._table[tokens[:, : added.shape[1]]] + added], axis=1)
        hidden = network.in_patches(self.run_stage(last, rows), patches.shape[0])
        logits: mx.array = self._module.products_of([self._head], hidden.reshape(-1, hidden.shape[-1]))[0]
        return logits.reshape(*patches.shape, -1)

    def cache_bytes(self, number: int, rows: int, key_bits: int = 16, value_bits: int = 16) -> int:
        """Bytes that the cache of a stage takes for `rows` rows of one stream."""
        stage = self._stages[number]
        pages = -(-rows // ROWS_PER_PAGE) * ROWS_PER_PAGE if number == 0 else rows
        delayed = 2 * 4 * (stage.dim // 2) * stage.layers if self._network.config.token_shift else 0
        widths = sum(row_bytes(stage.width_of_head, bits) for bits in (key_bits, value_bits))
        return pages * (stage.kv_heads or stage.heads) * widths * stage.layers + delayed

    def sequence_cache_bytes(self, streams: int, rows: int) -> int:
        """Bytes of the cache that `decode_sequence` has for `rows` rows, until it returns."""
        stage = self._stages[-1]
        return 2 * 4 * streams * rows * (stage.kv_heads or stage.heads) * stage.width_of_head * stage.layers


class FusedCache:
    """What one stage remembers, in the kernels' own pages; takes rows through the stage's layers."""

    def __init__(self, stack: Any, cache: Any, seconds: Any) -> None:
        self._stack, self.held, self._seconds = stack, cache, seconds

    def run(self, rows: mx.array) -> mx.array:
        """Hidden rows of `rows` [streams, n, dim], which follow those seen before."""
        return self._stack(rows, self.held, seconds=self._seconds)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return int(self.held.bytes_in_use)

    def keep(self, streams: Sequence[int]) -> None:
        """Keep these members of the batch."""
        self.held.keep(list(streams))

    def kept(self) -> KernelRows:
        """The rows of a single stream so far, which stay as they are."""
        return KernelRows(self.held.copy())

    def copy(self) -> "FusedCache":
        """One that goes on from here by itself, and shares the rows so far."""
        return FusedCache(self._stack, self.held.copy(), self._seconds)

    def may_go_back(self) -> None:
        """The next rows, which come together, may be forgotten from any of them on: see `forget`."""
        self.held.may_go_back()

    def forget(self, rows: int) -> None:
        """Forget so many of the rows that came last."""
        self.held.cut(self.held.rows - rows)

    def delayed(self) -> tuple[mx.array, ...]:
        """See `states.Place`."""
        return tuple(self.held.delayed())

    def take_up(self, beginning: Beginning) -> None:
        """Go on from the beginning of a prompt, in place of nothing."""
        self.held = taken_up(self.held, beginning)

    def memory(self) -> StageMemory:
        """All that is remembered of a single stream, to go on from later."""
        return StageMemory(self.held.stored(), int(self.held.dropped), self.delayed())

    def remember(self, memory: StageMemory) -> None:
        """Go on from what `memory` gave, in place of nothing."""
        rows = memory.layers[0][0][0].shape[2]
        self.held.restore(memory.layers, rows, memory.dropped)
        self.held.cut(rows + memory.dropped, list(memory.delayed))


def rotates(head_dim: int, bits: CacheBits) -> bool:
    """Whether the kernels rotate heads of such a width as a cache of so many bits asks for."""
    return not bits.is_packed or head_dim & (head_dim - 1) == 0


def row_bytes(head_dim: int, bits: int) -> int:
    """Bytes of a row of a head in a cache of the kernels: float32 for 16 bits, else codes and their scales."""
    return {16: 4 * head_dim, 8: head_dim + head_dim // 32, 4: head_dim // 2 + head_dim // 16}[bits]


def fuse(network: MegaByte) -> FusedStages | None:
    """The fused stages of a network, or None where the kernels do not run or do not know a layer of it."""
    if mx.default_device() != mx.Device(mx.cpu):
        return None
    arrays = [network.byte_embedding.weight, *(leaf for layer in network.local.layers for leaf in _floats(layer))]
    module = kernels()[0]
    if module is None or any(array.dtype != mx.float32 for array in arrays):
        return None
    shared = 0 if share_of(network) is None else 1  # the first stage, then, whose sums no kernel makes
    known = all(_knows(stage.stack) for stage in network.stages[shared:]) and type(network.output) in KNOWN
    return FusedStages(network, module) if known else None


def _knows(stack: Stack) -> bool:
    return all(type(part) in KNOWN for layer in stack.layers for part in (*_attention_parts(layer), *_ffn_parts(layer)))


def _attention_parts(layer: Block) -> list[nn.Module]:
    return [layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj, layer.attention.o_proj]


def _ffn_parts(layer: Block) -> list[nn.Module]:
    return [layer.ffn[name] for name in ("gate_proj", "up_proj", "down_proj") if name in layer.ffn]


def _floats(layer: Block) -> list[mx.array]:
    dense = [part.weight for part in (*_attention_parts(layer), *_ffn_parts(layer)) if type(part) is Linear]
    return [layer.attention_norm.weight, layer.ffn_norm.weight, *dense]


def _stack(module: Any, config: MegaByteConfig, stage: StageConfig, stack: Stack, window: int | None) -> Any:
    head_dim = stage.width_of_head
    shape = module.StackShape(
        heads=stage.heads,
        kv_heads=stage.kv_heads or stage.heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
        window=-1 if window is None else window,
        rope_theta=config.rope_theta if stage.rope else 0.0,
        rope_interleaved=config.rope_interleaved,
        token_shift=config.token_shift,
        activation=module.Activation[config.ffn],
    )
    return module.Stack([_layer(module, layer) for layer in stack.layers], kernel_norm(module, stack.get("norm")), shape)


def _layer(module: Any, layer: Block) -> Any:
    attention, ffn = layer.attention, layer.ffn
    products = [kernel_product(module, part) for part in _attention_parts(layer)]
    return module.Layer(
        kernel_norm(module, layer.attention_norm), *products,
        kernel_norm(module, attention.get("q_norm")), kernel_norm(module, attention.get("k_norm")),
        kernel_norm(module, layer.ffn_norm),
        kernel_product(module, ffn["gate_proj"]) if "gate_proj" in ffn else None,
        kernel_product(module, ffn.up_proj), kernel_product(module, ffn.down_proj),
    )  # fmt: skip


def kernel_norm(module: Any, norm: Any) -> Any:
    """The kernels' own copy of a normalisation; None for None."""
    if norm is None:
        return None
    return module.Norm(module.NormKind[NORMS[type(norm)]], norm.weight, norm.get("bias"), norm.eps)


def kernel_product(module: Any, layer: Any, factor: float = 1.0) -> Any:
    """The kernels' own copy of a linear layer, dense or packed, whose results `factor` multiplies."""
    if isinstance(layer, Linear):
        return module.Product(layer.weight, None, None, None, 0, layer.get("bias"), factor)
    affine = layer.mode == "affine"
    scales, biases = layer["scales"], layer.get("biases")
    if affine:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    kind = module.Kind[f"int{layer.bits}" if affine else layer.mode]
    if "global_scale" in layer:
        factor *= layer["global_scale"].item()
    return module.Product(
        layer["weight"], scales, biases, kind, layer.group_size, layer.get("bias"), factor, layer.activation_bits
    )
