"""What `/metrics` tells, in Prometheus' text form: counters, gauges of the moment, and histograms of waits."""

import bisect
import resource
import sys
from collections import Counter
from collections.abc import Sequence

from marlin_cli.engine.speculation import Speculated
from marlin_cli.serving.engine_thread import Load

# Upper bounds of the histograms' buckets, in seconds.
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts of values up to each bound, and their sum."""

    def __init__(self, bounds: Sequence[float] = BUCKETS_S) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> list[str]:
        """The samples, buckets as sums from below."""
        total, lines = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """Counts since the start. Names and units are those of llama-server where it has the same; a token is a byte."""

    def __init__(self) -> None:
        self._prompt_bytes = self._generated_bytes = 0
        self._prompt_s = self._generated_s = 0.0
        self._drafted_bytes = self._accepted_bytes = 0
        self._ends: Counter[str] = Counter()
        self._responses: Counter[tuple[str, int]] = Counter()
        self._first_byte_s, self._stream_s = Histogram(), Histogram()

    def first_byte(self, prompt_bytes: int, seconds: float) -> None:
        """A stream has begun; `seconds` since it was asked for."""
        self._prompt_bytes += prompt_bytes
        self._prompt_s += seconds
        self._first_byte_s.add(seconds)

    def generated(self, count: int) -> None:
        """Bytes of a stream."""
        self._generated_bytes += count

    def speculated(self, came: Speculated) -> None:
        """What came of the drafts of a stream that has ended."""
        self._drafted_bytes += came.drafted_bytes
        self._accepted_bytes += came.accepted_bytes

    def ended(self, reason: str, seconds: float, since_first_s: float) -> None:
        """A stream has ended by itself."""
        self._ends[reason] += 1
        self._generated_s += since_first_s
        self._stream_s.add(seconds)

    def cancelled(self, streams: int) -> None:
        """Streams whose client went away."""
        self._ends["cancelled"] += streams

    def failed(self) -> None:
        """An order that could not go on."""
        self._ends["failed"] += 1

    def responded(self, path: str, status: int) -> None:
        """An HTTP response; `path` is a route's, not a client's."""
        self._responses[path, status] += 1

    def text(self, load: Load, open_streams: int, connections: int) -> str:
        """The page."""
        busy = load.streams_in_quanta / load.quanta if load.quanta else 0.0
        numbers = [
            ("prompt_tokens_total", "counter", "Bytes of prompts that were read.", self._prompt_bytes),
            ("prompt_seconds_total", "counter", "Seconds of streams from request to first byte.", self._prompt_s),
            ("tokens_predicted_total", "counter", "Bytes that were generated.", self._generated_bytes),
            ("tokens_predicted_seconds_total", "counter", "Seconds of streams from first to last byte.", self._generated_s),
            ("spec_decode_num_draft_tokens_total", "counter", "Bytes that were drafted.", self._drafted_bytes),
            ("spec_decode_num_accepted_tokens_total", "counter", "Bytes of drafts that were right.", self._accepted_bytes),
            ("requests_processing", "gauge", "Streams that run.", load.running),
            ("requests_deferred", "gauge", "Streams that wait.", max(open_streams - load.running, 0)),
            ("n_decode_total", "counter", "Steps of the scheduler.", load.quanta),
            ("n_busy_slots_per_decode", "gauge", "Streams a step, on average.", busy),
            ("kv_cache_bytes", "gauge", "Bytes of the streams' caches.", load.cache_bytes),
            ("http_connections", "gauge", "Open connections.", connections),
            ("process_peak_memory_bytes", "gauge", "The most memory that the process had.", _peak_bytes()),
        ]
        lines: list[str] = []
        for name, kind, text, value in numbers:
            shown = f"{value:.6f}" if isinstance(value, float) else str(value)
            lines += [*_head(name, kind, text), f"marlin_{name} {shown}"]
        lines += _head("streams_ended_total", "counter", "Streams that ended, by reason.")
        lines += [f'marlin_streams_ended_total{{reason="{reason}"}} {count}' for reason, count in sorted(self._ends.items())]
        lines += _head("http_responses_total", "counter", "HTTP responses, by path and status.")
        lines += [
            f'marlin_http_responses_total{{path="{path}",code="{status}"}} {count}'
            for (path, status), count in sorted(self._responses.items())
        ]
        lines += _head("time_to_first_byte_seconds", "histogram", "From request to first byte of a stream.")
        lines += self._first_byte_s.lines("marlin_time_to_first_byte_seconds")
        lines += _head("stream_seconds", "histogram", "From request to last byte of a stream.")
        lines += self._stream_s.lines("marlin_stream_seconds")
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP marlin_{name} {text}", f"# TYPE marlin_{name} {kind}"]


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
