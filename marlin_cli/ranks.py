"""The processes (ranks) that `mlx.launch` or mpirun starts for one job: who they are, what they gather, and who is gone.

What is gathered travels over `mx.distributed`, by the backend that the launcher chose (ring, JACCL, NCCL, MPI). Those
have no common answer to a peer that dies: one raises after a dozen lines of its own, another waits for ever. So every
rank also holds a TCP connection to rank 0, through which they agree to begin each collective and learn at once, from
the closed connection, that one is gone; from missing beats, that its machine is. The job ends then: main threads are
interrupted as by Ctrl-C, which saves what is worth saving, and rank 0 says in one line which rank it was.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlin_cli.errors import DistributedError, MarlinError

JOIN_SECONDS = 120.0  # for all ranks to be there: they import MLX first, maybe from a slow disk

BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0  # without a beat a rank counts as gone

# A main thread that is interrupted may first have to finish a pass of a large model, or nothing at all.
STOP_SECONDS = 60.0
STOP_COLLECTIVE_SECONDS = 3.0

CHUNK_BYTES = 16 << 20  # of one rank in one collective; bounds memory


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


class Ranks:
    """This process among those of the job."""

    def __init__(self, rank: int = 0, size: int = 1, watch: "_Watch | None" = None) -> None:
        self.rank, self.size, self._watch = rank, size, watch

    def gather(self, payload: bytes) -> list[bytes]:
        """What every rank gave, by rank. All ranks must call it, in the same order.

        Raises:
            DistributedError: the connection broke.
        """
        if self._watch is None:
            return [payload]
        lengths = [int.from_bytes(part, "little") for part in self._exchange(len(payload).to_bytes(8, "little"))]
        received = [bytearray() for _ in lengths]
        for start in range(0, max(lengths), CHUNK_BYTES):
            for rank, part in enumerate(self._exchange(payload[start : start + CHUNK_BYTES])):
                received[rank] += part[: lengths[rank] - start] if start < lengths[rank] else b""
        return [bytes(part) for part in received]

    def collect(self, source: Path | None, target_of: Callable[[int], Path]) -> list[bool]:
        """Copy a file of each other rank to `target_of(its rank)` at rank 0; whether each rank has one, by rank.

        Files may be larger than memory.

        Raises:
            DistributedError: the connection broke.
            OSError: a file could not be read or written.
        """
        sizes = [int(part) for part in self.gather(b"-1" if source is None else str(source.stat().st_size).encode())]
        with contextlib.ExitStack() as files:
            opened = None if source is None else files.enter_context(source.open("rb"))
            targets = {
                rank: files.enter_context(target_of(rank).open("wb"))
                for rank, size in enumerate(sizes)
                if self.rank == 0 and rank > 0 and size >= 0
            }
            for start in range(0, max(sizes), CHUNK_BYTES):
                parts = self._exchange(b"" if opened is None else opened.read(CHUNK_BYTES))
                for rank, target in targets.items():
                    target.write(parts[rank][: max(0, sizes[rank] - start)])
        return [size >= 0 for size in sizes]

    def check_alike(self, **facts: str) -> None:
        """Refuse ranks that were not started on the same job.

        Raises:
            DistributedError: a fact differs between ranks; it is named.
        """
        everyone = [json.loads(part) for part in self.gather(json.dumps(facts).encode())]
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise DistributedError(f"rank {rank} has another {name} than rank 0; start all ranks on the same job")

    def _exchange(self, part: bytes) -> list[bytes]:
        """One collective of at most `CHUNK_BYTES` of each rank; parts come back padded to the longest."""
        import mlx.core as mx
        import numpy as np

        assert self._watch is not None
        self._watch.agree()
        try:
            self._watch.in_collective = True
            longest = int(np.array(mx.distributed.all_gather(mx.array([len(part)], mx.int32))).max())
            if longest == 0:
                return [b""] * self.size
            padded = np.frombuffer(part.ljust(longest, b"\0"), dtype=np.uint8)
            gathered = np.array(mx.distributed.all_gather(mx.array(padded))).reshape(self.size, longest)
        except RuntimeError as error:
            time.sleep(2 * BEAT_SECONDS)  # the watch knows which rank it was, and interrupts this
            raise DistributedError(f"the ranks lost their connection: {' '.join(str(error).split())}") from None
        finally:
            self._watch.in_collective = False
        return [row.tobytes() for row in gathered]


ALONE = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this job, for as long as the block takes; `ALONE` where nothing launched this process.

    Call it in the main thread. When a rank ends before its block does, all others leave theirs by KeyboardInterrupt,
    which this turns into the line that says so. Rank 0 prints it; the others end silently with exit code 1.

    Raises:
        DistributedError: a rank ended, or the ranks do not find each other.
    """
    launch = launch_of(os.environ)
    if launch is None:
        yield ALONE
        return
    watch = _join(launch)
    previous = signal.signal(signal.SIGTERM, watch.stop)
    try:
        watch.start()
        yield Ranks(launch.rank, watch.size, watch)
    except KeyboardInterrupt:
        if watch.lost is None:
            watch.fail("interrupted")
            raise
        raise _ending(watch, DistributedError(watch.lost)) from None
    except MarlinError as error:
        if watch.lost is not None:
            raise _ending(watch, DistributedError(watch.lost)) from None
        watch.fail(str(error))
        raise _ending(watch, error) from None
    except BaseException as error:
        watch.fail(f"{type(error).__name__}: {error}")
        raise
    finally:
        watch.close()
        signal.signal(signal.SIGTERM, previous)


def _ending(watch: "_Watch", error: MarlinError) -> BaseException:
    """How a rank whose job failed goes: with the line, or silently where rank 0 says it."""
    return SystemExit(error.exit_code) if watch.told else error


def _join(launch: Launch) -> "_Watch":
    import mlx.core as mx

    limit = _limit_of_joining(launch.rank)
    try:
        group = mx.distributed.init(strict=True, backend=launch.backend)
        if launch.rank == 0:
            return _leader(group.size(), launch.addresses)
        return _member(launch.rank, group.size())
    except (RuntimeError, OSError) as error:
        raise DistributedError(
            f"rank {launch.rank} cannot join over {launch.backend}: {' '.join(str(error).split())}"
        ) from None
    finally:
        limit.kill()
        limit.wait()


# MLX waits for the other ranks without end, and lets no thread of this process run meanwhile: another one must watch.
_LIMIT = """
import os, signal, sys, time
parent, end = os.getppid(), time.monotonic() + float(sys.argv[1])
while os.getppid() == parent:
    if time.monotonic() > end:
        print(sys.argv[2], file=sys.stderr, flush=True)
        os.kill(parent, signal.SIGKILL)
        break
    time.sleep(0.1)
"""


def _limit_of_joining(rank: int) -> "subprocess.Popen[bytes]":
    """A process that ends this one with a line on stderr, unless it is killed within `JOIN_SECONDS`."""
    line = f"marlin: rank {rank} waited {JOIN_SECONDS:.0f} s for the others; start all of them with mlx.launch"
    return subprocess.Popen([sys.executable, "-S", "-c", _LIMIT, str(JOIN_SECONDS), line], stdin=subprocess.DEVNULL)


def _leader(size: int, addresses: Sequence[str]) -> "_Watch":
    """Rank 0: says where it listens, and waits for the others."""
    local = bool(addresses) and all(address.startswith("127.") for address in addresses)
    token = secrets.token_hex(16)
    with socket.create_server(("127.0.0.1" if local else "", 0)) as server:
        name = socket.gethostname()
        call = {"host": name, "port": server.getsockname()[1], "addresses": [*addresses, name], "token": token}
        _announce(json.dumps(call).encode())
        connections: dict[int, _Connection] = {}
        while len(connections) < size - 1:
            connection = _Connection(server.accept()[0])
            hello = connection.receive()
            if hello is not None and hello.get("token") == token:
                connections[int(hello["rank"])] = connection
    return _Watch(0, size, connections)


def _member(rank: int, size: int) -> "_Watch":
    """Another rank: hears where rank 0 listens."""
    call = json.loads(_announce(b""))
    # On the same machine the loopback is always there.
    addresses = [*(["127.0.0.1"] if call["host"] == socket.gethostname() else []), *call["addresses"]]
    problem: OSError | None = None
    for address in dict.fromkeys(addresses):
        try:
            connection = _Connection(socket.create_connection((address, call["port"]), timeout=10))
        except OSError as error:
            problem = error
            continue
        connection.send(token=call["token"], rank=rank)
        return _Watch(rank, size, {0: connection})
    raise OSError(f"rank 0 is not reached at {', '.join(addresses)}, port {call['port']}: {problem}")


def _announce(call: bytes) -> bytes:
    """What rank 0 has to say, at every rank. Before there is a watch, this rests on `_join`'s time limit."""
    import mlx.core as mx
    import numpy as np

    room = np.zeros(4096, dtype=np.uint8)
    room[: len(call)] = np.frombuffer(call, dtype=np.uint8)
    return np.array(mx.distributed.all_gather(mx.array(room)))[: len(room)].tobytes().rstrip(b"\0")


class _Connection:
    """Messages to and from one other rank: a line of JSON each."""

    def __init__(self, plug: socket.socket) -> None:
        plug.settimeout(SILENT_SECONDS)
        plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._lines, self._lock = plug, plug.makefile("rb"), threading.Lock()

    def send(self, **message: Any) -> None:
        # A peer that is gone is found out where its messages are read.
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; None when the peer is gone, or silent for too long."""
        try:
            line = self._lines.readline()
            message: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None
        return message

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class _Watch:
    """The connections of one rank (rank 0: to all others; else: to rank 0), and threads that read them."""

    def __init__(self, rank: int, size: int, connections: dict[int, _Connection]) -> None:
        self.rank, self.size, self._connections = rank, size, connections
        self.lost: str | None = None  # the line that says why the job is over
        self.told = False  # rank 0 knows, and says it
        self.in_collective = False
        self._number = 0  # of the collective that is next
        self._ready = dict.fromkeys(connections, 0)  # collectives that the other side has reached
        self._left: set[int] = set()
        self._closed = self._stopping = False
        self._news = threading.Condition()

    def start(self) -> None:
        """From here on the main thread is interrupted when a rank is lost: by SIGTERM, which must lead to `stop`."""
        for peer, connection in self._connections.items():
            threading.Thread(target=self._read, args=(peer, connection), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def agree(self) -> None:
        """Wait until every rank has come to the next collective. Interrupted when one is lost."""
        self._number += 1
        if self.rank > 0:
            self._send(ready=self._number)
        with self._news:
            while min(self._ready.values()) < self._number:
                self._news.wait(0.1)  # short: a signal is handled between waits
        if self.rank == 0:
            self._send(ready=self._number)

    def fail(self, reason: str) -> None:
        """Tell the others that this rank ends before its time. Rank 0 says why; wait until it has heard."""
        self._closed = True
        self._send(failed=reason)
        if self.rank > 0:
            with self._news:
                self._news.wait_for(lambda: self.told or 0 in self._left, timeout=5)

    def close(self) -> None:
        self._closed = True
        self._send(bye=True)
        for connection in self._connections.values():
            connection.close()

    def stop(self, *_: object) -> None:
        """Interrupt the main thread, where this runs: once, since it will be saving what it has."""
        if not self._stopping:
            self._stopping = True
            raise KeyboardInterrupt

    def _send(self, **message: Any) -> None:
        for connection in self._connections.values():
            connection.send(**message)

    def _beat(self) -> None:
        while not self._closed:
            self._send(beat=True)
            time.sleep(BEAT_SECONDS)

    def _read(self, peer: int, connection: _Connection) -> None:
        while (message := connection.receive()) is not None:
            if "ready" in message:
                with self._news:
                    self._ready[peer] = message["ready"]
                    self._news.notify_all()
            elif "failed" in message:
                self._leaves(peer, f"rank {peer} of {self.size} failed: {message['failed']}", told=self.rank > 0)
            elif "over" in message:
                self._leaves(peer, message["over"], told=True)
            elif "bye" in message:
                self._leaves(peer, None)
        if peer not in self._left:
            self._leaves(peer, f"rank {peer} of {self.size} ended without finishing its share")

    def _leaves(self, peer: int, reason: str | None, *, told: bool = False) -> None:
        """A peer is gone, and with a reason the job is over."""
        with self._news:
            self._left.add(peer)
            self.told = self.told or told
            first = reason is not None and self.lost is None and not self._closed
            if first:
                self.lost = reason
            self._news.notify_all()
        if self.rank == 0 and reason is not None:
            self._send(over=reason)
        if first:
            self._interrupt()

    def _interrupt(self) -> None:
        """End the main thread by `stop`; the process, if that does not come back from where it is."""
        assert self.lost is not None
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        started = time.monotonic()
        while not self._stopping and not self._closed:
            time.sleep(0.1)
            if time.monotonic() - started > (STOP_COLLECTIVE_SECONDS if self.in_collective else STOP_SECONDS):
                _exit_now("" if self.told else self.lost)


def _exit_now(reason: str) -> None:
    """From another thread than the main one, which does not come back."""
    if reason:
        print(f"marlin: {reason}", file=sys.stderr, flush=True)
    os._exit(1)
