"""The house stands as CONTRIBUTING.md draws it: a room imports from its left alone, inside of functions too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "marlin_cli"


def drawn(text: str) -> list[list[str]]:
    """The rooms from left to right, those side by side together, of the indented lines after "## The house"."""
    lines = text.partition("## The house\n")[2].partition("\n##")[0].splitlines()
    order = " ".join(line.strip() for line in lines if line.startswith("    "))
    return [[room.strip() for room in step.split(",")] for step in order.split("->")]


def rooms_in(package: Path) -> list[str]:
    """The folders and single files of a package; what begins with an underscore opens or starts it and is no room."""
    names = (path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists())
    return sorted(name for name in names if not name.startswith("_"))


def room_of(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported_rooms(source: str) -> Iterator[tuple[int, str]]:
    """(line, room) of each import from the package, wherever in a file it stands; `__init__` for the package itself."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import by dots"
            names = [node.module or ""] if node.module != PACKAGE else [f"{PACKAGE}.{alias.name}" for alias in node.names]
        for name in names:
            first, _, rest = name.partition(".")
            if first == PACKAGE:
                yield node.lineno, rest.partition(".")[0] or "__init__"


def imports_from_the_right(package: Path, order: list[list[str]]) -> list[str]:
    """File, line and room of each import that runs back up the order."""
    place = {room: number for number, step in enumerate(order) for room in step}
    found = []
    for path in sorted(package.rglob("*.py")):
        here = room_of(path, package)
        for line, room in imported_rooms(path.read_text(encoding="utf-8")):
            # What is no room is the package itself, which waits for all of it.
            if here in place and here != room and not place.get(room, len(order)) < place[here]:
                found.append(f"{path.relative_to(package)}:{line} imports {room}")
    return found


ORDER = drawn((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_every_room_has_a_place():
    assert sorted(room for step in ORDER for room in step) == rooms_in(ROOT / PACKAGE)


def test_no_room_imports_from_its_right():
    assert imports_from_the_right(ROOT / PACKAGE, ORDER) == []


@pytest.mark.parametrize(
    "line, room",
    [
        ("from marlin_cli.bench.run import run", "bench"),
        ("from marlin_cli import bench", "bench"),
        ("import marlin_cli.bench.run", "bench"),
        ("def later():\n    from marlin_cli.bench import run", "bench"),
        ("from marlin_cli.quality import estimates", "quality"),
        ("from marlin_cli import __version__", "__version__"),
    ],
)
def test_an_import_from_the_right_or_from_beside_is_found(tmp_path, line, room):
    for name in ("errors", "quality", "prediction", "bench"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("from marlin_cli.errors import MarlinError\n" if name == "bench" else "")
    (tmp_path / "prediction" / "sizes.py").write_text(f"import numpy\n{line}\nfrom marlin_cli.prediction import costs\n")
    order = [["errors"], ["quality", "prediction"], ["bench"]]
    assert imports_from_the_right(tmp_path, order) == [f"prediction/sizes.py:{2 + line.count(chr(10))} imports {room}"]
