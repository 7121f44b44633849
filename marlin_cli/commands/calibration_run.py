"""What `marlin calibrate` does once its options are read: one library call, one rendering. Shows files without MLX."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from marlin_cli import console
from marlin_cli.errors import StatisticsError, UsageError
from marlin_cli.ranks import Ranks
from marlin_cli.statistics import Statistics, load_statistics, merge, save_statistics
from marlin_cli.statistics.show import domain_table, summarise, tables

if TYPE_CHECKING:
    from marlin_cli.checkpoints import ImportOptions


def run(
    ranks: Ranks,
    model: str,
    corpora: Sequence[str],
    output: Path,
    *,
    sequence_bytes: int,
    max_bytes: int | None,
    seed: int,
    shard: tuple[int, int],
    resume: bool,
    hessian: bool,
    options: "ImportOptions",
    device: str,
    json_output: bool,
) -> None:
    """Measure `corpora` in `model`, write the file, and say what was seen. Ranks share the work, and rank 0 reports."""
    import mlx.core as mx

    from marlin_cli.api import MegaByteModel
    from marlin_cli.checkpoints import fingerprint
    from marlin_cli.checkpoints.location import locate_model
    from marlin_cli.corpus import open_corpus
    from marlin_cli.statistics.collect import hessian_channels
    from marlin_cli.statistics.hessians import HessianAccumulator
    from marlin_cli.statistics.run import check_output, unfinished_path
    from marlin_cli.statistics.shared_run import calibrate_together, share_path

    check_output(output, resume=resume)
    location = locate_model(model)
    # Sums are taken in float32, also where the model would run in 16 bits.
    loaded = MegaByteModel.from_pretrained(location, device=device, dtype=mx.float32, options=options)
    fitting = _fitting_window(sequence_bytes, loaded.config.patch_size, loaded.config.max_bytes)
    corpus = open_corpus(corpora, sequence_bytes=fitting, seed=seed, max_bytes=max_bytes)
    total = corpus.total_bytes
    hessians = None
    if hessian:
        domains = len({source.domain for source in corpus.sources})
        hessians = HessianAccumulator(hessian_channels(loaded.network), domains, output.parent)
        where = "in files beside the output" if hessians.spilled else "in memory"
        console.note(f"Hessians of {domains} domain(s): {hessians.total_bytes / 2**20:,.0f} MiB, added up {where}")
    expected = None if total is None else total // (shard[1] * ranks.size)
    unfinished = unfinished_path(output if ranks.size == 1 else share_path(output, ranks.rank, ranks.size))
    with console.byte_progress("calibrating", expected) as progress:
        try:
            statistics = calibrate_together(
                ranks,
                loaded.network,
                corpus,
                output,
                model=fingerprint(location),
                shard=shard,
                resume=resume,
                hessians=hessians,
                on_bytes=progress.advance,
            )
        except KeyboardInterrupt:
            if unfinished.exists():
                console.note(f"interrupted; {unfinished} has what was measured: go on with --resume")
            raise
        finally:
            if hessians is not None:
                hessians.close()
    if statistics is not None:
        _report(statistics, output, json_output=json_output)


def merge_files(files: Sequence[Path], output: Path, *, json_output: bool) -> None:
    """Add up statistics of one model and write the sum."""
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
    for table in tables(summarise(statistics)):
        console.table(table.title, table.columns, table.rows, to_stdout=True)


def _fitting_window(wanted: int, patch_size: int, context_bytes: int) -> int:
    """The longest window of whole patches that `wanted` bytes and the model's context allow; says so if it differs."""
    fitting = min(wanted, context_bytes) // patch_size * patch_size
    if not fitting:
        raise UsageError(f"--seq-bytes {wanted} is less than a patch of the model ({patch_size} bytes)")
    if fitting != wanted:
        console.note(f"--seq-bytes {wanted} is cut to {fitting}: whole patches of {patch_size}, context {context_bytes}")
    return fitting


def _report(statistics: Statistics, output: Path, *, json_output: bool) -> None:
    if json_output:
        print(_document(statistics, output))
    table = domain_table(summarise(statistics))
    console.table(f"{output}: {table.title}", table.columns, table.rows)


def _document(statistics: Statistics, file: Path) -> str:
    return json.dumps({"file": str(file), **dataclasses.asdict(summarise(statistics))})
