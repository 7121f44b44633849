"""What packing costs the relatives of ByT5: sizes of released shapes, and accuracy of small models trained here; resumable.

    python benchmarks/relatives_quality.py --models FOLDER [--corpus FOLDER] [--held-out FOLDER] [--markdown docs/relatives.md]
        [--tasks bygpt5,canine,la_canine,gbst] [--seconds 240] [--per-language 12] [--calibration-bytes 32768] [--table-only]

Texts are <language>.txt (or docs_<language>.txt) of ten languages, in FOLDER or its multilingual/; the shipped calibration
sample where none is named, whose last lines are held out then. `relatives_models` says what each model learns. FOLDER of
--models keeps them, their statistics (of the lines that they were trained on) and the results: what is there is not made
again. Numbers are float32's on a CPU, weights unpacked before they run. Errors are those of paired texts.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from calibrated import statistics_of
from mlx.utils import tree_flatten
from published import machine, markers_of, write_between_markers
from relatives_models import PIECE, ROWS, TASKS, Task, Texts, split_texts, trained

from marlin_cli.corpus import TextCorpus, open_corpus, open_pairs
from marlin_cli.engine.answer_requests import AnswerLimits
from marlin_cli.engine.sentences import SplitSettings
from marlin_cli.files import shipped
from marlin_cli.models import ARCHITECTURES, Network, architecture_of, preset
from marlin_cli.models.canine import CanineConfig
from marlin_cli.models.gbst import GbstConfig
from marlin_cli.models.la_canine import LaCanineConfig
from marlin_cli.quantization.apply import dequantize_network, plan_network, quantize_network
from marlin_cli.quantization.plan import KEEP, QuantizationSettings
from marlin_cli.statistics import Statistics

MARKERS = markers_of("relatives_quality")
BASE = "16-bit"
METHODS = "rtn", "gptq"


def alike(name: str) -> QuantizationSettings:
    """One format for all layers that are packed, `wo` among them."""
    return QuantizationSettings(name, name, name, name, name, name)


SIZED = {"mxfp8": alike("mxfp8"), "nvfp4": alike("nvfp4"), "int4": alike("int4"), "default": QuantizationSettings()}
MEASURED = "mxfp8", "nvfp4", "default"

# Layers that are packed alone in nvfp4, by rtn: where the loss comes from.
ALONE = {
    "bygpt5": {"attention": r"attention", "feed-forward in": r"(up|gate)_proj", "`wo`": r"ffn\.down_proj"},
    "canine": {
        "deep layers": r"^layers", "first and last layer": r"local\.(first|last)", "convolution down": r"down\.conv",
        "convolution back": r"up\.conv",
    },
    "la_canine": {
        "deep layers": r"^layers\.\d+\.(attention|ffn)", "first and last layer": r"local\.(first|last)\.(attention|ffn)",
        "convolution down": r"down\.conv", "convolution back": r"up\.conv", "adapters": r"adapter",
    },
    "gbst": {
        "front end": r"front\.proj", "encoder but `wo`": r"encoder\.(?!.*ffn\.down_proj)",
        "decoder but `wo`": r"decoder\.(?!.*(ffn\.down_proj|cross))", "cross-attention": r"cross", "`wo`": r"ffn\.down_proj",
    },
}  # fmt: skip


def released() -> dict[str, Any]:
    """The shapes of released models: what their config.json says, as marlin reads it."""
    byt5 = {key: value for key, value in vars(preset("byt5-small")).items() if key != "model_type"}
    return {
        "nllg/bygpt5-small-*": preset("bygpt5-small"),
        "nllg/bygpt5-base-*": preset("bygpt5-base"),
        "google/canine-s": CanineConfig(),
        "wtp-canine-s-3l, one language": LaCanineConfig(layers=3, adapter_dim=384),
        "wtp-canine-s-12l, one language": LaCanineConfig(adapter_dim=384),
        "GBST before byt5-small": GbstConfig(**byt5),
    }


@dataclass(frozen=True)
class Size:
    """Of a model: bits of a weight in the layers that are packed, scales among them, and bytes of all its arrays."""

    bits: float
    size_bytes: int


def size_of(network: Network, settings: QuantizationSettings | None) -> Size:
    """The size by shapes alone; whatever is not packed takes 16 bits. Without settings nothing is."""
    whole = 2 * sum(array.size for _, array in tree_flatten(network.parameters()))
    plans = [] if settings is None else [plan for plan in plan_network(network, settings) if plan.format is not None]
    weights = sum(plan.rows * plan.columns for plan in plans)
    packed = sum(plan.rows * plan.columns * plan.format.bits_per_weight(plan.group_size) for plan in plans if plan.format)
    return Size(packed / weights if weights else 16.0, round(whole - 2 * weights + packed / 8))


# Scores: by name two arrays [texts], sums and what they are divided by.
Scores = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass
class Predicted:
    """What a model makes of the held-out texts: by batch its distributions, and answers or sentences where it gives any."""

    logs: list[np.ndarray]  # [predictions, values] natural logarithms
    said: list[Any]  # what users see: an answer, or the ends of sentences, a text


def predict(task: Task, name: str, model: Any, texts: Texts, pieces: Sequence[Any]) -> Predicted:
    """Run a model over the held-out pieces."""
    network = model.network
    logs = []
    for start in range(0, len(pieces), ROWS):
        logits = architecture_of(network).logits(network, task.batch(task.config, pieces[start : start + ROWS]).inputs)
        logs.append(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
    said: list[Any] = []
    if name == "gbst":
        for start in range(0, len(pieces), 4 * ROWS):
            sources = [pair.source for pair in pieces[start : start + 4 * ROWS]]
            limits = AnswerLimits(2 * max(map(len, sources)))
            said += [answer.data for (answer,) in model.answers(sources, limits)]
    elif name == "la_canine":
        settings = SplitSettings(threshold=0.5, window_characters=PIECE, stride_characters=PIECE // 2)
        for lines in texts.values():
            text = " ".join(lines)[: 10 * PIECE].encode()
            said.append({span.end_character for span, _ in model.sentences([text], settings)})
    return Predicted(logs, said)


def scores_of(task: Task, pieces: Sequence[Any], found: Predicted, plain: Predicted) -> Scores:
    """Bits, quality, likeness to the 16-bit model, and the divergence from it."""
    columns: dict[str, list[np.ndarray]] = {}
    for number, (logs, own) in enumerate(zip(found.logs, plain.logs, strict=True)):
        batch = task.batch(task.config, pieces[number * ROWS : (number + 1) * ROWS])
        counted = batch.owners >= 0
        logs, own, targets, owners = logs[counted], own[counted], batch.targets[counted], batch.owners[counted]

        def sums(values: np.ndarray, owners: np.ndarray = owners, texts: int = len(batch.sizes)) -> np.ndarray:
            return np.bincount(owners, values, texts)

        best, plain_best = logs.argmax(axis=-1), own.argmax(axis=-1)
        hits = sums((best == 1) & (targets == 1))
        divergence = (np.exp(own.astype(np.float64)) * (own - logs)).sum(axis=-1) / math.log(2)
        rows = {
            "bits": sums(-logs[np.arange(len(logs)), targets] / math.log(2)),
            "size": batch.sizes,
            "divergence": sums(divergence),
            "predictions": sums(np.ones(len(logs))),
            "best": sums(best == targets),
            "same": sums(best == plain_best),
            "hits": 2 * hits,
            "marks": sums(best == 1) + sums(targets == 1),
        }
        for key, values in rows.items():
            columns.setdefault(key, []).append(values)
    each = {key: np.concatenate(values).astype(float) for key, values in columns.items()}
    scores = {
        "bits": (each["bits"], each["size"]),
        "divergence": (each["divergence"], each["predictions"]),
        "quality": (each["best"], each["predictions"]),
        "equal": (each["same"], each["predictions"]),
    }
    if task.measure == "f1":
        scores["quality"] = each["hits"], each["marks"]
    if task.measure == "exact":
        scores["quality"] = _shares([said == pair.target for said, pair in zip(found.said, pieces, strict=True)])
        scores["equal"] = _shares([said == own for said, own in zip(found.said, plain.said, strict=True)])
    elif found.said:  # a sentence is where it begins and where it ends
        sentences = [({*zip([0, *sorted(a)], sorted(a))}, {*zip([0, *sorted(b)], sorted(b))})  # noqa: B905
                     for a, b in zip(found.said, plain.said, strict=True)]  # fmt: skip
        scores["equal"] = tuple(np.array([len(one) for one in side], float) for side in
                                ([a & b for a, b in sentences], [b for _, b in sentences]))  # type: ignore[assignment]  # fmt: skip
    return scores


def _shares(values: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(values, float), np.ones(len(values))


def difference(new: tuple[np.ndarray, np.ndarray], old: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """The ratio of sums of `new` less that of `old`, over the same texts, and its standard error by its linear part."""
    (a, b), (c, d) = new, old
    first, second = a.sum() / b.sum(), c.sum() / d.sum()
    residuals = (a - first * b) / b.sum() - (c - second * d) / d.sum()
    return first - second, math.sqrt(len(a) / (len(a) - 1) * float(residuals @ residuals))


# Measuring


def statistics_for(name: str, task: Task, network: Network, texts: Texts, models: Path, size_bytes: int) -> Statistics:
    """Statistics with x^T x of what the model was trained on, kept beside it."""
    folder = models / f"{name}.corpus-{size_bytes}"
    folder.mkdir(exist_ok=True)
    share = max(1, size_bytes // PIECE // len(texts))
    for language, lines in texts.items():
        pieces = task.pieces(lines)[:share]
        if name == "gbst":
            rows = [json.dumps({"source": each.source.decode(), "target": each.target.decode()}) for each in pieces]
            (folder / f"{language}.jsonl").write_text("".join(f"{row}\n" for row in rows))
        else:
            parts = [each if isinstance(each, bytes) else each[0].encode() for each in pieces]
            (folder / f"{language}.txt").write_bytes(b"".join(parts))
    if name == "gbst":
        corpus: Any = open_pairs([str(file) for file in sorted(folder.iterdir())], sequence_bytes=1024)
    else:
        corpus = open_corpus([str(folder)], sequence_bytes=PIECE)
        corpus = corpus if name == "bygpt5" else TextCorpus(corpus)
    return statistics_of(network, corpus, folder.with_suffix(f".{size_bytes}.safetensors"))


def measure(name: str, options: argparse.Namespace, done: dict[tuple[str, str], Scores], results: Path) -> None:
    """The rows of a model that the results lack."""
    train_texts, held_out = options.texts
    task = TASKS[name]()
    model = trained(name, train_texts, options.models, options.seconds, options.seed)
    rows = {BASE: None} | {f"{format} {method}": (SIZED[format], method) for format in MEASURED for method in METHODS}
    rows |= {f"alone: {part}": (_alone(pattern), "rtn") for part, pattern in ALONE[name].items()}
    if all((name, row) in done for row in rows):
        return
    pieces = []
    for lines in held_out.values():
        found = task.pieces(lines)
        places = np.linspace(0, len(found) - 1, min(options.per_language, len(found))).astype(int)
        pieces += [found[place] for place in places]
    plain = predict(task, name, model, held_out, pieces)
    statistics = None
    for row, packing in rows.items():
        if (name, row) in done:
            continue
        began, found = time.perf_counter(), plain
        if packing is not None:
            settings, method = packing
            if method == "gptq" and statistics is None:
                statistics = statistics_for(name, task, model.network, train_texts, options.models, options.calibration_bytes)
            made = quantize_network(model.network, settings, statistics if method == "gptq" else None, method=method)
            unpacked = type(model)(dequantize_network(made.network, mx.float32), model.device)
            found = predict(task, name, unpacked, held_out, pieces)
        scores = done[name, row] = scores_of(task, pieces, found, plain)
        lists = {key: [a.tolist(), b.tolist()] for key, (a, b) in scores.items()}
        seconds = round(time.perf_counter() - began, 1)
        where = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
        line = {"key": [name, row], "scores": lists, "seconds": seconds, **where}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name}: {row} ({seconds} s): {_cells(scores, done[name, BASE])}", flush=True)


def _alone(pattern: str) -> QuantizationSettings:
    return QuantizationSettings(KEEP, KEEP, KEEP, KEEP, KEEP, KEEP, overrides={pattern: "nvfp4"})


# Tables


def sizes_table() -> str:
    """Released shapes in every format."""
    lines = [f"| shape | 16-bit | {' | '.join(SIZED)} |", "|---|---|" + "---|" * len(SIZED)]
    for title, config in released().items():
        network = ARCHITECTURES[config.model_type].network(config)  # drafted; nothing is computed
        plain = size_of(network, None).size_bytes
        sizes = [size_of(network, settings) for settings in SIZED.values()]
        cells = [f"{each.bits:.2f} bits, {each.size_bytes / 1e6:.0f} MB ({each.size_bytes / plain:.0%})" for each in sizes]
        lines.append(f"| {title} | {plain / 1e6:.0f} MB | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(scores: Scores, plain: Scores) -> str:
    bits, error = difference(scores["bits"], plain["bits"])
    quality, doubt = difference(scores["quality"], plain["quality"])
    value = {key: float(a.sum() / b.sum()) for key, (a, b) in scores.items()}
    return (
        f"{value['bits']:.4f} | {bits:+.4f} ± {error:.4f} | {value['divergence']:.5f} | {100 * value['quality']:.2f} % |"
        f" {100 * quality:+.2f} ± {100 * doubt:.2f} | {100 * value['equal']:.2f} %"
    )


QUALITY = {"best": "bytes guessed", "f1": "F1", "exact": "exact answers"}
EQUAL = {"bygpt5": "equal guesses", "canine": "equal tags", "la_canine": "equal sentences", "gbst": "equal answers"}


def accuracy_table(name: str, done: Mapping[tuple[str, str], Scores], models: Path) -> str:
    """All rows of a model."""
    task = TASKS[name]()
    network = ARCHITECTURES[task.config.model_type].network(task.config)
    came = json.loads((models / name / "config.json").read_text())["marlin"]["trained"]
    count = sum(array.size for _, array in tree_flatten(network.parameters()))
    plain = done[name, BASE]
    head = f"**{task.title}**: {count / 1e6:.1f} million weights, {came['steps']} steps in {came['seconds']} s;"
    head += f" {len(plain['bits'][0])} held-out texts."
    columns = f"bits a {task.unit} | more | KL, bits | {QUALITY[task.measure]} | more, points | {EQUAL[name]}"
    lines = [head, "", f"| packed | bits a weight | KB | {columns} |", "|---|---|---|---|---|---|---|---|---|"]
    for row in [row for task_name, row in done if task_name == name]:
        part = row.removeprefix("alone: ")
        settings = None if row == BASE else SIZED[row.split()[0]] if part == row else _alone(ALONE[name][part])
        size = size_of(network, settings)
        title = row if part == row else f"nvfp4 rtn, {part} alone"
        lines.append(f"| {title} | {size.bits:.2f} | {size.size_bytes / 1e3:,.0f} | {_cells(done[name, row], plain)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of trained models, statistics and results")
    parser.add_argument("--corpus", type=Path, default=shipped("calibration/sample"))
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seconds", type=float, default=240, help="training of each model")
    parser.add_argument("--per-language", type=int, default=12, help="held-out texts")
    parser.add_argument("--calibration-bytes", type=int, default=32 << 10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--table-only", action="store_true", help="train and measure nothing")
    options = parser.parse_args()
    names = options.tasks.split(",")
    if unknown := [name for name in names if name not in TASKS]:
        parser.error(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    mx.set_default_device(mx.cpu)
    options.models.mkdir(parents=True, exist_ok=True)
    results = options.models / f"results-{options.per_language}-{options.calibration_bytes}.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done: dict[tuple[str, str], Scores] = {
        tuple(row["key"]): {key: (np.array(a), np.array(b)) for key, (a, b) in row["scores"].items()} for row in rows
    }
    if not options.table_only:
        options.texts = split_texts(options.corpus, options.held_out)
        for name in names:
            measure(name, options, done, results)
    measured = Counter(f"{row['machine']}, {row['date']}" for row in map(json.loads, results.read_text().splitlines()))
    head = f"`benchmarks/relatives_quality.py`, measured on {'; '.join(measured)}; float32."
    tables = [accuracy_table(name, done, options.models) for name in TASKS if (name, BASE) in done]
    text = "\n\n".join([head, sizes_table(), *tables]) + "\n"
    if options.markdown is not None:
        write_between_markers(options.markdown, text, MARKERS)
    print(text)


if __name__ == "__main__":
    main()
