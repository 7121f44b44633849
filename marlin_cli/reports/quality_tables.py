"""The tables of quality, of one model: scores by domain, by class of bytes and by position in the patch."""

from collections.abc import Sequence

from marlin_cli.bench.result import QualitySettings
from marlin_cli.quality.estimates import Estimate
from marlin_cli.quality.quality import Comparison, Quality, Score
from marlin_cli.reports.forms import Table
from marlin_cli.reports.measurements import groups_of, scores_of


def quality_tables(name: str, quality: Quality, settings: QualitySettings, *, details: bool = True) -> list[Table]:
    """The scores of the domains, and with details those of classes and positions where there are any."""
    tables = [_by_domain(name, quality, settings)]
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
        tables.append(_scores_table(title, "bytes that are", groups, beside=settings.reference not in (None, name)))
    return tables


def _by_domain(name: str, quality: Quality, settings: QualitySettings) -> Table:
    title = (
        f"Quality of {name} on {', '.join(settings.corpora)}\ntotal bits over total bytes, {_windows(settings)},"
        " s.e. over windows"
    )
    if settings.reference is not None and name != settings.reference:
        title += (
            f"\nagainst {settings.reference}: difference of bits/byte; KL(reference || model) in bits/byte,"
            "\nits mean, median, 99 % and maximum; share of bytes with the same likeliest one"
        )
    return _scores_table(title, "domain", scores_of(quality), beside=settings.reference not in (None, name))


def _windows(settings: QualitySettings) -> str:
    windowing = settings.windowing
    if settings.window is not None:
        window = settings.window
        view = "the context read again from its last half on" if window.bytes is None else f"{window.bytes:,} bytes in view"
        return f"each file a stream, {view}, in pieces of {windowing.window_bytes:,}"
    if windowing.stride == windowing.window_bytes:
        return f"disjoint windows of {windowing.window_bytes:,} bytes"
    return f"windows of {windowing.window_bytes:,} bytes every {windowing.stride:,}, each byte scored once"


def _scores_table(title: str, first: str, scores: Sequence[tuple[str, Score]], *, beside: bool) -> Table:
    """Args: beside: the columns of a comparison too; a model is not compared with itself."""
    columns = [first, "bytes", "windows", "bits/byte", "s.e."]
    if beside:
        columns += ["difference", "s.e.", "KL", "s.e.", "median", "99 %", "max", "top-1"]
    rows = []
    for name, score in scores:
        row = [name, f"{score.bytes:,}", f"{score.windows:,}", *_with_error(score.bits_per_byte, ".5f")]
        rows.append(row + (_beside(score.against_reference) if beside and score.against_reference is not None else []))
    return Table(title, columns, rows)


def _beside(result: Comparison) -> list[str]:
    return [
        *_with_error(result.bits_per_byte_difference, "+.5f"),
        *_with_error(result.kl_bits_per_byte, ".3g"),
        *(f"{bits:.3g}" for bits in (result.kl_median_bits, result.kl_percentile_99_bits, result.kl_maximum_bits)),
        f"{100 * result.top1_agreement.value:.2f} %",
    ]


def _with_error(estimate: Estimate, form: str) -> list[str]:
    error = estimate.standard_error
    return [format(estimate.value, form), "" if error is None else format(error, form.removeprefix("+"))]
