"""Two results compared: which speeds and scores changed beyond the noise. From JSON documents of `bench`, old and new."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from marlin_cli.documents import parse_json
from marlin_cli.errors import UsageError
from marlin_cli.files import check_regular
from marlin_cli.reports.forms import Table, csv_rows, markdown_of
from marlin_cli.text import one_line, quoted

# The longest line of a file of results that is read: a sweep of twenty models takes some hundred thousand bytes.
MOST_RESULT_BYTES = 16 << 20

# Two runs of the same thing on the same machine differ by this much: what lies within is never called a change.
SPEED_FLOOR = 0.05
# Repeats in turn of which medians are compared, where there are many.
POOLED = 4
# Scores of the same bytes differ by rounding alone.
QUALITY_FLOOR = 0.002

SPEEDS = ("prefill_bytes_per_second", "decode_bytes_per_second", "time_to_first_byte_seconds")
TEXT_SPEED = "characters_per_second"
ANSWERING_SPEEDS = ("encoder_bytes_per_second", "decode_bytes_per_second", "time_to_first_byte_seconds")


@dataclass(frozen=True)
class Ratio:
    """A ratio, new over old, with a 95 % interval; the ends are equal to it where a single observation does not tell."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """One measure of one model in both results."""

    model: str
    measure: str
    ratio: Ratio
    verdict: str  # better, worse, within noise


def paired_ratio(old: Sequence[float], new: Sequence[float]) -> Ratio:
    """Median of new / old over repeats that were taken in turn, and a 95 % interval of it (of fewer than six, all of them).

    Many repeats are taken four by four, and medians of those make a ratio: what others do hits or misses single short ones.
    The interval is that of the sign test: it asks nothing of the noise, of which a busy machine's has long tails.

    Raises:
        UsageError: different numbers of repeats.
    """
    if len(old) != len(new):
        raise UsageError(f"paired ratios need as many repeats of both: found {len(old)} and {len(new)}")
    groups = len(old) // POOLED if len(old) >= 6 * POOLED else len(old)
    middles = [[float(np.median(group)) for group in np.array_split(np.array(each, np.float64), groups)] for each in (old, new)]
    logs = np.log(middles[1]) - np.log(middles[0])
    ordered, outside = np.sort(logs), _outside(len(logs))
    return Ratio(*(math.exp(value) for value in (float(np.median(logs)), ordered[outside], ordered[-1 - outside])))


def unpaired_ratio(old: Sequence[float], new: Sequence[float]) -> Ratio:
    """Ratio of medians of separate runs. The error of a median is taken from the quartiles, as for normal noise."""
    middle = math.log(float(np.median(new)) / float(np.median(old)))
    error = math.hypot(_error_of_median(old), _error_of_median(new))
    return _around(middle, error * _student(min(len(old), len(new)) - 1))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """What both documents measured alike of the models in both: speeds of equal lengths, scores of the same windows.

    Raises:
        UsageError: no model is in both, none was measured alike, or a document is none of `bench`.
    """
    for document in (old, new):
        check_result(document, "--compare")
    before = {model["model"]: model for model in old["models"]}
    shared = [model for model in new["models"] if model["model"] in before]
    if not shared:
        names = ", ".join(map(quoted, list(before)[:8]))
        raise UsageError(f"--compare: no model is in both results; the old one has {names}")
    try:
        found = [change for model in shared for change in _changes_of(model, before[model["model"]], _alike(old, new))]
        if not all(math.isfinite(value) for change in found for value in asdict(change.ratio).values()):
            raise ArithmeticError
    except (ArithmeticError, ValueError, RecursionError):
        raise UsageError("--compare: numbers of the results lie too far apart to be compared") from None
    if not found:
        raise UsageError(
            "--compare: the results have nothing in common but models; measure both with the same settings"
            + (f" (now {other})" if (other := _other_settings(old, new)) else "")
        )
    yield from found


def left_out(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What `changes` compares nothing of: models that are in one result alone, settings that differ; empty if nothing."""
    before, after = ([model["model"] for model in each["models"]] for each in (old, new))
    alone = {"only in the old result": set(before) - set(after), "only in the new one": set(after) - set(before)}
    said = [f"{where}: {', '.join(map(quoted, sorted(names)))}" for where, names in alone.items() if names]
    other = _other_settings(old, new)
    return "; ".join([*said, *([f"not compared, as the settings differ: {other}"] if other else [])])


def _other_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The settings that differ, each with both values."""
    found = []
    for group in ("throughput_settings", "quality_settings"):
        before, after = old.get(group) or {}, new.get(group) or {}
        names = [name for name in sorted(before.keys() & after.keys()) if before[name] != after[name] and name != "reference"]
        found += [f"{name} {quoted(before[name])} and {quoted(after[name])}" for name in names]
    return ", ".join(found)


@dataclass(frozen=True)
class _Alike:
    """Whether two results were timed and scored with the same settings."""

    timed: bool
    scored: bool


def _alike(old: Mapping[str, Any], new: Mapping[str, Any]) -> _Alike:
    # What the scores are compared with changes nothing of them.
    scored = [{**(each.get("quality_settings") or {}), "reference": None} for each in (old, new)]
    return _Alike(old["throughput_settings"] == new["throughput_settings"], scored[0] == scored[1])


def _changes_of(new: Mapping[str, Any], old: Mapping[str, Any], alike: _Alike) -> Iterator[Change]:
    """Changes of one model."""
    if alike.timed:
        before = _samples(old)
        for measure, samples in _samples(new).items():
            if measure in before:
                ratio = unpaired_ratio(before[measure], samples)
                yield Change(new["model"], measure, ratio, _verdict(ratio, SPEED_FLOOR, "_per_second" in measure))
    mine, theirs = _bits(new), _bits(old)
    if alike.scored and mine is not None and theirs is not None and mine[1] == theirs[1]:
        ratio = _around(math.log(mine[0] / theirs[0]), 0.0)
        yield Change(new["model"], "bits_per_byte", ratio, _verdict(ratio, QUALITY_FLOOR, more_is_better=False))


def _samples(model: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """Repeats of every speed of a model, by measure; of a ByT5 by measure and batch size, of a CANINE by length too."""
    if model.get("throughput"):
        return {measure: model["throughput"][measure]["samples"] for measure in SPEEDS}
    if any(TEXT_SPEED in speed for speed in model.get("speeds") or ()):
        return {
            f"{TEXT_SPEED}, batch {speed['batch_size']}, characters {speed['prompt_characters']}": speed[TEXT_SPEED]["samples"]
            for speed in model["speeds"]
        }
    return {
        f"{measure}, batch {speed['batch_size']}": speed[measure]["samples"]
        for speed in model.get("speeds") or ()
        for measure in ANSWERING_SPEEDS
        if speed[measure] is not None
    }


def _bits(model: Mapping[str, Any]) -> tuple[float, int] | None:
    """Total bits of what a model was scored on, and how many bytes that is; None where it was not, or texts are encoded."""
    quality = model.get("quality")
    if not quality or "states_error" in quality.get("all_domains", ()):
        return None
    if "all_pairs" in quality:
        return quality["all_pairs"]["total_bits"], quality["all_pairs"]["target_bytes"]
    return quality["all_domains"]["total_bits"], quality["all_domains"]["bytes"]


def read_result(path: Path) -> dict[str, Any]:
    """The last result in a file that `--save` appends to, or the document of `--format json`.

    Raises:
        UsageError: the file cannot be read, or its last line is no result of `bench`, or of one with impossible numbers.
    """
    check_regular(path, UsageError)
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MOST_RESULT_BYTES))
            end = file.read(MOST_RESULT_BYTES).rstrip()
    except OSError as error:
        raise UsageError(f"--compare {path}: cannot read: {error.strerror}") from None
    _, feed, line = end.rpartition(b"\n")
    if not feed and size > MOST_RESULT_BYTES:
        raise UsageError(f"--compare {path}: its last line is longer than {MOST_RESULT_BYTES:,} bytes, no result of bench")
    try:
        document = parse_json(line, str(path), UsageError)
    except UsageError:
        raise UsageError(f"--compare {path}: the last line is no result of bench; write one with --save") from None
    return check_result(document, f"--compare {path}")


def check_result(document: Any, where: str) -> dict[str, Any]:
    """See that a document has what is compared: names, and numbers of which a logarithm can be taken.

    Raises:
        UsageError: it has not; `where` begins the error.
    """
    if not isinstance(document, dict) or not isinstance(document.get("models"), list):
        raise UsageError(f"{where}: the last line is no result of bench; write one with --save")
    settings = [document.get("throughput_settings"), document.get("quality_settings")]
    if "throughput_settings" not in document or not all(isinstance(each, dict | None) for each in settings):
        raise UsageError(f"{where}: the last line is no result of bench; write one with --save")
    try:
        for model in document["models"]:
            if not isinstance(model["model"], str):
                raise TypeError(f"the name of a model is {quoted(model['model'])}")
            for measure, samples in _samples(model).items():
                _check_numbers(measure, samples)
            bits = _bits(model)
            if bits is not None:
                _check_numbers("bits and bytes", bits)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise UsageError(f"{where}: a result lacks numbers that bench writes ({what}); measure again with --save") from None
    return document


def _check_numbers(name: str, values: Any) -> None:
    """`ValueError` unless these are some numbers above 0."""
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{quoted(name)} is {quoted(values)}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"{quoted(name)} has {quoted(value)}")


def table_of_changes(found: Sequence[Change]) -> Table:
    """A row a measure; the interval covers the noise of the repeats."""
    rows = [
        [
            change.model,
            change.measure,
            f"{change.ratio.value:.4f}",
            f"{change.ratio.low:.4f} .. {change.ratio.high:.4f}",
            change.verdict,
        ]
        for change in found
    ]
    title = f"Changes: speeds beyond {SPEED_FLOOR:.0%} and the noise, bits per byte beyond {QUALITY_FLOOR:.1%}"
    return Table(title, ["model", "measure", "new / old", "95 % interval", "verdict"], rows)


def rendered_changes(found: Sequence[Change], form: str) -> str:
    """Changes as json (one document), jsonl (a change a line), csv or md."""
    rows = [{"model": each.model, "measure": each.measure, **asdict(each.ratio), "verdict": each.verdict} for each in found]
    if form == "md":
        return markdown_of([table_of_changes(found)])
    if form == "json":
        return json.dumps({"changes": rows}, allow_nan=False)
    if form == "jsonl":
        return "\n".join(json.dumps(row, allow_nan=False) for row in rows)
    return csv_rows(["model", "measure", "value", "low", "high", "verdict"], rows)


def table_of_pairs(document: Mapping[str, Any], baseline: str) -> Table:
    """Speeds of every other model over those of `baseline`, repeat by repeat."""
    speeds = {model["model"]: model["throughput"] for model in document["models"]}
    rows = []
    for name, speed in speeds.items():
        for measure in SPEEDS if name != baseline else ():
            ratio = paired_ratio(speeds[baseline][measure]["samples"], speed[measure]["samples"])
            verdict = _verdict(ratio, SPEED_FLOOR, "_per_second" in measure)
            rows.append([name, measure, f"{ratio.value:.4f}", f"{ratio.low:.4f} .. {ratio.high:.4f}", verdict])
    count = len(speeds[baseline][SPEEDS[0]]["samples"])
    title = (
        f"Paired with {baseline}: median ratio of {count} runs in turn; a change is beyond {SPEED_FLOOR:.0%} and the interval"
    )
    return Table(title, ["model", "measure", "ratio", "95 % interval", "verdict"], rows)


def _verdict(ratio: Ratio, floor: float, more_is_better: bool) -> str:
    surely_more, surely_less = ratio.low > 1 and ratio.value > 1 + floor, ratio.high < 1 and ratio.value < 1 - floor
    if not (surely_more or surely_less):
        return "within noise"
    return "better" if surely_more == more_is_better else "worse"


def _around(log_ratio: float, half_width: float) -> Ratio:
    return Ratio(*(math.exp(log_ratio + shift) for shift in (0.0, -half_width, half_width)))


def _error_of_median(samples: Sequence[float]) -> float:
    """Standard error of the logarithm of a median: 1.2533 sigma / sqrt(n), sigma from the interquartile range."""
    first, third = np.percentile(np.log(np.array(samples, dtype=np.float64)), [25, 75])
    return 1.2533 * float(third - first) / 1.349 / math.sqrt(len(samples))


def _outside(count: int) -> int:
    """How many of `count` observations lie below a 95 % interval of their median, and above it.

    Each is below the median with a chance of a half: the interval misses it where at most so many lie on one of its sides.
    """
    below, cases = 0, 1  # of 2 ** count
    while 40 * (cases + math.comb(count, below + 1)) <= 2**count:
        below += 1
        cases += math.comb(count, below)
    return below


def _student(degrees: int) -> float:
    """97.5 % point of Student's t, by the expansion of Cornish and Fisher; exact up to three degrees."""
    if degrees < 1:
        return 0.0
    exact = {1: 12.706, 2: 4.303, 3: 3.182}
    if degrees in exact:
        return exact[degrees]
    z = 1.959964
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / degrees**power for power, term in enumerate(terms))
