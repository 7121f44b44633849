"""The server's life: a socket is bound, the model is loaded, requests are answered, and a signal lets what runs end first."""

import asyncio
import contextlib
import errno
import logging
import math
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn

from marlin_cli import console
from marlin_cli.engine.scheduling import Scheduler, SchedulerLimits
from marlin_cli.errors import BackendError, Terminated, UsageError
from marlin_cli.serving.app import application
from marlin_cli.serving.connections import Connection, Patience, connections_with
from marlin_cli.serving.desk import Desk
from marlin_cli.serving.engine_thread import EngineThread
from marlin_cli.serving.guard import hosts_of
from marlin_cli.serving.metrics import Metrics
from marlin_cli.serving.request_log import LibraryHandler, LineWriter
from marlin_cli.serving.served import Served

# Descriptors that connections may not take: files, pipes, what libraries open.
SPARE_DESCRIPTORS = 128
MOST_CONNECTIONS = 4096

# Connections that the system holds until they are accepted, and those that asyncio accepts before it does anything else: as
# many as its own backlog, and all of them before one that is too many can be closed.
BACKLOG = 2048
AT_ONCE = 16

# After the last answer of a server that ends, until connections are closed whatever they hold.
LAST_WORDS_S = 0.5


@dataclass(frozen=True)
class ServerSettings:
    """How a model is served.

    Attributes:
        max_waiting: streams that wait beside those that run; more are refused.
        drain_s: how long streams may go on after a signal to end.

    Raises:
        UsageError: a number that cannot be.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    key: str | None = None
    limits: SchedulerLimits = SchedulerLimits()
    max_waiting: int = 64
    drain_s: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise UsageError(f"--port must be from 0 to 65535, found {self.port}")
        if not 0 <= self.max_waiting <= 1 << 20:
            raise UsageError(f"--max-waiting must be from 0 to {1 << 20:,}, found {self.max_waiting:,}")
        if not 0 <= self.drain_s <= 86400:
            raise UsageError(f"--drain-seconds must be from 0 to 86400, found {self.drain_s}")


# Loads the model, in the thread that will own it: what is served, and what makes schedulers of it.
Load = Callable[[], tuple[Served, Callable[[], Scheduler[Any]]]]


def serve(settings: ServerSettings, load: Load) -> None:
    """Serve until a signal; returns when all that ran has ended.

    Raises:
        MarlinError: the model cannot be loaded, or the address not be had.
        Terminated, KeyboardInterrupt: streams were cut short by a second signal, or by the end of their time.
    """
    listening = bind(settings.host, settings.port)
    loaded: list[Served] = []

    def make() -> Callable[[], Scheduler[Any]]:
        served, schedulers = load()
        loaded.append(served)
        return schedulers

    with contextlib.closing(listening):
        engine = EngineThread(make)
        engine.start()
        writer = LineWriter(sys.stdout)
        try:
            cut_short_by = asyncio.run(_serve(settings, loaded[0], engine, listening, writer))
        finally:
            writer.close()
    if not engine.stop(seconds=1.0):
        console.note("marlin: the engine did not end within a second")
    if engine.ended.is_set():
        raise BackendError("the engine can do no more; what it said stands above")
    if cut_short_by is not None:
        raise KeyboardInterrupt if cut_short_by == signal.SIGINT else Terminated(cut_short_by)


async def _serve(
    settings: ServerSettings, served: Served, engine: EngineThread, listening: socket.socket, writer: LineWriter
) -> int | None:
    handler = LibraryHandler(writer.write)
    for name in ("uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    server = make_server(settings, served, engine, writer.write, Patience(most_connections()))
    server.announcement = f"marlin: {served.name} at {_url(listening)}"
    await server.serve(sockets=[listening])
    return server.cut_short_by


def make_server(
    settings: ServerSettings,
    served: Served,
    engine: EngineThread,
    write: Callable[[dict[str, Any]], None],
    patience: Patience,
) -> "Server":
    """A server in the loop that runs; its `serve` does.

    Args:
        write: takes the lines of the log.
    """
    metrics = Metrics()
    desk = Desk(served, engine, metrics, settings.limits.max_streams, settings.max_waiting)
    server: Server
    app = application(
        served, desk, engine, metrics, write, key=settings.key, hosts=hosts_of(settings.host, settings.key),
        created=int(time.time()), connections=lambda: len(server.server_state.connections),
    )  # fmt: skip
    connections: Any = connections_with(patience)
    config = uvicorn.Config(
        app, loop="asyncio", http=connections, ws="none", lifespan="off", log_config=None, access_log=False,
        proxy_headers=False, server_header=False, workers=1, backlog=AT_ONCE, timeout_keep_alive=math.ceil(patience.head_s),
    )  # fmt: skip
    server = Server(config, desk, engine, settings.drain_s)
    return server


class Server(uvicorn.Server):
    """uvicorn's, with an end of our own: what runs may finish, for so many seconds or until a second signal.

    Attributes:
        desk, engine: what it serves from.
        cut_short_by: the signal that ended streams before their time, if one did.
        announcement: what is said when it listens.
    """

    def __init__(self, config: uvicorn.Config, desk: Desk, engine: EngineThread, drain_s: float) -> None:
        super().__init__(config)
        self.desk, self.engine, self._drain_s = desk, engine, drain_s
        self._signals: list[int] = []
        self.cut_short_by: int | None = None
        self.announcement: str | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so: from here on signals are heard as this server hears them."""
        await super().startup(sockets)
        for each in sockets or []:
            each.listen(BACKLOG)
        if self.announcement is not None:
            console.note(self.announcement)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hear the signals that ask for an end, but for those that the caller wants to be deaf to."""
        heard = threading.current_thread() is threading.main_thread()
        ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        numbers = [each for each in ends if heard and signal.getsignal(each) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal ends the server when its streams have ended, a second one now."""
        self._signals.append(sig)
        self.should_exit = True
        if len(self._signals) > 1:
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """End when the engine has given up."""
        return await super().on_tick(counter) or self.engine.ended.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let streams end, then cut them short, then the connections."""
        self.desk.closing = True
        closing = asyncio.ensure_future(self._close())
        await super().shutdown(sockets)
        await closing

    async def _close(self) -> None:
        end = time.monotonic() + self._drain_s
        while self.desk.open and time.monotonic() < end and not (self.force_exit or self.engine.ended.is_set()):
            await asyncio.sleep(0.02)
        if self.desk.open:
            self.cut_short_by = self._signals[0] if self._signals else None
            self.desk.end_all("the server is stopping; ask again when it runs")
        end = time.monotonic() + LAST_WORDS_S
        while self.server_state.connections and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.end()


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address; nobody is heard yet.

    Raises:
        UsageError: no such address, or it is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: is no address of this machine: {getattr(error, 'strerror', None) or error}") from None
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        what = "is taken; choose another --port" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror}"
        raise UsageError(f"--host {host} --port {port}: {what}") from None
    listening.setblocking(False)
    return listening


def most_connections() -> int:
    """Connections that the process has descriptors for; it takes as many as it may first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + SPARE_DESCRIPTORS
    most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return max(8, (wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)) - SPARE_DESCRIPTORS)


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
