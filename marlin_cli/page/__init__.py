"""Self-contained HTML pages of tables and charts: plain values in, one file out. Knows nothing of models."""

from pathlib import Path

from marlin_cli.page.blocks import Bars, Block, Chart, Grid, Histogram, Plot, Point, Section, Text
from marlin_cli.page.document import render
from marlin_cli.writing import writing

__all__ = [
    "Bars", "Block", "Chart", "Grid", "Histogram", "Plot", "Point", "Section", "Text",
    "render", "write_page",
]  # fmt: skip


def write_page(path: Path, page: str) -> None:
    """Write a rendered page, atomically.

    Raises:
        OutputError: see `writing.writing`.
    """
    with writing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
