"""Raw bytes in and out, what became of a request, the log and the metrics."""

import io
import json
import re

import pytest
from serving_cases import parrot, running

from marlin_cli.serving.metrics import Histogram
from marlin_cli.serving.request_log import LineWriter


@pytest.fixture(scope="module")
def server():
    served, schedulers, _ = parrot()
    with running(lambda: (served, schedulers)) as server:
        yield server


def test_bytes_go_in_and_out_as_they_are_and_the_reason_is_told(server):
    data = bytes(range(256))
    status, headers, body = server.call("POST", "/v1/bytes?max_bytes=300&seed=5", data, Content_Type="application/octet-stream")
    assert (status, body) == (200, (data * 2)[:300])
    assert headers["Content-Type"] == "application/octet-stream" and headers["Transfer-Encoding"] == "chunked"
    where = headers["Content-Location"]
    assert where == f"/v1/requests/{headers['X-Request-Id']}"
    document = json.loads(server.call("GET", where)[2])
    [stream] = document["streams"]
    assert (document["state"], document["error"], stream["stop_reason"], stream["seed"]) == ("done", None, "length", 5)
    assert (stream["prompt_bytes"], stream["generated_bytes"]) == (256, 300)
    assert 0 <= stream["first_byte_ms"] <= stream["wall_ms"]


def test_nothing_in_and_nothing_out(server):
    assert server.call("POST", "/v1/bytes?max_bytes=0", b"abc")[2] == b""
    assert server.call("POST", "/v1/bytes?max_bytes=2", b"")[2] == b"??"


def test_the_log_tells_all_but_the_bytes(server):
    before = len(server.lines)
    server.ask("/v1/completions", {"prompt": "secret words", "max_tokens": 5, "stop": "hush"})
    server.until(lambda: len(server.lines) > before)
    line = server.lines[-1]
    assert json.loads(json.dumps(line)) == line
    assert (line["method"], line["path"], line["status"], line["state"]) == ("POST", "/v1/completions", 200, "done")
    [stream] = line["streams"]
    assert (stream["prompt_bytes"], stream["generated_bytes"], stream["stop_reason"]) == (12, 5, "length")
    assert not any(word in json.dumps(line) for word in ("secret", "secre", "hush"))


def test_metrics_are_prometheus_text_and_count(server):
    def read():
        status, headers, body = server.call("GET", "/metrics")
        assert status == 200 and headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        samples = {}
        for line in body.decode().splitlines():
            if not line.startswith("#"):
                assert re.fullmatch(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? -?[0-9.e+-]+', line), line
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    before = read()
    server.ask("/v1/completions", {"prompt": "abc", "max_tokens": 7, "n": 2})
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["marlin_prompt_tokens_total"] == 6 and grown["marlin_tokens_predicted_total"] == 14
    assert grown['marlin_streams_ended_total{reason="length"}'] == 2
    assert grown['marlin_http_responses_total{path="/v1/completions",code="200"}'] == 1
    assert grown["marlin_stream_seconds_count"] == grown['marlin_stream_seconds_bucket{le="+Inf"}'] == 2
    assert after["marlin_requests_processing"] == after["marlin_requests_deferred"] == 0
    assert after["marlin_process_peak_memory_bytes"] > 1e7


def test_buckets_are_sums_from_below():
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7):
        histogram.add(value)
    buckets = ['x_bucket{le="0.1"} 2', 'x_bucket{le="1.0"} 3', 'x_bucket{le="+Inf"} 4']
    assert histogram.lines("x") == [*buckets, "x_sum 7.650000", "x_count 4"]


def test_a_log_that_nobody_reads_stops_nothing():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    for stream in (Gone(), io.StringIO()):
        writer = LineWriter(stream)
        for number in range(3):
            writer.write({"number": number})
        writer.close()
    assert stream.getvalue() == '{"number": 0}\n{"number": 1}\n{"number": 2}\n'


def test_health(server):
    for path in ("/health", "/v1/health"):
        assert json.loads(server.call("GET", path)[2]) == {"status": "ok"}
