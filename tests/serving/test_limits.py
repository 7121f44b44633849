"""Bounds: a queue that is full, what can never fit, clients that go away, an engine that breaks."""

import json
import threading
from dataclasses import replace

import openai
import pytest
from serving_cases import MAX_BYTES, parrot, running

from marlin_cli.engine.scheduling import SchedulerLimits
from marlin_cli.serving import desk as desk_module
from marlin_cli.serving.completion_requests import read_completion
from marlin_cli.serving.refusals import Refusal


@pytest.fixture(scope="module")
def place():
    """A server of two streams and three that wait, and the gate of its scheduler."""
    served, schedulers, gate = parrot(SchedulerLimits(max_streams=2))
    with running(lambda: (served, schedulers), max_streams=2, max_waiting=3) as server:
        yield server, gate


@pytest.fixture
def held(place):
    """The server with a closed gate: streams stay where they are."""
    server, gate = place
    gate.clear()
    yield server
    gate.set()
    server.until(lambda: server.desk.open == 0)


def head(path, body, stream=True):
    data = json.dumps({"prompt": "ab", "max_tokens": 8, "stream": stream, **body}).encode() if path != "/v1/bytes" else b"ab"
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def test_a_full_queue_is_429_with_a_time_to_come_back(held):
    connections = []
    for count in range(1, 6):
        opened = held.connected()
        connections.append(opened)
        opened.__enter__().sendall(head("/v1/completions", {}))
        held.until(lambda count=count: held.desk.open == count)
    held.until(lambda: held.engine.load.running == 2 and held.engine.load.waiting == 3)
    status, headers, body = held.call("POST", "/v1/completions", {"prompt": "x"})
    assert status == 429 and int(headers["Retry-After"]) >= 1
    assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"
    with openai.OpenAI(base_url=f"http://127.0.0.1:{held.port}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError, match="5 streams run or wait"):
            client.completions.create(model="parrot", prompt="x")
    metrics = held.call("GET", "/metrics")[2].decode()
    assert "marlin_requests_processing 2\n" in metrics and "marlin_requests_deferred 3\n" in metrics
    for opened in connections:
        opened.__exit__(None, None, None)
    held.until(lambda: held.desk.open == 0 and held.engine.load.running == held.engine.load.waiting == 0)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/bytes"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("waits", [True, False])
def test_a_client_that_goes_away_frees_its_stream(path, stream, waits, held):
    with held.connected() as first, held.connected() as second:
        if waits:
            first.sendall(head("/v1/completions", {"n": 2}))
            held.until(lambda: held.engine.load.running == 2)
        second.sendall(head(path, {}, stream))
        held.until(lambda: (held.engine.load.running, held.engine.load.waiting) == ((2, 1) if waits else (1, 0)))
        second.close()
        held.until(lambda: (held.engine.load.running, held.engine.load.waiting) == ((2, 0) if waits else (0, 0)))
    held.until(lambda: held.desk.open == 0)
    held.until(lambda: any(line.get("gone") and line["state"] == "cancelled" for line in held.lines))


def test_one_that_goes_away_while_it_is_answered_frees_its_stream(place):
    server, _ = place
    with server.connected() as connection:
        connection.sendall(head("/v1/completions", {"max_tokens": MAX_BYTES, "n": 2}))
        assert connection.recv(10)
    server.until(lambda: server.desk.open == 0 and server.engine.load.running == 0)


def test_a_second_request_behind_the_first_does_not_hide_that_its_client_went_away(held):
    with held.connected() as connection:
        connection.sendall(head("/v1/completions", {}) + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        held.until(lambda: held.engine.load.running == 1)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
    held.until(lambda: held.engine.load.running == 0 and held.desk.open == 0)


def test_what_can_never_fit_is_400_at_once(held):
    for body, words in (
        ({"prompt": "x", "n": 6}, "6 streams are more than this server ever has (5)"),
        ({"prompt": "x" * (MAX_BYTES + 1)}, f"the model reads {MAX_BYTES:,}"),
        ({"prompt": "refuse"}, "the caches have no room for it"),
        ({"prompt": "refuse", "stream": True}, "the caches have no room for it"),
    ):
        status, document = held.ask("/v1/completions", body)
        assert (status, document["error"]["type"]) == (400, "invalid_request_error") and words in document["error"]["message"]
    status, _, body = held.call("POST", "/v1/bytes", b"refuse")
    assert status == 400 and b"the caches have no room" in body


@pytest.mark.parametrize("stream", [True, False])
def test_a_bug_of_the_engine_costs_the_streams_that_run_and_no_others(stream, place, capfd):
    server, gate = place
    gate.clear()
    answers = []
    body = {"prompt": "ab", "max_tokens": 4, "stream": stream}
    neighbour = threading.Thread(target=lambda: answers.append(server.call("POST", "/v1/completions", body)))
    neighbour.start()
    server.until(lambda: server.engine.load.running == 1)
    breaking = threading.Thread(target=lambda: answers.append(server.call("POST", "/v1/completions", {"prompt": "break"})))
    breaking.start()
    server.until(lambda: server.engine.load.running == 2)
    gate.set()
    neighbour.join()
    breaking.join()
    for status, _, said in answers:
        assert b"an error inside of the server" in said and (status == 500 or stream)
    assert server.ask("/v1/completions", body | {"stream": False})[1]["choices"][0]["text"] == "abab"
    assert "a bug, on purpose" in capfd.readouterr().err


def test_predictions_that_are_no_numbers_end_one_stream(place):
    server, gate = place
    status, document = server.ask("/v1/completions", {"prompt": "nothing"})
    assert status == 500 and "gives no numbers" in document["error"]["message"]
    gate.clear()
    with server.connected() as connection:
        connection.sendall(head("/v1/completions", {"prompt": "nothing"}))
        said = connection.recv(1 << 12)  # the head is sent before the first byte is there
        gate.set()
        while not said.endswith(b"0\r\n\r\n"):
            said += connection.recv(1 << 12)
    assert b'data: {"error":{"message":"the model gives no numbers' in said and b"[DONE]" not in said


def test_what_breaks_in_a_stream_is_an_error_of_openai(held, place):
    _, gate = place
    with openai.OpenAI(base_url=f"http://127.0.0.1:{held.port}/v1", api_key="none", max_retries=0) as client:
        with client.completions.create(model="parrot", prompt="nothing", stream=True) as stream:
            gate.set()
            with pytest.raises(openai.APIError, match="gives no numbers"):
                list(stream)


def test_a_quiet_stream_says_that_it_lives(held, monkeypatch):
    monkeypatch.setattr(desk_module, "QUIET_S", 0.0)
    held.server.desk._loop.call_soon_threadsafe(held.desk._look_after)
    with held.connected() as connection:
        connection.sendall(head("/v1/completions", {}))
        said = b""
        while b": still here\n\n" not in said:
            said += connection.recv(1 << 12)
            held.server.desk._loop.call_soon_threadsafe(held.desk._look_after)


def test_an_engine_that_always_breaks_is_no_good_health_until_it_works_again(place):
    server, _ = place
    for _ in range(3):
        assert server.ask("/v1/completions", {"prompt": "break"})[0] == 500
    status, _, body = server.call("GET", "/health")
    assert status == 503 and b"the engine fails" in body
    assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
    server.until(lambda: server.call("GET", "/health")[0] == 200)


def test_an_engine_that_can_do_no_more_ends_the_server():
    served, schedulers, _ = parrot()
    made = []

    def once():
        assert not made, "no second scheduler, on purpose"
        made.append(schedulers())
        return made[0]

    with running(lambda: (served, once)) as server:
        assert server.ask("/v1/completions", {"prompt": "break"})[0] == 500
        server.until(lambda: server.engine.ended.is_set() and not server._thread.is_alive())


@pytest.mark.parametrize(
    ("fields", "fits"), [({"max_tokens": 9999}, True), ({"n": 3}, False), ({"n": 3, "stream": True}, True)]
)
def test_what_is_told_whole_has_to_fit_in_memory(fields, fits):
    served = replace(parrot()[0], max_bytes=1 << 15)
    document = {"prompt": "", "max_tokens": 1 << 20, "logprobs": 15, **fields}
    if fits:
        read_completion(document, served)
        return
    with pytest.raises(Refusal, match="logprobs: 1,572,864 log-probabilities are more than 1,048,576 at once"):
        read_completion(document, served)
