"""What mlx.launch or mpirun says in the environment of a process it starts."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from marlin_cli.errors import DistributedError


@dataclass(frozen=True)
class Launch:
    """What the launcher says in the environment."""

    backend: str  # as `mx.distributed.init` takes it
    rank: int
    addresses: tuple[str, ...]  # where rank 0 may be found; empty where the launcher does not tell


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """How this process was launched; None if alone.

    Raises:
        DistributedError: the list of hosts of a ring cannot be read.
    """
    if "MLX_RANK" in environment and "MLX_HOSTFILE" in environment:
        hosts = _ring_hosts(Path(environment["MLX_HOSTFILE"]))
        return Launch("ring", int(environment["MLX_RANK"]), hosts) if hosts else None
    if "MLX_RANK" in environment and "MLX_JACCL_COORDINATOR" in environment:
        address = environment["MLX_JACCL_COORDINATOR"].rpartition(":")[0]
        return Launch("jaccl", int(environment["MLX_RANK"]), (address,))
    if "MLX_RANK" in environment and "NCCL_HOST_IP" in environment:
        alone = environment.get("MLX_WORLD_SIZE") == "1"
        return None if alone else Launch("nccl", int(environment["MLX_RANK"]), (environment["NCCL_HOST_IP"],))
    for size, rank in (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")):
        if int(environment.get(size, "1")) > 1 and rank in environment:
            return Launch("mpi", int(environment[rank]), ())
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


def _ring_hosts(path: Path) -> tuple[str, ...]:
    """The addresses of rank 0 in MLX's list of hosts; empty if it is the only one (mlx.launch leaves the file empty)."""
    try:
        text = path.read_text(encoding="utf-8")
        hosts = json.loads(text) if text.strip() else []
        if not isinstance(hosts, list):
            raise TypeError(f"it is {type(hosts).__name__}")
        return tuple(address.rpartition(":")[0] for address in hosts[0]) if len(hosts) > 1 else ()
    except OSError as error:
        raise DistributedError(f"MLX_HOSTFILE {path}: cannot read: {error.strerror or error}") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise DistributedError(f"MLX_HOSTFILE {path}: not a list of lists of address:port: {error}") from None
