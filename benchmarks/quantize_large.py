"""Seconds and peak memory of `marlin quantize` on a large random MegaByte, against the bytes of the model.

    python benchmarks/quantize_large.py [--dtype bfloat16] [--method mse] [--formats nvfp4,mxfp8] [--keep FOLDER]

The checkpoint is made shard by shard in a temporary folder (2 GB for a billion parameters in 16 bits) and packed by the
command itself, in a process of its own, whose peak the system tells.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from marlin_cli.models import config_as_mapping
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig

SIZES = {
    "0.1B": MegaByteConfig(global_layers=8, global_dim=1024, local_layers=4, local_dim=512),
    "1B": MegaByteConfig(global_layers=20, global_dim=2048, global_heads=16, local_layers=10, local_dim=1024, local_heads=16),
}
SHARD_WEIGHTS = 256 << 20


def make_checkpoint(folder: Path, config: MegaByteConfig, dtype: mx.Dtype) -> int:
    """Write random weights of the spread that training gives, a shard at a time; the count of parameters."""
    shapes = {name: array.shape for name, array in tree_flatten(MegaByte(config).parameters())}
    shards: list[list[str]] = [[]]
    used = total = 0
    for name, shape in shapes.items():
        size = 1
        for length in shape:
            size *= length
        if used + size > SHARD_WEIGHTS:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used, total = used + size, total + size
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        arrays = {name: (mx.random.normal(shapes[name]) * 0.02).astype(dtype) for name in names}
        mx.save_safetensors(str(folder / file), arrays, {"format": "mlx"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_as_mapping(config)))
    return total


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds of a command and its peak resident bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit code {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1B")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--method", default="mse")
    parser.add_argument("--formats", default="nvfp4,mxfp8", help="of the global and the local part")
    arguments = parser.parse_args()
    global_format, local_format = arguments.formats.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary) / "source", Path(temporary) / "packed"
        source.mkdir()
        mx.random.seed(0)
        parameters = make_checkpoint(source, SIZES[arguments.size], getattr(mx, arguments.dtype))
        stored = sum(file.stat().st_size for file in source.iterdir())
        seconds, peak = measured(
            [sys.executable, "-m", "marlin_cli", "quantize", str(source), "-o", str(target), "--method", arguments.method,
             "--global-format", global_format, "--local-format", local_format]
        )  # fmt: skip
        packed = sum(file.stat().st_size for file in target.iterdir())
        print(
            f"{parameters / 1e9:.2f} B parameters, {stored / 2**30:.2f} GiB in {arguments.dtype}: {packed / 2**30:.2f} GiB"
            f" after {seconds:.0f} s ({arguments.method}); peak {peak / 2**30:.2f} GiB of memory"
        )


if __name__ == "__main__":
    main()
