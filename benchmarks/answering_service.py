"""Requests that arrive at random, answered by marlin as they come and by CTranslate2 in batches: requests a second and latency.

    python benchmarks/answering_service.py [--requests 60] [--rates 0,0.7] [--batches 4,8,16] [--waits 0,20] [--rounds 3]

The shape is that of google/byt5-small (300 M parameters) with random weights; inputs of 32 to 512 bytes, answers of 16 to 128
ids, greedy, each with a length of its own at which it ends. Arrivals are Poisson. A rate is a share of the requests a second
that CTranslate2 makes of a backlog with its best settings; 0 is that backlog itself: all requests are there at the start.

CTranslate2 (int8) stands behind what its BufferedTranslationWrapper is: the first request that waits is joined by those that
come within `--waits` milliseconds, `--batches` at most, and they run as one batch. An answer that has ended leaves the batch's
computation (by its callback), but its client has it when the batch ends; "by id" is when its last id was there. Of its settings
those count that do best, for requests a second and for latency each. marlin admits what has come between two steps.

Rounds alternate; medians of them. The same threads for all (MARLIN_THREADS). What marlin answers is compared with its answer to
each input alone: equal where rows are exact (MARLIN_ROWS=exact), and a share of the ids elsewhere, as random weights decide
by a hair.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import ctranslate2
import numpy as np
from byt5_generation import packed, random_folder
from ctranslate2.converters import TransformersConverter
from measured import Row, add_rows_option, report
from transformers import ByT5Tokenizer
from transformers.utils import logging

from marlin_cli import ByT5Model
from marlin_cli.engine.answer_requests import AnswerLimits, AnswerRequest
from marlin_cli.engine.answer_scheduler import AnsweringScheduler, Ended
from marlin_cli.engine.scheduling import SchedulerLimits
from marlin_cli.ops.cpu import kernels, rows_are_exact, thread_count


@dataclass(frozen=True)
class Job:
    """A request: when it comes, in seconds, and what it asks."""

    at: float
    data: bytes
    ids: int


@dataclass
class Served:
    """What became of the requests of one run, in their order."""

    seconds: float  # until the last answer
    latency: list[float]  # from arrival to the answer
    by_id: list[float]  # from arrival to the last id
    gaps: list[float] = field(default_factory=list)  # between two ids of one answer
    answers: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return len(self.latency) / self.seconds

    @property
    def latency_95(self) -> float:
        return float(np.percentile(self.latency, 95))


Server = Callable[[Sequence[Job]], Served]


def jobs_of(count: int, rate: float, seed: int) -> list[Job]:
    """Requests that come `rate` a second, or all at once if it is 0."""
    rng = np.random.default_rng(seed)
    at = np.zeros(count) if rate == 0 else np.cumsum(rng.exponential(1 / rate, count))
    return [
        Job(float(when), rng.integers(0, 256, int(rng.integers(32, 513)), dtype=np.uint8).tobytes(), int(rng.integers(16, 129)))
        for when in at
    ]


def marlin_server(model: ByT5Model, limits: SchedulerLimits) -> Server:
    def serve(jobs: Sequence[Job]) -> Served:
        scheduler = AnsweringScheduler(model.network, limits)
        start, admitted = time.perf_counter(), 0
        latency, last, gaps = [0.0] * len(jobs), [0.0] * len(jobs), []
        answers: list[tuple[int, ...]] = [()] * len(jobs)
        while admitted < len(jobs) or scheduler.running or scheduler.waiting:
            now = time.perf_counter() - start
            while admitted < len(jobs) and jobs[admitted].at <= now:
                ids = jobs[admitted].ids
                scheduler.admit(AnswerRequest(jobs[admitted].data, AnswerLimits(ids, ids)))
                admitted += 1
            if not (scheduler.running or scheduler.waiting):
                time.sleep(jobs[admitted].at - now)
                continue
            news = scheduler.news()
            now = time.perf_counter() - start
            for new in news:
                if isinstance(new, Ended):
                    latency[new.stream], answers[new.stream] = now - jobs[new.stream].at, new.answers[0].ids
                    continue
                if last[new.stream]:
                    gaps.append(now - last[new.stream])
                last[new.stream] = now
        return Served(time.perf_counter() - start, latency, latency, gaps, answers)

    return serve


def ctranslate2_server(
    translator: ctranslate2.Translator, tokens: Callable[[bytes], list[str]], most: int, wait: float
) -> Server:
    def serve(jobs: Sequence[Job]) -> Served:
        sources = [tokens(job.data) for job in jobs]
        start, taken = time.perf_counter(), 0
        latency, by_id = [0.0] * len(jobs), [0.0] * len(jobs)
        while taken < len(jobs):
            _sleep_until(start + jobs[taken].at)
            # The timer runs from the first one on; what came during the last batch has waited already.
            end = max(time.perf_counter() - start, jobs[taken].at + wait)
            full = taken + most - 1
            _sleep_until(start + (min(end, max(jobs[full].at, 0.0)) if full < len(jobs) else end))
            now = time.perf_counter() - start
            batch = [index for index in range(taken, min(taken + most, len(jobs))) if jobs[index].at <= now]

            def stops(result: ctranslate2.GenerationStepResult, batch: list[int] = batch) -> bool:
                index = batch[result.batch_id]
                if result.step + 1 < jobs[index].ids:
                    return False
                by_id[index] = time.perf_counter() - start - jobs[index].at
                return True

            longest = max(jobs[index].ids for index in batch)
            found = translator.translate_batch(
                [sources[index] for index in batch], beam_size=1, max_decoding_length=longest, min_decoding_length=longest,
                callback=stops,
            )  # fmt: skip
            now = time.perf_counter() - start
            for index, each in zip(batch, found, strict=True):
                assert len(each.hypotheses[0]) == jobs[index].ids, "an answer of another length"
                latency[index] = now - jobs[index].at
            taken += len(batch)
        return Served(time.perf_counter() - start, latency, by_id)

    return serve


def _sleep_until(moment: float) -> None:
    if (left := moment - time.perf_counter()) > 0:
        time.sleep(left)


def alike(model: ByT5Model, jobs: Sequence[Job], served: Served, count: int) -> float:
    """Share of the ids of the first answers that are those of each input alone, up to where they part."""
    same = total = 0
    for job, ids in zip(jobs[:count], served.answers, strict=False):
        alone = model.answers([job.data], AnswerLimits(job.ids, job.ids))[0][0].ids
        parted = next((place for place, pair in enumerate(zip(ids, alone, strict=True)) if pair[0] != pair[1]), len(ids))
        same, total = same + parted, total + len(ids)
    assert not rows_are_exact() or same == total, "rows are exact, but an answer differs from that alone"
    return same / total


def rate_of(served: Sequence[Served]) -> float:
    return statistics.median(each.rate for each in served)


def latency_95_of(served: Sequence[Served]) -> float:
    return statistics.median(each.latency_95 for each in served)


def said(served: Sequence[Served]) -> str:
    """Medians of rounds."""
    by_id = statistics.median(float(np.percentile(each.by_id, 95)) for each in served)
    text = f"{rate_of(served):.2f} requests/s, 95 % within {latency_95_of(served):.2f} s"
    if served[0].by_id is not served[0].latency:
        text += f" (by id {by_id:.2f} s)"
    if served[0].gaps:
        gap, longest = (statistics.median(of(each.gaps) for each in served) for of in (statistics.median, max))
        text += f", gaps of {gap * 1000:.0f} ms, {longest * 1000:.0f} at most"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rates", default="0,0.7", help="shares of CTranslate2's requests a second; 0 is a backlog")
    parser.add_argument("--batches", default="4,8,16", help="CTranslate2's largest batches")
    parser.add_argument("--waits", default="0,20", help="milliseconds that it waits for more")
    parser.add_argument("--streams", type=int, default=32, help="marlin's places")
    parser.add_argument("--slice-rows", type=int, default=64, help="rows of an input that marlin reads between two steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", default="", help="weights of marlin to leave out, by name, with commas")
    parser.add_argument("--compare", type=int, default=4, help="answers that are compared with those alone")
    add_rows_option(parser)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_folder(folder)
        TransformersConverter(str(folder)).convert(str(folder / "ctranslate2"), quantization="int8", force=True)
        tokenizer = ByT5Tokenizer.from_pretrained(folder)
        translator = ctranslate2.Translator(
            str(folder / "ctranslate2"), device="cpu", compute_type="int8", inter_threads=1, intra_threads=thread_count()
        )
        plain = ByT5Model.from_pretrained(folder, device="cpu")
    makers: dict[str, Callable[[], ByT5Model]] = {
        "nvfp4 with 8-bit activations": lambda: packed(plain, "nvfp4", "int8", 8),
        "int8 with 8-bit activations": lambda: packed(plain, "int8", "int8", 8),
    }
    models = {label: make() for label, make in makers.items() if label not in arguments.skip.split(",")}
    limits = SchedulerLimits(arguments.streams, slice_rows=arguments.slice_rows)
    ours = {label: marlin_server(model, limits) for label, model in models.items()}
    theirs: dict[str, Server] = {
        f"batches of {most}, {wait} ms": ctranslate2_server(
            translator, lambda data: tokenizer.convert_ids_to_tokens([*(3 + byte for byte in data), 1]), most, wait / 1000
        )
        for most in map(int, arguments.batches.split(","))
        for wait in map(int, arguments.waits.split(","))
    }
    print(f"ctranslate2 {version('ctranslate2')}, {thread_count()} threads, kernels: {kernels()[1]}", flush=True)
    for serve in (*ours.values(), *theirs.values()):
        serve(jobs_of(2, 0, 99))
    most_rate = 0.0
    for share in map(float, arguments.rates.split(",")):
        if share and not most_rate:
            raise SystemExit("--rates: give 0 first, of which the others are shares")
        runs: dict[str, list[Served]] = {label: [] for label in (*ours, *theirs)}
        for number in range(arguments.rounds):
            jobs = jobs_of(arguments.requests, share * most_rate, number)
            for label, serve in {**ours, **theirs}.items():
                runs[label].append(serve(jobs))
                print(f"round {number + 1}, {label}: {said(runs[label][-1:])}", flush=True)
        best = {
            "rate": max((runs[label] for label in theirs), key=lambda its: statistics.median(each.rate for each in its)),
            "latency": min(
                (runs[label] for label in theirs), key=lambda its: statistics.median(each.latency_95 for each in its)
            ),
        }
        for label in theirs:
            print(f"CTranslate2, {label}: {said(runs[label])}", flush=True)
        if share == 0:
            most_rate = rate_of(best["rate"])
        arriving = "a backlog" if share == 0 else f"{share * most_rate:.2f} requests/s arriving"
        for label in ours:
            faster = rate_of(runs[label]) / rate_of(best["rate"])
            later = latency_95_of(runs[label]) / latency_95_of(best["latency"])
            shared = alike(models[label], jobs, runs[label][-1], arguments.compare)
            report(
                Row(
                    f"ByT5 (byt5-small's shape), {label}, {arguments.requests} requests of 32-512 bytes in, 16-128 ids out,"
                    f" {arriving}, {thread_count()} threads",
                    said(runs[label]),
                    f"CTranslate2 int8 at its best {said(best['rate'])}; for latency {said(best['latency'])}",
                    f"{faster:.2f}x requests/s, {later:.2f}x of its 95 % latency",
                    f"{shared:.0%} of the ids as alone, up to where they part",
                ),
                arguments.rows_file,
            )


if __name__ == "__main__":
    main()
