"""Ranks against one process: streams on each, or a model that all share; what is written, bits per byte, memory, time.

    python benchmarks/ranks.py streams [--model megabyte-demo] [--prompts 400] [--bytes 256] [--repeats 2]
    python benchmarks/ranks.py split [--layers 12] [--dim 1024] [--format none|nvfp4|..] [--bytes 512] [--device cpu]
    python benchmarks/ranks.py corpus [--corpus-bytes 512k] [--window-bytes 2048]
    python benchmarks/ranks.py killed [--phases loading,prompt,decoding,streams,scoring,calibrating] [--seconds 1]
    python benchmarks/ranks.py plan [--gigabytes 3600] [--inside 2,300,tree]
    python benchmarks/ranks.py link --device cuda
    python benchmarks/ranks.py paper

All but `paper` take --ranks N, and a random MegaByte of --layers and --dim (12 of 1,024: 155 million parameters) in --format,
or --model. Ranks are started by hand, on a ring on loopback, or with --device cuda over NCCL, a GPU each; with --ring too, all
on the first GPU. On a machine that others use, wall times say little: the processor time of a process, and of the busiest rank,
is beside them (of a rank that waits for the other one too, as a ring polls).

streams: `marlin generate --prompts` by one process and by ranks of one thread each; outputs are compared.
split: by one process and by ranks that share the global stage: all must write the same bytes as each other, and bits per byte
equal to 1e-5. Speed is that of bytes after the first ones. Memory is what weights take, and the most the process ever had.
corpus: `marlin calibrate` and `marlin bench --quality` of made-up words: the same file, the same bits per byte, and the time.
killed: the last rank is killed in the middle of each phase: how long the others go on, and what is left.
plan: what bench --plan --ranks says of this model and link, beside what `streams` and `split` measure.
link: how long a sum over GPUs takes within a kernel.
paper: what it would say of 8 hosts of 8 GPUs, and of models that are not there.
"""

import argparse
import contextlib
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launched import last_document, make, model_of, prompts_of, run
from ranks_corpus import corpus
from ranks_killed import PHASES, killed, phase
from ranks_link import link, turns


@dataclass(frozen=True)
class Streams:
    """What so many ranks made of many prompts, less what starting takes."""

    texts: list[str]
    wall: float
    busiest: float


def measured_streams(ranks: int, given: argparse.Namespace, folder: Path) -> Streams:
    command = ["-m", "marlin_cli", "generate", model_of(given, folder), "--prompts", str(prompts_of(given, folder))]
    command += ["--device", given.device, "--batch-size", str(given.batch), "--max-bytes"]
    if given.device != "cpu" and ranks == 1:
        run([*command, str(given.bytes)], ranks, given, folder)  # kernels are compiled for each number of streams
    runs = [run([*command, str(given.bytes)], ranks, given, folder) for _ in range(given.repeats)]
    # A run that does next to nothing but start: on a GPU it compiles what MLX compiles anew in every process.
    few = folder / "few.jsonl"
    few.write_text("".join(prompts_of(given, folder).read_text().splitlines(keepends=True)[: 4 * given.batch]))
    command[command.index("--prompts") + 1] = str(few)
    idle = run([*command, "0" if given.device == "cpu" else "8"], ranks, given, folder)
    texts = [json.loads(line)["bytes_base64"] for line in runs[-1].written[0].splitlines() if line.startswith("{")]
    return Streams(texts, min(each.wall for each in runs) - idle.wall, min(each.busiest for each in runs) - idle.busiest)


def streams(given: argparse.Namespace, folder: Path) -> None:
    one, many = (measured_streams(ranks, given, folder) for ranks in (1, given.ranks))
    size = given.prompts * given.bytes
    for ranks, each in ((1, one), (given.ranks, many)):
        print(f"{ranks} process(es), less the start: {each.wall:.2f} s ({size / each.wall:,.0f} bytes/s),", end=" ")
        print(f"{each.busiest:.2f} s of processor in the busiest")
    print(f"{one.wall / many.wall:.2f}x by the clock, {one.busiest / many.busiest:.2f}x by the processor", end="; ")
    equal = sum(mine == theirs for mine, theirs in zip(one.texts, many.texts, strict=True))
    print("same outputs" if equal == len(one.texts) else f"OTHER OUTPUTS: {equal} of {len(one.texts)} equal")


def peak_resident_bytes() -> int:
    """Of this process since its program began; what getrusage says counts its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def memory_of_gpu() -> int:
    """What is in use of the first GPU that this process sees: caches of MLX too, and what kernels have beside it."""
    import ctypes

    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ctypes.CDLL("libcuda.so.1").cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    return total.value - free.value


def decode(given: argparse.Namespace) -> None:
    """What a process of `split` does: a line of JSON."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from marlin_cli.api import MegaByteModel
    from marlin_cli.engine.sampling import Sampling
    from marlin_cli.engine.stopping import Stopping
    from marlin_cli.ranks import joined

    text = bytes(range(256)) * 8
    with joined() as ranks, ranks.computing() if ranks.size > 1 else contextlib.nullcontext():
        model = MegaByteModel.from_pretrained(given.folder, device=given.device, split=ranks)
        held = sum(array.nbytes for _, array in tree_flatten(model.network.parameters()))
        bits = model.bits_per_byte(text[:2048])
        speed, first = 0.0, float("inf")
        for _ in range(given.repeats + 1):
            begun = time.perf_counter()
            pieces = model.pieces([text[:64]], Stopping(given.bytes), Sampling())
            beginning = next(pieces).data
            came = time.perf_counter()
            rest = b"".join(piece.data for piece in pieces)
            speed = max(speed, len(rest) / (time.perf_counter() - came))
            first = min(first, came - begun)
        written = beginning + rest
        most = mx.get_peak_memory() if given.device != "cpu" else peak_resident_bytes()
        on_gpu = memory_of_gpu() if given.device == "cuda" else 0
    found = {"held": held, "bits": bits, "bytes": written.hex(), "speed": speed, "first": first, "most": most, "gpu": on_gpu}
    print(json.dumps(found))


def measured_split(ranks: int, given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Of each rank."""
    command = [__file__, "decode", "--folder", model_of(given, folder), "--bytes", str(given.bytes)]
    command += ["--repeats", str(given.repeats), "--device", given.device]
    return [last_document(each) for each in run(command, ranks, given, folder).written]


def split(given: argparse.Namespace, folder: Path) -> None:
    [alone], shared = (measured_split(ranks, given, folder) for ranks in (1, given.ranks))
    print(f"{given.layers} layers of {given.dim}, {given.format}: {alone['held'] / 1e6:.0f} MB of weights")
    for name, rows in (("alone", [alone]), ("rank", shared)):
        for row in rows:
            most = f"{row['most'] / 1e6:.0f} MB ({row['most'] / alone['most']:.2f})"
            on_gpu = f", of the GPU in use {row['gpu'] / 1e6:.0f} MB ({row['gpu'] / alone['gpu']:.2f})" if alone["gpu"] else ""
            print(
                f"{name:6} {row['speed']:8.0f} bytes/s after {1e3 * row['first']:.0f} ms, {row['bits']:.7f} bits a byte,",
                end=" ",
            )
            print(f"weights {row['held'] / alone['held']:.3f} of all, memory at most {most}{on_gpu}")
    equal = "same bytes on all ranks" if len({row["bytes"] for row in shared}) == 1 else "RANKS DIFFER"
    pairs = zip(alone["bytes"], shared[0]["bytes"], strict=True)
    as_alone = next((n // 2 for n, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
    print(f"{equal}; {'as alone' if as_alone is None else f'as alone up to byte {as_alone}'}")
    print(f"bits a byte differ by {abs(shared[0]['bits'] - alone['bits']):.1e}", end="; ")
    print(f"{shared[0]['speed'] / alone['speed']:.2f}x the speed of one process")


def plan(given: argparse.Namespace, folder: Path) -> None:
    command = ["-m", "marlin_cli", "bench", model_of(given, folder), "--plan", "--ranks", str(given.ranks)]
    command += ["--link", given.inside, "--context", str(given.bytes + 64), "--device", given.device]
    command += [] if given.device == "cpu" else ["--bandwidth", str(given.gigabytes)]
    rows = run(command, 1, given, folder).written[0].splitlines()
    planned = {
        way: float(_cell(rows, f"{given.ranks} ranks by {way}: bytes/s of all")) for way in ("streams", "--split global")
    }
    memory = float(_cell(rows, f"{given.ranks} ranks by --split global: bytes of memory each"))
    shared = measured_split(given.ranks, given, folder)
    many = measured_streams(given.ranks, given, folder)
    found = {"streams": given.prompts * given.bytes / many.wall, "--split global": float(shared[0]["speed"])}
    for way, value in planned.items():
        print(f"{way}: planned {value:,.0f} bytes/s, measured {found[way]:,.0f}: {100 * (value / found[way] - 1):+.0f} %")
    most = max(row["most"] for row in shared)
    print(f"memory a rank: planned {memory / 1e6:,.0f} MB, measured {most / 1e6:,.0f}: {100 * (memory / most - 1):+.0f} %")


def _cell(rows: list[str], name: str) -> str:
    return next(row for row in rows if row.startswith(name)).removeprefix(name).strip().replace(",", "")


# Of `paper`: layers, width, heads, and heads of keys and values of the global stage; all have the same local one.
MODELS = {"1.2 B": (24, 2048, 32, None), "7 B": (32, 4096, 32, None), "70 B": (80, 8192, 64, 8)}


def paper(given: argparse.Namespace, folder: Path) -> None:
    """8 hosts of 8 GPUs by the arithmetic of `bench --plan`: a table, nothing is run."""
    from mlx.utils import tree_flatten

    from marlin_cli.models.megabyte import MegaByte
    from marlin_cli.models.megabyte_config import MegaByteConfig
    from marlin_cli.prediction.arithmetic import costs_of, stored_bits
    from marlin_cli.prediction.ranks import by_split, by_streams, held_by_one, parse_link
    from marlin_cli.prediction.sizes import elements_by_part

    inside, across = parse_link(given.inside), parse_link(given.across)
    print("| model | bits | one GPU: GB, bytes/s | 8 share it: GB each, bytes/s | 64 by streams | 8 x 8 share | 64 share it |")
    print("|---|---|---|---|---|---|---|")
    for name, (layers, dim, heads, kv_heads) in MODELS.items():
        config = MegaByteConfig(
            global_layers=layers, global_dim=dim, global_heads=heads, global_kv_heads=kv_heads, local_layers=4,
            local_dim=1024, local_heads=16, max_bytes=65536,
        )  # fmt: skip
        weights = dict(tree_flatten(MegaByte(config).parameters()))
        for bits in (16, 4):
            sizes = {part: count * stored_bits(bits) / 8 for part, count in elements_by_part(weights).items()}
            costs = costs_of(config, sizes, 32768)
            seconds = {part: size / (given.gigabytes * 1e9) for part, size in costs.read_bytes.items()}
            one = by_streams(costs, sizes, seconds, 1)
            eight = by_split(costs, sizes, seconds, held_by_one(config, weights, 8, name), config, inside)
            cells = [f"{one.memory_bytes / 1e9:.1f}, {one.bytes_per_second:,.0f}"]
            cells += [f"{eight.memory_bytes / 1e9:.1f}, {eight.bytes_per_second:,.0f}"]
            cells += [f"{64 * one.bytes_per_second:,.0f}", f"{8 * eight.bytes_per_second:,.0f}"]
            if heads % 64:
                cells.append(f"{heads} heads")
            else:
                all_ = by_split(costs, sizes, seconds, held_by_one(config, weights, 64, name), config, across)
                cells.append(f"{all_.memory_bytes / 1e9:.1f}, {all_.bytes_per_second:,.0f}")
            print(f"| {name} | {bits} | {' | '.join(cells)} |")


JOBS = {"streams": streams, "split": split, "corpus": corpus, "killed": killed, "plan": plan, "link": link, "paper": paper}
OF_ONE_PROCESS = {"make": make, "decode": decode, "phase": phase, "turns": turns}  # that a job has started


def size(text: str) -> int:
    """A number of bytes, as 512k or 4M."""
    unit = {"k": 10, "M": 20, "G": 30}.get(text[-1:], 0)
    return int(text[: len(text) - bool(unit)]) << unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=(*JOBS, *OF_ONE_PROCESS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", help="A model that is there; streams: megabyte-demo unless --layers or --dim is given.")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--format", default="none")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--alike", action="store_true", help="Prompts of one length.")
    parser.add_argument("--batch", type=int, default=16, help="Streams that a process runs side by side at most.")
    parser.add_argument("--bytes", type=int, default=256)
    parser.add_argument("--corpus-bytes", type=size, default=512 << 10)
    parser.add_argument("--window-bytes", type=size, default=2048)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--phases", default=",".join(PHASES), help="In whose middle a rank is killed.")
    parser.add_argument("--seconds", type=float, default=1, help="In the phase, before a rank is killed.")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3600, help="A second, at which weights are read (plan, paper).")
    parser.add_argument("--inside", default="2,300,tree", help="The link within a host (plan, paper), as bench --link has it.")
    parser.add_argument("--across", default="25,40,tree", help="The link between hosts (paper).")
    parser.add_argument("--ring", action="store_true")
    given = parser.parse_args()
    given.nccl = given.device == "cuda" and not given.ring
    if given.job == "streams" and given.model is None and given.layers is None and given.dim is None:
        given.model = "megabyte-demo"
    given.layers, given.dim = given.layers or 12, given.dim or 1024
    if given.job in OF_ONE_PROCESS:
        return OF_ONE_PROCESS[given.job](given)
    with tempfile.TemporaryDirectory() as name:
        JOBS[given.job](given, Path(name))


if __name__ == "__main__":
    main()
