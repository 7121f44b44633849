"""`marlin serve` beside the same work in Python: first byte, eight streams, and many clients of whom a fifth leave early.

    python benchmarks/serving.py first|many|clients [MODEL] [--repeats 11] [--minutes 5] [--clients 64]

Both sides run in turns, with rows exact, in processes of their own; what the server answers is compared with what the model
gives alone. No prompts are kept (`--state-memory 0`), as rounds repeat them.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, contextmanager
from pathlib import Path

os.environ["MARLIN_ROWS"] = "exact"

from marlin_cli import load
from marlin_cli.engine.answer_requests import AnswerLimits, AnswerRequest
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.scheduling import Request, SchedulerLimits
from marlin_cli.engine.stopping import Stopping
from marlin_cli.models import Capability

TEXT = (Path(__file__).parents[1] / "README.md").read_bytes()


@contextmanager
def server(model, *options):
    """(process, port) of a server of its own."""
    command = [sys.executable, "-m", "marlin_cli", "serve", model, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            while " at http://" not in (line := process.stderr.readline().decode()):
                assert line, "the server ended"  # else it builds kernels first
            yield process, int(line.rpartition(":")[2])
        finally:
            process.kill()


def head_of(path, body):
    """A request whose connection ends with its answer."""
    return f"POST {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def completion(prompt, max_bytes, **options):
    """A request of a stream of events."""
    document = {"prompt": list(prompt), "max_tokens": max_bytes, "stream": True, "return_token_ids": True, **options}
    return head_of("/v1/completions", json.dumps(document).encode())


def first_byte_s(port, request, mark):
    """Seconds from connecting to the first byte of the answer, which stands after `mark`."""
    started = time.perf_counter()
    with closing(socket.create_connection(("127.0.0.1", port))) as connection:
        connection.sendall(request)
        said = b""
        while mark not in said or said.endswith(mark):
            said += connection.recv(1 << 16)
        found = time.perf_counter() - started
        while connection.recv(1 << 16):
            pass
    return found


def measure_first(name, repeats):
    """S5: the wait for the first byte, over HTTP and from Python."""
    model = load(name, device="cpu")
    with server(name, "--device", "cpu", "--state-memory", "0") as (_, port):
        for size in (16, 512, 4096):
            prompt = TEXT[:size]
            ways = {
                "python": lambda prompt=prompt: _python_first_s(model, prompt),
                "bytes": lambda prompt=prompt: first_byte_s(port, head_of("/v1/bytes?max_bytes=4", prompt), b"\r\n\r\n"),
                "events": lambda prompt=prompt: first_byte_s(port, completion(prompt, 4), b"\r\n\r\ndata: "),
            }
            seconds = {way: [] for way in ways}
            for _ in range(repeats + 1):
                for way, run in ways.items():
                    seconds[way].append(run())
            line = {"prompt_bytes": size}
            base = 1000 * statistics.median(seconds["python"][1:])
            for way, each in seconds.items():
                line[f"{way}_ms"] = round(1000 * statistics.median(each[1:]), 2)
                line[f"{way}_least_ms"] = round(1000 * min(each[1:]), 2)
            for way in ("bytes", "events"):
                line[f"{way}_within_goal"] = line[f"{way}_ms"] <= 1.05 * base + 3
            print(json.dumps(line), flush=True)


def _python_first_s(model, prompt):
    started = time.perf_counter()
    stream = model.generate_stream(prompt, 4)
    next(stream)
    found = time.perf_counter() - started
    list(stream)
    return found


def measure_many(name, repeats, streams=8, max_bytes=1024):
    """S6: bytes a second of eight streams, of the scheduler alone and over HTTP; their bytes are compared."""
    model = load(name, device="cpu")
    prompts = [TEXT[1000 * index : 1000 * index + 64] for index in range(streams)]
    with server(name, "--device", "cpu", "--max-streams", str(streams), "--state-memory", "0") as (_, port):
        ratios = {"bytes": [], "events": []}
        for turn in range(repeats + 1):
            engine_s, expected = _engine(model, prompts, max_bytes)
            for way in ratios:
                requests = [
                    head_of(f"/v1/bytes?max_bytes={max_bytes}", prompt) if way == "bytes" else completion(prompt, max_bytes)
                    for prompt in prompts
                ]
                started = time.perf_counter()
                answers = asyncio.run(_all(port, requests))
                seconds = time.perf_counter() - started
                found = [bytes_of(answer) for answer in answers]
                assert found == expected, "other bytes over HTTP"
                if turn:
                    ratios[way].append(engine_s / seconds)
            if turn:
                print(json.dumps({"engine_bytes_s": round(streams * max_bytes / engine_s)}), flush=True)
        for way, found in ratios.items():
            print(
                json.dumps(
                    {"way": way, "of_the_engine": round(statistics.median(found), 3), "each": [round(x, 3) for x in found]}
                )
            )


def _engine(model, prompts, max_bytes):
    scheduler = model.scheduler(SchedulerLimits(max_streams=len(prompts)))
    started = time.perf_counter()
    streams = {scheduler.admit(Request(prompt, Stopping(max_bytes))): bytearray() for prompt in prompts}
    while scheduler.running or scheduler.waiting:
        for piece in scheduler.advance():
            streams[piece.stream] += piece.data
    return time.perf_counter() - started, [bytes(data) for data in streams.values()]


async def _all(port, requests):
    return await asyncio.gather(*(_exchange(port, request) for request in requests))


async def _exchange(port, request, leaves_after=None):
    """The whole answer, or None where its reader left after so many bytes of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        said = bytearray()
        while part := await reader.read(1 << 16):
            said += part
            if leaves_after is not None and len(said) >= leaves_after:
                return None
        return bytes(said)
    finally:
        writer.close()


def bytes_of(answer):
    """The generated bytes of an answer of any path."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"octet-stream" in head:
        return body
    if b"event-stream" in head:
        lines = [line[6:] for line in body.split(b"\n\n") if line.startswith(b"data: {")]
        return b"".join(bytes(choice["token_ids"]) for line in lines for choice in json.loads(line)["choices"])
    return bytes(json.loads(body)["choices"][0]["token_ids"])


def measure_clients(name, minutes, clients, seed=1):
    """Clients for some minutes, a fifth of whom leave early; then SIGTERM while they go on."""
    draw = random.Random(seed)
    model = load(name, device="cpu")
    pool = [_task(draw, model) for _ in range(48)]
    counts: Counter[str] = Counter()
    with server(name, "--device", "cpu", "--max-streams", "16", "--max-waiting", "64") as (process, port):
        memory = []
        until = time.monotonic() + 60 * minutes
        ending = []

        async def client(number):
            own = random.Random(1000 * seed + number)
            while not ending:
                request, expected = own.choice(pool)
                leaves_after = own.choice((0, 1, 200, 400, 2000)) if own.random() < 0.2 else None
                try:
                    answer = await _exchange(port, request, leaves_after)
                except OSError:
                    counts["refused connections"] += 1
                    continue
                if answer is None:
                    counts["left"] += 1
                elif b" 429 " in answer[:20]:
                    counts["429"] += 1
                    await asyncio.sleep(0.05)
                elif b" 200 " in answer[:20] and not ending:
                    counts["right" if bytes_of(answer) == expected else "WRONG"] += 1
                elif not ending:
                    counts["other"] += 1

        async def everything():
            tasks = [asyncio.ensure_future(client(number)) for number in range(clients)]
            while time.monotonic() < until:
                memory.append(_resident_bytes(process.pid))
                await asyncio.sleep(5)
            ending.append(True)
            await asyncio.gather(*tasks)
            await asyncio.sleep(0.5)
            status = (await _exchange(port, b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")).decode()
            left = {
                each: _sample(status, f"marlin_{each}")
                for each in ("requests_processing", "requests_deferred", "kv_cache_bytes")
            }
            ending.clear()
            tasks = [asyncio.ensure_future(client(number)) for number in range(clients)]
            await asyncio.sleep(2)
            ending.append(True)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            code = await asyncio.get_running_loop().run_in_executor(None, process.wait)
            stopped_s = time.monotonic() - started
            await asyncio.gather(*tasks, return_exceptions=True)
            return left, code, stopped_s

        left, code, stopped_s = asyncio.run(everything())
        said = process.stderr.read().decode()
    third = len(memory) // 3
    line = {"answers": dict(counts), "left_at_end": left, "exit_code": code, "sigterm_s": round(stopped_s, 2)}
    line |= {"memory_mib": [round(each / 2**20) for each in (memory[0], memory[third], memory[2 * third], memory[-1])]}
    print(json.dumps({**line, "stderr": said}), flush=True)


def _task(draw, model):
    """A request of any path, and the bytes that the model gives for it alone."""
    first, size, longest = draw.randrange(8000), draw.choice((1, 16, 64, 500)), draw.choice((16, 64, 200))
    prompt, options = TEXT[first : first + size], {"temperature": draw.choice((0.0, 0.7, 1.2)), "seed": draw.randrange(1 << 30)}
    stop = draw.choice(((), (), (b"e ",), (b"\n", b"zz")))
    scheduler = model.scheduler(SchedulerLimits(max_streams=1))
    if model.capability is Capability.ANSWERS:
        scheduler.admit(AnswerRequest(prompt, AnswerLimits(longest, stop=stop), Sampling(**options)))
    else:
        scheduler.admit(Request(prompt, Stopping(longest, stop), Sampling(**options)))
    data = b""
    while scheduler.running or scheduler.waiting:
        data += b"".join(piece.data for piece in scheduler.advance())
    way = draw.choice(("bytes", "events", "whole"))
    if way == "bytes":
        query = "&".join([*(f"{key}={value}" for key, value in options.items()), *(f"stop_hex={each.hex()}" for each in stop)])
        return head_of(f"/v1/bytes?max_bytes={longest}&{query}", prompt), data
    stops = [each.decode() for each in stop]
    return completion(prompt, longest, **options, stop=stops, **({"stream": False} if way == "whole" else {})), data


def _sample(text, name):
    return float(next(line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(f"{name} ")))


def _resident_bytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main():
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("first", "many", "clients"))
    parser.add_argument("model", nargs="?", default="megabyte-demo")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    if options.what == "first":
        measure_first(options.model, options.repeats)
    elif options.what == "many":
        measure_many(options.model, options.repeats)
    else:
        measure_clients(options.model, options.minutes, options.clients)


if __name__ == "__main__":
    main()
