"""What calibration, packing, rotation and tuning ask of a ByT5; see `models.architecture`.

The decoder reads what the packed encoder makes of an input. Filler passes along and is told apart by `real`: the rows of
it that a layer sees count nowhere.
"""

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx

from marlin_cli.errors import QuantizationError
from marlin_cli.models.architecture import (
    Architecture,
    Capability,
    PackedKeys,
    Piece,
    Rotation,
    Split,
    State,
    Tuning,
    Watch,
    neighbour_with_same_input,
)
from marlin_cli.models.byt5 import ByT5, DownsamplingEncoder, PlainMemory
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.byt5_ids import ids_of_bytes
from marlin_cli.models.layers import inputs_by_layer, part_of
from marlin_cli.models.pair_batch import PairBatch
from marlin_cli.ops.long_attention import relative_attention

# Keys and values of an input come from the encoder's states in every layer of the decoder: measured in the first.
ENCODER_STATES = "decoder.layers.0.cross.k_proj"


def input_of(path: str) -> str:
    """The layer in whose name the input of the layer `path` is measured."""
    if part_of(path) == "cross" and path.endswith((".k_proj", ".v_proj")):
        return ENCODER_STATES
    return neighbour_with_same_input(path)


def pass_through(network: ByT5, sample: tuple[bytes, bytes], watch: Watch) -> None:
    """Run an input and its answer, teacher-forced; an encoder alone sees the input and nothing else.

    Rows are those of every byte, of the input's end, and of the decoder's start. Keys and values are those that the
    decoder holds: of its own rows, and of the encoder's states.
    """
    source, target = sample
    config = network.config
    states = network.encode(mx.array([[*ids_of_bytes(source), config.end_id]]))
    if config.decoder_layers:
        memory = network.memory(states)
        for index, each in enumerate(memory):
            watch(f"decoder.layers.{index}.cross", each.keys, each.values)
        caches = [WatchedCache(watch, f"decoder.layers.{index}.attention") for index in range(len(memory))]
        network.head(network.decode(mx.array([[config.start_id, *ids_of_bytes(target)]]), memory, caches))
    elif config.labels:
        network.label_scores(states)


class WatchedCache:
    """A `SelfCache` for one call, which shows what a real one would hold after it."""

    def __init__(self, watch: Watch, path: str) -> None:
        self._watch, self._path = watch, path

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, bias: mx.array) -> mx.array:
        self._watch(self._path, keys, values)
        return relative_attention(queries, keys, values, bias, causal=True)


def start(network: ByT5, batch: PairBatch) -> State:
    """The state of pairs before the first piece."""
    state = {"rows": network.embedding(batch.source), "target": batch.target, "target rows": mx.array(batch.rows)}
    return state if batch.lengths is None else _with_lengths(state, batch.lengths)


def pieces(network: ByT5) -> list[Piece]:
    """The blocks of the encoder, what all of the decoder reads of its states, and the blocks of the decoder."""
    config = network.config
    sources = [source for source in dict.fromkeys(inputs_by_layer(network, input_of).values()) if source != ENCODER_STATES]

    def blocks(path: str, count: int, run: Callable[..., State], parts: Sequence[str] = ("attention",)) -> list[Piece]:
        found = []
        for index in range(count):
            block = f"{path}.{index}"
            within = tuple(source for source in sources if source.startswith(f"{block}."))
            adds = (*(f"{block}.{part}.o_proj" for part in parts), f"{block}.ffn.down_proj")
            found.append(Piece(partial(run, index=index), within, adds))
        return found

    if config.downsample_factor == 1:
        all_pieces = blocks("encoder.layers", config.encoder_layers, _run_encoder_block)
    else:
        over_bytes = config.layers_over_bytes
        lower = blocks("encoder.local_layers", over_bytes, _run_local_block)
        upper = blocks("encoder.layers", config.encoder_layers - over_bytes, _run_encoder_block)
        all_pieces = [*lower, Piece(_pool), *upper, Piece(_join)]
    if config.decoder_layers:
        all_pieces.append(Piece(_read_states, (ENCODER_STATES,)))
        all_pieces += blocks("decoder.layers", config.decoder_layers, _run_decoder_block, ("attention", "cross"))
    return all_pieces


def logits(network: ByT5, batch: PairBatch) -> mx.array:
    """Logits [predictions, vocab] float32 of every byte of the answers and of their ends, pair after pair.

    Raises:
        QuantizationError: an encoder alone, which predicts nothing.
    """
    if not network.config.decoder_layers:
        raise QuantizationError("the model is an encoder alone and predicts nothing that could be measured")
    memory = network.memory(network.encode(batch.source, batch.lengths), batch.lengths)
    hidden = network.decode(batch.target, memory)
    return network.head(hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.places)])


def _run_encoder_block(network: ByT5, state: State, index: int) -> State:
    encoder = network.encoder
    return {**state, "rows": encoder.layers[index](state["rows"], encoder.relative_bias(), state.get("lengths"))}


def _run_local_block(network: ByT5, state: State, index: int) -> State:
    encoder = network.encoder
    assert isinstance(encoder, DownsamplingEncoder)
    bias, lengths = encoder.local_bias(), state.get("lengths")
    return {**state, "rows": encoder.local_layers[index](state["rows"], bias, lengths, encoder.window)}


def _pool(network: ByT5, state: State) -> State:
    """From a row a byte to a pooled row; both are kept."""
    encoder = network.encoder
    assert isinstance(encoder, DownsamplingEncoder)
    pooled = encoder.pooled(state["rows"], state.get("lengths"))
    state = {**state, "rows": pooled, "pooled": pooled, "byte rows": state["rows"]}
    if "lengths" not in state:
        return state
    return _with_lengths({**state, "byte lengths": state["lengths"]}, encoder.pooled_lengths(state["lengths"]))


def _join(network: ByT5, state: State) -> State:
    """Back to a row a byte."""
    encoder = network.encoder
    assert isinstance(encoder, DownsamplingEncoder)
    state = {**state, "rows": encoder.joined(state["byte rows"], state["pooled"], state["rows"])}
    return _with_lengths(state, state["byte lengths"]) if "byte lengths" in state else state


def _read_states(network: ByT5, state: State) -> State:
    """From the encoder's last rows to the decoder's first, and the keys and values that its layers read."""
    after = {"rows": network.embedding(state["target"])}
    if "lengths" in state:
        after["lengths"] = state["lengths"]
    rows = state["target rows"]
    if mx.any(rows < state["target"].shape[1]).item():
        after["real"] = mx.arange(state["target"].shape[1]) < rows[:, None]
    for index, memory in enumerate(network.memory(network.encoder.norm(state["rows"]))):
        after.update({f"keys {index}": memory.keys, f"values {index}": memory.values})
    return after


def _run_decoder_block(network: ByT5, state: State, index: int) -> State:
    memory = PlainMemory(state[f"keys {index}"], state[f"values {index}"], state.get("lengths"))
    block = network.decoder.layers[index]
    return {**state, "rows": block(state["rows"], network.decoder.relative_bias(), memory, None)}


def _with_lengths(state: State, lengths: mx.array) -> State:
    """The state with the real rows of each sequence told from filler."""
    return {**state, "lengths": lengths, "real": mx.arange(state["rows"].shape[1]) < lengths[:, None]}


def rotation(config: ByT5Config) -> Rotation:
    """The streams of encoder and decoder, which read one embedding and so are turned alike.

    Raises:
        QuantizationError: a head that is the embedding, an encoder that stands alone or takes maxima.
    """
    if not config.decoder_layers:
        raise QuantizationError("an encoder alone cannot be rotated: its states are the answer, and would be others")
    if config.tied_head:
        raise QuantizationError("a ByT5 with a tied head cannot be rotated: its embedding cannot take the last norm's gain")
    if config.downsample_factor > 1 and config.pooling == "max":
        raise QuantizationError("an encoder that pools by the maximum cannot be rotated; one that pools by the mean can")
    decoder = [f"decoder.layers.{index}" for index in range(config.decoder_layers)]
    blocks = [*encoder_blocks(config), *decoder]
    return Rotation(
        widths={"d_model": config.d_model},
        blocks=dict.fromkeys(blocks, config.head_dim),
        readers={
            "encoder.norm": tuple(f"{block}.cross.{name}" for block in decoder for name in ("k_proj", "v_proj")),
            "decoder.norm": ("output",),
        },
        rows=("embedding.weight",),
    )


def encoder_blocks(config: ByT5Config) -> list[str]:
    """The paths of the encoder's blocks, in the order in which rows pass them."""
    over_bytes = 0 if config.downsample_factor == 1 else config.layers_over_bytes
    return [
        *(f"encoder.local_layers.{index}" for index in range(over_bytes)),
        *(f"encoder.layers.{index}" for index in range(config.encoder_layers - over_bytes)),
    ]


def packed_keys(config: ByT5Config) -> PackedKeys:
    """Those of the attention to the encoder."""
    paths = tuple(f"decoder.layers.{index}.cross" for index in range(config.decoder_layers))
    return PackedKeys(paths, config.heads, config.head_dim)


BYT5 = Architecture(
    name="byt5",
    title="ByT5",
    config=ByT5Config,
    network=ByT5,
    capability=Capability.ANSWERS,
    parts=frozenset({"encoder", "decoder", "cross"}),
    pass_through=pass_through,
    start=start,
    pieces=pieces,
    logits=logits,
    rotation=rotation,
    packed_keys=packed_keys,
    is_gated=lambda config: config.gated_ffn,
    input_of=input_of,
    shows_states=True,
    overflows_in_float16=True,  # in the last layer of the feed-forward
    # All is tuned, as most is lost in the encoder, and in shorter steps: packed, the divergence is a thirtieth of a
    # MegaByte's, and Adam's steps, which are as long at any gradient, took it further off than packing had (LOG).
    tuning=Tuning(share=0.05, parts=None),
    split=Split(
        "encoder",
        encoder_blocks,
        lambda config: (config.heads, config.heads),
        by_head=("encoder.relative_bias.weight", "encoder.local_bias.weight"),
    ),
)
