"""What mlx.launch or mpirun says in the environment of a process it starts."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from marlin_cli.documents import MOST_JSON_BYTES, parse_json
from marlin_cli.errors import DistributedError
from marlin_cli.files import check_regular
from marlin_cli.text import quoted


@dataclass(frozen=True)
class Launch:
    """What the launcher says in the environment."""

    backend: str  # as `mx.distributed.init` takes it
    rank: int
    addresses: tuple[str, ...]  # where rank 0 may be found; empty where the launcher does not tell


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """How this process was launched; None if alone.

    Raises:
        DistributedError: the list of hosts of a ring cannot be read, or a rank or size is no number.
    """
    if "MLX_RANK" in environment and "MLX_HOSTFILE" in environment:
        hosts = _ring_hosts(Path(environment["MLX_HOSTFILE"]))
        return Launch("ring", _number(environment, "MLX_RANK"), hosts) if hosts else None
    if "MLX_RANK" in environment and "MLX_JACCL_COORDINATOR" in environment:
        address = environment["MLX_JACCL_COORDINATOR"].rpartition(":")[0]
        return Launch("jaccl", _number(environment, "MLX_RANK"), (address,))
    if "MLX_RANK" in environment and "NCCL_HOST_IP" in environment:
        alone = environment.get("MLX_WORLD_SIZE") == "1"
        return None if alone else Launch("nccl", _number(environment, "MLX_RANK"), (environment["NCCL_HOST_IP"],))
    for size, rank in (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")):
        if rank in environment and size in environment and _number(environment, size) > 1:
            return Launch("mpi", _number(environment, rank), ())
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


def _ring_hosts(path: Path) -> tuple[str, ...]:
    """The addresses of rank 0 in MLX's list of hosts; empty if it is the only one (mlx.launch leaves the file empty)."""
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
    return tuple(address.rpartition(":")[0] for address in hosts[0]) if len(hosts) > 1 else ()
