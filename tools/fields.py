"""Tables of the fields of config.json, from the comments of the code, between `<!-- fields: CLASS -->` and its end."""

import ast
import sys
from pathlib import Path

from tools.marked import pages, rewrite

ROOT = Path(__file__).parents[1]

# Where the settings stand whose fields pages list.
SETTINGS = {
    "MegaByteConfig": "marlin_cli/models/megabyte_config.py",
    "ByT5Config": "marlin_cli/models/byt5_config.py",
    "QuantizationSettings": "marlin_cli/quantization/plan.py",
}


def table_of(name: str) -> str:
    """The fields of a dataclass as Markdown: name, default, and the comment beside it."""
    source = (ROOT / SETTINGS[name]).read_text(encoding="utf-8")
    lines = source.splitlines()
    found = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    rows = ["| field | default | what |", "|---|---|---|"]
    for node in found.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
            continue
        last = lines[(node.end_lineno or node.lineno) - 1]
        comment = last.partition("  # ")[2].replace("|", "\\|")
        if not comment and (kind := ast.unparse(node.annotation)).startswith("Literal"):
            comment = kind.removeprefix("Literal[").removesuffix("]").replace("'", "")
        default = ast.unparse(node.value)
        default = "" if default == "None" else "`{}`" if "field(" in default else f"`{default}`"
        rows.append(f"| `{node.target.id}` | {default} | {comment} |")
    return "\n".join(rows)


def main() -> int:
    """Write the tables, or with --check tell which pages are not as the code has them."""
    check = "--check" in sys.argv[1:]
    changed = [page for page in pages(ROOT) if rewrite(page, "fields", table_of, check=check)]
    for page in changed:
        print(f"{page.relative_to(ROOT)}: {'not as the code has it; run make docs-options' if check else 'written'}")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
