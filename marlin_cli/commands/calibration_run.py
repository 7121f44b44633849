"""What `marlin calibrate` does once its options are read: one library call, one rendering. Shows files without MLX."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from marlin_cli import console
from marlin_cli.errors import OutputError, StatisticsError, UsageError
from marlin_cli.ranks import Ranks
from marlin_cli.statistics import Statistics, load_statistics, merge, save_statistics
from marlin_cli.statistics.show import domain_table, drawings, summarise, tables

if TYPE_CHECKING:
    from marlin_cli.checkpoints import ImportOptions
    from marlin_cli.models import Network
    from marlin_cli.statistics.run import Measurable

DEFAULT_CORPUS = "default"
PAIR_BYTES = 1024  # what ByT5 was pre-trained on
TEXT_BYTES = 2048  # what CANINE was pre-trained on, where characters have a byte


@dataclass(frozen=True)
class Input:
    """What is measured: corpora, or pairs for models that answer. None and empty are defaults."""

    corpora: tuple[str, ...]
    pairs: tuple[str, ...]
    sequence_bytes: int | None
    max_bytes: int | None
    seed: int
    noise_density: float | None  # of span corruption, as the next one
    span_bytes: float | None


def run(
    ranks: Ranks,
    model: str,
    wanted: Input,
    output: Path,
    *,
    shard: tuple[int, int],
    resume: bool,
    overwrite: bool,
    hessian: bool,
    options: "ImportOptions",
    device: str,
    json_output: bool,
) -> None:
    """Measure a corpus or pairs in `model`, write the file, and say what was seen. Ranks share it, and rank 0 reports."""
    import mlx.core as mx

    from marlin_cli.api import load
    from marlin_cli.checkpoints import fingerprint
    from marlin_cli.checkpoints.location import locate_model
    from marlin_cli.corpus import TextCorpus
    from marlin_cli.engine.disk_layers import DiskLinear
    from marlin_cli.models import Capability, architecture_of
    from marlin_cli.statistics.collect import hessian_channels
    from marlin_cli.statistics.hessians import HessianAccumulator
    from marlin_cli.statistics.run import check_output, unfinished_path
    from marlin_cli.statistics.shared_run import calibrate_together, share_path

    check_output(output, resume=resume, overwrite=overwrite)
    location = locate_model(model)
    # Sums are taken in float32, also where the model would run in 16 bits.
    network = load(location, device=device, dtype=mx.float32, options=options, streams=True).network
    if any(isinstance(module, DiskLinear) for module in network.modules()):
        console.note("memory is short of the model: each layer is read from its file when it is used, once a window")
    corpora = {Capability.CONTINUES: _windows, Capability.ANSWERS: _examples, Capability.ENCODES: _texts}
    corpus = corpora[architecture_of(network).capability](wanted, network)
    total = corpus.total_bytes
    hessians = None
    if hessian:
        domains = len(corpus.domains)
        hessians = HessianAccumulator(hessian_channels(network), domains, output.parent)
        where = "in files beside the output" if hessians.spilled else "in memory"
        console.note(f"Hessians of {domains} domain(s): {hessians.total_bytes / 2**20:,.0f} MiB, added up {where}")
    expected = None if total is None else total // (shard[1] * ranks.size)
    unfinished = unfinished_path(output if ranks.size == 1 else share_path(output, ranks.rank, ranks.size))
    with console.byte_progress("calibrating", expected) as progress:
        try:
            statistics = calibrate_together(
                ranks,
                network,
                corpus,
                output,
                model=fingerprint(location, options),
                shard=shard,
                resume=resume,
                hessians=hessians,
                on_bytes=progress.advance,
            )
        except KeyboardInterrupt:
            if unfinished.exists():
                console.note(f"interrupted; {unfinished} has what was measured: go on with --resume")
            elif ranks.size == 1:
                console.note("interrupted; nothing of this run is saved yet: begin again")
            raise
        finally:
            if hessians is not None:
                hessians.close()
    if statistics is not None:
        if isinstance(corpus, TextCorpus) and corpus.left_out:
            console.note(f"{corpus.left_out} window(s) of the corpus are left out: they are no UTF-8")
        _report(statistics, output, json_output=json_output)


def merge_files(files: Sequence[Path], output: Path, *, overwrite: bool, json_output: bool) -> None:
    """Add up statistics of one model and write the sum."""
    if output.is_file() and output.stat().st_size and not overwrite:
        raise OutputError(f"{output}: already exists; name another file or pass --overwrite")
    statistics = load_statistics(files[0])
    for file in files[1:]:
        other = load_statistics(file)
        try:
            statistics = merge(statistics, other)
        except StatisticsError as error:
            raise StatisticsError(f"{file}: {error}") from None
    save_statistics(output, statistics)
    _report(statistics, output, json_output=json_output)


def show_file(file: Path, *, json_output: bool) -> None:
    """Print what is in a file on stdout."""
    statistics = load_statistics(file)
    if json_output:
        print(_document(statistics, file))
        return
    summary = summarise(statistics)
    for table in [*tables(summary), *drawings(summary)]:
        console.table(table.title, table.columns, table.rows, to_stdout=True)


def _windows(wanted: Input, network: "Network") -> "Measurable":
    """Windows of whole patches, as long as asked for and as the context allows; says so if that differs."""
    from marlin_cli.corpus import default_sequence_bytes, open_corpus
    from marlin_cli.models import architecture_of

    architecture = architecture_of(network)
    unit, context = architecture.unit_bytes(network.config), architecture.most_bytes(network.config)
    corpora = wanted.corpora or (DEFAULT_CORPUS,)
    asked = default_sequence_bytes(corpora) if wanted.sequence_bytes is None else wanted.sequence_bytes
    fitting = min(asked, context) // unit * unit
    if not fitting:
        raise UsageError(f"--seq-bytes {asked} is less than a patch of the model ({unit} bytes)")
    if fitting != asked:
        whole = "" if unit == 1 else f"whole patches of {unit}, "
        console.note(f"--seq-bytes {asked} is cut to {fitting}: {whole}context {context}")
    return open_corpus(corpora, sequence_bytes=fitting, seed=wanted.seed, max_bytes=wanted.max_bytes)


def _examples(wanted: Input, network: "Network") -> "Measurable":
    """Pairs, or windows of corpora with spans taken out."""
    from marlin_cli.corpus import CorruptedCorpus, SpanCorruption, open_corpus, open_pairs

    asked = PAIR_BYTES if wanted.sequence_bytes is None else wanted.sequence_bytes
    fitting = _fitting(asked, network)
    settings = {"noise_density": wanted.noise_density, "mean_span_bytes": wanted.span_bytes}
    given = {name: value for name, value in settings.items() if value is not None}
    if not wanted.pairs:
        corpora = wanted.corpora or (DEFAULT_CORPUS,)
        corpus = open_corpus(corpora, sequence_bytes=fitting, seed=wanted.seed, max_bytes=wanted.max_bytes)
        return CorruptedCorpus(corpus, SpanCorruption(**given))
    pairs = open_pairs(wanted.pairs, sequence_bytes=fitting, seed=wanted.seed, max_bytes=wanted.max_bytes)
    if pairs.left_out:
        console.note(f"{pairs.left_out} pair(s) are left out: a side is longer than {fitting} bytes (--seq-bytes)")
    return pairs


def _texts(wanted: Input, network: "Network") -> "Measurable":
    """What of corpora is UTF-8, in windows cut between characters."""
    from marlin_cli.corpus import TextCorpus, open_corpus

    fitting = _fitting(TEXT_BYTES if wanted.sequence_bytes is None else wanted.sequence_bytes, network)
    corpora = wanted.corpora or (DEFAULT_CORPUS,)
    return TextCorpus(open_corpus(corpora, sequence_bytes=fitting, seed=wanted.seed, max_bytes=wanted.max_bytes))


def _fitting(asked: int, network: "Network") -> int:
    """Bytes of an input, at most as many as asked for; says so if the network takes fewer."""
    from marlin_cli.models import architecture_of

    fitting = min(asked, architecture_of(network).most_bytes(network.config))
    if fitting != asked:
        console.note(f"--seq-bytes {asked} is cut to {fitting}, the longest input of the model")
    return fitting


def _report(statistics: Statistics, output: Path, *, json_output: bool) -> None:
    if json_output:
        print(_document(statistics, output))
    table = domain_table(summarise(statistics))
    console.table(f"{output}: {table.title}", table.columns, table.rows)


def _document(statistics: Statistics, file: Path) -> str:
    return json.dumps({"file": str(file), **dataclasses.asdict(summarise(statistics))}, allow_nan=False)
