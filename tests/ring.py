"""Ranks of a ring on loopback, started by hand: mlx.launch polls its children without a pause, which takes a core."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, of a range that no outgoing connection is given."""
    ports: list[int] = []
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                try:
                    with socket.socket() as server:
                        server.bind(("127.0.0.1", port))
                except OSError:
                    continue
                ports.append(port)
        if len(ports) == count:
            break
    return ports


def start_ring(
    arguments: Sequence[str],
    folder: Path,
    size: int = 2,
    only: Sequence[int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list["subprocess.Popen[str]"]:
    """Ranks, all of them or `only` some, that run Python with these arguments. Nobody writes to their stdin."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **(environment or {}), "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (range(size) if only is None else only)
    ]  # fmt: skip


@contextlib.contextmanager
def ring(*arguments: Any, **options: Any) -> Iterator[list["subprocess.Popen[str]"]]:
    """As `start_ring`; none is left when the block is."""
    processes = start_ring(*arguments, **options)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(processes: Sequence["subprocess.Popen[str]"]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    results = []
    for process in processes:
        out, error = process.communicate(timeout=60)
        results.append((process.returncode, out, error))
    return results
