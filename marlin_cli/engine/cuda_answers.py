"""ByT5's decoder on an NVIDIA GPU: some steps a launch, ids are drawn there and fed again before the host has read them.

One answer to each input. The host's word counts: where what it pushes is not what was drawn, or it draws otherwise than before,
the launches ahead are forgotten, and the rows that they wrote are written again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from marlin_cli.engine.compiled_answers import MemoryRows
from marlin_cli.engine.cuda_layers import Prepared, linear_arrays, prepared, say_once
from marlin_cli.engine.cuda_noise import NoiseAhead
from marlin_cli.engine.finite import not_finite
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.errors import BackendError
from marlin_cli.models.byt5 import ByT5, Decoder, DecoderBlock
from marlin_cli.ops.cuda_answers import MOST_FED, AnswersOnDevice
from marlin_cli.ops.cuda_arrays import LayerArrays, LinearArrays, MemoryLayer, StageArrays, dense_arrays
from marlin_cli.ops.cuda_compile import machine_code
from marlin_cli.ops.cuda_driver import Queue
from marlin_cli.ops.cuda_mailbox import NOT_FINITE
from marlin_cli.ops.cuda_stages import MOST_STREAMS, MemoryPlaces, addresses, size_for, takes_stage
from marlin_cli.ops.reference import KeyValueRows, Packed

MOST_ANSWERS = 64  # in groups of those that one launch takes
STEPS = 8  # of a launch
GREEDY = (0.0, 1.0, 0.0, 0)


class Rules(NamedTuple):
    """What ids ahead of the host were drawn by."""

    barred: frozenset[int]
    sampling: Sampling


class Run(NamedTuple):
    """A launch of each group, not read yet."""

    numbers: dict[int, int]
    steps: int


class CudaAnswers:
    """What the decoder remembers; an `Answers` of `encoder_decoder` that draws by itself. Made by `cuda_answers`."""

    def __init__(self, network: ByT5, decoder: Prepared, memory: Sequence[MemoryRows], answers: int) -> None:
        self._queue, self._memory = Queue(), list(memory)
        self._noise = NoiseAhead(self._queue, network.config.vocab_size)
        self._source: Noise | None = None
        self._rows = list(range(answers))  # of each answer that goes on
        self._ids: list[np.ndarray] = []  # pushed, each [answers at first]
        self._accepted = 0  # of them, that the device had before the host
        self._rules: Rules | None = None
        self._runs: list[Run] = []
        self._ready: tuple[np.ndarray, np.ndarray] | None = None  # of the run that is being taken: [answers, steps] each
        self._taken = 0
        self._drawn: np.ndarray | None = None  # by the last draw, until the host pushes them
        self._make(decoder, answers)

    @property
    def memory_bytes(self) -> int:
        return sum(array.nbytes for each in self._memory for rows in (each.keys, each.values) for array in _arrays(rows))

    def push(self, ids: Sequence[int] | mx.array) -> None:
        """Append ids [answers]; `logits` or `draw` has what follows."""
        pushed = np.zeros(self._width, np.int32)
        pushed[self._rows] = np.array(ids)
        if self._drawn is not None and (pushed[self._rows] == self._drawn[self._rows]).all():
            self._accepted = len(self._ids) + 1
            pushed = self._drawn
        else:
            self._forget()
        self._ids.append(pushed)
        self._drawn = None

    def logits(self) -> mx.array:
        """Of what follows the ids pushed: [answers, vocab] float32."""
        self._forget()
        self._start(1, 0, Rules(frozenset(), Sampling()), keep_logits=True)
        self._read()
        self._forget()
        found = np.concatenate([group.logits() for group in self._groups])
        return mx.array(found[self._rows])

    def draw(self, forbidden: Sequence[int], sampling: Sampling, noise: Noise, most: int) -> tuple[list[int], list[float]]:
        """See `sampling.draw`; at most `most` ids will be drawn from here on.

        Raises:
            CheckpointError: logits that are no numbers.
            BackendError: the GPU did not finish.
        """
        rules = Rules(frozenset(forbidden), sampling)
        if rules != self._rules or self._drawn is not None or (self._ready is None and not self._runs):
            self._forget()
            self._source, self._rules = noise, rules
            self._start(min(STEPS, most), most, rules)
        if self._ready is None:
            queued = sum(run.steps for run in self._runs)
            if queued < most and len(self._runs) < 2:
                self._go_on(min(STEPS, most - queued), rules)
            self._ready, self._taken = self._read(), 0
        ids, costs = self._ready
        drawn, cost = ids[:, self._taken], costs[:, self._taken]
        self._taken += 1
        if self._taken == ids.shape[1]:
            self._ready = None
        if (drawn[self._rows] == NOT_FINITE).any():
            raise not_finite()
        self._drawn = drawn
        return drawn[self._rows].tolist(), cost[self._rows].tolist()

    def keep(self, answers: Sequence[int], streams: Sequence[int] | None) -> None:
        """See `Answers.keep`. Rows that end go on beside the others, unread, but no group without any other."""
        self._rows = [self._rows[answer] for answer in answers]

    def _forget(self) -> None:
        """Forget the launches ahead, and give their noise back."""
        ahead = sum(run.steps for run in self._runs)
        if self._ready is not None:
            ahead += self._ready[0].shape[1] - self._taken
        if self._rules is not None and self._rules.sampling.temperature and self._source is not None:
            self._noise.give_back(ahead)
            self._noise.close(self._source)
        self._runs, self._ready, self._drawn, self._rules = [], None, None, None

    def _start(self, steps: int, most: int, rules: Rules, *, keep_logits: bool = False) -> None:
        """Feed what the device does not have, and draw `steps` ids."""
        # The last id that was drawn there may not be fed yet, and one must be fed to draw.
        seen = max(0, min(self._accepted, len(self._ids)) - 1)
        new = np.stack(self._ids[seen:], axis=1)
        while new.shape[1] > MOST_FED - STEPS:
            some, new = new[:, : MOST_FED - STEPS], new[:, MOST_FED - STEPS :]
            for index, group in self._active():
                group.feed(self._of_group(index, some), seen, 1, 0, GREEDY, frozenset())
            seen += some.shape[1]
        noise, filters = self._drawing(steps, rules)
        numbers = {
            index: group.feed(self._of_group(index, new), seen, steps, noise, filters, rules.barred, keep_logits=keep_logits)
            for index, group in self._active()
        }
        self._accepted, self._runs = len(self._ids), [Run(numbers, steps)]
        self._seen = seen + new.shape[1] + steps - 1

    def _go_on(self, steps: int, rules: Rules) -> None:
        """Draw more behind the launches ahead."""
        noise, filters = self._drawing(steps, rules)
        numbers = {index: group.feed(None, self._seen, steps, noise, filters, rules.barred) for index, group in self._active()}
        self._runs.append(Run(numbers, steps))
        self._seen += steps

    def _drawing(self, steps: int, rules: Rules) -> tuple[int, tuple[float, float, float, int]]:
        sampling = rules.sampling
        if not sampling.temperature:
            return 0, GREEDY
        assert self._source is not None
        filters = (sampling.temperature, sampling.top_p, sampling.min_p, sampling.top_k)
        return self._noise.take(self._source, steps), filters

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids and costs [answers at first, steps] of the first launch ahead."""
        run = self._runs.pop(0)
        ids = np.zeros((self._width, run.steps), np.int32)
        costs = np.zeros((self._width, run.steps), np.float32)
        for index, number in run.numbers.items():
            rows = slice(index * MOST_STREAMS, index * MOST_STREAMS + self._groups[index].streams)
            ids[rows], costs[rows] = self._groups[index].read(number, run.steps)
        return ids, costs

    def _active(self) -> list[tuple[int, AnswersOnDevice]]:
        """The groups with an answer that goes on."""
        wanted = {row // MOST_STREAMS for row in self._rows}
        return [(index, group) for index, group in enumerate(self._groups) if index in wanted]

    def _of_group(self, index: int, ids: np.ndarray) -> np.ndarray:
        first = index * MOST_STREAMS
        return ids[first : first + self._groups[index].streams]

    def _make(self, decoder: Prepared, answers: int) -> None:
        lengths = self._memory[0].lengths
        stored = [_with_scales(rows) for each in self._memory for rows in (each.keys, each.values)]
        arrays = [None if array is None else mx.contiguous(array) for pair in stored for array in pair]
        lengths = None if lengths is None else mx.contiguous(lengths.astype(mx.int32))
        self._held = [*arrays, lengths]
        *places, of_lengths = addresses(self._held)
        bytes_an_input = [0 if array is None else array.nbytes // array.shape[0] for array in arrays]
        stage = replace(decoder.stage, memory_bits=_bits(self._memory))
        self._groups: list[AnswersOnDevice] = []
        for first in range(0, answers, MOST_STREAMS):
            inputs = min(MOST_STREAMS, answers - first)
            own = [place and place + first * size for place, size in zip(places, bytes_an_input, strict=True)]
            layers = [own[4 * i : 4 * i + 4] for i in range(len(self._memory))]
            memory = MemoryPlaces(layers, of_lengths and of_lengths + 4 * first, stored[0][0].shape[2], inputs)
            group = AnswersOnDevice(stage, size_for(inputs), self._queue, memory, decoder.known)
            group.load(machine_code(group.text))
            decoder.known = group.known
            self._groups.append(group)
        self._width = sum(group.streams for group in self._groups)


def why_operations(network: ByT5, memory_bits: int, inputs: int, answers: int = 1) -> str | None:
    """Why so many inputs are answered operation by operation; None where steps are launched whole."""
    if answers != 1:
        return "beams"
    if inputs > MOST_ANSWERS:
        return f"{inputs} answers side by side are more than {MOST_ANSWERS}"
    if type(network.decoder) is not Decoder or type(network.embedding) is not nn.Embedding:
        return "a decoder of another kind"
    decoder = _prepared(network)
    if decoder is None:
        return "layers of a kind that the kernels do not know, or with 8-bit activations"
    if not takes_stage(replace(decoder.stage, memory_bits=memory_bits), size_for(min(inputs, MOST_STREAMS))):
        return "float16, formats that differ from layer to layer, or sizes that the kernels do not take"
    return None


def _prepared(network: ByT5) -> Prepared | None:
    parts = [network.embedding, network.decoder, *([] if network.config.tied_head else [network.output])]
    return prepared(network, parts, lambda: decoder_arrays(network))


def cuda_answers(network: ByT5, memory: Sequence[MemoryRows], answers: int) -> CudaAnswers | None:
    """The state of a decoder with one answer to each input, or None where it goes operation by operation."""
    inputs = _with_scales(memory[0].keys)[0].shape[0]
    decoder = None if why_operations(network, _bits(memory), inputs, answers) else _prepared(network)
    if decoder is None:
        return None
    try:
        return CudaAnswers(network, decoder, memory, inputs)
    except BackendError as error:
        say_once(f"answers are decoded operation by operation: {error}")
        return None


def decoder_arrays(network: ByT5) -> StageArrays | None:
    """A decoder from ids to logits; None where it has a layer that the kernels do not know."""
    config = network.config
    layers = [_layer_arrays(layer) for layer in network.decoder.layers]
    last = _head(network)
    dtype = network.embedding.weight.dtype
    if last is None or any(layer is None or layer.attention_norm.dtype != dtype for layer in layers):
        return None
    bias = network.decoder.relative_bias()
    mx.eval(bias)
    return StageArrays(
        layers=tuple(layer for layer in layers if layer is not None),
        table=network.embedding.weight,
        norm=network.decoder.norm.weight,
        first=None,
        last=last,
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.head_dim,
        scale=1.0,
        window=-1,
        theta=0.0,
        interleaved=False,
        norm_kind="rmsnorm",
        activation=config.activation,
        eps=config.norm_eps,
        bias=mx.contiguous(bias.astype(dtype)),
    )


def _head(network: ByT5) -> LinearArrays | None:
    config = network.config
    head = dense_arrays(network.embedding.weight, None) if config.tied_head else linear_arrays(network.output)
    if head is None or not config.scaled_head:
        return head
    return LinearArrays(
        head.weight, head.kind, head.scales, head.zeros, head.bias, head.factor * config.d_model**-0.5, head.group
    )


def _layer_arrays(layer: DecoderBlock) -> LayerArrays | None:
    own, cross, ffn = layer.attention, layer.cross, layer.ffn
    parts = [own.q_proj, own.k_proj, own.v_proj, own.o_proj, ffn.up_proj, ffn.down_proj, cross.q_proj, cross.o_proj]
    known = [linear_arrays(part) for part in parts]
    gate = linear_arrays(ffn["gate_proj"]) if "gate_proj" in ffn else None
    if any(part is None for part in known) or ("gate_proj" in ffn and gate is None):
        return None
    query, key, value, out, up, down, cross_query, cross_out = (part for part in known if part is not None)
    return LayerArrays(
        attention_norm=layer.attention_norm.weight, ffn_norm=layer.ffn_norm.weight, query_norm=None, key_norm=None,
        qkv=(query, key, value), out=out, up=(up,) if gate is None else (gate, up), down=down,
        memory=MemoryLayer(layer.cross_norm.weight, cross_query, cross_out),
    )  # fmt: skip


def _bits(memory: Sequence[MemoryRows]) -> int:
    return memory[0].keys.bits if isinstance(memory[0].keys, Packed) else 16


def _arrays(rows: KeyValueRows) -> tuple[mx.array, ...]:
    return (rows.packed, rows.scales) if isinstance(rows, Packed) else (rows,)


def _with_scales(rows: KeyValueRows) -> tuple[mx.array, mx.array | None]:
    return (rows.packed, rows.scales) if isinstance(rows, Packed) else (rows, None)
