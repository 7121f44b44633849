"""One pass over a corpus by several ranks: each measures its share, and rank 0 adds the shares up."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from marlin_cli.errors import CorpusError, OutputError, StatisticsError
from marlin_cli.models import Network
from marlin_cli.ranks import Ranks
from marlin_cli.statistics.data import Run, Statistics, merge
from marlin_cli.statistics.hessians import HessianAccumulator
from marlin_cli.statistics.run import Measurable, NothingMeasured, calibrate, unfinished_path
from marlin_cli.statistics.store import load_statistics, save_statistics


def share_path(output: Path, rank: int, size: int) -> Path:
    """Where a rank keeps its share until rank 0 has written them all: beside the output, on the rank's own machine."""
    return output.with_name(f"{output.stem}.rank-{rank}-of-{size}{output.suffix}")


def calibrate_together(
    ranks: Ranks,
    network: Network,
    corpus: Measurable,
    output: Path,
    *,
    model: str,
    shard: tuple[int, int] = (0, 1),
    resume: bool = False,
    hessians: HessianAccumulator | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Statistics | None:
    """`calibrate` by all ranks: rank 0 writes `output` and returns the statistics, the others return None.

    Every rank saves its share as it goes (`share_path`), so that whatever ends the job, all that was measured is there
    for `resume`, with as many ranks again. Counts and maxima are bit for bit those of one process. So are sums of squares,
    unless a channel's windows differ by more than 2^29 / windows: they are float32 summed in float64, which is exact up
    to there, and else differs by about 1e-16 of a sum. Hessians are summed in float32: by about 1e-7.

    Raises:
        MarlinError: as `calibrate`; and ranks that were started with other models, corpora or settings.
        DistributedError: another rank ended; what this one has measured is saved.
        CorpusError: the corpus is read from stdin.
    """
    if ranks.size == 1:
        return calibrate(
            network, corpus, output,
            model=model, shard=shard, resume=resume, hessians=hessians, on_bytes=on_bytes,
        )  # fmt: skip
    if not corpus.resumable:
        raise CorpusError(f"stdin cannot be read by {ranks.size} ranks; write it to a file first")
    settings = json.dumps([*shard, resume, hessians is not None])
    ranks.check_alike(model=model, corpus=corpus.fingerprint(), settings=settings)
    if _finished_before(ranks, output, resume=resume):
        # Rank 0 checks that it is the same run, and reads it.
        if ranks.rank > 0:
            return None
        return calibrate(network, corpus, output, model=model, shard=shard, resume=True, hessians=hessians, on_bytes=on_bytes)
    share = share_path(output, ranks.rank, ranks.size)
    if share.exists() and not resume:
        raise OutputError(f"{share}: a share of an unfinished run is there; go on with --resume, or remove it")
    index, count = shard
    own: Path | None = share
    try:
        calibrate(
            network, corpus, share,
            model=model, shard=(index + count * ranks.rank, count * ranks.size), resume=resume, hessians=hessians,
            on_bytes=on_bytes,
        )  # fmt: skip
    except NothingMeasured:
        own = None  # fewer windows, or examples, than ranks
    run = Run(corpus.fingerprint(), corpus.sequence_bytes, corpus.seed, corpus.max_bytes, *shard)
    statistics = _added_up(ranks, own, output, run)
    ranks.gather(b"written")  # before that, a share may still be needed
    share.unlink(missing_ok=True)
    return statistics


def _finished_before(ranks: Ranks, output: Path, *, resume: bool) -> bool:
    """Has rank 0 the file that is asked for?"""
    there = resume and output.exists() and not unfinished_path(output).exists()
    return ranks.gather(str(there).encode())[0] == b"True"


def _added_up(ranks: Ranks, own: Path | None, output: Path, run: Run) -> Statistics | None:
    """The shares of all ranks as one file, at rank 0."""

    def arrived(rank: int) -> Path:
        return output.with_name(f".{share_path(output, rank, ranks.size).name}")

    try:
        files = ranks.collect(own, arrived)
        if ranks.rank > 0:
            return None
        paths = [own if rank == 0 else arrived(rank) for rank, there in enumerate(files) if there]
        shares = [load_statistics(path) for path in paths if path is not None]
        if not shares:
            raise StatisticsError("nothing to measure: no rank found anything of the model's size in the corpus")
        whole = shares[0]
        for share in shares[1:]:
            whole = merge(whole, share)
        # All shards of a run are that run.
        save_statistics(output, dataclasses.replace(whole, runs=(run,)))
    except OSError as error:
        raise OutputError(f"{output}: cannot bring the shares of the ranks together: {error.strerror or error}") from None
    finally:
        if ranks.rank == 0:
            for rank in range(1, ranks.size):
                arrived(rank).unlink(missing_ok=True)
    return load_statistics(output)
