"""The files that `marlin bench` writes beside its result: a page (--report) and a picture (--plot)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlin_cli import console
from marlin_cli.page import render, write_page
from marlin_cli.page.figure import check_figure_path, write_figure
from marlin_cli.page.fitting import chosen
from marlin_cli.reports.page import charts_in, labels_of, sections_of
from marlin_cli.version import __version__
from marlin_cli.writing import check_output_file


@dataclass(frozen=True)
class Pictures:
    """Where the page and the picture go; None leaves one out."""

    page: Path | None
    figure: Path | None
    charts: Sequence[str] = ()  # words of titles: what the picture shall hold; none: everything

    @classmethod
    def checked(cls, page: str | None, figure: str | None, charts: Sequence[str] = ()) -> "Pictures":
        """The paths of the options, which are refused before anything is measured.

        Raises:
            OutputError: no folder to write in.
            UsageError: a picture of an unknown kind, or without matplotlib.
        """
        found = cls(None if page is None else Path(page), None if figure is None else Path(figure), tuple(charts))
        for path in (found.page, found.figure):
            if path is not None:
                check_output_file(path)
        if found.figure is not None:
            check_figure_path(found.figure)
        return found

    def write(self, document: Mapping[str, Any]) -> None:
        """Write the files of a result, given as its JSON document.

        Raises:
            OutputError: a file cannot be written.
        """
        if self.page is None and self.figure is None:
            return
        sections = sections_of(document)
        title = "marlin bench: " + ", ".join(labels_of(document.get("models", [])))
        if self.page is not None:
            write_page(self.page, render(title, _about(document), sections, document))
            console.note(f"wrote {self.page}")
        if self.figure is not None:
            charts = charts_in(sections)
            wanted = chosen(charts, self.charts)
            if charts and not wanted:  # what was measured is not lost for a word
                titles = ", ".join(chart.title for chart in charts)
                console.note(f"--chart {' '.join(self.charts)}: no chart is called so, all are drawn: {titles}")
            write_figure(self.figure, wanted or charts, title)
            console.note(f"wrote {self.figure}")


def _about(document: Mapping[str, Any]) -> str:
    machine = document.get("machine", {})
    return f"Measured by marlin {__version__} on {machine.get('device', 'an unknown device')}, {machine.get('device_name', '')}"
