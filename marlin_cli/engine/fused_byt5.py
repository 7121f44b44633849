"""ByT5's encoder and decoder as single calls of the CPU kernels: no graph, no operation at a time. None of it on a GPU."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.engine.fused import kernel_norm, kernel_product
from marlin_cli.models import bygpt5
from marlin_cli.models.bygpt5 import ByGPT5
from marlin_cli.models.byt5 import Attention, ByT5, Decoder, DecoderBlock, Encoder, EncoderBlock
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.splitting import share_of
from marlin_cli.ops import Linear, QuantizedLinear
from marlin_cli.ops.cpu import kernels

T5Stack: TypeAlias = "Encoder | Decoder | bygpt5.Decoder"
T5Layer: TypeAlias = "EncoderBlock | DecoderBlock | bygpt5.Block"

# Rows by which the decoder's own cache grows; answers are short.
SELF_CACHE_ROWS = 64


class FusedByT5:
    """The kernels' own copies of a network's two stacks; they share its arrays. Made by `fuse_byt5`."""

    def __init__(self, network: ByT5, module: Any) -> None:
        self._network, self.module = network, module
        # None for an encoder that pools, or that ranks share: they stay with the graph.
        known = isinstance(network.encoder, Encoder) and share_of(network) is None
        self.encoder = kernel_stack(module, network.config, network.encoder) if known else None
        if network.config.decoder_layers:
            self._decoder = kernel_stack(module, network.config, network.decoder)
            self._head = kernel_head(module, network)

    @property
    def decoder_parts(self) -> tuple[Any, mx.array, Any]:
        """The decoder's stack, the table of embeddings, and the head."""
        return self._decoder, self._network.embedding.weight, self._head

    def encode(self, ids: mx.array, lengths: mx.array | None = None) -> mx.array:
        """See `ByT5.encode`."""
        if self.encoder is None:
            return self._network.encode(ids, lengths)
        network = self._network
        return self.encoder(network.rows(ids, lengths), None, _listed(network.state_lengths(lengths)))

    def answers(self, states: mx.array, lengths: mx.array | None, answers: int, memory_bits: int) -> "FusedAnswers":
        """Decoding state over the encoder's states [n, states, d_model], with `answers` answers to each input."""
        config = self._network.config
        real = _listed(self._network.state_lengths(lengths))
        memory = self._decoder.remember(states, real, 32 if memory_bits == 16 else memory_bits)
        cache = self.module.StackCache(
            config.decoder_layers, states.shape[0] * answers, config.heads, config.head_dim, 32, 32, SELF_CACHE_ROWS, []
        )
        return FusedAnswers(self.module, *self.decoder_parts, cache, memory)


class FusedAnswers:
    """What the decoder remembers, in the kernels' own pages; a `marlin_cli.engine.encoder_decoder.Answers`."""

    def __init__(self, module: Any, stack: Any, table: mx.array, head: Any, cache: Any, memory: Any) -> None:
        self._module, self._parts = module, (stack, table, head)
        self._cache, self._memory = cache, memory

    @property
    def memory_bytes(self) -> int:
        return int(self._memory.bytes_in_use)

    def push(self, ids: mx.array) -> mx.array:
        logits: mx.array = self._module.answer_decode(*self._parts, ids.tolist(), [1], [self._cache], [self._memory])
        return logits

    def keep(self, answers: Sequence[int], streams: Sequence[int] | None) -> None:
        self._cache.keep(list(answers))
        if streams is not None:
            self._memory.keep(list(streams))


def fuse_byt5(network: ByT5) -> FusedByT5 | None:
    """The fused stacks of a network, or None where the kernels do not run or do not know a layer of it."""
    stacks: list[Encoder | Decoder] = [network.decoder] if network.config.decoder_layers else []
    if isinstance(network.encoder, Encoder) and share_of(network) is None:
        stacks.append(network.encoder)
    if mx.default_device() != mx.Device(mx.cpu) or not knows_stack(network, stacks):
        return None
    module = kernels()[0]
    return None if module is None else FusedByT5(network, module)


def knows_stack(network: ByT5 | ByGPT5, stacks: Sequence[T5Stack]) -> bool:
    """Whether the kernels know every layer of stacks of T5's kind, and the table and the head beside them."""
    layers = [layer for stack in stacks for layer in stack.layers]
    parts = [part for layer in layers for part in _parts(layer)] + ([network.output] if "output" in network else [])
    arrays = [layer.ffn_norm.weight for layer in layers] + [part.weight for part in parts if type(part) is Linear]
    known = type(network.embedding) is nn.Embedding and all(type(part) in (Linear, QuantizedLinear) for part in parts)
    return known and all(array.dtype == mx.float32 for array in (network.embedding.weight, *arrays))


def kernel_stack(module: Any, config: ByT5Config, stack: T5Stack) -> Any:
    """The kernels' own copy of a stack of T5's kind."""
    shape = module.StackShape(
        heads=config.heads, kv_heads=config.heads, head_dim=config.head_dim, scale=1.0, window=-1, rope_theta=0.0,
        rope_interleaved=False, token_shift=False, activation=module.Activation[config.activation],
        causal=not isinstance(stack, Encoder),
    )  # fmt: skip
    layers = [_layer(module, layer) for layer in stack.layers]
    return module.Stack(layers, kernel_norm(module, stack.norm), shape, stack.relative_bias())


def kernel_head(module: Any, network: ByT5 | ByGPT5) -> Any:
    """The kernels' own copy of what makes logits of hidden rows."""
    factor = network.config.d_model**-0.5 if network.config.scaled_head else 1.0
    if network.config.tied_head:
        return module.Product(network.embedding.weight, None, None, None, 0, None, factor)
    return kernel_product(module, network.output, factor)


def _listed(lengths: mx.array | None) -> list[int]:
    return [] if lengths is None else lengths.tolist()  # type: ignore[return-value]


def _parts(layer: T5Layer) -> list[nn.Module]:
    cross = _projections(layer.cross) if isinstance(layer, DecoderBlock) else []
    ffn = [layer.ffn[name] for name in ("gate_proj", "up_proj", "down_proj") if name in layer.ffn]
    return [*_projections(layer.attention), *cross, *ffn]


def _projections(attention: Attention) -> list[nn.Module]:
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]


def _layer(module: Any, layer: T5Layer) -> Any:
    ffn, cross = layer.ffn, None
    if isinstance(layer, DecoderBlock):
        products = [kernel_product(module, part) for part in _projections(layer.cross)]
        cross = module.CrossAttention(kernel_norm(module, layer.cross_norm), *products)
    return module.Layer(
        kernel_norm(module, layer.attention_norm),
        *(kernel_product(module, part) for part in _projections(layer.attention)),
        None, None, kernel_norm(module, layer.ffn_norm),
        kernel_product(module, ffn.gate_proj) if "gate_proj" in ffn else None,
        kernel_product(module, ffn.up_proj), kernel_product(module, ffn.down_proj), cross,
    )  # fmt: skip
