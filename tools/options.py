"""Tables of options, from the code, between `<!-- options: COMMAND -->` and its end in README and docs.

python -m tools.options [--check]
"""

import functools
import sys
from enum import Enum
from pathlib import Path
from typing import Any, get_args

from typer.main import get_command

from marlin_cli.cli import app
from marlin_cli.commands.given import name_of
from marlin_cli.commands.uses import CONTINUING, MODELS, READS_BYTES, USES, Family, Use
from tools.marked import pages, rewrite

ROOT = Path(__file__).parents[1]

# Models of a family, as a table has room for.
MODELS_OF = {
    Family.CONTINUES: "MegaByte",
    Family.BYTEWISE: "ByGPT5 and the like",
    Family.ANSWERS: "ByT5, GBST",
    Family.ENCODER_ALONE: "a ByT5 encoder",
    Family.ENCODES: "CANINE, LA-CANINE",
}


@functools.cache
def commands() -> dict[str, Any]:
    """The subcommands by name."""
    group: Any = get_command(app)
    return dict(group.commands)


def options_of(command: str) -> set[str]:
    """All spellings of a command's options."""
    return {
        spelling for parameter in commands()[command].params for spelling in (*parameter.opts, *parameter.secondary_opts)
    } | {"-h", "--help"}


def table_of(command: str) -> str:
    """A command's arguments and options as Markdown."""
    rows = ["| option | what | for |", "|---|---|---|"]
    for parameter in commands()[command].params:
        rows.append(f"| {_spelled(parameter)} | {_what(parameter)} | {_for(command, name_of(parameter))} |")
    return "\n".join(rows)


def _spelled(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_cell(name_of(parameter))}`"
    names = ", ".join(f"`{name}`" for name in sorted(parameter.opts, key=len, reverse=True))
    return names if parameter.is_flag else f"{names} {_cell(parameter.metavar) if parameter.metavar else _kind(parameter)}"


# How values of a type are called in help texts.
KINDS: dict[Any, str] = {str: "TEXT", Path: "PATH", int: "INTEGER", float: "FLOAT"}


def _kind(parameter: Any) -> str:
    """What an option without a metavar takes."""
    kind = parameter.type_descriptor.annotation
    kind = next(iter(get_args(kind)), kind)
    return "\\|".join(each.value for each in kind) if issubclass(kind, Enum) else KINDS[kind]


def _what(parameter: Any) -> str:
    text = " ".join((getattr(parameter, "help", None) or "").split())
    default = parameter.default
    if getattr(parameter, "is_flag", False) or default in (None, "", ()) or callable(default):
        return _cell(text)
    shown = getattr(default, "value", default)
    return _cell(f"{text} Default: {shown:g}." if isinstance(shown, float) else f"{text} Default: {shown}.")


def _for(command: str, option: str) -> str:
    """Of which models an option is; nothing where it is of all that the command takes."""
    uses = USES[command]
    served = next((frozenset(uses[name]) for name in MODELS if name in uses), frozenset(Family))
    known = uses.get(option)
    if known is None or not (rest := served - frozenset(known)):
        said = ""
    elif served - rest == frozenset(CONTINUING) & served:
        said = "what continues bytes"
    elif served - rest == frozenset(READS_BYTES) & served:
        said = "all but CANINE"
    else:
        said = ", ".join(MODELS_OF[family] for family in Family if family in known and family in served)
    needs = next(iter(known.values()), Use()).needs if known else ()
    beside = " or ".join(f"`{each}`" for each in needs)
    return "; ".join(part for part in (said, f"beside {beside}" if beside else "") if part)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    """Write the tables, or with --check tell which pages are not as the code has them."""
    check = "--check" in sys.argv[1:]
    changed = [page for page in pages(ROOT) if rewrite(page, "options", table_of, check=check)]
    for page in changed:
        print(f"{page.relative_to(ROOT)}: {'not as the code has it; run make docs-options' if check else 'written'}")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
