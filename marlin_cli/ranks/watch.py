"""The TCP connections by which ranks learn that another is gone: at once from a closed one, else from missing beats."""

import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from marlin_cli.documents import parse_json
from marlin_cli.errors import DistributedError, Terminated
from marlin_cli.text import one_line

BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0  # without a beat a rank counts as gone

# Of a message, which is a number or the one line of an error; what sends more is no rank.
MOST_MESSAGE_BYTES = 16 << 10
MOST_REASON_LETTERS = 2000

# Of what a rank that is known sends beside its messages: prompts, and what follows them.
MOST_PAYLOAD_BYTES = 256 << 20

OTHER_BYTES = (
    "rank {rank} has drawn other bytes than rank 0: ranks that share a model need its same files, and machines of one kind"
)

# A main thread that is interrupted may first have to finish a pass of a large model, or nothing at all.
STOP_SECONDS = 60.0
STOP_WITH_NOTHING_SECONDS = 1.0


class Connection:
    """Messages to and from one other rank: a line of JSON each, and after some as many bytes as it says."""

    def __init__(self, plug: socket.socket) -> None:
        plug.settimeout(SILENT_SECONDS)
        plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._lines, self._lock = plug, plug.makefile("rb"), threading.Lock()

    def send(self, payload: bytes = b"", **message: Any) -> None:
        # A peer that is gone is found out where its messages are read.
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n" + payload)

    def receive(self) -> dict[str, Any] | None:
        """The next message; None when the peer is gone, silent for too long, or says what no rank says."""
        try:
            line = self._lines.readline(MOST_MESSAGE_BYTES)
            message = parse_json(line, "a message", DistributedError) if line.endswith(b"\n") else None
        except (OSError, ValueError, DistributedError):  # ValueError: closed by `close`
            return None
        return message if isinstance(message, dict) else None

    def payload(self, size: Any) -> bytes | None:
        """The bytes after a message that says so; None when the peer is gone, or it says what no rank says."""
        if not isinstance(size, int) or not 0 <= size <= MOST_PAYLOAD_BYTES:
            return None
        try:
            data = self._lines.read(size)
        except (OSError, ValueError):
            return None
        return data if len(data) == size else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Watch:
    """The connections of one rank (rank 0: to all others; else: to rank 0), and threads that read them."""

    def __init__(self, rank: int, size: int, connections: dict[int, Connection]) -> None:
        self.rank, self.size, self._connections = rank, size, connections
        self.lost: str | None = None  # the line that says why the job is over
        self.exit_code = 1  # of a job that is over so
        self.told = False  # rank 0 knows, and says it
        self.nothing_to_save = False
        self.deaf = False  # to signals that ask this process to end: rank 0 hears them for all
        self._number = 0  # of the collective that is next
        self._ready = dict.fromkeys(connections, 0)  # collectives that the other side has reached
        self._left: set[int] = set()
        self.leaving = False  # the main thread has begun to end the job, and is not interrupted any more
        self._closed = self._stopping = False
        self._news = threading.Condition()
        self._drawn: dict[int, dict[int, str]] = {}  # by step, of the ranks that are there already; of rank 0 alone
        self._same = dict.fromkeys(connections, 0)  # the last step in which the other side is known to have drawn the same
        self.when_over: list[Callable[[], None]] = []  # called once when the job is, or this rank's part of it
        self._inbox: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()

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

    def drew(self, step: int, what: str, *, wait: bool) -> None:
        """Say what came of a step of a model that ranks share. The job is over where it is not the same on all.

        Args:
            step: counts from 1.
            wait: until all have said the same. Interrupted when one is lost.
        """
        if self.rank > 0:
            self._send(step=step, drew=what)
        else:
            self._compare(0, step, what)
        with self._news:
            while wait and min(self._same.values()) < step:
                self._news.wait(0.1)  # short: a signal is handled between waits
        if wait and self.rank == 0:
            self._send(same=step)

    def _compare(self, rank: int, step: int, what: str) -> None:
        with self._news:
            found = self._drawn.setdefault(step, {})
            found[rank] = what
            others = [peer for peer in found if peer > 0] if 0 in found else []
            different = [peer for peer in others if found[peer] != found[0]]
            for peer in others:
                if peer not in different:
                    self._same[peer] = step
            if len(found) == self.size:
                del self._drawn[step]
            self._news.notify_all()
        for peer in different:
            self._leaves(peer, OTHER_BYTES.format(rank=peer))

    def send(self, rank: int, message: bytes) -> None:
        """Send to a rank that there is a connection to."""
        self._connections[rank].send(message, bytes=len(message))

    def receive(self, seconds: float | None) -> tuple[int, bytes] | None:
        """The next message and its sender, or None after so many seconds. Interrupted when a rank is lost."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            left = 0.1 if end is None else min(0.1, end - time.monotonic())  # short: a signal is handled between waits
            try:
                return self._inbox.get(timeout=max(0.0, left))
            except queue.Empty:
                if end is not None and time.monotonic() >= end:
                    return None

    def fail(self, reason: str, exit_code: int = 1, *, by_all: bool = False) -> None:
        """Tell the others that this rank ends before its time. Rank 0 says why; wait until it has heard.

        Args:
            exit_code: with which all ranks end.
            by_all: every rank fails so; none is named.
        """
        self._closed = True
        self._end()
        reason = one_line(reason)[:MOST_REASON_LETTERS]
        self._send(failed=reason if by_all else f"rank {self.rank} of {self.size} failed: {reason}", exit_code=exit_code)
        if self.rank > 0:
            with self._news:
                self._news.wait_for(lambda: self.told or 0 in self._left, timeout=5)

    def close(self) -> None:
        self._closed = True
        self._end()
        self._send(bye=True)
        for connection in self._connections.values():
            connection.close()

    def stop(self, number: int, _: object) -> None:
        """Interrupt the main thread, where this runs: once, since it will be saving what it has."""
        if self.deaf and self.lost is None:
            return
        before, self._stopping = self._stopping, True
        if not before and not self.leaving:
            raise KeyboardInterrupt if self.lost is not None else Terminated(number)

    def _end(self) -> None:
        while self.when_over:
            self.when_over.pop()()

    def _send(self, **message: Any) -> None:
        for connection in self._connections.values():
            connection.send(**message)

    def _beat(self) -> None:
        while not self._closed:
            self._send(beat=True)
            time.sleep(BEAT_SECONDS)

    def _read(self, peer: int, connection: Connection) -> None:
        while (message := connection.receive()) is not None:
            if "bytes" in message:
                data = connection.payload(message["bytes"])
                if data is None:
                    break
                self._inbox.put((peer, data))
            elif isinstance(message.get("ready"), int):
                with self._news:
                    self._ready[peer] = message["ready"]
                    self._news.notify_all()
            elif isinstance(message.get("same"), int) and self.rank > 0:
                with self._news:
                    self._same[peer] = message["same"]
                    self._news.notify_all()
            elif isinstance(message.get("drew"), str) and isinstance(message.get("step"), int) and self.rank == 0:
                self._compare(peer, message["step"], message["drew"])
            elif "failed" in message:
                self._leaves(peer, one_line(message["failed"]), _exit_code(message), told=self.rank > 0)
            elif "over" in message:
                self._leaves(peer, one_line(message["over"]), _exit_code(message), told=True)
            elif "bye" in message:
                self._leaves(peer, None)
        if peer not in self._left:
            self._leaves(peer, f"rank {peer} of {self.size} ended without finishing its share")

    def _leaves(self, peer: int, reason: str | None, exit_code: int = 1, *, told: bool = False) -> None:
        """A peer is gone, and with a reason the job is over."""
        with self._news:
            self._left.add(peer)
            self.told = self.told or told
            first = reason is not None and self.lost is None and not self._closed
            if first:
                self.lost, self.exit_code = reason, exit_code
            self._news.notify_all()
        if self.rank == 0 and reason is not None:
            self._send(over=reason, exit_code=exit_code)
        if first:
            self._interrupt()

    def _interrupt(self) -> None:
        """End the main thread by `stop`; the process, if that does not come back from where it is."""
        assert self.lost is not None
        self._end()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        started = time.monotonic()
        while not self._stopping and not self._closed:
            time.sleep(0.1)
            if time.monotonic() - started > (STOP_WITH_NOTHING_SECONDS if self.nothing_to_save else STOP_SECONDS):
                _exit_now("" if self.told else self.lost, self.exit_code)


def _exit_code(message: dict[str, Any]) -> int:
    """The exit code that a rank gives with its reason, as far as it is one of an error."""
    return 2 if message.get("exit_code") == 2 else 1


def _exit_now(reason: str, exit_code: int) -> None:
    """From another thread than the main one, which does not come back."""
    if reason:
        print(f"marlin: {reason}", file=sys.stderr, flush=True)
    os._exit(exit_code)
