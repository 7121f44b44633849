"""The tables of quality, of one model: scores by domain, by class of bytes and by position in the patch."""

from collections.abc import Sequence

from marlin_cli.bench.result import QualitySettings
from marlin_cli.quality.estimates import Estimate
from marlin_cli.quality.quality import Comparison, Quality, Score
from marlin_cli.reports.forms import Table
from marlin_cli.reports.measurements import groups_of, scores_of


def quality_tables(name: str, quality: Quality, settings: QualitySettings, *, details: bool = True) -> list[Table]:
    """The scores of the domains, and with details those of classes and positions where there are any.

    What is compared with a reference has a table of its own, as one row of all is wider than a terminal. A model is not
    compared with itself.
    """
    beside = None if settings.reference == name else settings.reference
    windows = f"total bits over total bytes, {_windows(settings)}, s.e. over windows"
    title = f"Quality of {name} on {', '.join(settings.corpora)}\n{windows}"
    tables = _tables(title, name, "domain", scores_of(quality), beside, details=details)
    if quality.pages_read:
        rows = [
            [str(layer), f"{there:,}", f"{read:,}", f"{100 * read / max(1, there):.2f} %"]
            for layer, (read, there) in enumerate(quality.pages_read)
        ]
        title = f"Pages of the cache that {name} read, by row and head"
        tables.append(Table(title, ["global layer", "pages", "read", "share"], rows))
    if details and (groups := groups_of(quality)):
        by = "by kind of byte and by position in the patch" if quality.patch_positions else "by kind of byte"
        title = f"Quality of {name} {by}, all domains as one sample"
        tables += _tables(title, name, "bytes that are", groups, beside, details=True)
    return tables


def _windows(settings: QualitySettings) -> str:
    windowing = settings.windowing
    if settings.window is not None:
        window = settings.window
        view = "the context read again from its last half on" if window.bytes is None else f"{window.bytes:,} bytes in view"
        return f"each file a stream, {view}, in pieces of {windowing.window_bytes:,}"
    if windowing.stride == windowing.window_bytes:
        return f"disjoint windows of {windowing.window_bytes:,} bytes"
    return f"windows of {windowing.window_bytes:,} bytes every {windowing.stride:,}, each byte scored once"


def _tables(
    title: str, name: str, first: str, scores: Sequence[tuple[str, Score]], reference: str | None, *, details: bool
) -> list[Table]:
    """The scores, and what they are beside a reference; with details what single bytes are beside it too."""
    rows = [
        [part, f"{score.bytes:,}", f"{score.windows:,}", *_with_error(score.bits_per_byte, ".5f")] for part, score in scores
    ]
    tables = [Table(title, [first, "bytes", "windows", "bits/byte", "s.e."], rows)]
    compared = [(part, score.against_reference) for part, score in scores if score.against_reference is not None]
    if reference is None or not compared:
        return tables
    tables.append(
        Table(
            f"{name} beside {reference}: difference of bits/byte; KL(reference || model) in bits/byte;"
            "\nshare of bytes with the same likeliest one",
            [first, "difference", "s.e.", "KL", "s.e.", "top-1"],
            [[part, *_beside(result)] for part, result in compared],
        )
    )
    if details:
        tables.append(
            Table(
                f"KL of single bytes of {name} beside {reference}, in bits",
                [first, "median", "99 %", "max"],
                [[part, *_of_single_bytes(result)] for part, result in compared],
            )
        )
    return tables


def _beside(result: Comparison) -> list[str]:
    return [
        *_with_error(result.bits_per_byte_difference, "+.5f"),
        *_with_error(result.kl_bits_per_byte, ".3g"),
        f"{100 * result.top1_agreement.value:.2f} %",
    ]


def _of_single_bytes(result: Comparison) -> list[str]:
    return [f"{bits:.3g}" for bits in (result.kl_median_bits, result.kl_percentile_99_bits, result.kl_maximum_bits)]


def _with_error(estimate: Estimate, form: str) -> list[str]:
    error = estimate.standard_error
    return [format(estimate.value, form), "" if error is None else format(error, form.removeprefix("+"))]
