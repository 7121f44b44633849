"""What packing costs the demo ByT5: character error rate by language and bits per byte of the wanted text; resumable.

    python benchmarks/byt5_quality.py HELDOUT --results results.jsonl [--per-language 12] [--train CORPUS/train/multilingual]
        [--answer main|all] [--rows "16-bit" "nvfp4 gptq" ..]

HELDOUT/multilingual holds docs_<language>.txt. Its lines are cut into segments as the demo's training cut them, less the
lines that TRAIN/<language>.txt has too, and stripped of case and marks: the model restores them. Statistics for mse, awq
and gptq are of the pairs that ship with the demo, which come from other texts. "Lost" is how much of the errors that the
16-bit model removes (against handing the input back) a packed one fails to remove. A row that RESULTS has is not run
again.
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
from marlin_cli.corpus import CorruptedCorpus, Pair, open_corpus, open_pairs
from marlin_cli.files import shipped
from marlin_cli.quality.estimates import ratio
from marlin_cli.quality.pairs import Answers, answers_to, bits_of_pairs, quality_of
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
    "nvfp4 gptq": ("gptq", "pairs", ("nvfp4", "nvfp4", "nvfp4", "mxfp8"), 16),
    "nvfp4 rtn, wo in 4 bits": ("rtn", None, ("nvfp4",) * 4, 16),
    "nvfp4 gptq, wo in 4 bits": ("gptq", "pairs", ("nvfp4",) * 4, 16),
    "nvfp4 awq": ("awq", "pairs", ("nvfp4", "nvfp4", "nvfp4", "mxfp8"), 16),
    "nvfp4 mse, no statistics": ("mse", None, ("nvfp4", "nvfp4", "nvfp4", "mxfp8"), 16),
    "nvfp4 mse": ("mse", "pairs", ("nvfp4", "nvfp4", "nvfp4", "mxfp8"), 16),
    "nvfp4 gptq, statistics of spans": ("gptq", "spans", ("nvfp4", "nvfp4", "nvfp4", "mxfp8"), 16),
    "nvfp4 gptq, wo in 16 bits": ("gptq", "pairs", ("nvfp4", "nvfp4", "nvfp4", KEPT), 16),
    "gptq, encoder alone in 4 bits": ("gptq", "pairs", ("nvfp4", KEPT, KEPT, "mxfp8"), 16),
    "gptq, decoder alone in 4 bits": ("gptq", "pairs", (KEPT, "nvfp4", KEPT, "mxfp8"), 16),
    "gptq, cross alone in 4 bits": ("gptq", "pairs", (KEPT, KEPT, "nvfp4", "mxfp8"), 16),
    "16-bit, keys and values in 4 bits": ("rtn", None, (KEPT, KEPT, KEPT, KEPT), 4),
}
# Rows that answer every input; the others are judged by bits per byte, which takes a tenth of the time.
ANSWERED = ("16-bit", "mxfp8 rtn", "nvfp4 rtn", "nvfp4 gptq", "nvfp4 rtn, wo in 4 bits", "nvfp4 gptq, wo in 4 bits")


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
    parser.add_argument("--per-language", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answer", choices=("main", "all"), default="main")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="these alone; 16-bit comes first")
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
    answered = [name for name in ROWS if options.answer == "all" or name in ANSWERED]
    found: dict[str, Answers] = {}
    for name in dict.fromkeys(["16-bit", *options.rows]):
        if name not in done:
            start = time.perf_counter()
            candidate = packed(model, name, statistics)
            if name in answered:
                answers = answers_to(candidate, pairs, name)
                results = {"bits": answers.bits, "errors": answers.errors, "exact": answers.exact}
            else:
                results = {"bits": bits_of_pairs(candidate, pairs, name)}
            lists = {key: array.tolist() for key, array in results.items()}
            done[name] = {"name": name, "setting": setting, "seconds": time.perf_counter() - start, **lists}
            with options.results.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
        row = {key: np.array(done[name][key]) for key in ("bits", "errors", "exact") if key in done[name]}
        line = f"{name:36} {row['bits'].sum() / sizes.sum():.5f} bits/byte"
        if name == "16-bit":
            plain = row
        more = ratio(row["bits"] - plain["bits"], sizes)
        line += (
            f" ({more.value:+.5f} ± {more.standard_error:.5f}, {100 * more.value * sizes.sum() / plain['bits'].sum():+.2f} %)"
        )
        if "errors" in row:
            found[name] = Answers([], row["bits"], row["errors"], row["exact"])
            line += of_answers(pairs, found[name], found["16-bit"], characters)
        print(line, flush=True)
    by_language(pairs, found)


def of_answers(pairs: list[Pair], answers: Answers, plain: Answers, characters: np.ndarray) -> str:
    """What a row's answers are like, and how much of the 16-bit model's gain over copying they lose."""
    score = quality_of(pairs, answers).all_pairs
    copied = score.copied_error_rate.value
    share = 100 / (copied - plain.errors.sum() / characters.sum())
    more = ratio(answers.errors - plain.errors, characters)
    return (
        f"; CER {100 * score.character_error_rate.value:.3f} % (copied {100 * copied:.2f} %), exact"
        f" {100 * score.exact_match.value:.1f} %, lost {share * more.value:+.2f} ± {share * more.standard_error:.2f} %"
    )


def by_language(pairs: list[Pair], found: dict[str, Answers]) -> None:
    """A table in Markdown: error rates of the rows that answered."""
    scores = {name: quality_of(pairs, answers) for name, answers in found.items()}
    first = scores["16-bit"]
    print(f"\n| language | characters | copied | {' | '.join(scores)} |\n|{'---|' * (3 + len(scores))}")
    for language, score in [*first.groups.items(), ("all", first.all_pairs)]:
        own = [each.groups.get(language, each.all_pairs).character_error_rate.value for each in scores.values()]
        rates = " | ".join(f"{100 * rate:.2f}" for rate in (score.copied_error_rate.value, *own))
        print(f"| {language} | {score.characters:,} | {rates} |")


if __name__ == "__main__":
    main()
