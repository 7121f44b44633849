"""CANINE and LA-CANINE in a few calls of the CPU kernels: no graph, no operation at a time. None of it on a GPU."""

from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

from marlin_cli.engine.fused import kernel_norm, kernel_product
from marlin_cli.models.canine import PRIMES, Attention, Block, Deep
from marlin_cli.models.canine_steps import CharacterNetwork
from marlin_cli.ops import Linear, QuantizedLinear
from marlin_cli.ops.cpu import kernels


class CanineRunner(Protocol):
    """What runs a network: itself, an operation at a time, or the kernels. Arguments as of `Canine`."""

    def __call__(self, ids: mx.array, lengths: mx.array | None, types: mx.array | None) -> mx.array:
        """The head's scores, float32."""

    def encode(self, ids: mx.array, lengths: mx.array | None, types: mx.array | None) -> mx.array:
        """The characters' states [n, total, d_model]."""

    def deep(self, ids: mx.array, lengths: mx.array | None, types: mx.array | None) -> Deep:
        """Everything up to the last of the deep layers."""


class FusedCanine:
    """The kernels' own copies of a network's parts. They share all arrays but the convolution back. Made by `fuse_canine`."""

    def __init__(self, network: CharacterNetwork, module: Any) -> None:
        self._network, self._module = network, module
        config, local, embedding = network.config, network.local, network.embedding
        self._embedding = module.CharacterEmbedding(
            [table.weight for table in embedding.tables], list(PRIMES[: len(embedding.tables)]), embedding.types.weight,
            embedding.positions.weight, kernel_norm(module, embedding.norm),
        )  # fmt: skip
        activation = module.Activation[config.activation]
        leads = network.mark_leads
        self._first = _stack(module, network, [local.first], config.block_characters)
        self._down = module.CharacterDown(
            kernel_product(module, local.down.conv),
            kernel_norm(module, local.down.norm),
            config.downsample_factor,
            activation,
            leads,
        )
        self._deep = _stack(module, network, network.layers)
        self._up = module.CharacterUp(
            *_window_products(module, local.up.conv, config.upsample_width), local.up.conv.get("bias"),
            kernel_norm(module, local.up.norm), config.downsample_factor, config.upsample_width, activation, leads,
        )  # fmt: skip
        self._last = _stack(module, network, [local.last])

    def __call__(self, ids: mx.array, lengths: mx.array | None = None, types: mx.array | None = None) -> mx.array:
        """See `Canine.__call__`."""
        return self._network.scores(self.deep(ids, lengths, types), lengths, self.states)

    def encode(self, ids: mx.array, lengths: mx.array | None = None, types: mx.array | None = None) -> mx.array:
        """See `Canine.encode`."""
        return self.states(self.deep(ids, lengths, types), lengths)

    def deep(self, ids: mx.array, lengths: mx.array | None = None, types: mx.array | None = None) -> Deep:
        """See `Canine.deep`."""
        kinds = None if types is None else types.astype(mx.int32)
        rows = self._module.embed_characters(self._embedding, ids.astype(mx.int32), kinds)
        characters = self._first(rows, None, _listed(lengths))
        molecules = self._module.down_characters(self._down, characters)
        counts = None if lengths is None else self._network.molecule_lengths(lengths, molecules.shape[1])
        return Deep(characters, self._deep(molecules, None, _listed(counts)))

    def states(self, deep: Deep, lengths: mx.array | None = None) -> mx.array:
        """See `Canine.states`."""
        return self._last(self._module.up_characters(self._up, *deep), None, _listed(lengths))


def runner_of(network: CharacterNetwork) -> CanineRunner:
    """The kernels where they run and know the network, else the network."""
    return fuse_canine(network) or network


def fuse_canine(network: CharacterNetwork) -> FusedCanine | None:
    """The fused parts of a network, or None where the kernels do not run or do not know one of them."""
    if mx.default_device() != mx.Device(mx.cpu):
        return None
    blocks = [network.local.first, *network.layers, network.local.last]
    convolutions = [network.local.down.conv, network.local.up.conv]
    parts = [part for block in blocks for part in _parts(block)] + convolutions
    known = all(type(part) in (Linear, QuantizedLinear) for part in parts)
    known = known and all(type(block.attention) is Attention for block in blocks)
    inside = [network.embedding, *blocks, *convolutions, network.local.down.norm, network.local.up.norm]
    arrays = [named for part in inside for named in tree_flatten(part.parameters())]
    known = known and all(array.dtype == mx.float32 or _is_packed(path, array) for path, array in arrays)
    if not known or not _splits(network.local.up.conv, network.config.d_model):
        return None
    module = kernels()[0]
    return None if module is None else FusedCanine(network, module)


def _listed(lengths: mx.array | None) -> list[int]:
    return [] if lengths is None else lengths.tolist()  # type: ignore[return-value]


def _is_packed(path: str, array: mx.array) -> bool:
    """Whether the array is of a packed layer, whose scales come in types of their own."""
    return array.dtype in (mx.uint32, mx.uint8) or path.rpartition(".")[2] in ("scales", "biases", "global_scale")


def _parts(block: Block) -> list[Any]:
    attention, ffn, adapter = block.attention, block.ffn, block.get("adapter")
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, ffn.up_proj, ffn.down_proj]
    return projections if adapter is None else [*projections, adapter.down_proj, adapter.up_proj]


def _stack(module: Any, network: CharacterNetwork, blocks: list[Any], width: int = -1) -> Any:
    config = network.config
    head_dim = config.d_model // config.heads
    shape = module.StackShape(
        heads=config.heads, kv_heads=config.heads, head_dim=head_dim, scale=head_dim**-0.5, window=-1, rope_theta=0.0,
        rope_interleaved=False, token_shift=False, activation=module.Activation[config.activation], causal=False,
        norms_follow=True, block=width,
    )  # fmt: skip
    return module.Stack([_layer(module, block) for block in blocks], None, shape)


def _layer(module: Any, block: Block) -> Any:
    q, k, v, o, up, down, *adapter = (kernel_product(module, part) for part in _parts(block))
    return module.Layer(
        kernel_norm(module, block.attention_norm), q, k, v, o, None, None, kernel_norm(module, block.ffn_norm), None, up, down,
        adapter=module.Adapter(*adapter) if adapter else None,
    )  # fmt: skip


def _splits(conv: Linear | QuantizedLinear, d_model: int) -> bool:
    """Whether the columns of each position of the convolution's window are groups of their own, in blocks that round alike."""
    return type(conv) is Linear or (d_model % 32 == 0 and d_model % conv.group_size == 0)


def _window_products(module: Any, conv: Linear | QuantizedLinear, width: int) -> list[Any]:
    """The convolution back as two products, over characters and molecules, whose rows are the window's positions in turn."""

    def half(array: mx.array, which: int) -> mx.array:
        rows = array.shape[0]
        return array.reshape(rows, width, 2, -1)[:, :, which].swapaxes(0, 1).reshape(width * rows, -1)

    products = []
    for which in (0, 1):
        arrays = {name: half(conv[name], which) for name in ("weight", "scales", "biases") if name in conv}
        if isinstance(conv, Linear):
            products.append(module.Product(arrays["weight"], None, None, None, 0, None, 1.0))
            continue
        if "global_scale" in conv:
            arrays["global_scale"] = conv["global_scale"]
        part = QuantizedLinear(arrays, group_size=conv.group_size, bits=conv.bits, mode=conv.mode)
        part.activation_bits = conv.activation_bits
        products.append(kernel_product(module, part))
    return products
