"""How pairs pass a ByT5: its encoder, then its decoder as pieces, and what it predicts of the answers. See `passes`.

The decoder reads what the packed encoder makes of an input. Filler passes along and is told apart by `real`: the rows of
it that a layer sees count nowhere.
"""

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx

from marlin_cli.errors import QuantizationError
from marlin_cli.models.byt5 import ByT5, DownsamplingEncoder, PlainMemory
from marlin_cli.quantization.pair_batches import PairBatch
from marlin_cli.quantization.pieces import Piece, State
from marlin_cli.statistics.collect import ENCODER_STATES, shared_inputs


def byt5_start(network: ByT5, batch: PairBatch) -> State:
    """The state of pairs before the first piece."""
    state = {"rows": network.embedding(batch.source), "target": batch.target, "target rows": mx.array(batch.rows)}
    return state if batch.lengths is None else _with_lengths(state, batch.lengths)


def byt5_pieces(network: ByT5) -> list[Piece]:
    """The blocks of the encoder, what all of the decoder reads of its states, and the blocks of the decoder."""
    config = network.config
    sources = [source for source in dict.fromkeys(shared_inputs(network).values()) if source != ENCODER_STATES]

    def blocks(path: str, count: int, run: Callable[..., State], parts: Sequence[str] = ("attention",)) -> list[Piece]:
        found = []
        for index in range(count):
            block = f"{path}.{index}"
            within = tuple(source for source in sources if source.startswith(f"{block}."))
            adds = (*(f"{block}.{part}.o_proj" for part in parts), f"{block}.ffn.down_proj")
            found.append(Piece(partial(run, index=index), within, adds))
        return found

    if config.downsample_factor == 1:
        pieces = blocks("encoder.layers", config.encoder_layers, _run_encoder_block)
    else:
        over_bytes = config.layers_over_bytes
        lower = blocks("encoder.local_layers", over_bytes, _run_local_block)
        upper = blocks("encoder.layers", config.encoder_layers - over_bytes, _run_encoder_block)
        pieces = [*lower, Piece(_pool), *upper, Piece(_join)]
    if config.decoder_layers:
        pieces.append(Piece(_read_states, (ENCODER_STATES,)))
        pieces += blocks("decoder.layers", config.decoder_layers, _run_decoder_block, ("attention", "cross"))
    return pieces


def byt5_logits(network: ByT5, batch: PairBatch) -> mx.array:
    """Logits [predictions, vocab] float32 of every byte of the answers and of their ends, pair after pair.

    Raises:
        QuantizationError: an encoder alone, which predicts nothing.
    """
    if not network.config.decoder_layers:
        raise QuantizationError("the model is an encoder alone and predicts nothing that could be measured")
    memory = network.memory(network.encode(batch.source, batch.lengths), batch.lengths)
    hidden = network.decode(batch.target, memory)
    return network.head(hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.places)])


def byt5_bytes(batch: PairBatch) -> int:
    """Bytes of the corpus that went into pairs."""
    return batch.size_bytes


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
