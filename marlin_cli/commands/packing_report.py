"""What `marlin quantize --report` does after packing: measures what it cost, and writes the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marlin_cli import console
from marlin_cli.checkpoints import ImportOptions, read_checkpoint
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.models import Capability, Network, architecture_of, build
from marlin_cli.ops.device import choose_device
from marlin_cli.page import render, write_page
from marlin_cli.quality.held_out import Windowing, cut, files_by_domain
from marlin_cli.quality.packing_loss import DomainLoss, loss_by_domain, output_errors
from marlin_cli.quantization.layers import LayerReport
from marlin_cli.reports.packing_page import document_of, sections_of
from marlin_cli.statistics import Statistics
from marlin_cli.statistics.show import summarise
from marlin_cli.version import __version__

# The bytes on which both models are compared: at most so many of a recipe, and of a window.
RECIPE = "default"
COMPARED_BYTES, WINDOW_BYTES = 64 << 10, 2048


def write_report(
    page: Path,
    model: str,
    options: ImportOptions,
    target: Path,
    method: str,
    layers: Sequence[LayerReport],
    kept_bytes: Mapping[str, int],
    statistics: Statistics | None,
    domain_weights: Mapping[str, float] | None,
) -> None:
    """Compare the packed model in `target` with `model`, and write the page. Both are read into memory.

    Args:
        domain_weights: share of each domain of the statistics, where they were weighed otherwise than by bytes.

    Raises:
        OutputError: the page cannot be written.
    """
    original, packed = _network(model, options), _network(str(target), ImportOptions())
    losses = None
    if architecture_of(original).capability is Capability.CONTINUES:
        losses = _losses(original, packed)
    errors = None if statistics is None else output_errors(original, packed, layers, statistics)
    summary = None if statistics is None else summarise(statistics)
    document = document_of(model, str(target), method, layers, kept_bytes, summary, errors, losses, domain_weights)
    about = f"{model} packed into {target} by marlin {__version__}, method {method}"
    write_page(page, render(f"What packing cost {Path(model).name}", about, sections_of(document, summary), document))
    console.note(f"wrote {page}")


def _network(model: str, options: ImportOptions) -> Network:
    checkpoint = read_checkpoint(locate_model(model), options)
    dtype = choose_device("auto").dtype
    return build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where=model, dtype=dtype)


def _losses(original: Any, packed: Any) -> dict[str, DomainLoss]:
    windowing = Windowing(min(WINDOW_BYTES, original.config.max_bytes), max_bytes=COMPARED_BYTES)
    windows = cut(files_by_domain(RECIPE), windowing)
    total = sum(window.length for part in windows.values() for window in part)
    with console.byte_progress("comparing", total) as progress:
        return loss_by_domain(original, packed, windows, progress.advance)
