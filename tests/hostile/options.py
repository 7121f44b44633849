"""Command lines: huge numbers, options twice, empty, in conflict, unknown, and with escape codes."""

import itertools
from pathlib import Path
from random import Random

from .case import Case
from .materials import PACKED, PAIRS, TEXT
from .mutations import ESCAPES

WORDS = (
    "", " ", "0", "-1", "1", "4", "16", "3", "9" * 30, "9" * 5_000, "1e999", "nan", "inf", "-inf", "1.5", "1k", "64k", "1T",
    "9" * 40 + "T",
    "0x10", "\u0663", ESCAPES, "\udcff", "x" * 5_000, "a=b", "=", "a=", "=nvfp4", "(=int4", "nvfp4", "mxfp8", "true",
    "text.txt", "pairs.jsonl",
    "/dev/null", "/dev/zero", ".", "..", "nothing/here", "1,2", ",", "1,,2", "0/1", "5/3", "0/0", "-", "--", "default", "@x",
    "%s", "a\nb",
)  # fmt: skip
FLAGS = {
    "generate": ["--sentinel", "--raw", "--json"],
    "quantize": ["--balance-keys", "--sequential", "--dequantize", "--overwrite", "--json"],
    "calibrate": ["--resume", "--hessian", "--merge", "--json"],
    "bench": ["--roofline", "--no-throughput", "--resume", "--kernels", "--plan"],
}
VALUES = {
    "generate": [
        "-p", "--prompt-file", "--hex", "--prompts", "--max-bytes", "--temperature", "--top-k", "--top-p", "--min-p",
        "--seed", "--stop",
        "--stop-hex", "--kv-bits", "--k-bits", "--v-bits", "--activation-bits", "--beams", "--n-best", "--length-penalty",
        "--early-stopping",
        "--max-length", "--min-length", "--prefix", "--input-prefix", "--batch-size", "--import", "--device",
        "--split",
    ],
    "quantize": [
        "--global-bits", "--local-bits", "--encoder-bits", "--decoder-bits", "--cross-bits", "--wo-bits", "--kv-bits",
        "--global-format",
        "--local-format", "--group-size", "--stats", "--method", "--domain-weight", "--sequential-bytes", "--save-recipe",
        "--recipe",
        "--override", "--report", "--export", "--import", "--calibration-corpus", "--calibration-pairs", "--target-bpw",
    ],
    "calibrate": [
        "--corpus", "--pairs", "--max-bytes", "--noise-density", "--span-bytes", "--seed", "--shard", "--show", "--import",
        "--device",
    ],
    "bench": [
        "--prompt-bytes", "--decode-bytes", "--quality", "--reference", "--window-bytes", "--stride-bytes",
        "--max-bytes-per-file",
        "--max-quality-bytes", "--reference-cache", "--kv-bits", "--activation-bits", "--format", "--report", "--plot",
        "--device", "--against",
        "--save", "--context", "--batch", "--bits", "--bandwidth", "--repeats", "-o", "--split", "--ranks", "--link",
    ],
}  # fmt: skip
# What keeps a run short when the options drawn are good ones.
BASES = {
    "generate": ["--max-bytes", "4", "-p", "ab"],
    "quantize": [],
    "calibrate": ["--max-bytes", "256", "--seq-bytes", "64", "--corpus", "text.txt", "-o", "new.safetensors"],
    "bench": ["--prompt-bytes", "8", "--decode-bytes", "4", "--repeats", "1"],
}
OUTPUTS = ("out", "new.safetensors", "out.recipe.yaml")


def options(rng: Random, folder: Path, materials: Path) -> Case:
    """A command with one to four options drawn from all that it has."""
    (folder / "text.txt").write_bytes(TEXT)
    (folder / "pairs.jsonl").write_bytes(PAIRS)
    command = rng.choice(("generate", "quantize", "calibrate", "bench"))
    model = str(materials / rng.choice(("prefix", "lucid", *PACKED, "gated", "relu")))
    argv = [command, model, *BASES[command]]
    if command == "quantize":
        argv += rng.choice((["-o", "out"], ["--dry-run"], ["--dry-run"], []))
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        if rng.random() < 0.15:
            argv.append(rng.choice(FLAGS[command]))
        elif rng.random() < 0.05:
            argv.append(rng.choice(("--nothing", "-z", "--" + ESCAPES, "extra", "", "--max-byte", "--help")))
        else:
            option = rng.choice(VALUES[command])
            words = [word for word in WORDS if not _is_long_work(option, word)]
            argv += [option, rng.choice(words)] * rng.choice((1, 1, 1, 1, 2))
    written = [
        word for option, word in itertools.pairwise(argv) if option in ("--save", "-o", "--report", "--plot", "--save-recipe")
    ]
    outputs = (*OUTPUTS, *(word.partition("/")[0] for word in written))
    return Case([word for word in argv if "\0" not in word], outputs, raw=command == "generate", stdin=TEXT)


def _is_long_work(option: str, word: str) -> bool:
    """Is it a number that asks, rightly, for more work than an input may take?"""
    if option in (
        "--max-bytes",
        "--max-length",
        "--decode-bytes",
        "--prompt-bytes",
        "--batch",
        "--context",
        "--repeats",
        "--seconds",
    ):
        return word in ("1k", "64k", "1T") or word.isdecimal() and word.isascii() and int(word[:40]) > 16 and len(word) < 30
    return False
