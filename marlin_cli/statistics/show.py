"""Statistics as a few numbers a layer: plain values for programs, and tables of text for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from marlin_cli.page.svg import shortened
from marlin_cli.statistics.data import Moments, Run, Statistics

BAR_LETTERS = 30  # of the longest bar: with a label and a number it fits 80 columns
ROWS_OF_A_TABLE = 8  # of the local sequence: with the longest label they fit 100 columns
SUFFIX = "_proj"  # of most layers' names; of layers that share an input it is said once


@dataclass(frozen=True)
class Range:
    """How large activations are: root mean squares over rows and channels, and the largest absolute value."""

    rows: int
    channels: int
    rms: float
    absolute_maximum: float
    channel_peak: float  # largest root mean square of a channel, over the median one
    rms_by_domain: dict[str, float]
    rms_by_group: list[float]  # by row of the sequence, or by head
    maximum_by_group: list[float]  # largest absolute value


@dataclass(frozen=True)
class LayerRange:
    """Linear layers that share an input, and its range. Groups are rows of the stage's sequence."""

    layers: list[str]
    input: Range


@dataclass(frozen=True)
class AttentionRange:
    """Keys and values of one attention. Groups are heads."""

    attention: str
    keys: Range
    values: Range


@dataclass(frozen=True)
class Summary:
    """What `marlin calibrate --show` shows."""

    model: str
    bytes: int
    domains: dict[str, int]
    runs: list[Run]
    layers: list[LayerRange]
    attentions: list[AttentionRange]


@dataclass(frozen=True)
class Table:
    """Text in rows; the first column is a name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def summarise(statistics: Statistics) -> Summary:
    """The numbers of every layer and attention."""
    totals = statistics.totals
    domains = list(totals.domains)
    sharing: dict[str, list[str]] = {}
    for path, source in statistics.layers.items():
        sharing.setdefault(source, []).append(path)
    return Summary(
        model=statistics.model,
        bytes=statistics.total_bytes,
        domains=dict(totals.domains),
        runs=list(statistics.runs),
        layers=[LayerRange(paths, _range(totals.inputs[source], domains)) for source, paths in sharing.items()],
        attentions=[
            AttentionRange(path, _range(totals.keys[path], domains), _range(totals.values[path], domains))
            for path in totals.keys
        ],
    )


def domain_table(summary: Summary) -> Table:
    """Bytes by domain."""
    rows = [[name, f"{count:,}", f"{100 * count / summary.bytes:.1f} %"] for name, count in summary.domains.items()]
    rows.append(["all", f"{summary.bytes:,}", ""])
    return Table(f"model {summary.model[:12]}, {len(summary.runs)} run(s)", ["domain", "bytes", "share"], rows)


def tables(summary: Summary) -> list[Table]:
    """Everything there is, at most 100 columns wide: domains, layers, rows of the sequence, keys and values."""
    ranges = [(_label(layer.layers), layer.input) for layer in summary.layers]
    by_row = [(label, each.rms_by_group) for label, each in ranges if len(each.rms_by_group) > 1]
    most = max((len(values) for _, values in by_row), default=0)
    found = [
        domain_table(summary),
        Table(
            "inputs of linear layers: root mean square, by domain; peak: largest channel over the median one",
            ["layer", "channels", "max", "peak", "rms", *summary.domains],
            [[label, str(each.channels), *_cells(each, summary)] for label, each in ranges],
        ),
        *(_row_table(by_row, start, min(start + ROWS_OF_A_TABLE, most)) for start in range(0, most, ROWS_OF_A_TABLE)),
        Table(
            "keys (as cached) and values: root mean square, by domain",
            ["attention", "heads", "max", "peak", "rms", *summary.domains],
            [
                [f"{each.attention} {kind}", str(len(cached.rms_by_group)), *_cells(cached, summary)]
                for each in summary.attentions
                for kind, cached in (("K", each.keys), ("V", each.values))
            ],
        ),
    ]
    return [table for table in found if table.rows]


def drawings(summary: Summary) -> list[Table]:
    """Ranges as bars of characters, at most 80 columns wide: by layer, by domain, by row of the local sequence."""
    layers = {shortened(layer.layers[0]): layer.input.absolute_maximum for layer in summary.layers}
    domains = {name: float(np.mean([layer.input.rms_by_domain[name] for layer in summary.layers])) for name in summary.domains}
    local = [layer.input for layer in summary.layers if len(layer.input.rms_by_group) > 1]
    most = max((len(each.rms_by_group) for each in local), default=0)
    rows = {
        str(row): float(np.mean([each.rms_by_group[row] for each in local if row < len(each.rms_by_group)]))
        for row in range(most)
    }
    drawn = [
        _drawn("largest absolute input of a layer", "layer", layers),
        _drawn("root mean square of inputs by domain, mean over layers", "domain", domains),
    ]
    return [*drawn, _drawn("root mean square by row of the local sequence, mean over layers", "row", rows)] if rows else drawn


def _row_table(by_row: Sequence[tuple[str, Sequence[float]]], start: int, end: int) -> Table:
    """Rows `start` to `end` of the local sequence; layers that see fewer are left empty."""
    return Table(
        "root mean square by row of the local sequence (row i predicts byte i of a patch)",
        ["layer", *map(str, range(start, end))],
        [
            [label, *(_number(values[row]) if row < len(values) else "" for row in range(start, end))]
            for label, values in by_row
        ],
    )


def _drawn(title: str, what: str, values: Mapping[str, float]) -> Table:
    largest = max(values.values(), default=0.0)
    rows = []
    for name, value in values.items():
        length = round(BAR_LETTERS * value / largest) if largest else 0
        rows.append([name, _number(value), "#" * length + "." * (BAR_LETTERS - length)])
    return Table(title, [what, "value", ""], rows)


def _range(moments: Moments, domains: Sequence[str]) -> Range:
    squares, count = moments.sum_squares, moments.count
    channels = squares.shape[-1]
    by_channel = _rms(squares.sum(axis=(0, 1)), count.sum())
    median = float(np.median(by_channel))
    by_domain = _rms(squares.sum(axis=(1, 2)), count.sum(axis=1) * channels)
    return Range(
        rows=int(count.sum()),
        channels=channels,
        rms=float(_rms(squares.sum(), count.sum() * channels)),
        absolute_maximum=float(moments.absolute_maximum.max(initial=0.0)),
        channel_peak=float(by_channel.max()) / median if median else 0.0,
        rms_by_domain=dict(zip(domains, by_domain.tolist(), strict=True)),
        rms_by_group=_rms(squares.sum(axis=(0, 2)), count.sum(axis=0) * channels).tolist(),
        maximum_by_group=moments.absolute_maximum.max(axis=(0, 2), initial=0.0).tolist(),
    )


def _rms(sum_squares: npt.ArrayLike, count: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Root mean square of `count` numbers; 0 of none."""
    return np.asarray(np.sqrt(np.asarray(sum_squares) / np.maximum(count, 1)))


def _label(layers: Sequence[str]) -> str:
    """`a.q/k/v_proj` for layers that share an input; of several blocks the first one is named."""
    blocks, names = (list(dict.fromkeys(path.rpartition(".")[part] for path in layers)) for part in (0, 2))
    if len(names) > 1 and all(name.endswith(SUFFIX) for name in names):
        together = "/".join(name.removesuffix(SUFFIX) for name in names) + SUFFIX
    else:
        together = " + ".join(names)
    label = f"{blocks[0]}.{together}" if blocks[0] else together
    return label + (f" ({len(blocks)} blocks)" if len(blocks) > 1 else "")


def _cells(found: Range, summary: Summary) -> list[str]:
    by_domain = [found.rms_by_domain[name] for name in summary.domains]
    return [_number(value) for value in (found.absolute_maximum, found.channel_peak, found.rms, *by_domain)]


def _number(value: float) -> str:
    return f"{value:.3g}"
