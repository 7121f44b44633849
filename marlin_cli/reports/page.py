"""A bench result, as its JSON document has it, as sections of a page: walks what is there, and knows no measure by name.

What decides is the shape of a value. A spread (median, minimum, maximum) or an estimate (value, standard_error) is a
measurement; a table of plain numbers under a name with a unit is a sum of parts; a table of alike tables is one row a
name; a list of alike tables whose entries differ in a whole number is a curve over it. All else goes to the last table.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from marlin_cli.page import Bars, Block, Chart, Grid, Plot, Point, Section, Text
from marlin_cli.page.axes import number
from marlin_cli.page.fitting import each_once, fitting_time

# Names of tables whose numbers add up end so.
UNITS = ("_bytes", "_seconds", "_ms", "_share", "_by_part")

# Whole numbers that curves are drawn over, before others that differ.
AXES = ("context_bytes", "prompt_bytes", "decode_bytes", "batch", "batch_size", "streams", "position")

# Keys of a spread that say nothing more in a table.
DETAIL = ("samples",)


@dataclass(frozen=True)
class Measured:
    """A number and how far it may be off: from the smallest to the largest repeat, or a standard error each way."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def reach(self) -> tuple[float, float] | None:
        """From where to where the number may lie."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def text(self) -> str:
        """The number with its range, if there is one."""
        reach = self.reach
        return number(self.value) + ("" if reach is None else f" ({number(reach[0])} .. {number(reach[1])})")


def sections_of(document: Mapping[str, Any]) -> list[Section]:
    """The page of a result of `marlin bench`."""
    models: list[Mapping[str, Any]] = [model for model in document.get("models", ()) if isinstance(model, Mapping)]
    names = labels_of(models)
    sections = []
    best = quality_against_size(models, names)
    if best is not None:
        sections.append(Section("Quality against size", [best]))
    sizes: list[Block] = []
    for topic in dict.fromkeys(key for model in models for key in model):
        charts = each_once(map(fitting_time, charts_of(topic, [model.get(topic) for model in models], names)))
        if topic.endswith(UNITS):
            sizes += charts
        elif charts:
            sections.append(Section(words(topic), charts))
    if sizes:
        sections.append(Section("Size", sizes))
    sections.append(_where(document))
    rows = _all_numbers(models)
    if rows:
        sections.append(Section("All numbers", [Grid("", ["", *names], rows)]))
    return sections


def charts_in(sections: Sequence[Section]) -> list[Chart]:
    """The charts of a page, in order."""
    return [block for section in sections for block in section.blocks if isinstance(block, (Bars, Plot))]


def labels_of(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name for each model: the last part of its path where those differ."""
    names = [str(model.get("model", index + 1)) for index, model in enumerate(models)]
    short = [PurePath(name).name or name for name in names]
    return short if len(set(short)) == len(short) else names


def quality_against_size(models: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Plot | None:
    """Bits per byte over bits per weight, a point a model; None where fewer than two were measured."""
    points = {}
    for model, name in zip(models, names, strict=True):
        weights, stored = model.get("weights"), model.get("stored_weight_bytes")
        score = (model.get("quality") or {}).get("all_domains") or {}
        quality = measured(score.get("bits_per_byte"))
        if isinstance(weights, Mapping) and isinstance(stored, Mapping) and quality is not None and sum(weights.values()):
            bits = 8 * sum(stored.values()) / sum(weights.values())
            # Beside a reference, what matters is the error of the difference: windows are paired.
            beside = measured((score.get("against_reference") or {}).get("bits_per_byte_difference"))
            if beside is not None and beside.reach is not None:
                spread = (beside.reach[1] - beside.reach[0]) / 2
                quality = Measured(quality.value, quality.value - spread, quality.value + spread)
            points[name] = [Point(bits, quality.value, quality.low, quality.high, name)]
    if len(points) < 2:  # a place among none
        return None
    return Plot("Quality against size", "bits per weight, all weights", "bits per byte", points, joined=False)


def measured(value: Any) -> Measured | None:
    """A spread, an estimate or a plain number; None for anything else."""
    if isinstance(value, Mapping):
        if _is_number(value.get("median")):
            return Measured(value["median"], value.get("minimum"), value.get("maximum"))
        if _is_number(value.get("value")) and "standard_error" in value:
            error = value["standard_error"]
            return Measured(value["value"], *([value["value"] - error, value["value"] + error] if error is not None else []))
        return None
    return Measured(float(value)) if _is_number(value) else None


def charts_of(name: str, values: Sequence[Any], models: Sequence[str]) -> Iterator[Chart]:
    """Charts of one value a model (None where a model lacks it), and of everything inside it."""
    known = next((value for value in values if value is not None), None)
    if measured(known) is not None and isinstance(known, Mapping):
        yield _bars(words(name), unit_of(name), models, {"": [measured(value) for value in values]})
    elif isinstance(known, Mapping) and known:
        yield from _of_table(name, [value if isinstance(value, Mapping) else {} for value in values], models)
    elif isinstance(known, list) and known and all(isinstance(entry, Mapping) for entry in known):
        yield from _curves(name, [value or [] for value in values], models)


def _series(models: Sequence[str]) -> Sequence[str]:
    """The names of series that stand for models; of one alone the page's title has it."""
    return models if len(models) > 1 else [""] * len(models)


def _bars(title: str, unit: str, labels: Sequence[str], series: Mapping[str, Sequence[Measured | None]]) -> Bars:
    values = {name: [None if each is None else each.value for each in found] for name, found in series.items()}
    ranges = {name: [None if each is None else each.reach for each in found] for name, found in series.items()}
    return Bars(title, unit, labels, values, ranges=ranges)


def _of_table(name: str, tables: Sequence[Mapping[str, Any]], models: Sequence[str]) -> Iterator[Chart]:
    keys = list(dict.fromkeys(key for table in tables for key in table))
    inside = [value for table in tables for value in table.values() if value is not None]
    if inside and all(map(_is_number, inside)):
        if any(key.startswith("percentile") for key in keys):  # no parts of a whole
            waits = {model: [table.get(key) for key in keys] for model, table in zip(_series(models), tables, strict=True)}
            yield Bars(words(name), unit_of(name), [words(key) for key in keys], waits)
        elif name.endswith(UNITS):
            parts = {key: [table.get(key) for table in tables] for key in keys}
            yield Bars(words(name), unit_of(name), models, parts, stacked=True)
    elif len(keys) > 1 and _alike(inside):
        for leaf in _measurements_in(inside[0]):
            rows = {
                model: [measured(_at(table.get(key), leaf)) for key in keys]
                for model, table in zip(_series(models), tables, strict=True)
            }
            yield _bars(f"{words(leaf[-1])} by {words(name).lower()}", unit_of(leaf[-1]), keys, rows)
    else:
        for key in keys:
            yield from charts_of(key, [table.get(key) for table in tables], models)


def _curves(name: str, lists: Sequence[Sequence[Mapping[str, Any]]], models: Sequence[str]) -> Iterator[Chart]:
    """A curve a model for each measurement in the entries, over the whole number in which they differ."""
    first = max(lists, key=len)
    whole = [key for key, value in first[0].items() if isinstance(value, int) and not isinstance(value, bool)]
    differing = [key for key in whole if len({entry.get(key) for entry in first}) > 1]
    axis = next((key for key in (*AXES, *differing) if key in differing), None)
    if axis is None:
        return
    # Entries that differ in more than the axis are curves of their own.
    others = [key for key in differing if key in AXES and key != axis]
    for leaf in _measurements_in(first[0]):
        series: dict[str, list[Point]] = {}
        for model, entries in zip(_series(models), lists, strict=True):
            for entry in entries:
                found = measured(_at(entry, leaf))
                if found is not None and _is_number(entry.get(axis)):
                    told = [f"{words(key).lower()} {entry[key]}" for key in others if key in entry]
                    label = ", ".join([*([model] if model else []), *told])
                    series.setdefault(label, []).append(Point(float(entry[axis]), found.value, found.low, found.high))
        span = [point.x for points in series.values() for point in points]
        log = bool(span) and min(span) > 0 and max(span) >= 8 * min(span)
        yield Plot(
            f"{words(leaf[-1])} by {words(axis).lower()}",
            words(axis).lower(),
            unit_of(leaf[-1]) or words(name),
            series,
            log_x=log,
        )


def _measurements_in(table: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Paths of the spreads and estimates in a table."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            if measured(value) is not None:
                yield (key,)
            else:
                yield from ((key, *rest) for rest in _measurements_in(value))


def _at(table: Any, path: Sequence[str]) -> Any:
    for key in path:
        table = table.get(key) if isinstance(table, Mapping) else None
    return table


def _alike(values: Sequence[Any]) -> bool:
    """Are all of them tables with the same keys, and no measurements themselves?"""
    tables = all(isinstance(value, Mapping) and measured(value) is None for value in values)
    return tables and len({frozenset(value) for value in values}) == 1


def _where(document: Mapping[str, Any]) -> Section:
    """The machine and the settings: whatever stands beside the models."""
    rows: list[list[str]] = []
    for topic, value in document.items():
        if topic != "models":
            rows += [[words(" ".join(path)), text] for path, text in _leaves((topic,), value)]
    blocks: list[Block] = [Grid("", ["", ""], rows)]
    if not document.get("models"):
        blocks.append(Text("The result holds no models."))
    return Section("What ran where", blocks)


def _all_numbers(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    columns = [dict(_leaves((), model)) for model in models]
    paths = dict.fromkeys(path for column in columns for path in column if path != ("model",))
    return [[words(" / ".join(path)), *(column.get(path, "") for column in columns)] for path in paths]


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every value inside with its path, as text; a measurement is one value."""
    found = measured(value)
    if found is not None:
        yield path, f"{value:,}" if isinstance(value, int) else found.text
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in DETAIL:
                yield from _leaves((*path, str(key)), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves((*path, _entry_name(inner, index)), inner)
    elif value is not None:
        yield path, str(value)


def _entry_name(entry: Any, index: int) -> str:
    """What tells an entry of a list from the others: its whole numbers, else its place."""
    if isinstance(entry, Mapping):
        named = [f"{words(key).lower()} {entry[key]}" for key in AXES if isinstance(entry.get(key), int)]
        if named:
            return ", ".join(named)
    return str(index + 1)


def words(name: str) -> str:
    """`decode_bytes_per_second` as "Decode bytes per second"."""
    text = str(name).replace("_", " ")
    return re.sub(r"\bkl\b", "KL", text[:1].upper() + text[1:], flags=re.IGNORECASE)


def unit_of(name: str) -> str:
    """The unit that the name of a measurement ends in; empty where it has none."""
    ends = {
        "bytes_per_second": "bytes/s", "seconds": "s", "_ms": "ms", "bits_per_byte": "bits per byte", "_bits": "bits",
        "bytes": "bytes", "share": "share", "difference": "bits per byte", "agreement": "share",
    }  # fmt: skip
    measure = name.removesuffix("_by_part")
    return next((unit for end, unit in ends.items() if measure.endswith(end)), "")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
