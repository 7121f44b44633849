"""What packing costs the demo ByT5: character error rate by language and bits per byte of the wanted text; resumable.

    python benchmarks/byt5_quality.py HELDOUT --results results.jsonl [--per-language 25] [--train CORPUS/train/multilingual]
        [--rows all|main]

HELDOUT/multilingual holds docs_<language>.txt. Its lines are cut into segments as the demo's training cut them, less the
lines that TRAIN/<language>.txt has too, and stripped of case and marks: the model restores them. Statistics for mse, awq
and gptq are of the pairs that ship with the demo, which come from other texts. The last columns say how much of the
errors that the 16-bit model removes (against handing the input back) a packed one fails to remove. A row that RESULTS
has is not run again.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from marlin_cli import ByT5Model
from marlin_cli.bench.estimates import ratio
from marlin_cli.bench.pairs import Answers, answers_to, quality_of
from marlin_cli.corpus import CorruptedCorpus, Pair, open_corpus, open_pairs
from marlin_cli.files import shipped
from marlin_cli.quantization.apply import dequantize_network, quantize_network
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.statistics import Statistics
from marlin_cli.statistics.collect import hessian_channels
from marlin_cli.statistics.hessians import HessianAccumulator
from marlin_cli.statistics.run import calibrate

DEMO = "byt5-demo"
KEPT = "16bit"

# name -> (method, statistics, formats of encoder, decoder, cross and wo, bits of the inputs' keys and values)
ROWS = {
    "16-bit": ("rtn", None, (KEPT, KEPT, KEPT, KEPT), 16),
    "mxfp8 rtn": ("rtn", None, ("mxfp8",) * 4, 16),
    "nvfp4 rtn": ("rtn", None, ("nvfp4", "nvfp4", "nvfp4", "mxfp8"), 16),
    "nvfp4 mse, no statistics": ("mse", None, ("nvfp4", "nvfp4", "nvfp4", "mxfp8"), 16),
    "nvfp4 mse": ("mse", "pairs", ("nvfp4", "nvfp4", "nvfp4", "mxfp8"), 16),
    "nvfp4 awq": ("awq", "pairs", ("nvfp4", "nvfp4", "nvfp4", "mxfp8"), 16),
    "nvfp4 gptq": ("gptq", "pairs", ("nvfp4", "nvfp4", "nvfp4", "mxfp8"), 16),
    "nvfp4 gptq, statistics of spans": ("gptq", "spans", ("nvfp4", "nvfp4", "nvfp4", "mxfp8"), 16),
    "nvfp4 rtn, wo in 4 bits": ("rtn", None, ("nvfp4",) * 4, 16),
    "nvfp4 gptq, wo in 4 bits": ("gptq", "pairs", ("nvfp4",) * 4, 16),
    "nvfp4 gptq, wo in 16 bits": ("gptq", "pairs", ("nvfp4", "nvfp4", "nvfp4", KEPT), 16),
    "gptq, encoder alone in 4 bits": ("gptq", "pairs", ("nvfp4", KEPT, KEPT, "mxfp8"), 16),
    "gptq, decoder alone in 4 bits": ("gptq", "pairs", (KEPT, "nvfp4", KEPT, "mxfp8"), 16),
    "gptq, cross alone in 4 bits": ("gptq", "pairs", (KEPT, KEPT, "nvfp4", "mxfp8"), 16),
    "16-bit, keys and values in 4 bits": ("rtn", None, (KEPT, KEPT, KEPT, KEPT), 4),
}
MAIN = ("16-bit", "mxfp8 rtn", "nvfp4 rtn", "nvfp4 gptq", "nvfp4 gptq, wo in 4 bits")


def held_out_pairs(heldout: Path, train: Path | None, per_language: int, seed: int) -> list[Pair]:
    """Segments of every language that the demo restores, as pairs of the stripped one and the original."""
    sys.path.insert(0, str(shipped(f"configs/models/{DEMO}")))
    from train import RESTORED, SEGMENT_BYTES, distinct_lines, split_line, stripped

    pairs = []
    for language in sorted(RESTORED):
        path = heldout / f"multilingual/docs_{language}.txt"
        if not path.exists():
            continue
        seen = set() if train is None else set(distinct_lines(train / f"{language}.txt"))
        lines = [line for line in distinct_lines(path) if line not in seen]
        segments = [text for line in lines for text in split_line(line, SEGMENT_BYTES)]
        drawn = random.Random(f"{seed} {language}").sample(segments, min(per_language, len(segments)))
        pairs += [Pair(stripped(text).encode(), text.encode(), language) for text in drawn]
    return pairs


def statistics_of(model: ByT5Model, kind: str) -> Statistics:
    """Moments and Hessians over the shipped pairs, or over as many bytes of the shipped corpus with spans taken out."""
    pairs = open_pairs([DEMO], sequence_bytes=1024)
    corpus = pairs
    if kind == "spans":
        windows = open_corpus(["default"], sequence_bytes=1024, max_bytes=pairs.total_bytes)
        corpus = CorruptedCorpus(windows)
    with tempfile.TemporaryDirectory() as folder:
        hessians = HessianAccumulator(hessian_channels(model.network), len(corpus.domains), Path(folder))
        found = calibrate(model.network, corpus, Path(folder) / "s.safetensors", model="", hessians=hessians)
    return Statistics(found.model, found.layers, found.runs, found.totals, dict(hessians.sums))


def packed(model: ByT5Model, name: str, statistics: dict[str, Statistics]) -> ByT5Model:
    """The model as the row has it, weights unpacked again: the same numbers, and as fast as the plain one."""
    method, kind, formats, kv_bits = ROWS[name]
    if set(formats) == {KEPT}:
        return ByT5Model(model.network, model.device, kv_bits=kv_bits)
    encoder, decoder, cross, wo = formats
    settings = QuantizationSettings(encoder_format=encoder, decoder_format=decoder, cross_format=cross, wo_format=wo)
    if kind is not None and kind not in statistics:
        statistics[kind] = statistics_of(model, kind)
    made = quantize_network(model.network, settings, statistics[kind] if kind else None, method=method)
    return ByT5Model(dequantize_network(made.network, model.device.dtype), model.device, kv_bits=kv_bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--per-language", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", choices=("all", "main"), default="all")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    pairs = held_out_pairs(options.heldout, options.train, options.per_language, options.seed)
    sizes, characters = (
        np.array([float(len(each)) for each in some])
        for some in zip(*((p.target, p.target.decode()) for p in pairs), strict=True)
    )
    model = ByT5Model.from_pretrained(DEMO, device=options.device)
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    setting = [options.per_language, options.seed, len(pairs), model.device.name]
    done = {row["name"]: row for row in map(json.loads, lines) if row["setting"] == setting}
    statistics: dict[str, Statistics] = {}
    print(
        f"{len(pairs)} pairs in {len({pair.group for pair in pairs})} languages, {characters.sum():,.0f} characters", flush=True
    )
    found: dict[str, Answers] = {}
    for name in MAIN if options.rows == "main" else ROWS:
        if name not in done:
            start = time.perf_counter()
            answers = answers_to(packed(model, name, statistics), pairs, name)
            done[name] = {
                "name": name, "setting": setting, "seconds": time.perf_counter() - start, "bits": answers.bits.tolist(),
                "errors": answers.errors.tolist(), "exact": answers.exact.tolist(),
            }  # fmt: skip
            with options.results.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
        row = done[name]
        found[name] = Answers([], *(np.array(row[key]) for key in ("bits", "errors", "exact")))
        report(name, pairs, found, sizes, characters)
    by_language(pairs, found)


def report(name: str, pairs: list[Pair], found: dict[str, Answers], sizes: np.ndarray, characters: np.ndarray) -> None:
    score = quality_of(pairs, found[name]).all_pairs
    plain = found["16-bit"]
    copied, plain_rate = score.copied_error_rate.value, plain.errors.sum() / characters.sum()
    more_bits = ratio(found[name].bits - plain.bits, sizes)
    more_errors = ratio(found[name].errors - plain.errors, characters)
    share = 100 / (copied - plain_rate)
    print(
        f"{name:36} CER {100 * score.character_error_rate.value:.3f} % (copied {100 * copied:.2f} %),"
        f" exact {100 * score.exact_match.value:.1f} %, {score.bits_per_target_byte.value:.5f} bits/byte;"
        f" {more_bits.value:+.5f} ± {more_bits.standard_error:.5f} bits/byte,"
        f" {share * more_errors.value:+.2f} ± {share * more_errors.standard_error:.2f} % of the reduction lost",
        flush=True,
    )


def by_language(pairs: list[Pair], found: dict[str, Answers]) -> None:
    """A table in Markdown: error rates of the main rows."""
    names = [name for name in MAIN if name in found]
    scores = {name: quality_of(pairs, found[name]) for name in names}
    first = scores[names[0]]
    print(f"\n| language | characters | copied | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}")
    for language, score in [*first.groups.items(), ("all", first.all_pairs)]:
        own = [scores[name].groups.get(language, scores[name].all_pairs).character_error_rate.value for name in names]
        rates = " | ".join(f"{100 * rate:.2f}" for rate in (score.copied_error_rate.value, *own))
        print(f"| {language} | {score.characters:,} | {rates} |")


if __name__ == "__main__":
    main()
