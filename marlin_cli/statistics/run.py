"""One pass over a corpus: windows, pairs or texts in, a statistics file out, and the way back into an interrupted pass."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from marlin_cli.corpus import Corpus, CorruptedCorpus, Example, PairCorpus, Text, TextCorpus, Window
from marlin_cli.errors import CorpusError, OutputError, StatisticsError
from marlin_cli.models import Capability, Network, architecture_of, shared_inputs
from marlin_cli.statistics.collect import measure, measure_pair, measure_text
from marlin_cli.statistics.data import Run, Statistics, Totals, pool
from marlin_cli.statistics.hessians import HessianAccumulator
from marlin_cli.statistics.store import holds_statistics, load_statistics, load_unfinished, save_statistics, save_unfinished
from marlin_cli.text import one_line, quoted
from marlin_cli.writing import check_output_parent, claimed

# What has been measured is saved when either is passed; a window more may be lost.
SAVE_EVERY_SECONDS = 10.0
SAVE_EVERY_BYTES = 256 << 10

# Hessians make large files: writing them may take at most one part in so many of the time.
SAVE_SHARE = 20

# Windows for networks that continue bytes, inputs with answers for those that answer, texts for those that encode them.
Measurable: TypeAlias = Corpus | PairCorpus | CorruptedCorpus | TextCorpus
Sample: TypeAlias = Window | Example | Text

SAMPLES: dict[Capability, tuple[type[Sample], str]] = {
    Capability.CONTINUES: (Window, "windows"),
    Capability.ANSWERS: (Example, "inputs with answers"),
    Capability.ENCODES: (Text, "texts"),
}


class NothingMeasured(StatisticsError):
    """The corpus, or the shard of it, has nothing that the model can read."""


def unfinished_path(output: Path) -> Path:
    """Where a run keeps what it has so far: beside the file that it will write."""
    return output.with_name(output.name + ".partial")


def check_output(output: Path, *, resume: bool, overwrite: bool = True) -> None:
    """Raise now what `calibrate` would raise after the model is read, and without `overwrite` for statistics that are there.

    Raises:
        OutputError: the output cannot be written or is a file of another kind, or an unfinished run is there and `resume`
            is off.
    """
    if output.is_dir():
        raise OutputError(f"{output}: is a folder; name a file to write")
    if output.is_file() and not holds_statistics(output):
        raise OutputError(f"{output}: is there and holds no statistics, which alone are replaced; name another file")
    if output.is_file() and output.stat().st_size and not (overwrite or resume):
        raise OutputError(f"{output}: already exists; name another file or pass --overwrite")
    check_output_parent(output)
    unfinished = unfinished_path(output)
    if unfinished.exists() and not resume:
        raise OutputError(f"{unfinished}: an unfinished run is there; go on with --resume, or remove it")


def calibrate(
    network: Network,
    corpus: Measurable,
    output: Path,
    *,
    model: str,
    shard: tuple[int, int] = (0, 1),
    resume: bool = False,
    hessians: HessianAccumulator | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Statistics:
    """Measure what `corpus` holds and write the statistics to `output`, in one step when all is done.

    Meanwhile they are saved beside it (`unfinished_path`) every few seconds, except those of stdin, which cannot be
    read again. A run that is interrupted and resumed, however often, writes the same file as one that is not.
    Memory: that of `measure` for one window, and three times the size of the statistics; the size of the corpus does
    not matter. The shipped demo on a CPU peaks at 570 MiB in windows of 16 KiB, and at 425 MiB in windows of 2 KiB.

    Args:
        network: in float32.
        corpus: what the network's capability takes: windows of bytes; pairs, or a corrupted corpus; or texts.
        model: fingerprint of the model.
        shard: (index, count): measure the windows whose number leaves `index` when divided by `count`. The shards
            of a corpus can be measured anywhere and merged.
        resume: go on with the unfinished run, if there is one.
        hessians: also add up x^T x of every input, here; the file is that much larger. It is saved less often, and an
            interrupt in the middle of a window goes back to the last save.
        on_bytes: called with the bytes of each window that is done, and first with those done before.

    Raises:
        OutputError: see `check_output`; or another process is at it.
        StatisticsError: the unfinished run is of another model, corpus or settings; or nothing could be measured.
        CorpusError: the corpus cannot be read.
        KeyboardInterrupt: after saving what there is.
    """
    check_output(output, resume=resume)
    with claimed(output):
        return _calibrated(
            network, corpus, output, model=model, shard=shard, resume=resume, hessians=hessians, on_bytes=on_bytes
        )


def _calibrated(
    network: Network,
    corpus: Measurable,
    output: Path,
    *,
    model: str,
    shard: tuple[int, int],
    resume: bool,
    hessians: HessianAccumulator | None,
    on_bytes: Callable[[int], None],
) -> Statistics:
    """`calibrate`, by the only process that does it."""
    run = Run(corpus.fingerprint(), corpus.sequence_bytes, corpus.seed, corpus.max_bytes, *shard)
    unfinished = unfinished_path(output)
    # One value, replaced in one step: an interrupt never finds sums of one window and the state of another.
    done: tuple[Statistics, dict[str, Any]] | None = None
    if resume and unfinished.exists():
        done = load_unfinished(unfinished)
        _check_same_run(unfinished, done[0], model, run)
        _check_hessians(unfinished, done[0], hessians)
        if done[0].layers != shared_inputs(network):
            raise StatisticsError(f"{unfinished}: is of other layers than the model's; it is damaged, remove it")
        if hessians is not None:
            hessians.restore(done[0].hessians)
        _resume(corpus, unfinished, done[1])
        on_bytes(done[0].total_bytes)
    elif resume and output.exists():
        finished = load_statistics(output)
        _check_same_run(output, finished, model, run)
        _check_hessians(output, finished, hessians)
        on_bytes(finished.total_bytes)
        return finished
    layers = shared_inputs(network)
    saved_at, unsaved_bytes, saving_took = time.monotonic(), 0, 0.0
    try:
        for window in corpus:
            if window.index % run.shard_count != run.shard_index or _too_short(network, window):
                continue
            if hessians is not None:
                hessians.begin()
            totals = _measured(network, window, hessians)
            count = sum(totals.domains.values())
            if done is not None:
                totals = _pooled(unfinished, done[0].totals, totals)
            sums = {} if hessians is None else hessians.sums
            done = Statistics(model, layers, (run,), totals, sums), corpus.state() if corpus.resumable else {}
            if hessians is not None:
                hessians.commit()
            unsaved_bytes += count
            since = time.monotonic() - saved_at
            due = unsaved_bytes >= SAVE_EVERY_BYTES or since >= SAVE_EVERY_SECONDS
            if corpus.resumable and due and since >= SAVE_SHARE * saving_took:
                started = time.monotonic()
                save_unfinished(unfinished, *done)
                saved_at, unsaved_bytes = time.monotonic(), 0
                saving_took = 0.0 if hessians is None else saved_at - started
            on_bytes(count)
        if done is None:
            raise _nothing(network, corpus, run)
        save_statistics(output, done[0])
    except KeyboardInterrupt:
        if done is not None and corpus.resumable and (hessians is None or hessians.consistent):
            save_unfinished(unfinished, *done)
        raise
    unfinished.unlink(missing_ok=True)
    return done[0]


def _nothing(network: Network, corpus: Measurable, run: Run) -> NothingMeasured:
    unit = architecture_of(network).unit_bytes(network.config)
    texts = f"text (UTF-8) of {unit} characters"
    what = f"window of {unit} bytes (a patch)" if isinstance(corpus, Corpus) else "example"
    what = texts if isinstance(corpus, TextCorpus) else what
    shard = f" for shard {run.shard_index}/{run.shard_count}" if run.shard_count > 1 else ""
    return NothingMeasured(f"nothing to measure: the corpus has no {what}{shard}")


def _pooled(unfinished: Path, before: Totals, totals: Totals) -> Totals:
    """Both together; only what came out of a file can be of other layers."""
    try:
        return pool(before, totals)
    except StatisticsError as error:
        raise StatisticsError(f"{unfinished}: {error}") from None


def _resume(corpus: Measurable, unfinished: Path, state: dict[str, Any]) -> None:
    """Take the corpus to where an unfinished run left it.

    Raises:
        StatisticsError: the state is none of a corpus.
    """
    try:
        corpus.resume(state)
    except CorpusError as error:
        raise StatisticsError(f"{unfinished}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise StatisticsError(f"{unfinished}: where the corpus was left is damaged ({one_line(error)}); remove it") from None


def _too_short(network: Network, window: Sample) -> bool:
    """Is there less than what the network reads at a time?"""
    unit = architecture_of(network).unit_bytes(network.config)
    if isinstance(window, Text):
        return len(window.data.decode()) < unit
    return isinstance(window, Window) and len(window.bytes) < unit


def _measured(network: Network, window: Sample, hessians: HessianAccumulator | None) -> Totals:
    kind, wanted = SAMPLES[architecture_of(network).capability]
    if not isinstance(window, kind):
        raise TypeError(f"this network is measured on {wanted}, found a {type(window).__name__}")
    if isinstance(window, Text):
        return measure_text(network, window.domain, window.data, hessians)
    if isinstance(window, Example):
        return measure_pair(network, window.domain, window.source, window.target, window.size_bytes, hessians)
    return measure(network, window.domain, window.bytes, hessians)


def _check_hessians(path: Path, found: Statistics, wanted: HessianAccumulator | None) -> None:
    if bool(found.hessians) != (wanted is not None):
        there, option = ("with", "without --hessian") if found.hessians else ("without", "with --hessian")
        raise StatisticsError(f"{path}: the run there is {there} Hessians, this one {option}; use its options")


def _check_same_run(path: Path, found: Statistics, model: str, run: Run) -> None:
    """Refuse to go on with another run, naming what differs."""
    if found.model != model:
        raise StatisticsError(f"{path}: of another model; name another output, or remove it")
    if len(found.runs) != 1:
        raise StatisticsError(f"{path}: merged from {len(found.runs)} runs, which cannot go on; name another output")
    before, now = asdict(found.runs[0]), asdict(run)
    # The fingerprint of the corpus changes with the settings too, which say more: it comes last.
    for key in sorted(now, key="corpus".__eq__):
        if before[key] != now[key]:
            what = "another corpus" if key == "corpus" else f"{key} {quoted(before[key])}, not {now[key]}"
            raise StatisticsError(f"{path}: the run there is of {what}; use its options, or name another output")
