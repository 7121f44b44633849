"""What answers cost ByT5: bits of given answers to inputs, teacher-forced, many at a time."""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.cache import check_cache_bits
from marlin_cli.engine.encoder_decoder import PackedMemory, encode
from marlin_cli.engine.finite import not_finite
from marlin_cli.errors import UsageError
from marlin_cli.models.byt5 import ByT5, Memory
from marlin_cli.models.byt5_ids import ids_of_bytes, padded
from marlin_cli.models.pair_batch import PairBatch


def bits_of_answers(
    network: ByT5, sources: Sequence[Sequence[int]], targets: Sequence[bytes], *, memory_bits: int = 16, name: str = "the model"
) -> npt.NDArray[np.float64]:
    """Bits that each answer and its end cost: [inputs], each as if it were alone.

    Args:
        sources: ids of the inputs, one at least.
        memory_bits: bits of the keys and values that the decoder reads of the inputs.
        name: of the model, for errors.

    Raises:
        UsageError: the network has no decoder, or `memory_bits` do not fit its heads.
        CheckpointError: predictions that are not finite.
    """
    config = network.config
    if not config.decoder_layers:
        raise UsageError("the model is an encoder alone and has no logits; ask it to encode")
    if memory_bits != 16:
        check_cache_bits(memory_bits, memory_bits, config.head_dim)
    source, lengths = padded(sources, config.pad_id)
    wanted, _ = padded([[*ids_of_bytes(target), config.end_id] for target in targets], config.pad_id)
    start = mx.full((len(targets), 1), config.start_id, dtype=wanted.dtype)
    read = mx.concatenate([start, wanted[:, :-1]], axis=1)
    plain = network.memory(network.encode(source, lengths), lengths)
    memory: Sequence[Memory] = plain if memory_bits == 16 else [PackedMemory(each, memory_bits) for each in plain]
    logits = network.head(network.decode(read, memory))
    costs = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
    # Rows after an answer's end are filler, which no earlier row sees.
    real = np.arange(wanted.shape[1]) <= np.array([[len(target)] for target in targets])
    bits: npt.NDArray[np.float64] = np.where(real, np.array(costs).astype(np.float64), 0.0).sum(axis=1) / math.log(2)
    if not np.isfinite(bits).all():
        raise not_finite(name)
    return bits


def log2_predictions(network: ByT5, batch: PairBatch) -> mx.array:
    """Base-2 logarithms of the probabilities of every id, at every byte of the answers and at their ends.

    Returns:
        [predictions, vocab] float32, pair after pair.

    Raises:
        UsageError: the network has no decoder.
    """
    if not network.config.decoder_layers:
        raise UsageError("the model is an encoder alone and predicts nothing; ask it to encode")
    memory = network.memory(encode(network, batch.source, batch.lengths), batch.lengths)
    hidden = network.decode(batch.target, memory)
    logits = network.head(hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.places)])
    return (logits - mx.logsumexp(logits, axis=-1, keepdims=True)) / math.log(2)
