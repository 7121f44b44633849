"""One job of several ranks: how they come together, what they gather, and how all end when one does."""

import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from marlin_cli.documents import parse_json
from marlin_cli.errors import DistributedError, MarlinError, UsageError
from marlin_cli.ranks.launch import Launch, launch_of, take_a_gpu
from marlin_cli.ranks.watch import BEAT_SECONDS, Connection, Watch
from marlin_cli.text import one_line

JOIN_SECONDS = 120.0  # for all ranks to be there: they import MLX first, maybe from a slow disk

CHUNK_BYTES = 16 << 20  # of one rank in one collective; bounds memory

MOST_ADDRESSES = 16  # of rank 0 that the others try: an announcement has room for them
ANNOUNCEMENT_BYTES = 4096


class _ConnectionLost(DistributedError):
    """A collective broke off; which rank ended is for the watch to say."""


class FoundByAll(DistributedError):
    """What every rank finds for itself, so that none has to be named."""


class Ranks:
    """This process among those of the job."""

    def __init__(self, rank: int = 0, size: int = 1, watch: "Watch | None" = None) -> None:
        self.rank, self.size, self._watch = rank, size, watch
        self._steps = 0  # of models that ranks share
        self.before_collectives: list[Callable[[], None]] = []  # see `settle`

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

    @property
    def group(self) -> Any:
        """All ranks, as `mx.distributed` takes them; None where there is but one."""
        if self._watch is None:
            return None
        import mlx.core as mx

        return mx.distributed.init()

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """While nothing is made here that should be saved: when another rank is lost this process ends within a second."""
        if self._watch is None:
            yield
            return
        before, self._watch.nothing_to_save = self._watch.nothing_to_save, True
        try:
            yield
        finally:
            self._watch.nothing_to_save = before

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """While ranks compute together: a collective breaks off, or waits for ever, where another rank is gone.

        Whoever does not come back from one is ended within a second, so nothing is left here that should be saved.

        Raises:
            DistributedError: the connection broke.
        """
        if self._watch is None:
            yield
            return
        try:
            with self.nothing_to_save():
                yield
        except RuntimeError as error:
            time.sleep(2 * BEAT_SECONDS)  # the watch knows which rank it was, and interrupts this
            raise _ConnectionLost(f"the ranks lost their connection: {one_line(error)}") from None

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """While rank 0 alone hears Ctrl-C and SIGTERM, which launchers send to all, and lets what runs come to its end."""
        if self._watch is None:
            yield
            return
        previous, self._watch.deaf = signal.signal(signal.SIGINT, signal.SIG_IGN), True
        try:
            yield
        finally:
            self._watch.deaf = False
            signal.signal(signal.SIGINT, previous)

    def send(self, rank: int, message: bytes) -> None:
        """Send to another rank: rank 0 to any, each other to rank 0. It does not wait for anybody."""
        assert self._watch is not None
        self._watch.send(rank, message)

    def receive(self, seconds: float | None = None) -> tuple[int, bytes] | None:
        """The next message and who sent it; None if there is none for so long. Without an end it waits as long as it takes."""
        assert self._watch is not None
        return self._watch.receive(seconds)

    def drew(self, what: str, *, wait: bool = False) -> None:
        """Say what came of a step of a model that ranks share. Rank 0 compares; where it is not the same on all the job ends.

        Nobody waits for that unless told to.
        """
        if self._watch is not None:
            self._steps += 1
            self._watch.drew(self._steps, what, wait=wait)

    def settle(self) -> None:
        """Before a collective of MLX: have what waits for other ranks beside MLX come to its end first.

        Kernels that wait for another GPU leave it no room for a collective's, which waits for that GPU too: were their order
        another one there, none would come to its end.
        """
        for act in self.before_collectives:
            act()

    def when_over(self, act: Callable[[], None]) -> None:
        """Have `act` called, from any thread, when the job ends, in whatever way."""
        if self._watch is not None:
            self._watch.when_over.append(act)

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
        everyone = [
            parse_json(part, "the facts of a rank", DistributedError) for part in self.gather(json.dumps(facts).encode())
        ]
        for rank, theirs in enumerate(everyone):
            if theirs.keys() != everyone[0].keys():
                raise FoundByAll(f"rank {rank} has another command than rank 0; start all ranks on the same job")
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise FoundByAll(f"rank {rank} has another {name} than rank 0; start all ranks on the same job")

    def _exchange(self, part: bytes) -> list[bytes]:
        """One collective of at most `CHUNK_BYTES` of each rank; parts come back padded to the longest."""
        import mlx.core as mx
        import numpy as np

        assert self._watch is not None
        self.settle()
        self._watch.agree()
        with self.computing():
            longest = int(np.array(mx.distributed.all_gather(mx.array([len(part)], mx.int32))).max())
            if longest == 0:
                return [b""] * self.size
            padded = np.frombuffer(part.ljust(longest, b"\0"), dtype=np.uint8)
            gathered = np.array(mx.distributed.all_gather(mx.array(padded))).reshape(self.size, longest)
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
    take_a_gpu(launch, os.environ)
    watch = _join(launch)
    previous = signal.signal(signal.SIGTERM, watch.stop)
    try:
        watch.start()
        yield Ranks(launch.rank, watch.size, watch)
        if watch.lost is not None:  # the block has taken the interrupt for a wish to end, and did
            raise _ConnectionLost(watch.lost)
    except BaseException as error:
        watch.leaving = True  # before anything else: an interrupt from here on would hide what is said
        ending = _ending(watch, error)
        if ending is error:
            raise
        raise ending from None
    finally:
        watch.close()
        signal.signal(signal.SIGTERM, previous)


def _ending(watch: Watch, error: BaseException) -> BaseException:
    """What a rank whose job failed raises: the line that says why, or nothing but its exit code where rank 0 says it."""
    if watch.lost is not None and isinstance(error, KeyboardInterrupt | _ConnectionLost):
        error = DistributedError(watch.lost)
        error.exit_code = watch.exit_code
    elif isinstance(error, MarlinError):
        # A wrong option is found by every rank, as all have the same command line; which is first is chance.
        watch.fail(str(error), error.exit_code, by_all=isinstance(error, FoundByAll | UsageError))
    else:
        watch.fail("interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}")
    return SystemExit(error.exit_code) if watch.told and isinstance(error, MarlinError) else error


def _join(launch: Launch) -> "Watch":
    import mlx.core as mx

    limit = _limit_of_joining(launch.rank)
    try:
        group = mx.distributed.init(strict=True, backend=launch.backend)
        if launch.rank == 0:
            return _leader(group.size(), launch.addresses)
        return _member(launch.rank, group.size())
    except (RuntimeError, OSError) as error:
        raise DistributedError(f"rank {launch.rank} cannot join over {launch.backend}: {one_line(error)}") from None
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
    """A process that ends this one with a line on stderr, unless it is killed within `JOIN_SECONDS`.

    It is isolated (-I, which holds what -P does, and older Pythons have it): nothing is imported from the current folder.
    """
    line = f"marlin: rank {rank} waited {JOIN_SECONDS:.0f} s for the others; start all of them with mlx.launch"
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", _LIMIT, str(JOIN_SECONDS), line], stdin=subprocess.DEVNULL)


def _leader(size: int, addresses: Sequence[str]) -> "Watch":
    """Rank 0: says where it listens, and waits for the others."""
    local = bool(addresses) and all(address.startswith("127.") for address in addresses)
    token = secrets.token_hex(16)
    with socket.create_server(("127.0.0.1" if local else "", 0)) as server:
        name = socket.gethostname()
        call = {"host": name, "port": server.getsockname()[1], "addresses": [*addresses[:MOST_ADDRESSES], name], "token": token}
        _announce(json.dumps(call).encode())
        return Watch(0, size, _joining(server, size, token))


def _joining(server: socket.socket, size: int, token: str) -> dict[int, Connection]:
    """The connections of all other ranks, by rank. Whoever else connects is heard aside, where nobody waits, and hung up on."""
    arrived: queue.SimpleQueue[tuple[int, Connection]] = queue.SimpleQueue()

    def greet(plug: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection = Connection(plug)
            rank = _rank_of(connection.receive(), size, token)
            if rank is None:
                connection.close()
            else:
                arrived.put((rank, connection))

    connections: dict[int, Connection] = {}
    server.settimeout(0.1)
    while len(connections) < size - 1:
        with contextlib.suppress(TimeoutError, ConnectionError):
            threading.Thread(target=greet, args=(server.accept()[0],), daemon=True).start()
        while not arrived.empty():
            rank, connection = arrived.get()
            connections[rank] = connection
    return connections


def _rank_of(hello: dict[str, Any] | None, size: int, token: str) -> int | None:
    """The rank that a first message is of; None if it is of no rank of this job."""
    said, rank = ("", 0) if hello is None else (hello.get("token"), hello.get("rank"))
    known = isinstance(said, str) and secrets.compare_digest(said.encode(errors="replace"), token.encode())
    return rank if known and isinstance(rank, int) and 0 < rank < size else None


def _member(rank: int, size: int) -> "Watch":
    """Another rank: hears where rank 0 listens."""
    call = parse_json(_announce(b""), "what rank 0 announces", DistributedError)
    # On the same machine the loopback is always there.
    addresses = [*(["127.0.0.1"] if call["host"] == socket.gethostname() else []), *call["addresses"]]
    problem: OSError | None = None
    for address in dict.fromkeys(addresses):
        try:
            connection = Connection(socket.create_connection((address, call["port"]), timeout=10))
        except OSError as error:
            problem = error
            continue
        connection.send(token=call["token"], rank=rank)
        return Watch(rank, size, {0: connection})
    raise OSError(f"rank 0 is not reached at {', '.join(addresses)}, port {call['port']}: {problem}")


def _announce(call: bytes) -> bytes:
    """What rank 0 has to say, at every rank. Before there is a watch, this rests on `_join`'s time limit."""
    import mlx.core as mx
    import numpy as np

    if len(call) > ANNOUNCEMENT_BYTES:
        raise DistributedError(f"the addresses of rank 0 take {len(call):,} bytes, more than any names of hosts")
    room = np.zeros(ANNOUNCEMENT_BYTES, dtype=np.uint8)
    room[: len(call)] = np.frombuffer(call, dtype=np.uint8)
    return np.array(mx.distributed.all_gather(mx.array(room)))[: len(room)].tobytes().rstrip(b"\0")
