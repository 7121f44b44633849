"""`python -m tests.hostile.run`: a campaign, its table of classes by kind, and one input of it again."""

import argparse
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from .campaign import Result, run_all, worker
from .judge import BAD, GOOD
from .kinds import KINDS
from .materials import prepare


def main() -> int:
    """Run what the options say; 1 if any input came to a bad end."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.run", description=__doc__)
    parser.add_argument("--inputs", type=int, default=400, help="inputs a seed, shared out over the kinds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=1, help="processes that run inputs side by side")
    parser.add_argument("--minutes", type=float, help="end early, each seed")
    parser.add_argument("--table", type=Path, help="write the table into this file too, as Markdown")
    parser.add_argument("--materials", type=Path, help="keep the good files here, and take them from there")
    parser.add_argument("--kind", choices=KINDS, help="with --number: one input")
    parser.add_argument("--number", type=int)
    parser.add_argument("--keep", type=Path, help="a new folder to leave that input in, with its stdout and stderr")
    parser.add_argument("--verbose", action="store_true", help="tell of every input, the refusals too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="marlin-hostile-") as folder:
        materials = options.materials or Path(folder) / "materials"
        if not materials.exists():
            prepare(materials)
        materials = materials.resolve()
        if options.number is not None:
            with worker(materials) as made:
                result = made.run(options.kind, options.seeds[0], options.number, options.keep)
            _tell(result)
            return result.verdict in BAD
        return _campaign(options, materials)


def _campaign(options: argparse.Namespace, materials: Path) -> int:
    began = time.monotonic()
    parts = [(options, materials, (index, options.workers)) for index in range(options.workers)]
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        results = [result for part in pool.map(_part, *zip(*parts, strict=True)) for result in part]
    text = table(results)
    peak = max(result.peak_bytes for result in results)
    longest = max(result.seconds for result in results)
    text += (
        f"\n{len(results):,} inputs of seeds {', '.join(map(str, options.seeds))}; the largest process took {peak >> 20} MiB,"
    )
    text += f" the longest {longest:.1f} s of processor time.\n"
    print(f"\n{text}\n{time.monotonic() - began:.0f} s")
    if options.table is not None:
        options.table.write_text(text, encoding="utf-8")
    return any(result.verdict in BAD for result in results)


def _part(options: argparse.Namespace, materials: Path, part: tuple[int, int]) -> list[Result]:
    """The inputs of one worker, of all seeds."""
    results: list[Result] = []
    for seed in options.seeds:
        with worker(materials) as made:
            for result in run_all(made, seed, options.inputs, options.minutes, part):
                results.append(result)
                if result.verdict in BAD or options.verbose:
                    _tell(result)
    return results


def table(results: list[Result]) -> str:
    """Classes by kind, as a table in Markdown."""
    counts = Counter((result.kind, result.verdict) for result in results)
    classes = [*GOOD, *BAD]
    lines = [f"| kind | {' | '.join(classes)} |", "|---" * (len(classes) + 1) + "|"]
    for kind in (*KINDS, "all"):
        cells = [sum(count for (of, name), count in counts.items() if kind in (of, "all") and name == each) for each in classes]
        lines.append(f"| {kind} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _tell(result: Result) -> None:
    again = f"--kind {result.kind!r} --seeds {result.seed} --number {result.number}"
    environment = "".join(f"{name}={value!r} " for name, value in result.environment.items())
    command = environment[:200] + " ".join(map(repr, result.argv))[:300]
    print(f"{result.verdict:9} {again}: {result.reason}\n          {command}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
