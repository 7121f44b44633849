"""What mlx.launch or mpirun says in the environment of a process it starts."""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from marlin_cli.documents import MOST_JSON_BYTES, parse_json
from marlin_cli.errors import DistributedError
from marlin_cli.files import check_regular
from marlin_cli.text import quoted

# How kinds of MPI name the number of ranks, a rank, and its number on its machine.
MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
)
GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each of this machine
CHOSEN_GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Launch:
    """What the launcher says in the environment."""

    backend: str  # as `mx.distributed.init` takes it
    rank: int
    addresses: tuple[str, ...]  # where rank 0 may be found; empty where the launcher does not tell
    local: int = 0  # how many ranks before this one are on its machine, as far as the launcher tells


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """How this process was launched; None if alone.

    Raises:
        DistributedError: the list of hosts of a ring cannot be read, or a rank or size is no number.
    """
    if "MLX_RANK" in environment and "MLX_HOSTFILE" in environment:
        hosts, rank = _ring_hosts(Path(environment["MLX_HOSTFILE"])), _number(environment, "MLX_RANK")
        here = hosts[rank][0] if rank < len(hosts) else ""
        return Launch("ring", rank, hosts[0], sum(host[0] == here for host in hosts[:rank])) if hosts else None
    if "MLX_RANK" in environment and "MLX_JACCL_COORDINATOR" in environment:
        address = environment["MLX_JACCL_COORDINATOR"].rpartition(":")[0]
        return Launch("jaccl", _number(environment, "MLX_RANK"), (address,))
    if "MLX_RANK" in environment and "NCCL_HOST_IP" in environment:
        alone, rank = environment.get("MLX_WORLD_SIZE") == "1", _number(environment, "MLX_RANK")
        return None if alone else Launch("nccl", rank, (environment["NCCL_HOST_IP"],), rank)
    for size, name, local in MPI:
        if name in environment and size in environment and _number(environment, size) > 1:
            return Launch("mpi", _number(environment, name), (), _number(environment, local if local in environment else name))
    return None


def is_follower() -> bool:
    """Is this a rank that leaves printing and writing to rank 0?"""
    return any(name in os.environ for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")) and _follows()


def _follows() -> bool:
    try:
        launch = launch_of(os.environ)
    except DistributedError:
        return False  # `joined` will say what is wrong
    return launch is not None and launch.rank > 0


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise DistributedError(f"{name} must be a number, as a launcher sets it; found {quoted(text)}")
    return int(text)


def take_a_gpu(launch: Launch, environment: MutableMapping[str, str]) -> None:
    """Let this rank see one NVIDIA GPU of its machine's several, its own, where nobody has chosen. Before anything uses one.

    mlx.launch chooses so over NCCL, and nowhere else; MLX has all arrays on the first GPU that a process sees.
    """
    if CHOSEN_GPUS in environment:
        return
    try:
        count = len(list(GPUS.iterdir()))
    except OSError:
        return
    if count > 1:
        environment[CHOSEN_GPUS] = str(launch.local % count)


def _ring_hosts(path: Path) -> tuple[tuple[str, ...], ...]:
    """The addresses of each rank in MLX's list of hosts; empty if there is only one (mlx.launch leaves the file empty)."""
    check_regular(path, DistributedError)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_JSON_BYTES)
    except OSError as error:
        raise DistributedError(f"MLX_HOSTFILE {path}: cannot read: {error.strerror or error}") from None
    hosts = parse_json(data, f"MLX_HOSTFILE {path}", DistributedError) if data.strip() else []
    lists = isinstance(hosts, list) and all(isinstance(each, list) and each for each in hosts)
    if not lists or not all(isinstance(address, str) for each in hosts for address in each):
        raise DistributedError(f"MLX_HOSTFILE {path}: not a list of lists of address:port: {quoted(hosts)}")
    return tuple(tuple(address.rpartition(":")[0] for address in host) for host in hosts) if len(hosts) > 1 else ()
