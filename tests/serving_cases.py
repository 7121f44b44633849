"""Real servers on ports of their own, in threads of the test's process, and a scheduler without a model for them."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections import deque

from marlin_cli.engine.scheduling import NOT_FINITE, Cost, Piece, SchedulerLimits
from marlin_cli.errors import UsageError
from marlin_cli.models import Capability
from marlin_cli.serving.connections import Patience
from marlin_cli.serving.engine_thread import EngineThread
from marlin_cli.serving.served import Served, continuing_request
from marlin_cli.serving.server import ServerSettings, bind, make_server

WAIT_S = 20


class Running:
    """A server that runs.

    Attributes:
        lines: of its log.
    """

    def __init__(self, make, settings, patience):
        self.lines, self._loaded = [], []

        def load():
            served, schedulers = make()
            self._loaded.append(served)
            return schedulers

        listening = bind(settings.host, 0)
        self.port = listening.getsockname()[1]
        self.engine = EngineThread(load)
        self.engine.start()
        self._ready = threading.Event()

        async def run():
            self._loop = asyncio.get_running_loop()
            self.server = make_server(settings, self._loaded[0], self.engine, self.lines.append, patience)
            self.desk = self.server.desk
            self._ready.set()
            await self.server.serve(sockets=[listening])

        self._thread = threading.Thread(target=lambda: asyncio.run(run()))
        self._thread.start()
        assert self._ready.wait(WAIT_S)
        self.until(lambda: self.server.started)

    def until(self, condition):
        """Wait until something is so."""
        end = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.002)

    def call(self, method, path, body=None, **headers):
        """(status, headers, body) of an exchange; headers are named with underscores."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        with contextlib.closing(connection):
            data = json.dumps(body) if isinstance(body, (dict, list)) else body
            connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def ask(self, path, body, **headers):
        """(status, document) of a POST of JSON."""
        status, _, answer = self.call("POST", path, body, **headers)
        return status, json.loads(answer)

    def raw(self, data, *, seconds=WAIT_S):
        """Everything that the server says to some bytes until it closes, on a connection of its own."""
        with self.connected() as connection:
            connection.settimeout(seconds)
            said = b""
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(data)
                while part := connection.recv(1 << 16):
                    said += part
            return said

    @contextlib.contextmanager
    def connected(self):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        with contextlib.closing(connection):
            yield connection

    def stop(self):
        self.server.should_exit = True
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive() and self.engine.stop(WAIT_S)


@contextlib.contextmanager
def running(make, *, max_streams=4, max_waiting=4, patience=None, **values):
    settings = ServerSettings(limits=SchedulerLimits(max_streams=max_streams), max_waiting=max_waiting, **values)
    server = Running(make, settings, patience or Patience(64))
    try:
        yield server
    finally:
        server.stop()


MAX_BYTES = 4096


class Parrot:
    """A `Scheduler`. What a prompt begins with makes it refuse, break or end without numbers.

    Attributes:
        gate: while it is closed no stream goes on.
        broken: schedulers of this kind that were made.
    """

    def __init__(self, limits, gate):
        self._limits, self.gate, self._next = limits, gate, 0
        self._waiting, self._running = deque(), {}

    @property
    def running(self):
        return len(self._running)

    @property
    def waiting(self):
        return len(self._waiting)

    @property
    def cache_bytes(self):
        return 100 * self.running

    def admit(self, request):
        if request.prompt.startswith(b"refuse"):
            raise UsageError("the caches have no room for it; ask for less")
        stream, self._next = self._next, self._next + 1
        self._waiting.append((stream, request))
        return stream

    def advance(self):
        while self._waiting and len(self._running) < self._limits.max_streams:
            stream, request = self._waiting.popleft()
            self._running[stream] = request, 0
        if not self.gate.wait(0.001):
            return []
        pieces = []
        for stream, (request, count) in list(self._running.items()):
            if request.prompt.startswith(b"break"):
                raise RuntimeError("a bug, on purpose")
            if request.prompt.startswith(b"nothing") and count == 2:
                pieces.append(Piece(stream, b"", NOT_FINITE))
                del self._running[stream]
                continue
            pieces.append(self._piece(stream, request, count))
            self._running[stream] = request, count + 1
            if pieces[-1].stop_reason is not None:
                del self._running[stream]
        return pieces

    def release(self, stream):
        self._running.pop(stream, None)
        self._waiting = deque(each for each in self._waiting if each[0] != stream)

    def _piece(self, stream, request, count):
        if count >= request.stopping.max_bytes:
            return Piece(stream, b"", "length")
        byte = (request.prompt or b"?")[count % max(len(request.prompt), 1)]
        costs = ()
        if request.logprobs is not None:
            costs = (Cost(byte, -0.5, tuple((byte ^ other, -0.5 - other) for other in range(request.logprobs))),)
        last = count + 1 == request.stopping.max_bytes
        return Piece(stream, bytes([byte]), "length" if last else None, costs)


def parrot(limits=None, **values):
    """What is served, what makes schedulers of it, and their gate, which is open."""
    gate = threading.Event()
    gate.set()
    served = Served("parrot", "Parrot", Capability.CONTINUES, MAX_BYTES, 0, False, lambda id: b"", continuing_request, **values)
    return served, (lambda: Parrot(limits or SchedulerLimits(), gate)), gate
