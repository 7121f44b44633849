"""Does an NVIDIA GPU score, calibrate and pack as the CPU does? Bits per byte, statistics and packed bytes of both, compared.

    python benchmarks/cuda_against_cpu.py [--kib 64] [--formats nvfp4,mxfp8,int4] [--window 2048] [--threads 8]

The demos of MegaByte and ByT5: scored in float32, in bfloat16 (the CPU in float32) and packed from float32 by rtn on each
device. Statistics are of the float32 demo. Each device in a process of its own; seconds of both.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from marlin_cli import load
from marlin_cli.engine.answer_scoring import bits_of_answers
from marlin_cli.engine.scoring import bits_of
from marlin_cli.files import shipped
from marlin_cli.models.byt5_ids import ids_of_bytes
from marlin_cli.ops.device import choose_device
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.statistics.collect import measure

CALIBRATED_WINDOWS, EVERY = 8, 6  # windows; which of the pairs


def sample(count: int) -> np.ndarray:
    """Bytes of the shipped sample, some of each file."""
    files = sorted(path for path in Path(shipped("calibration/sample")).rglob("*") if path.is_file())
    share = -(-count // len(files))
    data = b"".join(path.read_bytes()[:share] for path in files)
    return np.frombuffer(data[:count], np.uint8)


def settings_of(name: str, answers: bool) -> QuantizationSettings:
    group = 32 if name.startswith("int") else None
    if answers:
        return QuantizationSettings(
            encoder_format=name, decoder_format=name, cross_format=name, wo_format=name, group_size=group
        )
    return QuantizationSettings(global_format=name, local_format=name, group_size=group)


def pairs_of_demo() -> list[tuple[list[int], bytes]]:
    """Some inputs, as ids, and answers of the demo that restores case and marks."""
    lines = (shipped("configs/models/byt5-demo") / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines[::EVERY]]
    return [([*ids_of_bytes(pair["source"].encode()), 1], pair["target"].encode()) for pair in pairs]


def run(side: str, kib: int, formats: list[str], window: int) -> dict:
    """Everything that is compared, of one device, and seconds."""
    device = choose_device(side)
    data, found, seconds = sample(kib << 10), {}, {}

    def timed(name, call):
        start = time.perf_counter()
        result = call()
        seconds[name] = time.perf_counter() - start
        return result

    def at(network, dtype):
        network.set_dtype(dtype)
        mx.eval(network.parameters())
        return network

    pairs = pairs_of_demo()
    answer_bytes = sum(len(target) + 1 for _, target in pairs)

    def answered(network):
        """Of each pair its share of the bits per byte of all, whose mean that is."""
        each = []
        for i in range(0, len(pairs), 16):
            sources, targets = zip(*pairs[i : i + 16], strict=True)
            each.append(bits_of_answers(network, sources, targets))
        return np.concatenate(each) * len(pairs) / answer_bytes

    half = mx.float32 if side == "cpu" else mx.bfloat16
    for model in ("demo", "byt5"):

        def fresh(dtype, model=model):
            return at(load(f"{'megabyte' if model == 'demo' else model}-demo", device=side).network, dtype)

        score = answered if model == "byt5" else lambda network: bits_of(network, data, window)
        plain = fresh(mx.float32)
        found[f"{model} float32 bits"] = timed(f"{model} float32", lambda s=score, p=plain: s(p))
        if model == "demo":
            count = min(CALIBRATED_WINDOWS, len(data) // window)
            windows = [data[i * window : (i + 1) * window] for i in range(count)]
            totals = timed("calibrate", lambda p=plain, w=windows: [measure(p, "sample", each) for each in w])
            for number, each in enumerate(totals):
                for kind, path, moments in each.items():
                    found[f"statistics {number} {kind} {path} squares"] = moments.sum_squares
                    found[f"statistics {number} {kind} {path} largest"] = moments.absolute_maximum
        other = fresh(half)
        found[f"{model} bfloat16 bits"] = timed(f"{model} bfloat16", lambda s=score, p=other: s(p))
        for name in formats:
            settings = settings_of(name, model == "byt5")
            packed = timed(f"{model} packing {name}", lambda p=plain, s=settings: quantize_network(p, s, method="rtn").network)
            for path, array in tree_flatten(packed.parameters()):
                if array.dtype in (mx.uint32, mx.uint8):
                    found[f"packed {model} {name} {path}"] = np.array(array)
            packed = at(packed, half)
            found[f"{model} {name} bits"] = timed(f"{model} {name}", lambda s=score, p=packed: s(p))
    return {"device": device.name, "found": found, "seconds": seconds}


def compare(cpu: dict, gpu: dict) -> None:
    one, other = cpu["found"], gpu["found"]
    for name in one:
        if not name.endswith(" bits"):
            continue
        a, b, key = one[name].mean(), other[name].mean(), name.removesuffix(" bits")
        apart = np.abs(one[name] - other[name])
        print(
            f"{key:15} bits per byte {a:.6f} (CPU) {b:.6f} (GPU), apart {abs(a - b):.1e}, of single ones {apart.mean():.1e}; "
            f"seconds {cpu['seconds'][key]:.2f}, {gpu['seconds'][key]:.2f}"
        )
    for kind in ("squares", "largest"):
        worst = (0.0, "")
        for name in one:
            if name.startswith("statistics") and name.endswith(kind):
                a, b = one[name].astype(np.float64), other[name].astype(np.float64)
                if a.size:
                    worst = max(worst, (float((np.abs(a - b) / np.maximum(a, 1e-3 * a.max() + 1e-30)).max()), name))
        print(f"statistics, {kind}: apart at most {worst[0]:.1e} relative ({worst[1]})")
    print(f"  seconds {cpu['seconds']['calibrate']:.2f}, {gpu['seconds']['calibrate']:.2f}")
    groups: dict[str, list[str]] = {}
    for name in one:
        if name.startswith("packed"):
            groups.setdefault(" ".join(name.split()[1:3]), []).append(name)
    for group, names in groups.items():
        differ = sum(int((one[name].view(np.uint8) != other[name].view(np.uint8)).sum()) for name in names)
        total = sum(one[name].nbytes for name in names)
        key = " packing ".join(group.split())
        print(f"packed {group}: {differ} of {total} bytes differ; seconds {cpu['seconds'][key]:.2f}, {gpu['seconds'][key]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kib", type=int, default=64)
    parser.add_argument("--formats", default="nvfp4,mxfp8,int4")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--threads", default="8")
    parser.add_argument("--other", default="cuda", help="the device beside the CPU")
    parser.add_argument("--side", help="one device alone, which leaves its numbers in the file --to")
    parser.add_argument("--to")
    parser.add_argument("--cpu", type=Path, help="a file of the CPU's numbers, as --side cpu left it")
    arguments = parser.parse_args()
    if arguments.side:
        result = run(arguments.side, arguments.kib, arguments.formats.split(","), arguments.window)
        Path(arguments.to).write_bytes(pickle.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        sides = {side: Path(folder, side) for side in ("cpu", arguments.other) if side != "cpu" or arguments.cpu is None}
        passed = ["--kib", str(arguments.kib), "--formats", arguments.formats, "--window", str(arguments.window)]
        environment = {**os.environ, "MARLIN_THREADS": arguments.threads}
        running = [
            subprocess.Popen([sys.executable, __file__, *passed, "--side", side, "--to", str(path)], env=environment)
            for side, path in sides.items()
        ]
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit("a side failed")
        compare(*(pickle.loads(path.read_bytes()) for path in (arguments.cpu or sides["cpu"], sides[arguments.other])))


if __name__ == "__main__":
    main()
