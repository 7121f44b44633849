"""Puts a table between its marks in a page of the documentation, or makes a file of it."""

from pathlib import Path


def publish(path: Path, name: str, text: str) -> None:
    """Write `text` between the lines `<!-- name: ... -->` and `<!-- end of name -->` of a file, or into a new one."""
    if not path.exists():
        path.write_text(text, encoding="utf-8")
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith(f"<!-- {name}:"))
    end = lines.index(f"<!-- end of {name} -->")
    lines[begin + 1 : end] = ["", *text.strip().splitlines(), ""]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
