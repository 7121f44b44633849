"""Parts of a Markdown file between two comments, which scripts write anew; all else is left as it is."""

import re
from collections.abc import Callable
from pathlib import Path


def rewritten(text: str, kind: str, render: Callable[[str], str]) -> str:
    """The text, with what stands between `<!-- KIND: WHAT -->` and `<!-- end of KIND -->` replaced by `render(WHAT)`."""
    begin, end = rf"<!-- {kind}: (?P<what>[^\n]*?) -->\n", f"<!-- end of {kind} -->"
    pattern = re.compile(rf"{begin}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda found: f"<!-- {kind}: {found['what']} -->\n{render(found['what'])}\n{end}", text)


def rewrite(path: Path, kind: str, render: Callable[[str], str], *, check: bool) -> bool:
    """Rewrite a file; with `check` only say whether it would change."""
    before = path.read_text(encoding="utf-8")
    after = rewritten(before, kind, render)
    if after != before and not check:
        path.write_text(after, encoding="utf-8")
    return after != before


def pages(root: Path) -> list[Path]:
    """README and the pages of docs."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
