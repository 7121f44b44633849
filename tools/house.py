"""The picture of the house: which room of `marlin_cli` imports from which, as docs/house.svg.

    python -m tools.house

Rows and columns are the rooms in the order of CONTRIBUTING.md; a dot is the larger the more files of the row's room import from
the column's. What stands in order has no dot on the right of the diagonal.
"""

import ast
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "marlin_cli"
PICTURE = ROOT / "docs/house.svg"

STEP, LEFT, TOP = 22, 150, 130  # pixels: between rooms, and beside the dots


def rooms() -> list[str]:
    """All rooms from left to right, as CONTRIBUTING.md draws them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The house\n")[2].partition("\n##")[0]
    order = " ".join(line.strip() for line in text.splitlines() if line.startswith("    "))
    return [room.strip() for step in order.split("->") for room in step.split(",")]


def imports() -> Counter[tuple[str, str]]:
    """How many files of a room import from another, by both."""
    found: Counter[tuple[str, str]] = Counter()
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.update((here, there) for there in set(_imported(path.read_text(encoding="utf-8"))) if there != here)
    return found


def _imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module] if module != PACKAGE.name else [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            first, _, rest = name.partition(".")
            if first == PACKAGE.name and rest:
                yield rest.partition(".")[0]


def picture() -> str:
    """The SVG."""
    order, found = rooms(), imports()
    side = STEP * len(order)
    width, height = LEFT + side + 70, TOP + side + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for place, room in enumerate(order):
        middle = TOP + STEP * place + STEP // 2
        column = LEFT + STEP * place + STEP // 2
        parts.append(
            f'<rect x="{LEFT + STEP * place}" y="{TOP + STEP * place}" width="{STEP}" height="{STEP}" fill="#dfe6ee"/>'
        )
        parts.append(f'<line x1="{LEFT}" y1="{middle}" x2="{LEFT + side}" y2="{middle}" stroke="#eeeeee"/>')
        parts.append(f'<line x1="{column}" y1="{TOP}" x2="{column}" y2="{TOP + side}" stroke="#eeeeee"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{middle + 4}" text-anchor="end">{room}</text>')
        parts.append(f'<text transform="translate({column + 4},{TOP - 8}) rotate(-60)">{room}</text>')
    for (row, column_room), count in sorted(found.items()):
        if row not in order or column_room not in order:
            continue
        x = LEFT + STEP * order.index(column_room) + STEP / 2
        y = TOP + STEP * order.index(row) + STEP / 2
        radius = min(STEP / 2 - 1, 2 + 1.3 * math.sqrt(count))
        colour = "#2f6f9f" if order.index(column_room) < order.index(row) else "#c0392b"
        said = f"{row} imports {column_room}: {count} files"
        parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:.1f}" fill="{colour}"><title>{said}</title></circle>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> int:
    """Write the picture."""
    PICTURE.write_text(picture(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
