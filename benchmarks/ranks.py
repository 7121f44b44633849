"""Two ranks against one process: streams on each, or a model that both share; what is written, bits per byte, memory, time.

    python benchmarks/ranks.py streams [--prompts 24] [--bytes 256] [--repeats 2]
    python benchmarks/ranks.py split [--layers 12] [--dim 1024] [--format none|nvfp4|..] [--bytes 512] [--device cpu]
    python benchmarks/ranks.py killed
    python benchmarks/ranks.py paper

Ranks are started by hand, on a ring on loopback, or with --device cuda over NCCL, a GPU each; with --ring too, all on the first
GPU. On a machine that others use, wall times say little: the processor time of a process, and of the busier rank, is beside
them (of a rank that waits for the other one too, as a ring polls).

streams: `marlin generate --prompts` of the demo by one process and by two ranks of one thread each; outputs are compared.
split: a random MegaByte by one process and by two ranks that share its global stage: both must write the same bytes as each
other, and bits per byte equal to 1e-5. Memory is what the weights take, and the most that the process ever had.
killed: rank 1 is killed while both decode: how long rank 0 goes on.
paper: what bench --plan --ranks would say of 8 hosts of 8 GPUs, and of models that are not there.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "the global stage reads a patch at a time and the local one its bytes in turn ".split()


def environments(ranks: int, nccl: bool, folder: Path, threads: int) -> list[dict[str, str]]:
    """Of each process; of one alone nothing says that it is a rank."""
    common = {**os.environ, "MARLIN_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    if ranks == 1:
        return [{**common, "CUDA_VISIBLE_DEVICES": "0"}]
    if nccl:
        launch = {"MLX_WORLD_SIZE": str(ranks), "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": "12345"}
        return [{**common, **launch, "MLX_RANK": str(n), "CUDA_VISIBLE_DEVICES": str(n)} for n in range(ranks)]
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(ranks)]
    hosts = [[f"127.0.0.1:{server.getsockname()[1]}"] for server in servers]
    for server in servers:
        server.close()
    (folder / "hosts.json").write_text(json.dumps(hosts))
    launch = {"MLX_HOSTFILE": str(folder / "hosts.json"), "CUDA_VISIBLE_DEVICES": "0"}
    return [{**common, **launch, "MLX_RANK": str(n)} for n in range(ranks)]


def run(command: list[str], ranks: int, nccl: bool, folder: Path, threads: int) -> tuple[list[str], float, float]:
    """What each process wrote, wall seconds, and processor seconds of the busiest."""
    begun = time.perf_counter()
    processes = [
        subprocess.Popen([sys.executable, *command], env=each, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        for each in environments(ranks, nccl, folder, threads)
    ]
    written, busiest = [], 0.0
    for process in processes:
        assert process.stdout is not None
        written.append(process.stdout.read())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}")
        busiest = max(busiest, usage.ru_utime + usage.ru_stime)
    return written, time.perf_counter() - begun, busiest


def streams(given: argparse.Namespace, folder: Path) -> None:
    prompts = [" ".join(WORDS[n % 7 : 7 + n % 9]) for n in range(given.prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
    command = [
        "-m",
        "marlin_cli",
        "generate",
        given.model,
        "--prompts",
        str(folder / "prompts.jsonl"),
        "--device",
        given.device,
    ]
    command += ["--max-bytes", str(given.bytes)]
    best: dict[int, list[float]] = {1: [], 2: []}
    texts = {}
    for _ in range(given.repeats):
        for ranks, times in best.items():
            written, wall, busiest = run(command, ranks, given.nccl, folder, given.threads)
            texts[ranks] = [json.loads(line)["bytes_base64"] for line in written[0].splitlines()]
            best[ranks] = [wall, busiest] if not times else [min(times[0], wall), min(times[1], busiest)]
    # A command that generates nothing takes this.
    _, idle, idle_cpu = run([*command[:-1], "0"], 1, given.nccl, folder, given.threads)
    for ranks, (wall, busiest) in best.items():
        print(f"{ranks} process(es): {wall:.2f} s, {busiest:.2f} s of processor in the busiest")
    ratio, cpu = (best[1][0] - idle) / (best[2][0] - idle), (best[1][1] - idle_cpu) / (best[2][1] - idle_cpu)
    print(f"less {idle:.2f} s ({idle_cpu:.2f} s) of starting: {ratio:.2f}x by the clock, {cpu:.2f}x by the processor")
    print("same outputs" if texts[1] == texts[2] else "OTHER OUTPUTS")


def peak_resident_bytes() -> int:
    """Of this process since its program began; what getrusage says counts its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def model_of(given: argparse.Namespace, folder: Path) -> Path:
    """A random MegaByte whose global stage is most of it."""
    import mlx.core as mx

    from marlin_cli.api import MegaByteModel
    from marlin_cli.models.megabyte_config import MegaByteConfig
    from marlin_cli.quantization.plan import QuantizationSettings

    config = MegaByteConfig(
        global_layers=given.layers, global_dim=given.dim, global_heads=given.dim // 64, local_layers=2, local_dim=256,
        local_heads=4, max_bytes=8192,
    )  # fmt: skip
    model = MegaByteModel.from_config(config, device=given.device)
    if given.device != "cpu":
        model.network.set_dtype(mx.bfloat16)
    if given.format != "none":
        model = model.quantize(settings=QuantizationSettings(global_format=given.format, local_format="16bit"))
    path = folder / "model"
    model.save(path)
    return path


def decode(given: argparse.Namespace, path: Path) -> None:
    """What a process of `split` does: a line of JSON."""
    import contextlib

    import mlx.core as mx
    from mlx.utils import tree_flatten

    from marlin_cli.api import MegaByteModel
    from marlin_cli.engine.sampling import Sampling
    from marlin_cli.engine.stopping import Stopping
    from marlin_cli.ranks import joined

    text = bytes(range(256)) * 8
    with joined() as ranks, ranks.computing() if ranks.size > 1 else contextlib.nullcontext():
        model = MegaByteModel.from_pretrained(path, device=given.device, split=ranks)
        held = sum(array.nbytes for _, array in tree_flatten(model.network.parameters()))
        bits = model.bits_per_byte(text[:2048])
        best, written = float("inf"), b""
        for _ in range(given.repeats + 1):
            begun = time.perf_counter()
            written = b"".join(piece.data for piece in model.pieces([text[:64]], Stopping(given.bytes), Sampling()))
            best = min(best, time.perf_counter() - begun)
        most = mx.get_peak_memory() if given.device != "cpu" else peak_resident_bytes()
    print(json.dumps({"held": held, "bits": bits, "bytes": written.hex(), "speed": given.bytes / best, "most": most}))


def split(given: argparse.Namespace, folder: Path) -> None:
    path = model_of(given, folder)
    command = [__file__, "decode", "--folder", str(path), "--bytes", str(given.bytes), "--repeats", str(given.repeats)]
    command += ["--device", given.device]
    found = {
        ranks: [json.loads(each) for each in run(command, ranks, given.nccl, folder, given.threads)[0]] for ranks in (1, 2)
    }
    [alone], shared = found[1], found[2]
    print(f"{given.layers} layers of {given.dim}, {given.format}: {alone['held'] / 1e6:.0f} MB of weights")
    for name, rows in (("alone", [alone]), ("rank", shared)):
        for row in rows:
            most = f"{row['most'] / 1e6:.0f} MB ({row['most'] / alone['most']:.2f})"
            print(f"{name:6} {row['speed']:8.0f} bytes/s, {row['bits']:.7f} bits a byte,", end=" ")
            print(f"weights {row['held'] / alone['held']:.3f} of all, memory at most {most}")
    equal = "same bytes on both ranks" if shared[0]["bytes"] == shared[1]["bytes"] else "RANKS DIFFER"
    pairs = zip(alone["bytes"], shared[0]["bytes"], strict=True)
    as_alone = next((n // 2 for n, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
    print(f"{equal}; {'as alone' if as_alone is None else f'as alone up to byte {as_alone}'}")
    print(f"bits a byte differ by {abs(shared[0]['bits'] - alone['bits']):.1e}", end="; ")
    print(f"{shared[0]['speed'] / alone['speed']:.2f}x the speed of one process")


def killed(given: argparse.Namespace, folder: Path) -> None:
    path = model_of(given, folder)
    command = [sys.executable, __file__, "decode", "--folder", str(path), "--bytes", "4096", "--repeats", "1000"]
    both = [
        subprocess.Popen([*command, "--device", given.device], env=each, stderr=subprocess.PIPE, text=True)
        for each in environments(2, given.nccl, folder, given.threads)
    ]
    time.sleep(given.seconds)
    both[1].send_signal(signal.SIGKILL)
    begun = time.perf_counter()
    _, errors = both[0].communicate()
    print(f"rank 0 ended {time.perf_counter() - begun:.2f} s later with {both[0].returncode}: {errors.splitlines()[-1]}")
    both[1].communicate()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("streams", "split", "killed", "paper", "decode"))
    parser.add_argument("--model", default="megabyte-demo")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--bytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--format", default="none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10, help="Before a rank is killed.")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3600, help="A second, at which weights are read (paper).")
    parser.add_argument("--inside", default="12,300,tree", help="The link within a host (paper), as bench --link has it.")
    parser.add_argument("--across", default="25,40,tree", help="The link between hosts (paper).")
    parser.add_argument("--ring", action="store_true")
    given = parser.parse_args()
    given.nccl = given.device == "cuda" and not given.ring
    if given.job == "decode":
        return decode(given, given.folder)
    with tempfile.TemporaryDirectory() as name:
        {"streams": streams, "split": split, "killed": killed, "paper": paper}[given.job](given, Path(name))


if __name__ == "__main__":
    main()
