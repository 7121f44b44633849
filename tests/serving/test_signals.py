"""The program: its lines, its end by signals, and what it refuses before it serves."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from serving_cases import WAIT_S

from marlin_cli.errors import UsageError
from marlin_cli.serving.server import ServerSettings, bind

MARLIN = [sys.executable, "-m", "marlin_cli", "serve"]

# A server of the fake scheduler in a process of its own; its gate is closed when streams shall not end by themselves.
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from serving_cases import parrot
from marlin_cli.cli import _listen_to_signals
from marlin_cli.errors import Terminated
from marlin_cli.serving.server import ServerSettings, serve
served, schedulers, gate = parrot()
if sys.argv[2] == "closed":
    gate.clear()
_listen_to_signals([])
try:
    serve(ServerSettings(port=0, drain_s=float(sys.argv[3])), lambda: (served, schedulers))
except Terminated as ending:
    sys.exit(ending.exit_code)
"""


@contextlib.contextmanager
def process(gate, drain_s):
    """(process, port) of a server."""
    command = [sys.executable, "-c", SCRIPT, os.path.dirname(os.path.dirname(__file__)), gate, str(drain_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        try:
            line = server.stderr.readline().decode()
            assert line.startswith("marlin: parrot at http://127.0.0.1:"), line + server.stderr.read().decode()
            yield server, int(line.rpartition(":")[2])
        finally:
            server.kill()


@contextlib.contextmanager
def streaming(port, max_tokens):
    """A connection to which an answer has begun to come."""
    body = json.dumps({"prompt": "ab", "max_tokens": max_tokens, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert connection.recv(1 << 10).startswith(b"HTTP/1.1 200")
        yield connection


def refuses_others(port):
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        with contextlib.suppress(ConnectionResetError):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
            except ConnectionRefusedError:
                return
    raise AssertionError("it goes on")


def rest_of(connection):
    said = b""
    while part := connection.recv(1 << 16):
        said += part
    return said


def test_a_signal_lets_what_runs_end():
    with process("open", 20) as (server, port), streaming(port, 3000) as connection:
        server.send_signal(signal.SIGTERM)
        assert b"[DONE]" in rest_of(connection)
        assert server.wait(WAIT_S) == 0
        lines = [json.loads(line) for line in server.stdout.read().splitlines()]
        assert lines[-1]["state"] == "done" and server.stderr.read() == b""
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port))


CUT = [([signal.SIGTERM], 0.1), ([signal.SIGTERM] * 2, 60), ([signal.SIGHUP, signal.SIGINT], 60)]


@pytest.mark.parametrize(("signals", "drain_s"), CUT)
def test_what_does_not_end_is_cut_short_by_a_limit_or_a_second_signal(signals, drain_s):
    with process("closed", drain_s) as (server, port), streaming(port, 8) as connection:
        idle = socket.create_connection(("127.0.0.1", port))
        for number in signals:
            server.send_signal(number)
            refuses_others(port)  # the signal was heard
        said = rest_of(connection)
        assert b'"code":"shutting_down"' in said and b"[DONE]" not in said and said.endswith(b"0\r\n\r\n")
        assert server.wait(WAIT_S) == 128 + signals[0]
        assert b"Traceback" not in server.stderr.read()
        idle.close()


def test_an_idle_server_ends_at_once_and_well():
    for number in (signal.SIGTERM, signal.SIGINT):
        with process("open", 60) as (server, _):
            server.send_signal(number)
            assert server.wait(WAIT_S) == 0 and server.stderr.read() == b""


def test_a_closed_stdout_costs_only_the_log():
    with process("open", 60) as (server, port):
        server.stdout.close()
        for _ in range(3):
            with streaming(port, 5):
                pass
        server.send_signal(signal.SIGTERM)
        assert server.wait(WAIT_S) == 0 and b"Traceback" not in server.stderr.read()


def test_the_program_serves_a_model_and_ends(demo):
    command = [*MARLIN, "megabyte-demo", "--port", "0", "--device", "cpu", "--name", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        killer = threading.Timer(120, server.kill)
        killer.start()
        try:
            line = server.stderr.readline().decode()
            if line.startswith("building the CPU kernels"):
                line = server.stderr.readline().decode()
            assert line.startswith("marlin: demo at http://127.0.0.1:"), line
            port = int(line.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                request = b"POST /v1/bytes?max_bytes=24 HTTP/1.0\r\nHost: localhost\r\nContent-Length: 9\r\n\r\ndef main("
                connection.sendall(request)
                assert rest_of(connection).partition(b"\r\n\r\n")[2] == demo.generate(b"def main(", 24)
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            killer.cancel()
            server.kill()


REFUSED = {
    "no model": (["nothing-there"], "nothing-there: no such file, folder or shipped model"),
    "a port of no number": (["megabyte-demo", "--port", "99999"], "--port must be from 0 to 65535"),
    "rows of another kind": (["megabyte-demo", "--rows", "slow"], "--rows must be exact or fast"),
    "two keys": (["megabyte-demo", "--api-key", "a", "--api-key-file", "b"], "has no meaning beside"),
    "a key of no text": (["megabyte-demo", "--api-key", "a b"], "a key is 1 to"),
    "no address": (["megabyte-demo", "--host", "no.such.host.invalid"], "--host no.such.host.invalid: is no address"),
    "a size of no number": (["megabyte-demo", "--cache-memory", "much"], "--cache-memory: 'much' is not a size"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_it_cannot_do_is_one_line(kind):
    arguments, words = REFUSED[kind]
    result = subprocess.run([*MARLIN, *arguments], capture_output=True, timeout=60)
    assert result.returncode in (1, 2) and result.stdout == b""
    assert result.stderr.count(b"\n") == 1 and words in result.stderr.decode()


def test_an_address_that_is_taken_is_named():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--host 127.0.0.1 --port {port}: is taken; choose another --port"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("values", [{"port": -1}, {"max_waiting": -1}, {"drain_s": -1}, {"drain_s": 1e9}])
def test_settings_that_cannot_be(values):
    with pytest.raises(UsageError, match="^--"):
        ServerSettings(**values)
