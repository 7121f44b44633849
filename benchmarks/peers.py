"""The comparisons with other packages, gathered in one Markdown table: every part is another benchmark with small settings.

    python benchmarks/peers.py [--only NAME,..] [--march native,x86-64-v3] [--results FILE] [--again]
        [--markdown docs/results.md]

Each part runs in a process of its own, one after another, on as many cores as it has threads (MARLIN_THREADS), and compares
outputs itself. Its rows are kept in --results as soon as it ends, so a stopped run goes on where it was; --again measures
parts anew that are there already. The table goes to stdout, and with --markdown between the two markers of that file. A
part that fails, or that takes longer than --seconds, is a row that says so, and the exit status is then 1. About 20
minutes on 2 cores. `--march` runs them with marlin's kernels built for other processors too (MARLIN_MARCH), and each row says
which class its kernels are of. Peers are held to the same class by their own settings (`PEERS_HELD_TO`), but for MLX, which
has none. Needs the extra `peers`: `make peers`.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measured import read_rows
from published import machine, markers_of, write_between_markers

from marlin_cli.ops.cpu_build import WAITING

FOLDER = Path(__file__).parent
PACKAGES = "mlx", "mlx-lm", "torch", "MEGABYTE-pytorch", "transformers", "ctranslate2"
MARKERS = markers_of("peers")

# What makes peers leave alone the instructions that a class of processor lacks: CTranslate2, oneDNN, torch, MKL (which heeds it
# on Intel's processors only) and OpenBLAS. The classes that are not here have all that there is.
PEERS_HELD_TO = {
    "portable": {"CT2_FORCE_CPU_ISA": "GENERIC", "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"}
    | {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OPENBLAS_CORETYPE": "Nehalem"},
    "avx2": {"CT2_FORCE_CPU_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    | {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "OPENBLAS_CORETYPE": "Haswell"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},  # without VNNI
}


@dataclass(frozen=True)
class Part:
    """A benchmark, its settings, and a number of threads other than all."""

    script: str
    options: list[str]
    threads: int | None = None


@dataclass
class Outcome:
    """What a part left; `settings` says under what."""

    name: str
    settings: dict[str, Any]
    seconds: float
    failure: str = ""
    rows: list[dict[str, str]] = field(default_factory=list)


PARTS = {
    "products": Part("products", ["--only", "packed", "--sizes", "1024,4096", "--repeats", "5"]),
    "products-1-thread": Part("products", ["--only", "packed", "--sizes", "4096", "--repeats", "5"], threads=1),
    "dense": Part("products", ["--only", "dense", "--sizes", "1024,4096", "--repeats", "7"]),
    "megabyte-512": Part("megabyte_generation", ["--lengths", "512", "--bytes", "32", "--rounds", "3"]),
    "megabyte-4096": Part("megabyte_generation", ["--lengths", "", "--whole", "4096", "--rounds", "2"]),
    "cached-torch": Part("megabyte_roofline", ["--bytes", "64", "--rounds", "5"]),
    "packed-cache": Part("key_value_cache", ["--context", "32k", "--rounds", "5"]),
    "mlx-lm-cache": Part("packed_attention", ["--rounds", "5"]),
    "canine": Part("characters", ["--only", "canine", "--rounds", "3"]),
    "bygpt5": Part("characters", ["--only", "bygpt5", "--rounds", "3"]),
    "byt5": Part("byt5_generation", ["--streams", "1", "--rounds", "3"]),
    "byt5-batch-8": Part("byt5_generation", ["--streams", "8", "--rounds", "1", "--skip", "transformers bfloat16"]),
}


@contextmanager
def pinned(threads: str | None) -> Iterator[None]:
    """Processes started here stay on as many cores as they have threads, where the system can say so."""
    if threads is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[: int(threads)])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def run(name: str, settings: dict[str, Any], seconds: float) -> Outcome:
    """A part's rows; those measured before it failed are kept too."""
    part = PARTS[name]
    # A peer's package may bring the OpenMP that is loaded first, for both: it waits as marlin's own is told to.
    environment = WAITING | dict(os.environ) | {"MARLIN_MARCH": settings["march"]} | settings["peers"]
    if part.threads is not None:
        environment |= {"MARLIN_THREADS": str(part.threads), "OMP_NUM_THREADS": str(part.threads)}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        command = [sys.executable, str(FOLDER / f"{part.script}.py"), *part.options, "--rows-file", str(file)]
        failure = ""
        try:
            # What the part prints is progress.
            with pinned(environment.get("MARLIN_THREADS")):
                done = subprocess.run(command, stdout=2, timeout=seconds, check=False, env=environment)
            failure = f"failed with status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            failure = f"took more than {seconds:.0f} s"
        rows = [asdict(row) for row in read_rows(file)]
    return Outcome(name, settings, time.perf_counter() - start, failure, rows)


def processor_class(march: str) -> str:
    """The class of processor of the kernels for `march`, which are built now if they are not there."""
    code = (
        "from marlin_cli.ops.cpu import kernels; module, _ = kernels(); print(module.processor_class() if module else 'none')"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "MARLIN_MARCH": march}
    ).stdout.strip()


def versions() -> str:
    """What is compared, as installed."""
    return ", ".join(f"{package} {version(package)}" for package in PACKAGES)


def table(outcomes: list[Outcome]) -> str:
    """The rows in Markdown, under a line with dates and machines."""
    dates = sorted({outcome.settings["date"] for outcome in outcomes})
    machines, installed = (sorted({outcome.settings[key] for outcome in outcomes}) for key in ("machine", "versions"))
    minutes = sum(outcome.seconds for outcome in outcomes) / 60
    held_to = {outcome.settings["class"]: outcome.settings["peers"] for outcome in outcomes if outcome.settings["peers"]}
    held = [
        f"Beside kernels of {built_for} the peers are held to it too (MLX has no such setting): "
        + ", ".join(f"`{name}={value}`" for name, value in settings.items())
        + "."
        for built_for, settings in held_to.items()
    ]
    lines = [
        f"`benchmarks/peers.py` on {' and '.join(dates)} in {minutes:.0f} minutes; {'; '.join(machines)};"
        f" {'; '.join(installed)}.",
        "Ratios are marlin's speed over the peer's: more than 1 is faster.",
        *held,
        "",
        "| what | marlin | peer | ratio | outputs | kernels | script |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        script = f"`{PARTS[outcome.name].script}.py`"
        cells = [list(row.values()) for row in outcome.rows]
        if outcome.failure:
            cells.append([outcome.name, outcome.failure, "", "", ""])
        last = [outcome.settings["class"], script]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in [*row, *last]) + " |" for row in cells]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas: " + ", ".join(PARTS))
    parser.add_argument("--march", default=os.environ.get("MARLIN_MARCH", "native"), help="as of MARLIN_MARCH, with commas")
    parser.add_argument("--results", type=Path, default=Path("peers.jsonl"))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]}; known: {', '.join(PARTS)}")
    settings = {"machine": machine(), "threads": os.environ.get("MARLIN_THREADS", "all"), "versions": versions()}
    lines = arguments.results.read_text(encoding="utf-8").splitlines() if arguments.results.exists() else []
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    found = {(outcome.name, outcome.settings["class"]): outcome for outcome in outcomes if "peers" in outcome.settings}
    builds = {processor_class(march): march for march in arguments.march.split(",")}
    asked = [(name, built_for) for built_for in builds for name in names]
    for number, (name, built_for) in enumerate(asked, start=1):
        wanted = settings | {"options": PARTS[name].options, "class": built_for, "march": builds[built_for]}
        wanted |= {"peers": PEERS_HELD_TO.get(built_for, {})}
        done = found.get((name, built_for))
        if done and not done.failure and wanted.items() <= done.settings.items() and not arguments.again:
            continue
        said = f"[{number}/{len(asked)}] {name}, {built_for}"
        print(said, file=sys.stderr, flush=True)
        outcome = run(name, wanted | {"date": str(datetime.date.today())}, arguments.seconds)
        print(f"{said}: {outcome.seconds:.0f} s {outcome.failure}", file=sys.stderr, flush=True)
        found[name, built_for] = outcome
        with arguments.results.open("a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(outcome)) + "\n")
    chosen = sorted(found.values(), key=lambda outcome: list(PARTS).index(outcome.name))
    text = table(chosen)
    if arguments.markdown is not None:
        write_between_markers(arguments.markdown, text, MARKERS)
    print(text)
    sys.exit(1 if any(outcome.failure for outcome in chosen) else 0)


if __name__ == "__main__":
    main()
