"""Bytes that no client of ours sends: 4xx or a closed connection, no traceback, and the server answers the next one."""

import contextlib
import json
import socket

import pytest
from serving_cases import MAX_BYTES, parrot, running

from marlin_cli.serving import exchange
from marlin_cli.serving.app import BODY_BYTES_A_BYTE, BODY_BYTES_BESIDE
from marlin_cli.serving.connections import Patience

MOST_BODY = BODY_BYTES_BESIDE + BODY_BYTES_A_BYTE * MAX_BYTES


@pytest.fixture(scope="module")
def server():
    """A server of little patience, of 8 connections."""
    served, schedulers, _ = parrot()
    with running(lambda: (served, schedulers), patience=Patience(8, head_s=0.3, reader_s=0.3, rest_s=0.3)) as server:
        yield server


@pytest.fixture(autouse=True)
def lives_and_says_no_traceback(server, capfd, recwarn):
    yield
    assert server.ask("/v1/completions", {"prompt": "abc", "max_tokens": 5})[1]["choices"][0]["text"] == "abcab"
    server.until(lambda: server.desk.open == 0)
    assert "Traceback" not in capfd.readouterr().err
    assert not [line for line in server.lines if line.get("level") == "error"]


def post(body, path="/v1/completions", more=""):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{more}Content-Length: {len(data)}\r\n\r\n".encode() + data


BODIES = {
    "nothing": b"",
    "no JSON": b"prompt=abc",
    "half of it": b'{"prompt": "abc',
    "no UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "deeply nested": b"[" * 100_000,
    "deep in a field": b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
    "digits without end": b'{"max_tokens": ' + b"9" * 10_000 + b"}",
    "no number": b'{"temperature": NaN}',
    "endless": b'{"temperature": 1e999}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "half a surrogate pair for a name": b'{"\\ud800": 1}',
    "half a surrogate pair to stop at": b'{"stop": "\\udfff"}',
    "a prompt of truth": b'{"prompt": true}',
    "a prompt of a table": b'{"prompt": {"text": "a"}}',
    "no bytes": b'{"prompt": [256]}',
    "negative bytes": b'{"prompt": [-1]}',
    "true is no byte": b'{"prompt": [97, true]}',
    "fractions": b'{"prompt": [1.5]}',
    "mixed": b'{"prompt": ["a", 97]}',
    "no prompts": b'{"prompt": []}',
    "no prompt": b"{}",
    "a prompt of nothing": b'{"prompt": null}',
    "many prompts": json.dumps({"prompt": ["a"] * 1000}).encode(),
    "no base64": b'{"prompt": {"base64": "?"}}',
    "base64 of no ASCII": '{"prompt": {"base64": "é"}}'.encode(),
    "text for a number": b'{"max_tokens": "5"}',
    "true for a number": b'{"max_tokens": true}',
    "a fraction of a byte": b'{"max_tokens": 1.5}',
    "less than nothing": b'{"max_tokens": -1}',
    "more than any": b'{"max_tokens": 99999999999}',
    "a number for true": b'{"stream": 1}',
    "a stop of numbers": b'{"stop": 5}',
    "stops without end": json.dumps({"stop": ["x"] * 100}).encode(),
    "a long stop": json.dumps({"stop": "x" * 5000}).encode(),
    "options of a list": b'{"stream": true, "stream_options": []}',
    "unknown options": b'{"stream": true, "stream_options": {"x": 1}}',
    "a key of thousands": json.dumps({"k" * 100_000: 1}).encode(),
    "logprobs of a flag": b'{"logprobs": true}',
    "a model of a number": b'{"model": 5}',
    "sentinels of a model without": b'{"sentinels": true}',
}  # fmt: skip


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_that_is_none_is_400_with_a_line(kind, server):
    said = server.raw(post(BODIES[kind], more="Connection: close\r\n"))
    assert said.startswith(b"HTTP/1.1 400 "), said[:100]
    error = json.loads(said.partition(b"\r\n\r\n")[2])["error"]
    assert error["type"] == "invalid_request_error" and 0 < len(error["message"]) < 700 and "\n" not in error["message"]


QUERIES = [
    "max_bytes=x", "max_bytes=1.5", "max_bytes=-1", "temperature=nan", "temperature=1e999", "top_p=7", "n=2", "stop_hex=x",
    "max_bytes=1_0", "max_bytes=+5", "max_bytes=%D9%A3", "temperature=1_0", "temperature=.", "temperature=e5", "temperature=",
    "max_bytes=1&max_bytes=2", "sentinels=maybe", "%ff=%ff", "max_bytes=" + "9" * 5000, "max_bytes=%B2", "stop=",
]  # fmt: skip


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_that_is_none_is_400_with_a_line(query, server):
    status, _, body = server.call("POST", f"/v1/bytes?{query}", b"x")
    assert status == 400 and len(json.loads(body)["error"]["message"]) < 700


HEADS = {
    "no HTTP": b"hello\r\n\r\n",
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "a head too long": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "a path too long": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "headers without end": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 20_000,
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "a zero byte": b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "a length that is none": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    "a length and chunks": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "an unknown encoding": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
    "chunks that are none": b"POST /v1/bytes HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_is_none_is_4xx_and_closed(kind, server):
    said = server.raw(HEADS[kind])
    assert said == b"" or said.startswith(b"HTTP/1.1 4"), said[:100]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405), ("GET", "/v1/requests/x", 404),
     ("OPTIONS", "/v1/completions", 405), ("GET", "/v1/models/" + "x" * 3000, 404), ("GET", "/%ff%00", 404), ("GET", "//", 404),
     ("GET", "/v1/bytes/", 404)],
)  # fmt: skip
def test_paths_and_methods_that_are_none(method, path, status, server):
    found, headers, body = server.call(method, path)
    assert found == status and len(json.loads(body)["error"]["message"]) < 200
    assert "access-control-allow-origin" not in headers


def test_head_of_what_has_a_body(server):
    assert server.call("HEAD", "/")[0] == 200 and server.call("HEAD", "/v1/completions")[0] == 405


def test_a_body_too_large_is_413_before_it_is_read(server):
    said = server.raw(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MOST_BODY + 1}\r\n\r\n".encode())
    assert said.startswith(b"HTTP/1.1 413 ") and b"100 Continue" not in said
    said = server.raw(post(b"", more="Content-Length: 99999999999999999999999\r\n").replace(b"Content-Length: 0\r\n", b""))
    assert said == b"" or said.startswith(b"HTTP/1.1 4")


def test_a_body_too_large_in_chunks_is_413_and_what_comes_after_is_thrown_away(server):
    part = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    with server.connected() as connection:
        connection.sendall(b"POST /v1/bytes HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(MOST_BODY // (1 << 16) + 1):
            connection.sendall(part)
        said = b""
        while not said.endswith(b"}}"):
            said += connection.recv(1 << 16)
        assert said.startswith(b"HTTP/1.1 413 ")
        connection.sendall(part[:100] + b"no chunk\r\n" * 6000)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1 << 16) == b""


def test_a_client_that_wants_to_know_first_is_told(server):
    with server.connected() as connection:
        head = post(b"ab", "/v1/bytes?max_bytes=2", "Expect: 100-continue\r\n").removesuffix(b"ab")
        connection.sendall(head)
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"ab")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_packed_bodies_are_415(server):
    assert server.call("POST", "/v1/completions", b"x", Content_Encoding="gzip")[0] == 415


def test_half_a_body_is_408_in_time(server, monkeypatch):
    monkeypatch.setattr(exchange, "BODY_S", 0.2)
    said = server.raw(post(b"x" * 100)[:-50])
    assert said.startswith(b"HTTP/1.1 408 ") and b"connection: close" in said.lower()


def test_half_a_body_and_gone_is_nothing(server):
    with server.connected() as connection:
        connection.sendall(post(b"x" * 100)[:-50])
    server.until(lambda: any(line.get("path") == "/v1/completions" and line["status"] in (None, 400) for line in server.lines))


@pytest.mark.parametrize("said", [b"", b"G", b"GET / HTTP/1.1\r\nHost: loc"])
def test_one_that_says_nothing_or_half_a_head_is_closed(said, server):
    assert server.raw(said) == b""


def test_one_that_drips_a_head_byte_by_byte_is_closed_all_the_same(server):
    with server.connected() as connection:
        connection.settimeout(0.01)
        closed = False
        for byte in b"GET / HTTP/1.1\r\nX: " + b"x" * 2000:
            try:
                connection.sendall(bytes([byte]))
                closed = connection.recv(10) == b""
            except TimeoutError:
                continue
            except OSError:
                closed = True
            if closed:
                break
        assert closed


def test_idle_connections_make_room_for_new_ones(server):
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    try:
        assert server.call("GET", "/health")[0] == 200
        server.until(lambda: len(server.server.server_state.connections) <= 8)
    finally:
        for each in idle:
            each.close()


def test_a_reader_that_takes_nothing_is_closed_and_its_stream_freed(server):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.connect(("127.0.0.1", server.port))
    try:
        for _ in range(3):
            connection.sendall(post({"prompt": "ab", "max_tokens": MAX_BYTES, "stream": True, "logprobs": 20, "n": 4}))
        server.until(lambda: server.desk.open > 0)
        server.until(lambda: server.desk.open == 0)
        server.until(lambda: len(server.server.server_state.connections) == 0)
    finally:
        connection.close()


def test_a_connection_serves_one_request_after_the_other(server):
    with server.connected() as connection:
        for _ in range(3):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            said = b""
            while not said.endswith(b"}"):
                said += connection.recv(1000)
            assert said.startswith(b"HTTP/1.1 200 ")


def test_many_connections_at_once_make_room_for_each_other_before_any_is_impatient():
    served, schedulers, _ = parrot()
    with running(lambda: (served, schedulers), patience=Patience(8)) as server, contextlib.ExitStack() as all_of_them:
        for _ in range(100):
            all_of_them.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        assert server.call("GET", "/health")[0] == 200
        server.until(lambda: len(server.server.server_state.connections) <= 8)
