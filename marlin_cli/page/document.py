"""A page as one HTML document that needs nothing else: no network, no scripts, light and dark, narrow and wide."""

import json
from collections.abc import Sequence
from typing import Any

from marlin_cli.page.blocks import Block, Grid, Section, Text
from marlin_cli.page.svg import clean, draw

# Nothing on a page may run or be fetched, whatever a name smuggles in.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

# Colours of series, dark enough for white and light enough for black.
LIGHT = ("#2b66c4", "#c9600a", "#1b8563", "#a83e83", "#7a6c12", "#5a54c9", "#b5373c", "#3b7f8c")
DARK = ("#7aa8f0", "#f0a04b", "#5cc9a4", "#e08cc2", "#cdbf5a", "#aaa4f5", "#ef8a8d", "#7fc4d1")

STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c2024;--faint:#626a73;--rule:#dde1e6;--band:#f4f6f8;LIGHT}
@media(prefers-color-scheme:dark){:root{--page:#15181b;--ink:#e6e9ec;--faint:#9aa3ad;--rule:#343a41;--band:#1e2327;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem 1rem 3rem;max-width:68rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.4rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--rule)}
p{margin:.5rem 0;max-width:46rem;overflow-wrap:anywhere}
.about{color:var(--faint)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.6rem 2rem;margin:1rem 0;
align-items:start}
figure{margin:0;max-width:36rem}
figcaption,caption{font-weight:600;font-size:.95rem;text-align:left;margin-bottom:.4rem;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto;overflow:visible;font-size:12px}
svg text{fill:var(--ink)}
svg .small{font-size:11px}
svg .faint{fill:var(--faint);font-size:11px}
.axis{stroke:var(--faint)}
.grid{stroke:var(--rule)}
polyline{fill:none;stroke-width:2}
.wide{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600}
tbody th{font-weight:400}
th:first-child{text-align:left;padding-left:0;white-space:normal;overflow-wrap:anywhere;min-width:9rem;max-width:24rem}
tbody tr:nth-child(even){background:var(--band)}
""".strip()


def render(title: str, about: str, sections: Sequence[Section], data: Any) -> str:
    """The page as HTML.

    Args:
        about: a line under the title.
        data: the numbers for programs: plain values, as a JSON document in the element `data`.

    Raises:
        ValueError: `data` holds NaN or infinity, which JSON does not have.
    """
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{clean(POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{clean(title)}</title>",
        f"<style>{_style()}</style>",
        "</head>",
        "<body>",
        f"<h1>{clean(title)}</h1>",
        f'<p class="about">{clean(about)}</p>',
        *(_section(section) for section in sections),
        f'<script type="application/json" id="data">{_embedded(data)}</script>',
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _embedded(data: Any) -> str:
    """JSON that cannot end the element it stands in: every character that HTML gives a meaning is written as its code."""
    text = json.dumps(data, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _style() -> str:
    def variables(colours: Sequence[str]) -> str:
        return ";".join(f"--c{index}:{colour}" for index, colour in enumerate(colours))

    classes = "\n".join(
        f".c{index}{{fill:var(--c{index})}} .l{index}{{stroke:var(--c{index});stroke-width:1.6}}" for index in range(len(LIGHT))
    )
    return f"{STYLE.replace('LIGHT', variables(LIGHT)).replace('DARK', variables(DARK))}\n{classes}"


def _section(section: Section) -> str:
    """Its blocks in order; charts that follow each other share a grid."""
    parts = ["<section>", f"<h2>{clean(section.title)}</h2>"]
    charts: list[str] = []
    for block in section.blocks:
        if not isinstance(block, (Text, Grid)):
            charts.append(f"<figure><figcaption>{clean(block.title)}</figcaption>{draw(block)}</figure>")
            continue
        parts += _charts(charts)
        charts = []
        parts.append(_plain(block))
    return "\n".join([*parts, *_charts(charts), "</section>"])


def _charts(charts: Sequence[str]) -> list[str]:
    return [f'<div class="charts">{"".join(charts)}</div>'] if charts else []


def _plain(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{clean(block.text)}</p>"
    assert isinstance(block, Grid)
    head = "".join(f'<th scope="col">{clean(column)}</th>' for column in block.columns)
    rows = "".join(
        f'<tr><th scope="row">{clean(row[0])}</th>{"".join(f"<td>{clean(cell)}</td>" for cell in row[1:])}</tr>\n'
        for row in block.rows
    )
    caption = f"<caption>{clean(block.title)}</caption>" if block.title else ""
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>'
