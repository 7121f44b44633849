"""Processes that are ranks, started by hand: one alone, a ring on loopback, or NCCL with a GPU each; and models for them."""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WORDS = "the global stage reads a patch at a time and the local one its bytes in turn ".split()


@dataclass(frozen=True)
class Ran:
    """What a command by one or several processes came to.

    Attributes:
        written: stdout of each process.
        wall: seconds until the last one ended.
        busiest: processor seconds of the busiest.
    """

    written: list[str]
    wall: float
    busiest: float


def environments(ranks: int, given: argparse.Namespace, folder: Path) -> list[dict[str, str]]:
    """Of each process; of one alone nothing says that it is a rank."""
    common = {**os.environ, "MARLIN_THREADS": str(given.threads), "OMP_NUM_THREADS": str(given.threads)}
    if ranks == 1:
        return [{**common, "CUDA_VISIBLE_DEVICES": "0"}]
    ports = free_ports(ranks)
    if given.nccl:
        launch = {"MLX_WORLD_SIZE": str(ranks), "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(ports[0])}
        launch["NCCL_NVLS_ENABLE"] = "0"  # no multicast over NVLink
        return [{**common, **launch, "MLX_RANK": str(n), "CUDA_VISIBLE_DEVICES": str(n)} for n in range(ranks)]
    (folder / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    launch = {"MLX_HOSTFILE": str(folder / "hosts.json"), "CUDA_VISIBLE_DEVICES": "0"}
    return [{**common, **launch, "MLX_RANK": str(n)} for n in range(ranks)]


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def start(
    command: Sequence[str], ranks: int, given: argparse.Namespace, folder: Path, **pipes: int
) -> list["subprocess.Popen[str]"]:
    """Python with these arguments, by so many ranks."""
    return [
        subprocess.Popen(
            [sys.executable, *command], env=each, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, **pipes
        )
        for each in environments(ranks, given, folder)
    ]


def run(command: Sequence[str], ranks: int, given: argparse.Namespace, folder: Path) -> Ran:
    """Run it to its end; one that fails ends this program."""
    begun = time.perf_counter()
    written, busiest = [], 0.0
    for process in start(command, ranks, given, folder):
        assert process.stdout is not None
        written.append(process.stdout.read())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command[:3])} by {ranks}: exit code {process.returncode}")
        busiest = max(busiest, usage.ru_utime + usage.ru_stime)
    return Ran(written, time.perf_counter() - begun, busiest)


def model_of(given: argparse.Namespace, folder: Path) -> str:
    """The model that is named; else a random MegaByte whose global stage is most of it, saved in `folder`."""
    if given.model is not None:
        return str(given.model)
    path = folder / "model"
    command = [str(Path(__file__).with_name("ranks.py")), "make", "--folder", str(path)]
    for name in ("layers", "dim", "format", "device"):
        command += [f"--{name}", str(getattr(given, name))]
    if not path.exists():
        run(command, 1, given, folder)  # in a process of its own, whose memory on a GPU is free again then
    return str(path)


def make(given: argparse.Namespace) -> None:
    """What the process of `model_of` does."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from marlin_cli.api import MegaByteModel
    from marlin_cli.checkpoints.writer import write_model
    from marlin_cli.models import config_as_mapping
    from marlin_cli.models.megabyte_config import MegaByteConfig
    from marlin_cli.quantization.apply import quantize_network
    from marlin_cli.quantization.plan import QuantizationSettings

    config = MegaByteConfig(
        global_layers=given.layers, global_dim=given.dim, global_heads=given.dim // 64, local_layers=2, local_dim=256,
        local_heads=4, max_bytes=8192,
    )  # fmt: skip
    model = MegaByteModel.from_config(config, device=given.device)
    if given.device != "cpu":
        model.network.set_dtype(mx.bfloat16)
    if given.format != "none":
        settings = QuantizationSettings(global_format=given.format, local_format="16bit")
        packed = quantize_network(model.network, settings, method="rtn")  # the fastest
        weights = dict(tree_flatten(packed.network.parameters()))
        return write_model(given.folder, config_as_mapping(config), weights, packed.quantization, packed.marlin)
    model.save(given.folder)


def text_of(size: int, folder: Path) -> Path:
    """A file of so many bytes of words."""
    path, order = folder / f"words-{size}.txt", random.Random(0)
    words = [order.choice(WORDS) for _ in range(size // 2)]
    path.write_text(" ".join(words)[:size])
    return path


def prompts_of(given: argparse.Namespace, folder: Path) -> Path:
    """A file of prompts, of up to 80 bytes each; or of 64, --alike."""
    path = folder / "prompts.jsonl"
    prompts = [" ".join(WORDS[n % 7 : 7 + n % 9]) for n in range(given.prompts)]
    if given.alike:
        prompts = [f"{n} {' '.join(WORDS)}"[:64] for n in range(given.prompts)]
    path.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
    return path


def last_document(written: str) -> dict[str, object]:
    """The JSON that a process wrote last; MLX says something before it over NCCL."""
    found: dict[str, object] = json.loads(written.splitlines()[-1])
    return found
