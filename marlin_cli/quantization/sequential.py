"""Packs a network layer after layer on calibration bytes: each layer sees what the packed layers before it leave.

Statistics of the 16-bit network say what a layer's input was; after packing it is something else. Here two networks run
side by side, the original and the packed one as far as it is packed, and a layer's weight is first fitted by least
squares so that on the packed network's input x it gives what the original gives on its own, and then packed with x^T x
of the packed network (asymmetric calibration, GPTAQ, arXiv 2504.02692). Layers that add to the residual stream are
fitted to what is missing in the stream too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from marlin_cli.errors import QuantizationError, UsageError
from marlin_cli.models import Network, architecture_of, linear_layers, matrices_of, set_modules, shared_inputs, with_weights
from marlin_cli.models.architecture import Piece, State
from marlin_cli.quantization.apply import FORMAT_VERSION, Quantized, copy_with, plan_network
from marlin_cli.quantization.encoders import decode
from marlin_cli.quantization.feeds import size_bytes
from marlin_cli.quantization.layers import LayerReport, pack_layer, pack_weight, packed_layer, planned, report_of
from marlin_cli.quantization.methods import NEED_SEQUENTIAL, WITHOUT_OUTLIERS
from marlin_cli.quantization.methods.hadamard import rotated
from marlin_cli.quantization.plan import LayerPlan, QuantizationSettings, quantization_table
from marlin_cli.quantization.scaled import without_outliers

Matrix = npt.NDArray[np.float64]

# Of the mean diagonal of x^T x, in the fit: it keeps the weight near the original where inputs say little.
FIT_DAMPING = 0.01


@dataclass
class _Sums:
    """Sums over rows x of a layer's input in the packed network: what the fit and `gptq` need."""

    weight: float
    square: Matrix  # x^T x [channels, channels]
    drift: Matrix  # (original's input - x)^T x [channels, channels]
    missing: Matrix | None  # (original's stream - the packed network's)^T x [rows, channels]


class _Observed(nn.Module):
    """A linear layer that keeps its inputs and outputs of a pass, in which it may be called several times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._calls: list[tuple[mx.array, mx.array]] = []

    def __call__(self, x: mx.array) -> mx.array:
        output = self.layer(x)
        self._calls.append((x, output))
        return output

    def take(self) -> tuple[mx.array, mx.array]:
        """Inputs and outputs [rows, channels] since this was asked last."""
        calls, self._calls = self._calls, []
        inputs, outputs = ([_flat(each) for each in some] for some in zip(*calls, strict=True))
        return (inputs[0], outputs[0]) if len(calls) == 1 else (mx.concatenate(inputs), mx.concatenate(outputs))


def quantize_sequentially(
    network: Network,
    settings: QuantizationSettings,
    batches: Sequence[tuple[str, Any]],
    *,
    method: str = "gptq",
    domain_weights: Mapping[str, float] | None = None,
    on_layer: Callable[[LayerReport], None] | None = None,
) -> Quantized:
    """A copy of `network` with its layers packed by `settings`, in the order that bytes pass them.

    Memory: the rows of one stage in both networks, 8 x width bytes a row; for a local stage and a ByT5 a row is a byte.

    Args:
        batches: (domain, calibration bytes as the architecture reads them, see `feeds`).
        method: a name in `METHODS` other than awq; gptq+hadamard packs the rotated network.
        domain_weights: share of each domain in the sums; the rows seen of each if None. One that is left out counts
            nothing.

    Raises:
        UsageError: keys are to be balanced, which takes statistics.
        QuantizationError: no calibration bytes, or what `quantize_network` raises.
    """
    if settings.balance_keys:
        raise UsageError("--balance-keys takes the keys' ranges from --stats, which --sequential goes without")
    architecture = architecture_of(network)
    sizes = [(domain, size_bytes(batch)) for domain, batch in batches]
    weights = _weights(sizes, domain_weights)
    if not any(weights):
        raise QuantizationError("no calibration bytes to pack the layers on")
    plans = plan_network(network, settings)
    if method in NEED_SEQUENTIAL:
        architecture.rotation(network.config)  # one that cannot be turned says so before it reads the bytes
    if method in WITHOUT_OUTLIERS:
        squares = _input_squares(network, [batch for _, batch in batches], weights)
        inputs = shared_inputs(network)
        network, _ = without_outliers(network, plans, lambda path: squares[inputs[path]])
    if method in NEED_SEQUENTIAL:
        network = rotated(network)
    run = _Run(network, plans, method, batches, weights, on_layer)
    for piece in architecture.pieces(network):
        run.pack_piece(piece)
    embeddings = [path for path, module in network.named_modules() if isinstance(module, nn.Embedding)]
    marlin: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "method": f"{method}, sequential on {sum(size for _, size in sizes):,} bytes",
        "formats": settings.formats_of(plan.path for plan in plans),
        "kv_bits": settings.kv_bits,
        "statistics": None,
    }
    if method in NEED_SEQUENTIAL and architecture.shows_states:
        marlin["rotated_states"] = True  # of the encoder: `encode` would give others than the original
    if domain_weights is not None:
        marlin["domain_weights"] = dict(domain_weights)
    layers = matrices_of(network)
    for plan in plans:
        if plan.part == "hash" and plan.format is not None:
            run.pack_table(plan, layers[plan.path])
    reports = [run.reports.get(plan.path) or planned(plan, layers[plan.path].weight) for plan in plans]
    return Quantized(copy_with(network, run.packed), quantization_table(plans, sorted(embeddings)), marlin, reports)


def _weights(sizes: Sequence[tuple[str, int]], domain_weights: Mapping[str, float] | None) -> list[float]:
    """The weight of a row of each batch, from the batches' domains and bytes."""
    if domain_weights is None:
        return [1.0] * len(sizes)
    total: dict[str, int] = {}
    for domain, size in sizes:
        total[domain] = total.get(domain, 0) + size
    unknown = sorted(set(domain_weights) - set(total))
    if unknown:
        raise QuantizationError(f"no domain {unknown[0]!r} in the calibration bytes; there are {', '.join(sorted(total))}")
    weights = [domain_weights.get(domain, 0.0) / total[domain] for domain, _ in sizes]
    # Scaled so that a domain alone gives, to the last bit, what its bytes give without weights.
    return [weight / (max(weights) or 1.0) for weight in weights]


def _input_squares(network: Network, batches: Sequence[Any], weights: Sequence[float]) -> dict[str, npt.NDArray[np.float32]]:
    """The mean square of each input channel [channels] of the network as it is, by the path in whose name it is measured."""
    network = _in_float32(network)
    architecture = architecture_of(network)
    used = [(batch, weight) for batch, weight in zip(batches, weights, strict=True) if weight > 0]
    states = [architecture.start(network, batch) for batch, _ in used]
    sums: dict[str, npt.NDArray[np.float64]] = {}
    rows = dict.fromkeys(shared_inputs(network).values(), 0.0)
    for piece in architecture.pieces(network):
        observers = {source: _Observed(linear_layers(network)[source]) for source in piece.sources}
        set_modules(network, list(observers.items()))
        for index, (_, weight) in enumerate(used):
            before, states[index] = states[index], piece.run(network, states[index])
            mx.eval(states[index])
            for source, observer in observers.items():
                seen = _real_rows(observer.take()[0], before)
                sums[source] = sums.get(source, 0) + weight * np.square(seen).sum(axis=0, dtype=np.float64)
                rows[source] += weight * len(seen)
        set_modules(network, [(source, observer.layer) for source, observer in observers.items()])
    return {source: (total / rows[source]).astype(np.float32) for source, total in sums.items()}


def _real_rows(array: mx.array, state: State) -> npt.NDArray[np.float32]:
    """Rows [rows, channels] of an array [.., channels] that came about from a state, without filler."""
    rows = np.array(_flat(array))
    return rows[np.array(state["real"]).reshape(-1)] if "real" in state else rows


class _Run:
    """Both networks, how far each batch has come in them, and what has been packed so far."""

    def __init__(
        self,
        network: Network,
        plans: Sequence[LayerPlan],
        method: str,
        batches: Sequence[tuple[str, Any]],
        weights: Sequence[float],
        on_layer: Callable[[LayerReport], None] | None,
    ) -> None:
        self.plans, self.method, self.on_layer = {plan.path: plan for plan in plans}, method, on_layer
        self.original = linear_layers(network)
        self.teacher, self.student = _in_float32(network), _in_float32(network)
        start = architecture_of(network).start
        used = [(batch, weight) for (_, batch), weight in zip(batches, weights, strict=True) if weight > 0]
        # Of each batch in the teacher and in the student.
        self.states: list[tuple[State, State]] = [(start(self.teacher, each), start(self.student, each)) for each, _ in used]
        self.weights = [weight for _, weight in used]
        self.reports: dict[str, LayerReport] = {}
        self.packed: list[tuple[str, nn.Module]] = []
        self.groups: dict[str, list[str]] = {}
        for path, source in shared_inputs(network).items():
            self.groups.setdefault(source, []).append(path)

    def pack_table(self, plan: LayerPlan, table: nn.Module) -> None:
        """Pack a table, whose rows are multiplied by nothing."""
        packed, report = pack_layer(table["weight"], None, plan, method=self.method)
        assert packed is not None
        self.packed.append((plan.path, packed))
        self.reports[plan.path] = report
        if self.on_layer is not None:
            self.on_layer(report)

    def pack_piece(self, piece: Piece) -> None:
        """Pack the layers of a piece, then take every batch through it."""
        for source in piece.sources:
            self._pack(source, piece)
        for index, states in enumerate(self._through(piece)):
            mx.eval(states)
            self.states[index] = states

    def _through(self, piece: Piece) -> Iterator[tuple[State, State]]:
        """What each batch becomes behind a piece, in the teacher and in the student; nothing is evaluated."""
        for teacher, student in self.states:
            yield piece.run(self.teacher, teacher), piece.run(self.student, student)

    def _pack(self, source: str, piece: Piece) -> None:
        """Pack the layers of a piece that see the input of `source`."""
        members = [path for path in self.groups[source] if self.plans[path].format is not None]
        if not members:
            return
        sums = self._sums(source, piece)
        hessian = sums.square / sums.weight
        importance = mx.array(np.diag(hessian).astype(np.float32))
        damped = sums.square + FIT_DAMPING * np.diag(sums.square).mean() * np.eye(len(hessian))
        shift = np.linalg.solve(damped, sums.drift.T).T
        missing = None if sums.missing is None else np.linalg.solve(damped, sums.missing.T).T
        for path in members:
            plan, module = self.plans[path], self.original[path]
            weight = np.array(module["weight"].astype(mx.float32))
            fitted = weight + weight @ shift
            if missing is not None:
                fitted = fitted + missing
            packed = pack_weight(mx.array(fitted.astype(np.float32)), plan, self.method, importance, hessian)
            self.packed.append((path, packed_layer(packed, module.get("bias"))))
            plain = linear_layers(self.student)[path]
            plain["weight"] = decode(packed)
            report = report_of(module["weight"], packed, plan, hessian)
            self.reports[path] = report
            if self.on_layer is not None:
                self.on_layer(report)

    def _sums(self, source: str, piece: Piece) -> _Sums:
        # What a layer of the residual stream adds to: the rows of its block, and what the layers before it have added.
        added = piece.adds[: piece.adds.index(source)] if source in piece.adds else ()
        networks = self.teacher, self.student
        observers = [{path: _Observed(linear_layers(network)[path]) for path in (source, *added)} for network in networks]
        channels = self.plans[source].columns
        square, drift = np.zeros((channels, channels)), np.zeros((channels, channels))
        missing = np.zeros((self.plans[source].rows, channels)) if source in piece.adds else None
        total = 0.0
        try:
            for network, watching in zip(networks, observers, strict=True):
                set_modules(network, list(watching.items()))
            for index, _ in enumerate(self._through(piece)):
                weight, states = self.weights[index], self.states[index]
                arrays = [watching[source].take()[0] for watching in observers]
                if missing is not None:
                    at = [_flat(state["rows"]) for state in states]
                    for path in added:
                        at = [stream + watching[path].take()[1] for stream, watching in zip(at, observers, strict=True)]
                    arrays.append(at[0] - at[1])
                mx.eval(arrays)
                rows = [_real_rows(array, states[0]) for array in arrays]
                total += weight * len(rows[1])
                square += weight * (rows[1].T @ rows[1])
                drift += weight * ((rows[0] - rows[1]).T @ rows[1])
                if missing is not None:
                    missing += weight * (rows[2].T @ rows[1])
        finally:
            for network, watching in zip(networks, observers, strict=True):
                set_modules(network, [(path, observer.layer) for path, observer in watching.items()])
        return _Sums(total, square, drift, missing)


def _flat(array: mx.array) -> mx.array:
    return array.reshape(-1, array.shape[-1])


def _in_float32(network: Network) -> Network:
    """A copy whose linear layers are its own, with everything in float32."""
    return with_weights(network, {path: array.astype(mx.float32) for path, array in tree_flatten(network.parameters())})
